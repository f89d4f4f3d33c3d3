"""A PEFT directory opened: one adapter chosen, every one of its tensors sorted by what it is."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from specstream_convert.messages import escaped, listing
from specstream_convert.peft_config import ADAPTER_CONFIG, MERGE_IN_PEFT, PeftConfig, read_peft_config
from specstream_convert.peft_keys import Key, Kind, parse
from specstream_convert.pickles import NO_PICKLES, Pickles
from specstream_convert.report import TensorFate
from specstream_convert.shards import ADAPTER, MODEL, PICKLED_ADAPTERS, PICKLED_MODEL, open_shards
from specstream_convert.stored import StoredTensor, Weights
from specstream_mlx.config import WEIGHTS_NAME, read_json
from specstream_mlx.errors import InvalidInputError, UnsupportedError, UsageError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ZERO_3 = "a known fault of saving under DeepSpeed ZeRO-3; save it again with transformers >= 5"
NEVER_SAVED = (
    "its initial weights were never saved and cannot be recovered; retrain with modules_to_save=['specstream'] and "
    "without target_modules that reach into it"
)
_REFUSED = {
    Kind.LORA_BIAS: f"a bias of LoRA B is not supported; {MERGE_IN_PEFT}",
    Kind.EMBEDDING_LORA: f"LoRA on an embedding is not supported; {MERGE_IN_PEFT}",
    Kind.DORA: f"DoRA is not supported; {MERGE_IN_PEFT}",
    Kind.TOKENS: f"trained token rows are not supported; {MERGE_IN_PEFT}",
    Kind.EXPERT_LORA: "LoRA on fused experts is packed in two incompatible ways and not supported",
}


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one module by PEFT's path: ``A`` (r, in) and ``B`` (out, r)."""

    module: str
    a: StoredTensor
    b: StoredTensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight they change."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class Adapter:
    """What one PEFT adapter holds."""

    directory: Path
    config: PeftConfig
    weights: Weights
    pairs: tuple[LoraPair, ...]
    streams: dict[str, StoredTensor]  # by their name below specstream.
    saved: dict[str, StoredTensor]  # full tensors that may only be copies of the base's, by PEFT's name
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
    return Adapter(
        directory=directory,
        config=config,
        weights=weights,
        pairs=_pairs(weights, keys),
        streams=streams,
        saved=_unique(weights, [key for key in keys if key.kind in (Kind.SAVED, Kind.BASE_COPY)]),
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
    if wrapped:
        raise InvalidInputError(
            listing(
                f"{weights.tensors[key.raw].place}: PEFT put a LoRA around a stream module: {NEVER_SAVED}"
                for key in wrapped
            )
        )
    unsupported = [key for key in keys if key.kind in _REFUSED]
    if unsupported:
        raise UnsupportedError(
            listing(f"{weights.tensors[key.raw].place}: {_REFUSED[key.kind]}" for key in unsupported)
        )
    unknown = [key for key in keys if key.kind is Kind.OTHER]
    if unknown:
        raise InvalidInputError(
            listing(
                f"{weights.tensors[key.raw].place}: not a tensor this converter knows; map it with --key-map or "
                "drop it with --ignore-keys"
                for key in unknown
            )
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


def _pairs(weights: Weights, keys: list[Key]) -> tuple[LoraPair, ...]:
    a, b = (_unique(weights, [key for key in keys if key.kind is kind]) for kind in (Kind.LORA_A, Kind.LORA_B))
    problems = [f"{a[module].place}: has no matching lora_B" for module in sorted(set(a) - set(b))]
    problems += [f"{b[module].place}: has no matching lora_A" for module in sorted(set(b) - set(a))]
    for side in (a, b):
        for module in sorted(side):
            shape = side[module].shape
            if len(shape) != 2 or 0 in shape:
                problems.append(f"{side[module].place}: shape {shape}, expected two dimensions; {ZERO_3}")
    if problems:
        raise InvalidInputError(listing(problems))
    pairs = []
    for module in sorted(a, key=_natural):
        rank_a, rank_b = a[module].shape[0], b[module].shape[1]
        if rank_a != rank_b:
            problems.append(f"{a[module].place}: rank {rank_a}, but lora_B has rank {rank_b}")
        pairs.append(LoraPair(module, a[module], b[module]))
    if problems:
        raise InvalidInputError(listing(problems))
    for tensor in [*a.values(), *b.values()]:
        tensor.require_float()
    return tuple(pairs)


def _natural(module: str) -> tuple[tuple[int, int, str], ...]:
    """Order ``layers.10`` after ``layers.9``."""
    return tuple(
        (0, int(part), "") if part.isdecimal() and len(part) < 9 else (1, 0, part) for part in module.split(".")
    )


def stream_file(path: Path) -> Path:
    """Form B: the stream file itself, or the one in a directory."""
    return path / WEIGHTS_NAME if path.is_dir() else path
