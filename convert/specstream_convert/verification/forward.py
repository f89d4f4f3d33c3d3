"""Logits of a model that need not fit in memory: it is run one part at a time, each dropped after its use."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_attention_mask
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear
from mlx_lm.utils import load_adapters, load_model

from specstream_convert.base.model import Base, lazy_model
from specstream_convert.verification.comparison import Array, Comparison
from specstream_mlx.errors import VerificationError
from specstream_mlx.families import FAMILIES, family_of, model_classes
from specstream_mlx.formats.safetensors import row_blocks

WHOLE_MODEL_BYTES = 1 << 26  # in float32; a larger model is run part by part
ROWWISE = (nn.Embedding, nn.Linear, nn.QuantizedEmbedding, nn.QuantizedLinear)  # every parameter has a row per output


def output_logits(directory: Path, tokens: Array, *, live: bool, done: Callable[[str], None] | None = None) -> Array:
    """Logits (L, V) of the directory as mlx-lm opens it, computed in float32.

    ``done`` is told the path of every layer that has been run.
    """
    try:
        model, config = load_model(directory, lazy=True, get_model_classes=model_classes)
        if live:
            model = load_adapters(model, str(directory / "adapters"))
    except (ValueError, TypeError, KeyError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise VerificationError(f"the output is wrong: mlx-lm does not open it ({reason})") from error
    mx.eval(mx.random.state)  # as in lazy_model
    model.eval()
    if sum(value.size for _, value in tree_flatten(model.parameters())) * 4 <= WHOLE_MODEL_BYTES:
        model.set_dtype(mx.float32)
        return np.array(model(mx.array(tokens)[None])[0].astype(mx.float32))
    return _by_parts(model, config["model_type"], tokens, _Loaded(model, config["model_type"]), done)


def reference_logits(base: Base, comparison: Comparison, tokens: Array) -> Array:
    """Logits (L, V) of the reference in float32; every tensor of the output is compared with it on the way."""
    model = lazy_model(base.config)
    model.eval()
    return _by_parts(model, base.model_type, tokens, _Compared(model, base.model_type, comparison))


class _Parts(Protocol):
    """Fills the parts of a model with float32 parameters, each when its turn comes."""

    def embed(self, tokens: Array) -> Array:
        """Fill the embedding for ``tokens``; return the ids that stand for them in it."""

    def layer(self, path: str, layer: nn.Module) -> None:
        """Fill one layer."""

    def head(self) -> Iterator[None]:
        """Fill the LM head with rows from the first to the last, block by block."""


def _by_parts(
    model: nn.Module, model_type: str, tokens: Array, parts: _Parts, done: Callable[[str], None] | None = None
) -> Array:
    family = family_of(model, model_type)
    positions = np.arange(len(tokens), dtype=np.int32)
    hidden = family.embed(mx.array(parts.embed(tokens))[None], positions).astype(mx.float32)
    mx.eval(hidden)
    mask = create_attention_mask(hidden, None)
    for i in range(len(family.layers)):
        layer, path = family.layers[i], f"{family.LAYERS}.{i}"
        family.layers[i] = None
        parts.layer(path, layer)
        hidden = layer(hidden, mask, None)
        mx.eval(hidden)
        del layer
        mx.clear_cache()
        if done is not None:
            done(path)
    hidden = family.norm(hidden)
    return np.concatenate([np.array(family.head(hidden)[0]) for _ in parts.head()], axis=-1)


class _Loaded:
    """A model that mlx-lm has opened; its parameters are lazy and still in their files."""

    def __init__(self, model: nn.Module, model_type: str) -> None:
        family = FAMILIES[model_type]
        modules: dict[str, Any] = dict(model.named_modules())
        self._embedding = modules[family.EMBEDDING]
        self._head = modules.get(family.HEAD, self._embedding)
        self._held_by_head = self._head.parameters()
        values = dict(tree_flatten(self._held_by_head))
        self._shape_of_head = next(value.shape for name, value in values.items() if name.split(".")[-1] == "weight")
        for path, module in modules.items():
            apart = path in (family.EMBEDDING, family.HEAD) or path.startswith(f"{family.LAYERS}.")
            if not apart and not module.children():
                module.set_dtype(mx.float32)

    def embed(self, tokens: Array) -> Array:
        rows = _rows(self._embedding, self._embedding.parameters(), mx.array(tokens))
        if rows is None:
            self._embedding.set_dtype(mx.float32)
            return tokens
        mx.eval(rows)
        self._embedding.update(rows)
        self._embedding.set_dtype(mx.float32)
        return np.arange(len(tokens))

    def layer(self, path: str, layer: nn.Module) -> None:
        layer.set_dtype(mx.float32)

    def head(self) -> Iterator[None]:
        for block in row_blocks(self._shape_of_head):
            rows = _rows(self._head, self._held_by_head, block)
            if rows is not None:
                self._head.update(rows)
            self._head.set_dtype(mx.float32)
            yield
            if rows is None:
                return


def _rows(module: nn.Module, parameters: dict[str, Any], rows: slice | mx.array) -> dict[str, Any] | None:
    """The parameters that make the chosen rows of an embedding or an LM head, or None for an unknown kind of module."""
    if type(module) in ROWWISE:
        return {name: value[rows] for name, value in parameters.items()}
    if type(module) is LoRALinear and (plain := _rows(module.linear, parameters["linear"], rows)) is not None:
        return {"linear": plain, "lora_a": parameters["lora_a"], "lora_b": parameters["lora_b"][:, rows]}
    if type(module) is LoRAEmbedding and (plain := _rows(module.embedding, parameters["embedding"], rows)) is not None:
        return {"embedding": plain, "lora_a": parameters["lora_a"][rows], "lora_b": parameters["lora_b"]}
    return None


class _Compared:
    """mlx-lm's unquantised model, filled with the reference."""

    def __init__(self, model: nn.Module, model_type: str, comparison: Comparison) -> None:
        family = FAMILIES[model_type]
        self._comparison = comparison
        self._names = comparison.parameters()
        modules: dict[str, Any] = dict(model.named_modules())
        self._embedding = modules[family.EMBEDDING]
        self._head = modules.get(family.HEAD, self._embedding)
        self._embedding_name = f"{family.EMBEDDING}.weight"
        self._head_name = f"{family.HEAD}.weight" if family.HEAD in modules else self._embedding_name
        apart = (self._embedding_name, self._head_name)
        small = [name for name in self._names if name not in apart and not name.startswith(f"{family.LAYERS}.")]
        model.load_weights([(name, self._whole(name)) for name in small], strict=False)

    def _whole(self, name: str) -> mx.array:
        return mx.concatenate([value for _, value in self._comparison.blocks(name)])

    def embed(self, tokens: Array) -> Array:
        # The blocks of an embedding that is the head too are compared when they are the head.
        found: dict[int, mx.array] = {}
        for rows, value in self._comparison.blocks(self._embedding_name, compare=self._head is not self._embedding):
            found |= {int(token): value[token - rows.start] for token in tokens if rows.start <= token < rows.stop}
            mx.eval(list(found.values()))
        self._embedding.update({"weight": mx.stack([found[int(token)] for token in tokens])})
        return np.arange(len(tokens))

    def layer(self, path: str, layer: nn.Module) -> None:
        names = [name for name in self._names if name.startswith(f"{path}.")]
        layer.load_weights([(name.removeprefix(f"{path}."), self._whole(name)) for name in names])

    def head(self) -> Iterator[None]:
        others = {name: value for name, value in self._head.parameters().items() if name != "weight"}
        for rows, value in self._comparison.blocks(self._head_name):
            self._head.update({"weight": value} | {name: other[rows] for name, other in others.items()})
            yield
