"""``--dequantize``: a quantised mlx-lm base read as a float one, tensor by tensor.

    affine                W = scale * q + bias           scale and bias per group of a row
    mxfp4, nvfp4, mxfp8   W = scale * float(q)           q a small float, scale a power of two or an fp8 number

The products are exact in float32; a weight is rounded when it is written, after the LoRA has been merged.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from specstream_convert.base.model import Base
from specstream_convert.files.stored import StoredTensor
from specstream_mlx.errors import InvalidInputError, UnsupportedError, UsageError
from specstream_mlx.formats.messages import escaped, refuse
from specstream_mlx.formats.safetensors import FLOATS, mlx_dtype, row_blocks

MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
APPROXIMATION = (
    "the base is dequantised: what quantisation took from the weights does not come back, so this is an approximation "
    "of the model that the adapter was trained on; the full-precision base is better"
)
REQUANTIZED = (
    "the dequantised base is QUANTISED AGAIN: quantising is not idempotent, every weight is rounded a second time "
    "(at 4 bits by about 3% of its size); quantise the full-precision base instead, or leave out --quantize"
)


@dataclass(frozen=True)
class DequantizedTensor(StoredTensor):
    """A quantised weight (packed, in ``raw``) that reads as float values in ``float_dtype``."""

    scales: StoredTensor = None  # type: ignore[assignment]  # always given; a dataclass wants a default here
    biases: StoredTensor | None = None
    group_size: int = 64
    bits: int = 4
    mode: str = "affine"
    float_dtype: str = "BF16"

    @property
    def dtype(self) -> str:
        return self.float_dtype

    @property
    def shape(self) -> tuple[int, ...]:
        rows = self.file.tensors[self.raw].shape
        return (*rows[:-1], rows[-1] * 32 // self.bits)

    def read(self) -> mx.array:
        return self.read_float32().astype(mlx_dtype(self.float_dtype))

    def read_finite(self) -> mx.array:
        return self.read_float32()

    def read_float32(self) -> mx.array:
        return mx.concatenate([value for _, value in self.blocks(finite=True)])

    def blocks(self, *, finite: bool = False) -> Iterator[tuple[slice, mx.array]]:
        """Slices of rows and their unrounded values in float32; the packed weight is read whole."""
        packed = self.file.read(self.raw)
        scales, biases = self.scales.read(), self.biases.read() if self.biases else None
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        how: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        for rows in row_blocks(self.shape):
            with mx.stream(mx.cpu):
                parts = packed[rows], scales[rows], None if biases is None else biases[rows]
                value = mx.dequantize(*parts, **how, dtype=mx.float32)
                if finite and not bool(mx.isfinite(value).all().item()):
                    raise InvalidInputError(
                        f"{self.scales.place}: gives values that are NaN or infinite; the file is damaged, download it "
                        "again"
                    )
            yield rows, value

    def require_float(self) -> None:
        """It is one by definition."""


def dequantized(base: Base) -> Base:
    """The same base with float weights; its configuration says nothing of quantisation.

    Raises:
        UsageError: the base is not quantised.
        UnsupportedError, InvalidInputError: a layer whose quantisation is unknown or damaged; all are listed.
    """
    if not base.quantized:
        raise UsageError(f"{base.path}: --dequantize, but the base is not quantised; leave it out")
    settings = base.config["quantization"]
    tensors: dict[str, StoredTensor] = {}
    dropped: dict[str, str] = {}
    unknown, damaged = [], []
    for name, tensor in base.tensors.items():
        module = name.rpartition(".")[0]
        if f"{module}.scales" not in base.tensors:
            tensors[name] = tensor
        elif name == f"{module}.weight":
            how = settings[module] if isinstance(settings.get(module), dict) else settings
            if how.get("mode", "affine") not in MODES:
                unknown.append(f"{tensor.place}: quantisation mode {escaped(repr(how['mode']))} is not known")
                continue
            held = _layer(base, module, how)
            problem = _problem(held)
            if problem:
                damaged.append(f"{tensor.place}: {problem}")
            tensors[name] = held
        elif name in (f"{module}.scales", f"{module}.biases"):
            dropped[tensor.raw] = f"its part of {module}.weight is in the dequantised values"
        else:
            tensors[name] = tensor
    refuse(damaged)
    refuse(unknown, UnsupportedError)
    config = {key: value for key, value in base.config.items() if key not in ("quantization", "quantization_config")}
    return replace(
        base,
        config=config,
        tensors=tensors,
        dropped=base.dropped | dropped,
        warnings=(*base.warnings, APPROXIMATION),
    )


def _layer(base: Base, module: str, how: dict[str, Any]) -> DequantizedTensor:
    weight, scales = base.tensors[f"{module}.weight"], base.tensors[f"{module}.scales"]
    plain = (t.dtype for n, t in base.tensors.items() if t.dtype in FLOATS and not n.endswith((".scales", ".biases")))
    return DequantizedTensor(
        weight.file,
        weight.raw,
        scales=scales,
        biases=base.tensors.get(f"{module}.biases"),
        group_size=how["group_size"],
        bits=how["bits"],
        mode=how.get("mode", "affine"),
        float_dtype=scales.dtype if scales.dtype in FLOATS else next(plain, "BF16"),
    )


def _problem(held: DequantizedTensor) -> str | None:
    """Why a layer cannot be dequantised; its shapes have been checked with the base."""
    affine = held.mode == "affine"
    packed = held.file.tensors[held.raw].dtype
    if packed != "U32":
        return f"packed weights are {packed}, expected U32"
    if affine != (held.scales.dtype in FLOATS) or (not affine and held.scales.dtype != "U8"):
        return f"scales are {held.scales.dtype}, which mode {held.mode} does not have"
    if affine != (held.biases is not None):
        return f"mode {held.mode} {'needs' if affine else 'has no'} biases"
    if held.biases is not None and held.biases.dtype not in FLOATS:
        return f"biases are {held.biases.dtype}, expected a float dtype"
    try:
        how: dict[str, Any] = {"group_size": held.group_size, "bits": held.bits, "mode": held.mode}
        one = mx.zeros((1, held.group_size * held.bits), mx.uint32)  # 32 groups
        scale = mx.zeros((1, 32), mx.float32 if affine else mx.uint8)
        mx.eval(mx.dequantize(one, scale, scale if affine else None, **how, dtype=mx.float32))
    except (ValueError, RuntimeError) as error:
        return f"MLX cannot dequantise it ({escaped(' '.join(str(error).split()))})"
    return None
