"""Open and check every input and decide what becomes of every tensor; nothing is written."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specstream_convert.adapter import (
    Adapter,
    compile_ignored,
    find_adapter,
    open_adapter,
    read_renames,
    stream_file,
)
from specstream_convert.base import Base, open_base, resolve_base
from specstream_convert.checks import check_base_matches, check_coverage, check_lossless
from specstream_convert.lora import LoraSet, check_effect
from specstream_convert.mapping import FineTune, map_adapter
from specstream_convert.options import DTYPES, ConvertOptions
from specstream_convert.output import check_tokenizer, tokenizer_directory
from specstream_convert.outputs import OutputTensor, plan_outputs
from specstream_convert.report import TensorFate
from specstream_convert.safetensors_io import open_tensors
from specstream_convert.streams_in import (
    WHY_NO_STREAMS,
    StreamSource,
    check_streams,
    from_stream_file,
    gather,
    join,
    read_stream_config,
)
from specstream_convert.verify import read_reference_logits
from specstream_mlx.config import CONFIG_NAME, LORA_PREFIX, WEIGHTS_NAME, StreamConfig
from specstream_mlx.errors import InvalidInputError, UnsupportedError, UsageError

Progress = Callable[[str, int, int], None]
ADAPTERS = "adapters/adapters.safetensors"


@dataclass(frozen=True)
class Plan:
    """Everything decided before the first byte is written."""

    options: ConvertOptions
    base: Base
    adapter: Adapter | None
    loras: LoraSet | None
    outputs: tuple[OutputTensor, ...]  # of model*.safetensors; empty with --adapter-only
    streams: StreamSource
    config: StreamConfig | None
    config_path: Path | None
    placement: str  # merged, live, sidecar or none
    dtype: str | None
    quantization: dict[str, Any] | None
    tokenizer: Path | None
    fates: tuple[TensorFate, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def mode(self) -> str | None:
        return self.config.mode if self.config else None


def make_plan(options: ConvertOptions, progress: Progress) -> Plan:
    """Open and check all inputs; nothing is written."""
    renames, ignored = read_renames(options.key_map), compile_ignored(options.ignore_keys)
    adapter = None
    if options.adapter_path is not None:
        directory = find_adapter(options.adapter_path, options.adapter_name)
        adapter = open_adapter(directory, options.adapter_name, renames, ignored)
    streams, config, config_path, stream_fates = _open_streams(options, adapter, renames, ignored)
    base = _open_base(options, adapter, config)
    notes = [*base.notes, *streams.notes]
    warnings = list(base.warnings)
    fates = list(stream_fates)
    fine_tune = FineTune()
    if adapter is not None:
        fine_tune = map_adapter(adapter, base)
        notes += [*adapter.notes, *fine_tune.notes]
        warnings += adapter.config.notes
        fates += [*adapter.fates, *fine_tune.fates]
        check_coverage(adapter.config, fine_tune.loras, base, config)
    loras = LoraSet(fine_tune.loras) if fine_tune.loras else None
    if config is not None:
        assert config_path is not None
        check_base_matches(config, config_path, base)
        warnings += check_streams(streams, config, base.hidden_size, config_path)
        if config.mode == "lossless" and loras is not None:
            check_lossless(loras.items, config, base)
    if loras is not None:
        warnings += check_effect(loras.items)
    elif adapter is not None and (config is None or config.mode == "shared"):
        raise InvalidInputError(f"{adapter.file.path}: holds no LoRA tensor; give the streams alone as --streams-path")
    placement = _placement(options, base, loras, config)
    if loras is not None:
        fates += _lora_fates(loras, placement)
    tokenizer = None
    if not options.adapter_only:
        tokenizer = tokenizer_directory(adapter.directory if adapter else None, base.path)
        if tokenizer is None:
            notes.append("no tokenizer files were found in the adapter or the base; the output has none")
        else:
            check_tokenizer(tokenizer, int(base.config["vocab_size"]))
    dtype = DTYPES[options.dtype] if options.dtype else None
    quantization = _quantization(options, base)
    outputs: tuple[OutputTensor, ...] = ()
    if not options.adapter_only:
        changes = fine_tune.merged() if placement == "merged" else {}
        outputs = plan_outputs(base, changes, dtype, one_file=quantization is not None)
        fates += _base_fates(base, outputs, quantization is not None)
    if options.reference_logits is not None:
        read_reference_logits(options.reference_logits, base)
    return Plan(
        options=options,
        base=base,
        adapter=adapter,
        loras=loras,
        outputs=outputs,
        streams=streams,
        config=config,
        config_path=config_path,
        placement=placement,
        dtype=dtype,
        quantization=quantization,
        tokenizer=tokenizer,
        fates=tuple(fates),
        notes=tuple(notes),
        warnings=tuple(warnings),
    )


def _open_streams(
    options: ConvertOptions, adapter: Adapter | None, renames: dict[str, str], ignored: Any
) -> tuple[StreamSource, StreamConfig | None, Path | None, tuple[TensorFate, ...]]:
    form_a = gather(adapter.file, adapter.streams) if adapter else None
    if options.lora_only:
        if form_a is not None and form_a.tensors:
            raise UsageError(
                f"{form_a.fates[0].file}: holds stream tensors; leave out --lora-only, or drop them with "
                "--ignore-keys '.*specstream.*'"
            )
        return StreamSource({}, (), ()), None, None, ()
    homes = _homes(options, adapter)
    path = options.streams_path
    if path is None:
        path = next((home for home in homes if (home / WEIGHTS_NAME).exists()), None)
    form_b = from_stream_file(open_tensors(stream_file(path)), renames, ignored) if path is not None else None
    streams = join(form_a, form_b)
    config_path = options.specstream_config
    if config_path is None:
        config_path = next((home / CONFIG_NAME for home in homes if (home / CONFIG_NAME).exists()), None)
    if config_path is None:
        config_path = homes[0] / CONFIG_NAME
    if not streams.tensors and not config_path.exists():
        where = adapter.file.path if adapter else path
        raise InvalidInputError(f"{where}: {WHY_NO_STREAMS}")
    config = read_stream_config(config_path, streams)
    if not streams.tensors and config.tensor_shapes(1):
        where = adapter.file.path if adapter else path
        raise InvalidInputError(f"{where}: {WHY_NO_STREAMS}")
    return streams, config, config_path, streams.fates


def _homes(options: ConvertOptions, adapter: Adapter | None) -> list[Path]:
    """Directories where the stream file and configuration are looked for, nearest first."""
    homes = []
    if options.streams_path is not None:
        homes.append(options.streams_path if options.streams_path.is_dir() else options.streams_path.parent)
    if adapter is not None:
        homes.append(adapter.directory)
    if options.adapter_path is not None and options.adapter_path not in homes:
        homes.append(options.adapter_path)
    return homes


def _open_base(options: ConvertOptions, adapter: Adapter | None, config: StreamConfig | None) -> Base:
    revision: str | None = None
    if options.hf_path is not None:
        path, name = resolve_base(options.hf_path, None)
    else:
        assert adapter is not None
        named = adapter.config.base_model
        if named is None:
            raise InvalidInputError(
                f"{adapter.config.path}: base_model_name_or_path is missing; give the base model with --hf-path"
            )
        revision = adapter.config.revision
        recorded = config.base_model if config else {}
        if revision is None and recorded.get("name_or_path") == named and isinstance(recorded.get("revision"), str):
            revision = recorded["revision"]
        path, name = resolve_base(named, revision, relative_to=adapter.directory)
    return open_base(path, name, revision)


def _placement(options: ConvertOptions, base: Base, loras: LoraSet | None, config: StreamConfig | None) -> str:
    """Where the LoRA goes."""
    if config is not None and config.mode == "lossless":
        if options.fuse:
            raise UsageError("--fuse contradicts mode lossless: the LoRA may act on stream rows only; leave it out")
        return "sidecar" if loras is not None else "none"
    if loras is None:
        return "none"
    if options.adapter_only:
        return "live"
    if options.fuse and base.quantized:
        raise UnsupportedError(
            f"{base.path}: the base is quantised, and merging into it keeps 12-23% of a small LoRA; give the "
            "full-precision base with --hf-path (and --quantize), or --keep-adapters"
        )
    if options.fuse is None:
        return "live" if base.quantized else "merged"
    return "merged" if options.fuse else "live"


def _quantization(options: ConvertOptions, base: Base) -> dict[str, Any] | None:
    if base.quantized and (options.quantize or options.dtype):
        raise UsageError(f"{base.path}: the base is already quantised; leave out --quantize and --dtype")
    if not options.quantize:
        return None
    return {"group_size": options.q_group_size, "bits": options.q_bits, "mode": options.q_mode}


def _lora_fates(loras: LoraSet, placement: str) -> list[TensorFate]:
    fates = []
    for item in loras.items:
        targets = {
            "merged": (f"model:{item.weight}",) * 2,
            "live": (f"{ADAPTERS}:{item.module}.lora_a", f"{ADAPTERS}:{item.module}.lora_b"),
            "sidecar": (
                f"{WEIGHTS_NAME}:{LORA_PREFIX}{item.module}.lora_a",
                f"{WEIGHTS_NAME}:{LORA_PREFIX}{item.module}.lora_b",
            ),
        }[placement]
        what = "merged" if placement == "merged" else "transposed"
        for tensor, target in zip((item.factors.a, item.factors.b), targets, strict=True):
            fates.append(TensorFate(tensor.file.path.name, tensor.raw, what, target))
    return fates


def _base_fates(base: Base, outputs: tuple[OutputTensor, ...], quantized: bool) -> list[TensorFate]:
    fates = []
    by_source = {(output.source.file.path, output.source.raw): output for output in outputs}
    for file in base.files:
        for raw in sorted(file.tensors):
            if raw in base.dropped:
                fates.append(TensorFate(file.path.name, raw, f"dropped: {base.dropped[raw]}"))
                continue
            output = by_source[file.path, raw]
            unchanged = "transposed" if output.source.transposed else "copied"
            what = "merged with LoRA" if output.changes else unchanged
            if output.dtype != output.source.dtype:
                what += f", cast to {output.dtype}"
            if quantized:
                what += ", quantised where the layer allows"
            fates.append(TensorFate(file.path.name, raw, what, f"{output.file}:{output.name}"))
    return fates


def lora_summary(plan: Plan) -> dict[str, Any] | None:
    """The ``lora`` block of ``specstream_config.json`` and of the report."""
    if plan.loras is None or plan.adapter is None:
        return None
    return {
        "rank": plan.loras.rank,
        "scale": plan.loras.scale,
        "placement": plan.placement,
        "num_modules": len(plan.loras.items),
        "use_rslora": plan.adapter.config.use_rslora,
        "ranks": sorted({item.factors.rank for item in plan.loras.items}),
        "scales": sorted({item.factors.scale for item in plan.loras.items}),
    }
