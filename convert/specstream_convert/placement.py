"""Where a fine-tune goes: merged into the base's weights, live beside them, or into the sidecar.

Merged is exact on a full-precision base, and what is written is one model. Live is exact where mlx-lm has the form for
it; it is the only exact way on a quantised base. What fits neither is refused.
"""

from typing import Any

from specstream_convert.base.model import Base
from specstream_convert.changes.lora import LoraSet
from specstream_convert.changes.mapping import FineTune
from specstream_convert.options import ConvertOptions
from specstream_mlx.errors import UnsupportedError, UsageError
from specstream_mlx.formats.config import StreamConfig
from specstream_mlx.formats.messages import refuse

FULL_PRECISION = "give the full-precision base with --hf-path, or --dequantize"


def choose_placement(options: ConvertOptions, base: Base, fine_tune: FineTune, config: StreamConfig | None) -> str:
    """``merged``, ``live``, ``sidecar`` or ``none``.

    Raises:
        UsageError: arguments that contradict the mode.
        UnsupportedError: the place asked for, or the only one there is, cannot hold the fine-tune exactly.
    """
    if config is not None and config.mode == "lossless":
        if options.fuse:
            raise UsageError("--fuse contradicts mode lossless: the LoRA may act on stream rows only; leave it out")
        return "sidecar" if fine_tune.loras else "none"
    if not fine_tune.loras and not fine_tune.others:
        return "none"
    if options.adapter_only:
        _refuse(_whole_model_only(fine_tune, base) + _not_live(fine_tune, base, options), "leave out --adapter-only")
        return "live"
    if options.fuse and base.quantized:
        raise UnsupportedError(
            f"{base.path}: the base is quantised, and merging into it keeps 12-23% of a small LoRA; give the "
            "full-precision base with --hf-path (and --quantize), or --keep-adapters, or --dequantize"
        )
    if base.quantized:
        _refuse(_not_on_quantized(fine_tune, base) + _not_live(fine_tune, base, options), FULL_PRECISION)
    elif options.fuse is False:
        _refuse(_not_live(fine_tune, base, options), "leave out --keep-adapters, it is then merged")
    if not fine_tune.loras:
        return "merged"
    if options.fuse is None:
        return "live" if base.quantized else "merged"
    return "merged" if options.fuse else "live"


def _refuse(problems: list[str], way_out: str) -> None:
    refuse([f"{problem}; {way_out}" for problem in problems], UnsupportedError)


def _not_live(fine_tune: FineTune, base: Base, options: ConvertOptions) -> list[str]:
    """Why mlx-lm cannot hold the LoRA modules beside the weights."""
    if not fine_tune.loras:
        return []

    def bits(module: str) -> int | None:
        if options.quantize:
            return options.q_bits
        if f"{module}.scales" not in base.tensors:
            return None
        how: Any = base.config["quantization"]
        own = how.get(module)
        return (own if isinstance(own, dict) else how)["bits"]

    return LoraSet(fine_tune.loras).live_problems(bits)


def _not_on_quantized(fine_tune: FineTune, base: Base) -> list[str]:
    """Changes to weights that the base holds quantised."""
    problems = [
        f"{changes[0].tensors[0].place}: changes {name}, which is quantised in {base.path}"
        for name, changes in fine_tune.others.items()
        if f"{name.removesuffix('.weight')}.scales" in base.tensors
    ]
    if fine_tune.untied and not problems:
        problems = [f"{base.path}: is quantised, and the adapter gives its tied LM head values of its own"]
    return problems


def _whole_model_only(fine_tune: FineTune, base: Base) -> list[str]:
    """Changes that need the base's weights in the output."""
    problems = [
        f"{changes[0].tensors[0].place}: changes {name}, which an adapter without its base cannot hold"
        for name, changes in fine_tune.others.items()
    ]
    if fine_tune.untied and not problems:
        sides = (base.family.EMBEDDING, base.family.HEAD)
        problems = [
            f"{item.a.place}: unties the LM head, which an adapter without its base cannot hold"
            for item in fine_tune.loras
            if item.module in sides
        ]
    return problems
