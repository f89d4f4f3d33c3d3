"""What a checkpoint holds and what is wrong with it, told without its base.

LoRA factors, stream tensors and the norm that a fingerprint names are read, as the converter would read them; of a
model only the headers are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from specstream_convert.adapter.peft import ADAPTER_WEIGHTS, Adapter, open_adapter
from specstream_convert.adapter.peft_config import ADAPTER_CONFIG
from specstream_convert.adapter.peft_keys import parse
from specstream_convert.adapter.streams import (
    StreamSource,
    check_streams,
    from_stream_file,
    gather,
    join,
    read_stream_config,
)
from specstream_convert.base.model import open_base
from specstream_convert.changes.kinds import Lora
from specstream_convert.changes.lora import check_effect
from specstream_convert.checks import check_base_matches, lossless_problems
from specstream_convert.report import REPORT_NAME
from specstream_mlx.errors import InvalidInputError, SpecStreamError
from specstream_mlx.families import FAMILIES
from specstream_mlx.families.decoder import DecoderFamily
from specstream_mlx.formats.adapter_directory import LIVE_WEIGHTS
from specstream_mlx.formats.config import BASE_FIELDS, CONFIG_NAME, LORA_PREFIX, WEIGHTS_NAME, StreamConfig, read_json
from specstream_mlx.formats.live_lora import LiveAdapter, is_mlx_lm, lora_shapes, read_live_adapter
from specstream_mlx.formats.messages import escaped
from specstream_mlx.formats.safetensors import TensorFile, open_tensors

MEDUSA_HEADS = 4  # of the paper's comparison; used where no number of streams is known
TRAINER_FILES = ("trainer_state.json", "training_args.bin", "optimizer.pt")
NO_STREAMS = StreamSource({}, (), ())


@dataclass(frozen=True)
class Inspection:
    """The answer of ``inspect``. ``problems`` is empty when the checkpoint can be used as it is."""

    path: str
    kind: str  # peft adapter(s), stream file, specstream model, stream adapter, model, mlx-lm adapter, unknown
    base: dict[str, Any] | None = None
    mode: str | None = None
    gamma: int | None = None
    num_stream_layers: int | None = None
    streams: dict[str, Any] | None = None  # identity, initialisation, position and pruner, as configured
    lora: dict[str, Any] | None = None  # ranks, scales, number of modules
    num_stream_parameters: int | None = None
    num_medusa_parameters: int | None = None
    medusa_formula: str | None = None
    num_lora_parameters: int | None = None
    adapter_bytes: int | None = None  # of streams and LoRA as stored: what they take in memory over the base
    quantization: dict[str, Any] | None = None
    adapters: tuple[dict[str, Any], ...] = ()  # where there are several: the facts of each
    files: dict[str, int] | None = None  # name -> bytes
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, in reading order."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: _finite(value) for name, value in values.items()}


def _finite(value: Any) -> Any:
    """``value`` as JSON can hold it: a number read from ``1e999`` becomes the word ``inf``."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def inspect_checkpoint(path: Path) -> Inspection:
    """Say what ``path`` holds: PEFT adapters, a directory of ours, a model, an mlx-lm adapter, or a stream file.

    Raises:
        InvalidInputError: there is nothing at ``path``.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InvalidInputError(f"{path}: no such file or directory")
    try:
        return _inspect(path)
    except SpecStreamError as error:
        return Inspection(path=str(path), kind="unknown", problems=tuple(str(error).splitlines()))
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror})") from error


def _inspect(path: Path) -> Inspection:
    found = _Findings(path)
    if not path.is_dir():
        found.streams(path.parent, path)
        return found.result("stream file")
    found.fields["files"] = {
        file.relative_to(path).as_posix(): file.stat().st_size
        for file in sorted([*path.glob("*"), *path.glob("adapters/*")])
        if file.is_file()
    }
    if is_mlx_lm(path):
        found.live(path)
        return found.result("mlx-lm adapter")
    has_model, has_streams = (path / "config.json").exists(), (path / CONFIG_NAME).exists()
    places = [] if has_model and not (path / ADAPTER_CONFIG).exists() else peft_places(path)
    if len(places) == 1:
        directory, name = places[0]
        found.peft(directory, name)
        return found.result("peft adapter")
    if places:
        return _several(found, places)
    if has_model:
        found.model(path)
    if has_streams or (path / WEIGHTS_NAME).exists():
        found.streams(path, path / WEIGHTS_NAME)
    if (path / "adapters").is_dir():
        found.live(path / "adapters")
    if has_model:
        return found.result("specstream model" if has_streams else "model")
    if has_streams or (path / WEIGHTS_NAME).exists():
        ready = (path / REPORT_NAME).exists() or "lora" in found.fields  # form B of PyTorch has neither
        return found.result("stream adapter" if ready else "stream file")
    found.problems.append(f"{path}: neither a model, an adapter nor a stream file was found here")
    return found.result("unknown")


def peft_places(path: Path) -> list[tuple[Path, str | None]]:
    """Every PEFT adapter at ``path``: its directory, and its name where one file holds several."""
    homes = [path] if (path / ADAPTER_CONFIG).exists() or (path / ADAPTER_WEIGHTS).exists() else []
    homes += sorted(sub for sub in path.iterdir() if (sub / ADAPTER_CONFIG).is_file() and not is_mlx_lm(sub))
    places: list[tuple[Path, str | None]] = []
    for home in homes:
        try:
            file = open_tensors(home / ADAPTER_WEIGHTS)
        except SpecStreamError:  # said again, with its reason, when the adapter is opened
            places.append((home, None))
            continue
        names = sorted({key.adapter for key in map(parse, file.tensors) if key.adapter is not None})
        places += [(home, name) for name in names] if len(names) > 1 else [(home, None)]
    return places


def _several(found: "_Findings", places: list[tuple[Path, str | None]]) -> Inspection:
    rows = []
    for directory, name in places:
        one = _Findings(directory)
        one.peft(directory, name)
        told = one.result("peft adapter")
        lora = told.lora or {}
        name = escaped(name or (directory.name if directory != found.path else "default"))
        rows.append(
            {"name": name, "base": (told.base or {}).get("name_or_path")}
            | {field: getattr(told, field) for field in ("mode", "gamma", "num_stream_layers")}
            | {field: lora.get(field) for field in ("ranks", "scales", "num_modules")}
            | {field: getattr(told, field) for field in ("num_lora_parameters", "num_stream_parameters")}
            | {"num_problems": len(told.problems)}
        )
        found.problems += told.problems
        found.notes += [note for note in told.notes if note not in found.notes]
    found.notes.append("several adapters: convert takes one, chosen with --adapter-name")
    return replace(found.result("peft adapters"), adapters=tuple(rows))


class _Findings:
    """Collects what the parts of a checkpoint say; a part that is wrong becomes a problem, not the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.fields: dict[str, Any] = {}

    def result(self, kind: str) -> Inspection:
        if kind not in ("stream adapter", "specstream model", "mlx-lm adapter"):
            self.fields.pop("adapter_bytes", None)  # PyTorch's form is not what is loaded
        base = self.fields.get("base") or {}
        d, v = base.get("hidden_size"), base.get("vocab_size")
        if type(d) is int and type(v) is int:
            heads = self.fields.get("gamma") or MEDUSA_HEADS
            self.fields["num_medusa_parameters"] = heads * (d * d + d * v)
            self.fields["medusa_formula"] = f"{heads} heads x (D x D residual block + D x V LM head), D = {d}, V = {v}"
        return Inspection(
            path=str(self.path),
            kind=kind,
            problems=tuple(dict.fromkeys(self.problems)),
            notes=tuple(dict.fromkeys(self.notes)),
            **self.fields,
        )

    def attempt(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except SpecStreamError as error:
            self.problems += str(error).splitlines()
            return None

    def peft(self, directory: Path, name: str | None) -> None:
        """One PEFT adapter with the streams in its file or beside it."""
        if any((directory / file).exists() for file in TRAINER_FILES):
            self.notes.append("a checkpoint of the HF Trainer: its own .bin, .pt and .pth files are never opened")
        adapter: Adapter | None = self.attempt(lambda: open_adapter(directory, name))
        source: StreamSource | None = None
        items: tuple[Lora, ...] = ()
        if adapter is not None:
            items = self._peft_lora(adapter)
            source = self.attempt(lambda: gather(adapter.streams))
            self.notes += adapter.notes
            if adapter.config.initial is not None:
                self.notes.append(f"init_lora_weights is {adapter.config.initial!r}: convert with --recompute-init")
            if adapter.saved:
                self.notes.append(f"{len(adapter.saved)} full tensors beside the LoRA; they are judged with the base")
        home = directory
        if not any((home / file).exists() for file in (CONFIG_NAME, WEIGHTS_NAME)) and home != self.path.parent:
            home = directory.parent if (directory.parent / CONFIG_NAME).exists() else directory
        has_streams = any((home / file).exists() for file in (CONFIG_NAME, WEIGHTS_NAME))
        if has_streams or (source is not None and source.tensors):
            config = self.streams(home, home / WEIGHTS_NAME, source)
            layers = (self.fields.get("base") or {}).get("num_hidden_layers")
            if config is not None and config.mode == "lossless" and type(layers) is int:
                self.problems += lossless_problems(items, config, layers)
        elif adapter is not None:
            self.notes.append("no stream tensors: a plain adapter, converted with --lora-only")

    def _peft_lora(self, adapter: Adapter) -> tuple[Lora, ...]:
        config = adapter.config
        items = adapter.loras
        self.fields["lora"] = {
            "ranks": sorted({item.rank for item in items}),
            "scales": sorted({item.scale for item in items}),
            "num_modules": len(items),
        }
        self.fields["num_lora_parameters"] = sum(item.rank * sum(item.shape) for item in items)
        self.fields["base"] = {"name_or_path": config.base_model}
        self.problems += [
            f"{item.a.place}: rank {item.rank}, but {ADAPTER_CONFIG} says {config.rank_of(item.module)}, so its scale "
            "is not known; correct rank_pattern"
            for item in items
            if item.rank != config.rank_of(item.module)
        ]
        self.notes += self.attempt(lambda: check_effect(items)) or []
        self.notes += config.notes
        return items

    def streams(self, directory: Path, weights: Path, form_a: StreamSource | None = None) -> StreamConfig | None:
        """Stream tensors and their configuration; the tensors of an output of ours may carry a sidecar LoRA."""
        source = form_a or NO_STREAMS
        if weights.exists():
            file: TensorFile | None = self.attempt(lambda: open_tensors(weights))
            if file is not None:
                own = {n: t for n, t in file.tensors.items() if not n.startswith(LORA_PREFIX)}
                self._count(file)
                self._sidecar_lora(file)
                form_b = self.attempt(lambda: from_stream_file(TensorFile(file.path, own, file.num_bytes), {}, None))
                source = self.attempt(lambda: join(source, form_b)) or source
        if source.tensors:
            self.fields["num_stream_parameters"] = sum(math.prod(held.shape) for held in source.tensors.values())
        self.notes += source.notes
        config: StreamConfig | None = self.attempt(lambda: read_stream_config(directory / CONFIG_NAME, source))
        if not weights.exists() and not source.tensors and (config is None or config.tensor_shapes(1)):
            self.attempt(lambda: open_tensors(weights))
        if config is not None:
            self._config(config, source, directory / CONFIG_NAME)
        return config

    def _config(self, config: StreamConfig, source: StreamSource, where: Path) -> None:
        described = config.to_dict()
        self.fields |= {"mode": config.mode, "gamma": config.gamma, "num_stream_layers": config.num_stream_layers}
        self.fields["streams"] = {
            name: described[name] for name in ("stream_id", "stream_init", "stream_position", "prune")
        }
        own = self.fields.get("base") or {}
        recorded = {key: value for key, value in config.base_model.items() if key != "fingerprint"}
        self.fields["base"] = recorded | {key: value for key, value in own.items() if value is not None} or None
        if config.lora is not None and "lora" not in self.fields:
            self.fields["lora"] = config.lora
        d = (self.fields.get("base") or {}).get("hidden_size")
        widths = [held.shape[-1] for name, held in source.tensors.items() if not name.endswith("up.weight")]
        if type(d) is not int and widths and len(set(widths)) == 1:
            d = widths[0]
        if type(d) is int and 0 < d < 2**31:
            width = d
            self.notes += self.attempt(lambda: check_streams(source, config, width, where)) or []
        if (where.parent / "config.json").exists():
            base = self.attempt(lambda: open_base(where.parent, where.parent.name))
            if base is not None:
                self.attempt(lambda: check_base_matches(config, where, base))

    def _sidecar_lora(self, file: TensorFile) -> None:
        own = {name.removeprefix(LORA_PREFIX): name for name in file.tensors if name.startswith(LORA_PREFIX)}
        if own:
            self._live(self.attempt(lambda: lora_shapes(file, own)))

    def live(self, directory: Path) -> None:
        """A LoRA in mlx-lm's format."""
        self._live(self.attempt(lambda: read_live_adapter(directory)))
        weights = directory / LIVE_WEIGHTS
        if not weights.exists():
            self.problems.append(f"{weights}: file not found; save the adapter again")
            return
        file: TensorFile | None = self.attempt(lambda: open_tensors(weights))
        if file is not None:
            self._count(file)

    def _count(self, file: TensorFile) -> None:
        size = sum(tensor.num_bytes for tensor in file.tensors.values())
        self.fields["adapter_bytes"] = self.fields.get("adapter_bytes", 0) + size

    def _live(self, found: LiveAdapter | None) -> None:
        if found is None:
            return
        self.problems += found.problems
        self.fields["num_lora_parameters"] = found.num_parameters
        if found.lora:
            self.fields["lora"] = found.lora

    def model(self, path: Path) -> None:
        """A model in either form; the converter's own opening of a base finds the problems."""
        raw = self.attempt(lambda: read_json(path / "config.json")) or {}
        family = FAMILIES.get(str(raw.get("model_type")), DecoderFamily)
        sizes = {name: family.size(raw, name) for name in BASE_FIELDS}
        self.fields["base"] = {name: value for name, value in sizes.items() if value is not None}
        quantization = raw.get("quantization")
        if isinstance(quantization, dict):
            self.fields["quantization"] = {k: v for k, v in quantization.items() if not isinstance(v, dict)}
        if raw:
            base = self.attempt(lambda: open_base(path, path.name))
            if base is not None:
                self.notes += [*base.notes, *base.warnings]
