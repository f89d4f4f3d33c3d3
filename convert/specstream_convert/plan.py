"""Decide what becomes of every tensor; nothing is written."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specstream_convert.adapter.peft import Adapter
from specstream_convert.adapter.streams import check_streams
from specstream_convert.base.dequantize import REQUANTIZED
from specstream_convert.base.model import Base
from specstream_convert.changes.kinds import Change, Replace
from specstream_convert.changes.lora import LoraSet, check_effect
from specstream_convert.changes.mapping import FineTune, map_adapter
from specstream_convert.changes.recompute import with_initials
from specstream_convert.checks import check_base_matches, check_coverage, check_lossless, check_lossless_settings
from specstream_convert.fates import adapter_fates, base_fates
from specstream_convert.files.pickles import Pickles
from specstream_convert.files.stored import StoredTensor
from specstream_convert.inputs import Inputs, find_tokenizer, open_inputs, other_name
from specstream_convert.options import DTYPES, ConvertOptions
from specstream_convert.placement import choose_placement
from specstream_convert.report import TensorFate
from specstream_convert.verification.comparison import Expected
from specstream_convert.verification.verify import read_reference_logits
from specstream_convert.writing.output import check_tokenizer
from specstream_convert.writing.outputs import plan_outputs
from specstream_convert.writing.quantized import plan_quantization
from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.formats.config import StreamConfig


@dataclass(frozen=True)
class Plan(Expected):
    """Everything decided before the first byte is written.

    The base's configuration is the output's: LM head untied, vocabulary resized where the adapter does so.
    """

    options: ConvertOptions
    adapter: Adapter | None
    config: StreamConfig | None
    config_path: Path | None
    dtype: str | None
    quantization: dict[str, Any] | None  # as asked for
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


class _Account:
    """What is told of a conversion, gathered while it is planned."""

    def __init__(self, inputs: Inputs, pickles: Pickles) -> None:
        self.notes = [*inputs.base.notes, *inputs.streams.notes, *pickles.notes]
        self.warnings = list(inputs.base.warnings)
        self.fates = list(inputs.streams.fates)


def make_plan(options: ConvertOptions, pickles: Pickles) -> Plan:
    """Open and check all inputs and decide; nothing is written but what ``pickles`` keeps for as long as it is open."""
    inputs = open_inputs(options, pickles)
    told = _Account(inputs, pickles)
    if options.dequantize and options.quantize:
        told.warnings.append(REQUANTIZED)
    fine_tune = _fine_tune(inputs, told)
    quantization = _quantization(options, inputs.base)
    placement = choose_placement(options, inputs.base, fine_tune, inputs.config)
    loras = LoraSet(fine_tune.loras) if fine_tune.loras else None
    changes = _changes(fine_tune, placement, told)
    told.fates += adapter_fates(fine_tune, placement)
    inputs = replace(inputs, base=_with_vocabulary(inputs.base, fine_tune, told))
    base, dtype, tokenizer, quantized = inputs.base, DTYPES[options.dtype] if options.dtype else None, None, None
    outputs = () if options.adapter_only else plan_outputs(base, changes, dtype, fine_tune.untied)
    if not options.adapter_only:
        tokenizer = _tokenizer(options, inputs, told)
        new = {out.name: out.shape for out in outputs if out.shape != out.source.shape or out.name not in base.tensors}
        base = replace(base, parameters=base.parameters | new)
        if quantization is not None:
            quantized, outputs = plan_quantization(base.config, outputs, quantization)
        told.fates += base_fates(base, outputs, quantized)
    if options.reference_logits is not None:
        read_reference_logits(options.reference_logits, base)
    return Plan(
        base,
        loras,
        outputs,
        placement,
        quantized,
        inputs.streams,
        options=options,
        adapter=inputs.adapter,
        config=inputs.config,
        config_path=inputs.config_path,
        dtype=dtype,
        quantization=quantization,
        tokenizer=tokenizer,
        fates=tuple(told.fates),
        notes=tuple(told.notes),
        warnings=tuple(told.warnings),
    )


def _fine_tune(inputs: Inputs, told: _Account) -> FineTune:
    """What the adapter does to the base, every part of it held against the others."""
    adapter, base, config, fine_tune = inputs.adapter, inputs.base, inputs.config, FineTune()
    if adapter is not None:
        if inputs.mode == "lossless":
            check_lossless_settings(adapter.config)
        fine_tune = map_adapter(adapter, base)
        told.notes += [*adapter.notes, *fine_tune.notes, *other_name(adapter, base, config)]
        told.fates += [*adapter.fates, *fine_tune.fates]
        check_coverage(adapter.config, fine_tune.loras, base, config)
        loras, warnings = with_initials(fine_tune.loras, adapter.config, base, inputs.mode, fine_tune.others.keys())
        fine_tune = replace(fine_tune, loras=loras)
        told.warnings += [*adapter.config.notes, *warnings]
    if config is not None:
        assert inputs.config_path is not None
        check_base_matches(config, inputs.config_path, base, fine_tune.vocab_size)
        told.warnings += check_streams(inputs.streams, config, base.hidden_size, inputs.config_path)
        if config.mode == "lossless":
            check_lossless(fine_tune, config, base)
    told.warnings += check_effect(fine_tune.loras, alone=not fine_tune.others)
    if adapter is not None and not fine_tune.loras and not fine_tune.others and inputs.mode != "lossless":
        raise InvalidInputError(
            f"{adapter.weights.path}: holds no LoRA tensor; give the streams alone as --streams-path"
        )
    return fine_tune


def _changes(fine_tune: FineTune, placement: str, told: _Account) -> dict[str, tuple[Change, ...]]:
    """What is done to the base's tensors, by name."""
    changes = {"merged": fine_tune.merged(), "live": fine_tune.others}.get(placement, {})
    if placement == "live" and changes:
        told.notes.append(f"{len(changes)} tensors that a live adapter cannot hold were written into the model instead")
    if placement == "live" and LoraSet(fine_tune.loras).dora:
        told.notes.append(
            "mlx-lm's live DoRA computes the norm of every adapted weight at every call; merged is faster"
        )
    return changes


def _with_vocabulary(base: Base, fine_tune: FineTune, told: _Account) -> Base:
    """The base with the configuration of the output."""
    config = dict(base.config)
    if fine_tune.untied:
        config["tie_word_embeddings"] = False
    if fine_tune.vocab_size is not None:
        config["vocab_size"] = fine_tune.vocab_size
        told.notes.append(f"the adapter resized the vocabulary to {fine_tune.vocab_size}; config.json says so")
    return replace(base, config=config)


def _tokenizer(options: ConvertOptions, inputs: Inputs, told: _Account) -> Path | None:
    """Where the tokenizer is; its ids have rows in the embedding."""
    found = find_tokenizer(options, inputs)
    if found is None:
        told.notes.append("no tokenizer files were found in the adapter or the base; the output has none")
    else:
        check_tokenizer(found, int(inputs.base.config["vocab_size"]))
    return found


def _quantization(options: ConvertOptions, base: Base) -> dict[str, Any] | None:
    if base.quantized and (options.quantize or options.dtype):
        raise UsageError(
            f"{base.path}: the base is already quantised; leave out --quantize and --dtype, or give --dequantize"
        )
    if not options.quantize:
        return None
    return {"group_size": options.q_group_size, "bits": options.q_bits, "mode": options.q_mode}


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
