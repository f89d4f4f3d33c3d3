"""What a checkpoint holds, told from its configurations and headers; no weight of the base is read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specstream_convert.adapter import ADAPTER_WEIGHTS, open_adapter
from specstream_convert.messages import escaped
from specstream_convert.peft_config import ADAPTER_CONFIG
from specstream_convert.report import REPORT_NAME
from specstream_convert.safetensors_io import TensorFile, open_tensors
from specstream_convert.streams_in import StreamSource, from_stream_file, gather, join, read_stream_config
from specstream_mlx.config import CONFIG_NAME, LORA_PREFIX, PREFIX, WEIGHTS_NAME, StreamConfig, read_json
from specstream_mlx.errors import InvalidInputError, SpecStreamError
from specstream_mlx.families import FAMILIES
from specstream_mlx.families.decoder import DecoderFamily


@dataclass(frozen=True)
class Inspection:
    """The answer of ``inspect``. ``problems`` is empty when the checkpoint can be used as it is."""

    path: str
    kind: str  # peft adapter, stream file, specstream model, stream adapter, model, mlx-lm adapter, unknown
    base: dict[str, Any] | None = None
    mode: str | None = None
    gamma: int | None = None
    num_stream_layers: int | None = None
    lora: dict[str, Any] | None = None  # ranks, scales, number of modules
    num_stream_parameters: int | None = None
    num_medusa_parameters: int | None = None  # 4 * (D^2 + D*V): four heads for the same shape
    num_lora_parameters: int | None = None
    quantization: dict[str, Any] | None = None
    files: dict[str, int] | None = None  # name -> bytes
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, in reading order."""
        return {
            "path": self.path,
            "kind": self.kind,
            "base": self.base,
            "mode": self.mode,
            "gamma": self.gamma,
            "num_stream_layers": self.num_stream_layers,
            "lora": self.lora,
            "num_stream_parameters": self.num_stream_parameters,
            "num_medusa_parameters": self.num_medusa_parameters,
            "num_lora_parameters": self.num_lora_parameters,
            "quantization": self.quantization,
            "files": self.files,
            "problems": list(self.problems),
            "notes": list(self.notes),
        }


def inspect_checkpoint(path: Path) -> Inspection:
    """Say what ``path`` holds: a PEFT directory, a directory of ours, a plain model, or a stream file.

    Raises:
        InvalidInputError: there is nothing at ``path``.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InvalidInputError(f"{path}: no such file or directory")
    found = _Findings(path)
    try:
        return found.inspect()
    except SpecStreamError as error:
        found.problems.append(str(error))
        return found.result("unknown")
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror})") from error


class _Findings:
    """Collects what the parts of a checkpoint say; a part that is wrong becomes a problem, not the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.fields: dict[str, Any] = {}

    def inspect(self) -> Inspection:
        path = self.path
        if path.is_file():
            self._streams(StreamSource({}, (), ()), path.parent, path)
            return self.result("stream file")
        self.fields["files"] = {
            file.relative_to(path).as_posix(): file.stat().st_size
            for file in sorted([*path.glob("*"), *path.glob("adapters/*")])
            if file.is_file()
        }
        if (path / ADAPTER_CONFIG).exists():
            raw = self._try(lambda: read_json(path / ADAPTER_CONFIG)) or {}
            if "peft_type" not in raw and ("lora_parameters" in raw or "fine_tune_type" in raw):
                return self.result("mlx-lm adapter")
            self._peft(path)
            return self.result("peft adapter")
        if (path / ADAPTER_WEIGHTS).exists():
            self.problems.append(
                f"{path / ADAPTER_CONFIG}: file not found; the scale of the LoRA is only written there"
            )
            return self.result("peft adapter")
        has_model, has_streams = (path / "config.json").exists(), (path / CONFIG_NAME).exists()
        if has_model:
            self._model(path)
        if has_streams or (path / WEIGHTS_NAME).exists():
            self._streams(StreamSource({}, (), ()), path, path / WEIGHTS_NAME)
        if has_model:
            return self.result("specstream model" if has_streams else "model")
        if has_streams:
            return self.result("stream adapter" if (path / REPORT_NAME).exists() else "stream file")
        named = [sub for sub in sorted(path.iterdir()) if (sub / ADAPTER_CONFIG).is_file()]
        if named:
            self.notes.append(f"adapters in sub-directories: {', '.join(escaped(sub.name) for sub in named)}")
            return self.result("peft adapter")
        self.problems.append(f"{path}: neither a model, an adapter nor a stream file was found here")
        return self.result("unknown")

    def result(self, kind: str) -> Inspection:
        base = self.fields.get("base") or {}
        d, v = base.get("hidden_size"), base.get("vocab_size")
        if type(d) is int and type(v) is int:
            self.fields["num_medusa_parameters"] = 4 * (d * d + d * v)
        return Inspection(
            path=str(self.path), kind=kind, problems=tuple(self.problems), notes=tuple(self.notes), **self.fields
        )

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except SpecStreamError as error:
            self.problems += str(error).splitlines()
            return None

    def _peft(self, path: Path) -> None:
        adapter = self._try(lambda: open_adapter(path))
        source = StreamSource({}, (), ())
        if adapter is not None:
            scales = {adapter.config.scale_of(pair.module) for pair in adapter.pairs}
            self.fields["lora"] = {
                "ranks": sorted({pair.rank for pair in adapter.pairs}),
                "scales": sorted(scales),
                "num_modules": len(adapter.pairs),
            }
            self.fields["num_lora_parameters"] = sum(pair.rank * sum(pair.shape) for pair in adapter.pairs)
            self.fields["base"] = {"name_or_path": adapter.config.base_model}
            self.notes += adapter.notes
            source = self._try(lambda: gather(adapter.file, adapter.streams)) or source
        self._streams(source, path, path / WEIGHTS_NAME)

    def _streams(self, source: StreamSource, directory: Path, weights: Path) -> None:
        """Stream tensors and their configuration; the tensors of an output of ours may carry a sidecar LoRA."""
        if weights.exists():
            file = self._try(lambda: open_tensors(weights))
            if file is not None:
                self._sidecar_lora(file)
                plain = TensorFile(
                    file.path, {n: t for n, t in file.tensors.items() if not n.startswith(LORA_PREFIX)}, file.num_bytes
                )
                form_b = self._try(lambda: from_stream_file(plain, {}, None))
                source = self._try(lambda: join(source, form_b)) or source
        if source.tensors:
            self.fields["num_stream_parameters"] = sum(_size(held.shape) for held in source.tensors.values())
        config = self._try(lambda: read_stream_config(directory / CONFIG_NAME, source))
        if config is not None:
            self._config(config, source)
        self.notes += source.notes

    def _config(self, config: StreamConfig, source: StreamSource) -> None:
        self.fields |= {"mode": config.mode, "gamma": config.gamma, "num_stream_layers": config.num_stream_layers}
        if config.base_model:
            named = (self.fields.get("base") or {}).get("name_or_path")
            base = {key: value for key, value in config.base_model.items() if key != "fingerprint"}
            self.fields["base"] = base | ({"name_or_path": named} if named and "name_or_path" not in base else {})
        if config.lora is not None and "lora" not in self.fields:
            self.fields["lora"] = config.lora
        d = (self.fields.get("base") or {}).get("hidden_size")
        widths = [held.shape[-1] for name, held in source.tensors.items() if name == "stream_embeddings"]
        if type(d) is not int and widths:
            d = widths[0]
        if type(d) is not int:
            return
        expected = config.tensor_shapes(d)
        for name in sorted(set(expected) | set(source.tensors)):
            held = source.tensors.get(name)
            if held is None:
                self.problems.append(f"{self.path}: {PREFIX}{name} {expected[name]} is needed and was not found")
            elif name not in expected:
                self.problems.append(f"{self.path}: {PREFIX}{escaped(name)} is not needed by {CONFIG_NAME}")
            elif held.shape != expected[name]:
                self.problems.append(
                    f"{self.path}: {PREFIX}{name} has shape {held.shape}, {CONFIG_NAME} asks for {expected[name]}"
                )

    def _sidecar_lora(self, file: TensorFile) -> None:
        shapes = [
            t.shape for name, t in file.tensors.items() if name.startswith(LORA_PREFIX) and name.endswith(".lora_a")
        ]
        if shapes:
            sizes = [_size(t.shape) for name, t in file.tensors.items() if name.startswith(LORA_PREFIX)]
            self.fields["num_lora_parameters"] = sum(sizes)

    def _model(self, path: Path) -> None:
        config = self._try(lambda: read_json(path / "config.json")) or {}
        names = (
            "model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size "
            "tie_word_embeddings"
        )
        family = FAMILIES.get(str(config.get("model_type")), DecoderFamily)
        sizes = {name: family.size(config, name) for name in names.split()}
        self.fields["base"] = {name: value for name, value in sizes.items() if value is not None}
        quantization = config.get("quantization")
        if isinstance(quantization, dict):
            self.fields["quantization"] = {k: v for k, v in quantization.items() if not isinstance(v, dict)}
        shards = sorted(path.glob("model*.safetensors"))
        if not shards:
            self.problems.append(f"{path}: no model*.safetensors")
        for shard in shards:
            self._try(lambda shard=shard: open_tensors(shard))  # type: ignore[misc]


def _size(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total
