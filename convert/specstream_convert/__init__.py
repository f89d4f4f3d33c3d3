"""PyTorch fine-tunes with speculative streams, converted to MLX directories. Needs no PyTorch."""

from specstream_convert.inspection import Inspection, inspect_checkpoint
from specstream_convert.options import ConvertOptions
from specstream_convert.pipeline import convert
from specstream_convert.report import ConversionReport, TensorFate

__all__ = [
    "ConversionReport",
    "ConvertOptions",
    "Inspection",
    "TensorFate",
    "convert",
    "inspect_checkpoint",
]
