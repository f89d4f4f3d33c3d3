"""A PEFT directory opened: one adapter chosen, every one of its tensors sorted by what it is."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from specstream_convert.adapter.peft_config import ADAPTER_CONFIG, PeftConfig, read_peft_config
from specstream_convert.adapter.peft_keys import Key, Kind, parse
from specstream_convert.changes.kinds import Lora
from specstream_convert.files.pickles import NO_PICKLES, Pickles
from specstream_convert.files.shards import ADAPTER, MODEL, PICKLED_ADAPTERS, PICKLED_MODEL, open_shards
from specstream_convert.files.stored import StoredTensor, Weights
from specstream_convert.report import TensorFate
from specstream_mlx.errors import InvalidInputError, UnsupportedError, UsageError
from specstream_mlx.formats.config import WEIGHTS_NAME, read_json
from specstream_mlx.formats.messages import escaped, listing, refuse

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ZERO_3 = "a known fault of saving under DeepSpeed ZeRO-3; save it again with transformers >= 5"
NEVER_SAVED = (
    "its initial weights were never saved and cannot be recovered; retrain with modules_to_save=['specstream'] and "
    "without target_modules that reach into it"
)
NO_TWO_PACKINGS = "LoRA on fused experts is packed in two incompatible ways and not supported"


@dataclass(frozen=True)
class Adapter:
    """What one PEFT adapter holds."""

    directory: Path
    config: PeftConfig
    weights: Weights
    loras: tuple[Lora, ...]
    streams: dict[str, StoredTensor]  # by their name below specstream.
    saved: dict[str, StoredTensor]  # whole tensors, trained ones and copies of the base's, by PEFT's name
    frozen: frozenset[str]  # those of ``saved`` that PEFT kept under a LoRA (``base_layer``)
    tokens: dict[str, StoredTensor]  # trained rows of an embedding or of the LM head, by PEFT's module path
    fates: tuple[TensorFate, ...]  # of tensors already disposed of
    notes: tuple[str, ...]


def read_renames(key_map: Path | None) -> dict[str, str]:
    """The user's own map from tensor names to the names this converter knows."""
    if key_map is None:
        return {}
    raw = read_json(key_map)
    if not all(isinstance(value, str) for value in raw.values()):
        raise InvalidInputError(f"{key_map}: every value must be a tensor name (a string)")
    return raw


def compile_ignored(pattern: str | None) -> re.Pattern[str] | None:
    """The user's ``--ignore-keys`` expression."""
    if pattern is None:
        return None
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--ignore-keys is not a regular expression: {error}") from error


def find_adapter(path: Path, adapter_name: str | None) -> Path:
    """The directory that holds ``adapter_config.json``: ``path`` itself or the chosen adapter's sub-directory."""
    if not path.exists():
        raise InvalidInputError(f"{path}: no such directory; --adapter-path is the directory that PEFT saved")
    if not path.is_dir():
        raise InvalidInputError(f"{path}: not a directory; --adapter-path is the directory that PEFT saved")
    try:
        named = sorted(sub for sub in path.iterdir() if sub.is_dir() and (sub / ADAPTER_CONFIG).is_file())
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror})") from error
    if (path / ADAPTER_CONFIG).exists() or not named:
        return path
    names = [sub.name for sub in named]
    if adapter_name is None and len(named) == 1:
        return named[0]
    if adapter_name is None:
        raise UsageError(f"{path}: holds several adapters; choose --adapter-name {'|'.join(map(escaped, names))}")
    for sub in named:
        if sub.name == adapter_name:
            return sub
    raise UsageError(f"{path}: no adapter {escaped(adapter_name)!r}; choose from {', '.join(map(escaped, names))}")


def open_adapter(
    directory: Path,
    adapter_name: str | None = None,
    renames: dict[str, str] | None = None,
    ignored: re.Pattern[str] | None = None,
    pickles: Pickles = NO_PICKLES,
) -> Adapter:
    """Open ``directory`` and sort its tensors.

    Raises:
        InvalidInputError: files missing or damaged, or tensors left over; all offenders are listed.
        UnsupportedError: tensors of PEFT features with no exact result here.
        UsageError: several adapters in one file and no ``adapter_name``.
    """
    config = read_peft_config(directory / ADAPTER_CONFIG)
    weights = _open_weights(directory, pickles)
    fates: list[TensorFate] = []
    keys: list[Key] = []
    for raw, tensor in weights.tensors.items():
        if ignored is not None and ignored.fullmatch(raw):
            fates.append(TensorFate(tensor.file.path.name, raw, "ignored by --ignore-keys"))
        else:
            parsed = parse((renames or {}).get(raw, raw))
            keys.append(Key(raw, parsed.kind, parsed.module, parsed.adapter, parsed.prefixed))
    keys, dropped = _choose_adapter(weights, keys, directory, adapter_name)
    fates += [_fate(weights, key, f"belongs to adapter {key.adapter}, not chosen") for key in dropped]
    _refuse(weights, keys)
    fates += [_fate(weights, key, "not used at inference, dropped") for key in keys if key.kind is Kind.VELORA]
    notes = []
    if any(key.prefixed for key in keys):
        notes.append(
            f"{weights.path.name}: a trainer's wrapper prefix (module., _orig_mod. or FSDP) was removed from names"
        )
    if not weights.files[0].data and (directory / "adapter_model.bin").exists():
        notes.append("adapter_model.bin was not opened; adapter_model.safetensors is used")
    streams = _unique(weights, [key for key in keys if key.kind is Kind.STREAM])
    untrained = [key for key in keys if key.kind is Kind.UNTRAINED]
    for key in untrained:
        fates.append(_fate(weights, key, "untrained copy, dropped"))
    if not streams and any(key.module.startswith(("specstream.", "model.specstream.")) for key in untrained):
        raise InvalidInputError(
            f"{weights.tensors[untrained[0].raw].place}: only the untrained original_module copies of the streams "
            "were saved; save with PEFT's save_pretrained"
        )
    whole, twice = _without_twins(weights, [key for key in keys if key.kind in (Kind.SAVED, Kind.BASE_COPY)])
    fates += twice
    return Adapter(
        directory=directory,
        config=config,
        weights=weights,
        loras=_loras(weights, keys, config),
        streams=streams,
        saved={key.module: weights.tensors[key.raw] for key in whole},
        frozen=frozenset(key.module for key in whole if key.kind is Kind.BASE_COPY),
        tokens=_unique(weights, [key for key in keys if key.kind is Kind.TOKENS]),
        fates=tuple(fates),
        notes=tuple(notes),
    )


def _open_weights(directory: Path, pickles: Pickles) -> Weights:
    """The adapter's file or shards; without one, a dump of the whole model with the adapter inside."""
    sets = [ADAPTER, *PICKLED_ADAPTERS, MODEL, PICKLED_MODEL]
    files = next((files for files in sets if any(map(Path.exists, files.present(directory)))), None)
    if files is None:
        path = directory / ADAPTER_WEIGHTS
        raise InvalidInputError(f"{path}: file not found; --adapter-path is the directory that PEFT saved")
    opened = open_shards(directory, files, pickles)
    path = opened[0].path if len(opened) == 1 else directory / files.index_name
    weights = Weights(path, opened)
    if not weights.tensors:
        raise InvalidInputError(f"{path}: the adapter has no tensors; {ZERO_3}")
    return weights


def _fate(weights: Weights, key: Key, fate: str) -> TensorFate:
    return TensorFate(weights.tensors[key.raw].file.path.name, key.raw, fate)


def _choose_adapter(
    weights: Weights, keys: list[Key], directory: Path, wanted: str | None
) -> tuple[list[Key], list[Key]]:
    names = sorted({key.adapter for key in keys if key.adapter is not None})
    if wanted is not None and names and wanted not in names:
        raise UsageError(
            f"{weights.path}: no adapter {escaped(wanted)!r}; choose from {', '.join(map(escaped, names))}"
        )
    if wanted is not None and not names and wanted not in ("default", directory.name):
        raise UsageError(
            f"{weights.path}: holds one unnamed adapter, not {escaped(wanted)!r}; leave out --adapter-name"
        )
    if len(names) > 1 and wanted is None:
        raise UsageError(
            f"{weights.path}: holds several adapters; choose --adapter-name {'|'.join(map(escaped, names))}"
        )
    if len(names) < 2:
        return keys, []
    return (
        [key for key in keys if key.adapter in (None, wanted)],
        [key for key in keys if key.adapter not in (None, wanted)],
    )


def _refuse(weights: Weights, keys: list[Key]) -> None:
    wrapped = [key for key in keys if key.kind is Kind.STREAM_WRAPPED]
    refuse(
        [f"{weights.tensors[key.raw].place}: PEFT put a LoRA around a stream module: {NEVER_SAVED}" for key in wrapped]
    )
    experts = [key for key in keys if key.kind is Kind.EXPERT_LORA]
    refuse([f"{weights.tensors[key.raw].place}: {NO_TWO_PACKINGS}" for key in experts], UnsupportedError)
    unknown = [key for key in keys if key.kind is Kind.OTHER]
    refuse(
        [
            f"{weights.tensors[key.raw].place}: not a tensor this converter knows; map it with --key-map or "
            "drop it with --ignore-keys"
            for key in unknown
        ]
    )


def _unique(weights: Weights, keys: Iterable[Key]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for key in keys:
        if key.module in found:
            raise InvalidInputError(
                f"{weights.tensors[key.raw].place}: means the same tensor as {escaped(found[key.module].raw)}; keep one"
            )
        found[key.module] = weights.tensors[key.raw]
    return found


def _without_twins(weights: Weights, keys: list[Key]) -> tuple[list[Key], list[TensorFate]]:
    """Keep one of several names of the same tensor, provided that they hold the same bits.

    After a resized vocabulary PEFT writes a module of modules_to_save under two names.
    """
    kept: dict[str, Key] = {}
    fates = []
    for key in keys:
        first = kept.setdefault(key.module, key)
        if first is key:
            continue
        one, other = weights.tensors[first.raw], weights.tensors[key.raw]
        if (one.dtype, one.shape) != (other.dtype, other.shape) or not bool(
            mx.array_equal(one.read(), other.read()).item()
        ):
            raise InvalidInputError(f"{other.place}: means the same tensor as {escaped(one.raw)}; keep one")
        fates.append(_fate(weights, key, f"equal to {escaped(first.raw)}, dropped"))
    return list(kept.values()), fates


def _loras(weights: Weights, keys: list[Key], config: PeftConfig) -> tuple[Lora, ...]:
    """LoRA modules in the order of their layers, complete and of shapes that fit each other."""
    magnitudes, biases = (
        _unique(weights, [key for key in keys if key.kind is kind]) for kind in (Kind.DORA, Kind.LORA_BIAS)
    )
    loras: dict[str, Lora] = {}
    problems: list[str] = []
    for kinds in ((Kind.LORA_A, Kind.LORA_B), (Kind.EMBEDDING_A, Kind.EMBEDDING_B)):
        embedding = Kind.EMBEDDING_A in kinds
        a, b = (_unique(weights, [key for key in keys if key.kind is kind]) for kind in kinds)
        problems += _side_problems(a, b)
        for module in set(a) & set(b):
            lora = Lora(
                module,
                a[module],
                b[module],
                config.scale_of(module),
                embedding,
                magnitudes.get(module),
                biases.get(module),
            )
            if loras.setdefault(module, lora) is not lora:
                problems.append(f"{a[module].place}: the module also has {escaped(loras[module].a.raw)}; keep one")
    if not problems:
        for lora in loras.values():
            problems += _lora_problems(lora, config)
        for extra in (magnitudes, biases):
            problems += [
                f"{extra[name].place}: the module has no lora_A and lora_B" for name in set(extra) - set(loras)
            ]
    if problems:
        raise InvalidInputError(listing(sorted(problems)))
    for lora in loras.values():
        for tensor in (lora.a, lora.b, lora.magnitude, lora.bias):
            if tensor is not None:
                tensor.require_float()
    return tuple(loras[module] for module in sorted(loras, key=_natural))


def _side_problems(a: dict[str, StoredTensor], b: dict[str, StoredTensor]) -> list[str]:
    problems = [f"{a[module].place}: has no matching lora_B; save the adapter again" for module in set(a) - set(b)]
    problems += [f"{b[module].place}: has no matching lora_A; save the adapter again" for module in set(b) - set(a)]
    for tensor in (*a.values(), *b.values()):
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            problems.append(f"{tensor.place}: shape {tensor.shape}, expected two dimensions; {ZERO_3}")
    return problems


def _lora_problems(lora: Lora, config: PeftConfig) -> list[str]:
    problems = []
    if lora.rank != lora.b.shape[1]:
        problems.append(
            f"{lora.a.place}: rank {lora.rank}, but lora_B has rank {lora.b.shape[1]}; save the adapter again"
        )
    wanted = (lora.b.shape[0],)
    for tensor, name, field, needed in (
        (lora.magnitude, "lora_magnitude_vector", "use_dora", config.use_dora),
        (lora.bias, "lora_B.bias", "lora_bias", config.lora_bias and not lora.embedding),
    ):
        if tensor is None and needed:
            problems.append(f"{lora.a.place}: has no matching {name}, although {field} of {ADAPTER_CONFIG} is true")
        elif tensor is not None and not needed:
            problems.append(f"{tensor.place}: {field} of {ADAPTER_CONFIG} is not true, so PEFT would not use it")
        elif tensor is not None and tensor.shape != wanted:
            problems.append(f"{tensor.place}: shape {tensor.shape}, expected {wanted}")
    return problems


def _natural(module: str) -> tuple[tuple[int, int, str], ...]:
    """Order ``layers.10`` after ``layers.9``."""
    return tuple(
        (0, int(part), "") if part.isdecimal() and len(part) < 9 else (1, 0, part) for part in module.split(".")
    )


def stream_file(path: Path) -> Path:
    """Form B: the stream file itself, or the one in a directory."""
    return path / WEIGHTS_NAME if path.is_dir() else path
