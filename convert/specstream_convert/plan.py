"""Open and check every input and decide what becomes of every tensor; nothing is written."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specstream_convert.adapter.full_dump import split_dump
from specstream_convert.adapter.peft import (
    Adapter,
    compile_ignored,
    find_adapter,
    open_adapter,
    read_renames,
    stream_file,
)
from specstream_convert.adapter.streams import (
    WHY_NO_STREAMS,
    StreamSource,
    check_streams,
    from_stream_file,
    gather,
    join,
    read_stream_config,
)
from specstream_convert.base.dequantize import REQUANTIZED, DequantizedTensor, dequantized
from specstream_convert.base.model import Base, open_base, resolve_base
from specstream_convert.changes.kinds import AddScaled, Lora, Replace, Rescale, SetRows
from specstream_convert.changes.lora import LoraSet, check_effect
from specstream_convert.changes.mapping import FineTune, map_adapter
from specstream_convert.changes.recompute import check_asked_for, with_initials
from specstream_convert.checks import check_base_matches, check_coverage, check_lossless, check_lossless_settings
from specstream_convert.files.pickles import Pickles
from specstream_convert.files.stored import StoredTensor
from specstream_convert.options import DTYPES, ConvertOptions
from specstream_convert.placement import choose_placement
from specstream_convert.report import TensorFate
from specstream_convert.verification.verify import Progress, read_reference_logits
from specstream_convert.writing.output import check_tokenizer, tokenizer_directory
from specstream_convert.writing.outputs import OutputTensor, plan_outputs
from specstream_convert.writing.quantized import Quantized, plan_quantization
from specstream_mlx.errors import InvalidInputError, UnsupportedError, UsageError
from specstream_mlx.formats.config import CONFIG_NAME, LORA_PREFIX, WEIGHTS_NAME, StreamConfig
from specstream_mlx.formats.messages import escaped
from specstream_mlx.formats.safetensors import open_tensors

ADAPTERS = "adapters/adapters.safetensors"


@dataclass(frozen=True)
class Plan:
    """Everything decided before the first byte is written."""

    options: ConvertOptions
    base: Base  # its configuration is the output's: LM head untied, vocabulary resized where the adapter does so
    adapter: Adapter | None
    loras: LoraSet | None
    outputs: tuple[OutputTensor, ...]  # of model*.safetensors; empty with --adapter-only
    streams: StreamSource
    config: StreamConfig | None
    config_path: Path | None
    placement: str  # merged, live, sidecar or none
    dtype: str | None
    quantization: dict[str, Any] | None  # as asked for
    quantized: Quantized | None  # as decided for every tensor
    tokenizer: Path | None
    fates: tuple[TensorFate, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def mode(self) -> str | None:
        return self.config.mode if self.config else None

    def replacement(self, name: str) -> StoredTensor | None:
        """The tensor that the output has in place of the base's ``name``."""
        changes = next((output.changes for output in self.outputs if output.name == name), ())
        return next((change.tensor for change in changes if isinstance(change, Replace)), None)


def make_plan(options: ConvertOptions, progress: Progress, pickles: Pickles) -> Plan:
    """Open and check all inputs; nothing is written but what ``pickles`` keeps for as long as it is open."""
    renames, ignored = read_renames(options.key_map), compile_ignored(options.ignore_keys)
    adapter = None
    if options.adapter_path is not None:
        directory = find_adapter(options.adapter_path, options.adapter_name)
        adapter = open_adapter(directory, options.adapter_name, renames, ignored, pickles)
        check_asked_for(adapter.config, options.recompute_init)
    dump = split_dump(adapter, renames, ignored) if adapter is not None and options.hf_path is None else None
    if dump is not None:
        adapter = dump[0]
    streams, config, config_path, stream_fates = _open_streams(options, adapter, renames, ignored)
    base = _open_base(options, adapter, config, pickles, dump[1] if dump else None)
    if options.dequantize:
        base = dequantized(base)
    notes = [*base.notes, *streams.notes, *pickles.notes]
    warnings = list(base.warnings)
    if options.dequantize and options.quantize:
        warnings.append(REQUANTIZED)
    fates = list(stream_fates)
    fine_tune = FineTune()
    if adapter is not None:
        if config is not None and config.mode == "lossless":
            check_lossless_settings(adapter.config)
        fine_tune = map_adapter(adapter, base)
        notes += [*adapter.notes, *fine_tune.notes, *_other_name(adapter, base, config)]
        warnings += adapter.config.notes
        fates += [*adapter.fates, *fine_tune.fates]
        check_coverage(adapter.config, fine_tune.loras, base, config)
        mode = config.mode if config else None
        loras_trained, init_warnings = with_initials(
            fine_tune.loras, adapter.config, base, mode, fine_tune.others.keys()
        )
        fine_tune = replace(fine_tune, loras=loras_trained)
        warnings += init_warnings
    loras = LoraSet(fine_tune.loras) if fine_tune.loras else None
    if config is not None:
        assert config_path is not None
        check_base_matches(config, config_path, base, fine_tune.vocab_size)
        warnings += check_streams(streams, config, base.hidden_size, config_path)
        if config.mode == "lossless":
            check_lossless(fine_tune, config, base)
    warnings += check_effect(fine_tune.loras, alone=not fine_tune.others)
    if (
        adapter is not None
        and not fine_tune.loras
        and not fine_tune.others
        and (config is None or config.mode == "shared")
    ):
        raise InvalidInputError(
            f"{adapter.weights.path}: holds no LoRA tensor; give the streams alone as --streams-path"
        )
    quantization = _quantization(options, base)
    placement = choose_placement(options, base, fine_tune, config)
    changes = {"merged": fine_tune.merged(), "live": fine_tune.others}.get(placement, {})
    if placement == "live" and changes:
        notes.append(f"{len(changes)} tensors that a live adapter cannot hold were written into the model instead")
    if placement == "live" and loras is not None and loras.dora:
        notes.append("mlx-lm's live DoRA computes the norm of every adapted weight at every call; merged is faster")
    fates += _adapter_fates(fine_tune, placement)
    vocabulary: dict[str, Any] = {}
    if fine_tune.untied:
        vocabulary["tie_word_embeddings"] = False
    if fine_tune.vocab_size is not None:
        vocabulary["vocab_size"] = fine_tune.vocab_size
        notes.append(f"the adapter resized the vocabulary to {fine_tune.vocab_size}; config.json says so")
    base = replace(base, config=base.config | vocabulary)
    tokenizer = None
    if not options.adapter_only:
        tokenizer = _tokenizer(options, adapter, base)
        if tokenizer is None:
            notes.append("no tokenizer files were found in the adapter or the base; the output has none")
        else:
            check_tokenizer(tokenizer, int(base.config["vocab_size"]))
    dtype = DTYPES[options.dtype] if options.dtype else None
    outputs: tuple[OutputTensor, ...] = ()
    quantized = None
    if not options.adapter_only:
        outputs = plan_outputs(base, changes, dtype, fine_tune.untied)
        new = {out.name: out.shape for out in outputs if out.shape != out.source.shape or out.name not in base.tensors}
        base = replace(base, parameters=base.parameters | new)
        if quantization is not None:
            quantized, outputs = plan_quantization(base.config, outputs, quantization)
        fates += _base_fates(base, outputs, quantized)
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
        quantized=quantized,
        tokenizer=tokenizer,
        fates=tuple(fates),
        notes=tuple(notes),
        warnings=tuple(warnings),
    )


def _open_streams(
    options: ConvertOptions, adapter: Adapter | None, renames: dict[str, str], ignored: Any
) -> tuple[StreamSource, StreamConfig | None, Path | None, tuple[TensorFate, ...]]:
    form_a = gather(adapter.streams) if adapter else None
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
        where = adapter.weights.path if adapter else path
        raise InvalidInputError(f"{where}: {WHY_NO_STREAMS}")
    config = read_stream_config(config_path, streams)
    if not streams.tensors and config.tensor_shapes(1):
        where = adapter.weights.path if adapter else path
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


def _open_base(
    options: ConvertOptions,
    adapter: Adapter | None,
    config: StreamConfig | None,
    pickles: Pickles,
    dumped: dict[str, StoredTensor] | None,
) -> Base:
    if dumped is not None:
        assert adapter is not None
        return open_base(adapter.directory, adapter.directory.resolve().name, held=dumped)
    named, relative_to, revision = options.hf_path, None, options.revision
    if named is None:
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
        relative_to = adapter.directory
    try:
        path, name, revision = resolve_base(named, revision, relative_to, pickled=pickles.allowed)
        return open_base(path, name, revision, pickles)
    except UnsupportedError as error:
        named = adapter.config.base_model if adapter else None
        plain = re.sub(r"(-unsloth)?-bnb-4bit$", "", named or "")
        if not plain or plain == named:
            raise
        raise UnsupportedError(f"{error}; try {escaped(plain)}, the name without its quantisation") from error


def _other_name(adapter: Adapter, base: Base, config: StreamConfig | None) -> list[str]:
    """A note where only the shapes say that the base is the one that the adapter was trained on."""
    named = adapter.config.base_model
    marked = config is not None and "fingerprint" in config.base_model
    if named is None or marked or Path(named).name.lower() == Path(base.name).name.lower():
        return []
    return [f"the adapter was trained on {escaped(named)}, the base given is {escaped(base.name)}; their shapes agree"]


def _tokenizer(options: ConvertOptions, adapter: Adapter | None, base: Base) -> Path | None:
    """The adapter's tokenizer, beside its weights or one directory up, otherwise the base's."""
    if adapter is None:
        return tokenizer_directory(None, base.path)
    found = tokenizer_directory(adapter.directory, base.path)
    if found in (base.path, None) and options.adapter_path not in (None, adapter.directory):
        return tokenizer_directory(options.adapter_path, base.path)
    return found


def _quantization(options: ConvertOptions, base: Base) -> dict[str, Any] | None:
    if base.quantized and (options.quantize or options.dtype):
        raise UsageError(
            f"{base.path}: the base is already quantised; leave out --quantize and --dtype, or give --dequantize"
        )
    if not options.quantize:
        return None
    return {"group_size": options.q_group_size, "bits": options.q_bits, "mode": options.q_mode}


def _adapter_fates(fine_tune: FineTune, placement: str) -> list[TensorFate]:
    """What becomes of the adapter's tensors; a tensor that changes both sides of a tie has two fates."""
    fates = []
    for item in fine_tune.loras:
        parts = {"lora_a": item.a, "lora_b": item.b, "m": item.magnitude}
        for part, tensor in parts.items():
            if tensor is None:
                continue
            home = {"live": f"{ADAPTERS}:", "sidecar": f"{WEIGHTS_NAME}:{LORA_PREFIX}"}.get(placement)
            target = f"model:{item.weight}" if home is None else f"{home}{item.module}.{part}"
            what = "merged" if home is None else ("copied" if part == "m" else "transposed")
            fates.append(TensorFate(tensor.file.path.name, tensor.raw, what, target))
    for name, changes in fine_tune.others.items():
        for change in changes:
            what = {Replace: "replaces the base's", SetRows: "replaces rows", AddScaled: "merged"}[type(change)]
            fates += [TensorFate(tensor.file.path.name, tensor.raw, what, f"model:{name}") for tensor in change.tensors]
    return fates


def _base_fates(base: Base, outputs: tuple[OutputTensor, ...], quantized: Quantized | None) -> list[TensorFate]:
    """What becomes of the base's tensors; the embedding of a base that is untied has two fates."""
    fates = []
    by_source: dict[tuple[Path, str], list[OutputTensor]] = {}
    for output in outputs:
        by_source.setdefault((output.source.file.path, output.source.raw), []).append(output)
    for file in base.files:
        for raw in sorted(file.tensors):
            if raw in base.dropped:
                fates.append(TensorFate(file.path.name, raw, f"dropped: {base.dropped[raw]}"))
                continue
            for output in by_source[file.path, raw]:
                what = _what(output)
                if quantized is not None and output.name in quantized.layers:
                    what += ", quantised"
                fates.append(TensorFate(file.path.name, raw, what, f"{output.file}:{output.name}"))
    return fates


def _what(output: OutputTensor) -> str:
    """A tensor of the output in words."""
    words = {
        Replace: "replaced by the adapter's",
        SetRows: "rows replaced by the adapter's",
        Lora: "merged with LoRA",
        Rescale: "rescaled by DoRA",
        AddScaled: "added to",
    }
    done = [words[type(change)] for change in output.changes]
    if isinstance(output.source, DequantizedTensor):
        done.insert(0, "dequantised")
    what = ", ".join(done) or ("transposed" if output.source.transposed else "copied")
    return what if output.dtype == output.source.dtype else f"{what}, cast to {output.dtype}"


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
        "use_dora": plan.loras.dora,
        "ranks": sorted({item.rank for item in plan.loras.items}),
        "scales": sorted({item.scale for item in plan.loras.items}),
    }
