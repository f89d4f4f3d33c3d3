"""Prompt caches as files, in mlx-lm's format: either program goes on from the other's.

mlx-lm's files name the model and say nothing else about it. Ours also hold the first tokens, whose rows are computed
again on loading: a cache of other weights, or of another adapter, has others.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import KVCache, QuantizedKVCache
from mlx_lm.models.cache import load_prompt_cache as load_stock
from mlx_lm.models.cache import save_prompt_cache as save_stock

from specstream_mlx.errors import InvalidInputError, UnsupportedError, UsageError
from specstream_mlx.formats.places import Repository, locate
from specstream_mlx.formats.safetensors import check_safetensors
from specstream_mlx.target.caches import SUPPORTED, LayerLayout, arrays_of, check_caches, layout, refusal

SUFFIX = ".safetensors"  # mlx tells formats apart by it
FIRST_TOKENS = "specstream_first_tokens"
REVISION = "specstream_revision"  # of the model's repository
_NUM_FIRST = 8
_TOLERANCE = 0.1  # of the rows' norm; 16-bit noise is far below, rows of other weights far above


def check_target(path: Path) -> None:
    """Make sure that a prompt cache may be written to ``path``.

    Raises:
        UsageError: no place for it, or a file that is something else.
    """
    if path.suffix != SUFFIX:
        raise UsageError(f"{path}: a prompt cache's name ends in {SUFFIX}; rename it")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: no directory {path.parent}; make it first")
    if path.exists():
        try:
            read_metadata(path)
        except (InvalidInputError, UnsupportedError):
            raise UsageError(f"{path}: exists and is no prompt cache; give another name") from None


def save_prompt_cache(path: Path, caches: Sequence[Any], tokens: Sequence[int], metadata: dict[str, str]) -> None:
    """Write ``caches`` at once or not at all.

    Args:
        tokens: what they begin with, as far as it was run in one pass: later rows may have seen quantised keys.
        path: an earlier prompt cache there is replaced.
        metadata: ``model`` and ``tokenizer_config`` (JSON) are what mlx-lm looks for.

    Raises:
        UsageError: it cannot be written there.
    """
    check_target(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{SUFFIX}")
    first = {FIRST_TOKENS: json.dumps(list(tokens[:_NUM_FIRST]))}
    try:
        save_stock(str(temporary), list(caches), metadata | first)
        check_safetensors(temporary)  # mlx does not notice a full disk
        temporary.replace(path)
    except (OSError, RuntimeError, InvalidInputError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UsageError(f"{path}: cannot be written ({reason}); free some space, or give another place") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_metadata(path: Path) -> dict[str, str]:
    """What a prompt cache says of itself.

    Raises:
        InvalidInputError: damaged, or no prompt cache of this mlx-lm's format.
        UnsupportedError: it holds caches that cannot take back rows.
    """
    if path.suffix != SUFFIX:
        raise InvalidInputError(f"{path}: a prompt cache's name ends in {SUFFIX}; give the file itself")
    check_safetensors(path)
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
        written: dict[str, str] = loaded[1]
        metadata, kinds, _ = tree_unflatten(list(written.items()))
        kinds = [str(kind) for kind in kinds]
        metadata = {str(name): str(value) for name, value in metadata.items()}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise _other_format(path) from error
    for index, kind in enumerate(kinds):
        if kind not in {supported.__name__ for supported in SUPPORTED}:
            raise UnsupportedError(f"{path}: cache of layer {index}: {refusal(kind)}")
    return metadata


def model_of(path: Path, model: str | None) -> str:
    """The model that a prompt cache was made with, or ``model`` when it names none.

    Raises:
        InvalidInputError: ``model`` is another one, or there is no name at all; and as ``read_metadata``.
    """
    made_with = read_metadata(path).get("model", model)
    if made_with is None:
        raise InvalidInputError(f"{path}: does not name its model; give the model too")
    if model is None or model == made_with:
        return made_with
    if model.partition("@")[0] == made_with and isinstance(locate(model), Repository):
        return model
    places = [Path(name).expanduser() for name in (model, made_with)]
    if all(place.is_dir() for place in places) and places[0].samefile(places[1]):
        return model
    raise InvalidInputError(f"{path}: made with model {made_with}, not {model}; leave the model out, or make it again")


def revision_of(path: Path, revision: str | None) -> str | None:
    """The revision of the repository that a prompt cache was made with, where none is given.

    Raises:
        InvalidInputError: ``revision`` is another one; and as ``read_metadata``.
    """
    made_with = read_metadata(path).get(REVISION)
    if revision is not None and made_with is not None and revision != made_with:
        raise InvalidInputError(
            f"{path}: made with revision {made_with}, not {revision}; leave the revision out, or make it again"
        )
    return revision or made_with


def load_prompt_cache(path: Path, model: Any) -> list[Any]:
    """Read the caches of ``model`` from a file that mlx-lm or we wrote.

    Raises:
        InvalidInputError: damaged, of another format, or of another model.
        UnsupportedError: caches that cannot take back rows.
    """
    metadata = read_metadata(path)
    try:
        caches: list[Any] = load_stock(str(path))
        problems = _problems(caches, layout(model))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise _other_format(path) from error
    if problems:
        raise InvalidInputError(f"{path}: {problems[0]}; it was made with another model")
    check_caches(caches)
    tokens = _first_tokens(metadata, model.vocab_size, caches[0].offset)
    if tokens is None:
        raise _other_format(path)
    if tokens and not _computes(model, tokens, caches):
        raise InvalidInputError(
            f"{path}: this model and adapter compute other keys and values for its first {len(tokens)} tokens; make "
            "the cache again with them"
        )
    return caches


def _other_format(path: Path) -> InvalidInputError:
    return InvalidInputError(f"{path}: not a prompt cache as this version of mlx-lm writes them; make it again")


def _problems(caches: Sequence[Any], layers: Sequence[LayerLayout]) -> list[str]:
    """What does not fit between caches read from a file and a model's layers."""
    if len(caches) != len(layers):
        return [f"caches of {len(caches)} layers, this model has {len(layers)}"]
    problems = []
    for index, (cache, layer) in enumerate(zip(caches, layers, strict=True)):
        arrays = arrays_of(cache)
        rows = {array.shape[2] for array in arrays}
        if len(arrays) != (2 if isinstance(cache, KVCache) else 6) or len(rows) != 1:
            raise ValueError("arrays are missing, or their rows do not agree")
        if not 0 < int(cache.offset) <= min(rows) or any(array.shape[0] != 1 for array in arrays):
            raise ValueError("no rows, more rows than there are, or a batch")
        keys, values = arrays[0], arrays[len(arrays) // 2]
        heads, sizes, dtype = (keys.shape[1], values.shape[1]), (keys.shape[3], values.shape[3]), keys.dtype
        if isinstance(cache, QuantizedKVCache):
            sizes = (sizes[0] * 32 // cache.bits, sizes[1] * 32 // cache.bits)
            dtype = arrays[1].dtype
        if (heads, sizes) != (layer.heads, layer.sizes):
            problems.append(
                f"layer {index} has heads {heads} of {sizes} numbers, this model {layer.heads} of {layer.sizes}"
            )
        elif dtype != layer.dtype:
            names = [str(found).rpartition(".")[2] for found in (dtype, layer.dtype)]
            problems.append(f"layer {index} is {names[0]}, this model makes {names[1]}")
    return problems


def _first_tokens(metadata: dict[str, str], vocab_size: int, num_rows: int) -> list[int] | None:
    """The first tokens that a file of ours names, none for a file of mlx-lm's; None when they cannot be right."""
    try:
        tokens = json.loads(metadata.get(FIRST_TOKENS, "[]"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
        return None
    right = len(tokens) <= num_rows and all(0 <= token < vocab_size for token in tokens)
    return tokens if right else None


def _computes(model: Any, tokens: list[int], caches: Sequence[Any]) -> bool:
    """Whether the model gives ``tokens`` the rows that ``caches`` begin with."""
    fresh = model.make_cache()
    model(mx.array([tokens]), cache=fresh)
    worst = mx.array(0.0)
    for cache, computed in zip(caches, fresh, strict=True):
        if isinstance(cache, QuantizedKVCache):
            computed = computed.to_quantized(cache.group_size, cache.bits)
        for read, own in zip(_rows(cache, len(tokens)), _rows(computed, len(tokens)), strict=True):
            worst = mx.maximum(worst, mx.linalg.norm(read - own) / mx.linalg.norm(own))
    return bool((worst < _TOLERANCE).item())


def _rows(cache: Any, count: int) -> list[mx.array]:
    """The first rows' keys and values as F32."""
    if not isinstance(cache, QuantizedKVCache):
        return [half[..., :count, :].astype(mx.float32).flatten() for half in (cache.keys, cache.values)]
    rows = []
    for half in (cache.keys, cache.values):
        data, scales, biases = (array[..., :count, :] for array in half)
        numbers = mx.dequantize(data, scales, biases, group_size=cache.group_size, bits=cache.bits)
        rows.append(numbers.astype(mx.float32).flatten())
    return rows
