"""What becomes of every tensor, in words, for the report."""

from pathlib import Path

from specstream_convert.base.dequantize import DequantizedTensor
from specstream_convert.base.model import Base
from specstream_convert.changes.kinds import AddScaled, Lora, Replace, Rescale, SetRows
from specstream_convert.changes.mapping import FineTune
from specstream_convert.report import TensorFate
from specstream_convert.writing.outputs import OutputTensor
from specstream_convert.writing.quantized import Quantized
from specstream_mlx.formats.adapter_directory import ADAPTERS
from specstream_mlx.formats.config import LORA_PREFIX, WEIGHTS_NAME


def adapter_fates(fine_tune: FineTune, placement: str) -> list[TensorFate]:
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
            fates.append(tensor.fate(what, target))
    for name, changes in fine_tune.others.items():
        for change in changes:
            what = {Replace: "replaces the base's", SetRows: "replaces rows", AddScaled: "merged"}[type(change)]
            fates += [tensor.fate(what, f"model:{name}") for tensor in change.tensors]
    return fates


def base_fates(base: Base, outputs: tuple[OutputTensor, ...], quantized: Quantized | None) -> list[TensorFate]:
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
