"""A converted directory beside the float64 reference: every tensor, every LoRA, every stream."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from float64_reference import Array, Reference, blocks, factors64, float64, rows_of, to_numpy

from specstream_convert.base.dequantize import DequantizedTensor
from specstream_convert.verification.comparison import Expected, load
from specstream_convert.writing.outputs import OutputTensor
from specstream_convert.writing.quantized import PARTS, Quantized
from specstream_mlx.errors import VerificationError
from specstream_mlx.formats.config import LORA_PREFIX, PREFIX
from specstream_mlx.formats.safetensors import dtype_name, mlx_dtype

ROUNDING = {"F32": 2.0**-24, "BF16": 2.0**-8, "F16": 2.0**-11}
QUANTIZED_APART = 0.05  # how far two quantisations of nearly equal weights may lie apart, in units of their own error


def check_in_float64(directory: Path, expected: Expected) -> dict[str, float]:
    """Compare an output with the reference.

    Returns:
        ``max_abs_error`` and ``max_share_of_rounding_bound`` of the changed tensors.

    Raises:
        VerificationError: a tensor differs by more than float32 arithmetic and one rounding explain.
    """
    check = _Check(directory, expected)
    if (directory / "config.json").exists():
        check.tensors()
    if expected.loras is not None and expected.placement in ("live", "sidecar"):
        check.adapters()
    if expected.streams.tensors:
        check.streams()
    if check.problems:
        raise VerificationError("\n".join(f"the output is wrong: {problem}" for problem in check.problems))
    return {"max_abs_error": check.largest, "max_share_of_rounding_bound": check.share}


class _Check:
    def __init__(self, directory: Path, expected: Expected) -> None:
        self._directory, self._expected = directory, expected
        self.problems: list[str] = []
        self.largest, self.share = 0.0, 0.0

    def tensors(self) -> None:
        """All of ``model*.safetensors``."""
        held = {
            name: value for path in self._directory.glob("model*.safetensors") for name, value in load(path).items()
        }
        outputs, quantized = {output.name: output for output in self._expected.outputs}, self._expected.quantized
        for name, output in outputs.items():
            module = name.removesuffix(".weight")
            if name.rpartition(".")[0] + ".scales" in outputs and name.rpartition(".")[2] in PARTS:
                read = rows_of(output.source)
                self._same(name, held.pop(name), read(slice(0, output.shape[0])))
            elif quantized is not None and name in quantized.layers:
                parts = [held.pop(part) for part in (f"{module}.{part}" for part in PARTS) if part in held]
                self._quantized(output, quantized, parts)
            else:
                self._plain(output, held.pop(name))
        self.problems += [f"{name}: in the output without reason" for name in held]

    def _plain(self, output: OutputTensor, found: mx.array) -> None:
        assert (dtype_name(found), found.shape) == (output.dtype, output.shape)
        wanted_of = _rounded(output)
        for rows in blocks(output.shape):
            plain, wanted, allowed = wanted_of(rows)
            if _is_exact(output):
                self._same(output.name, found[rows], plain)
                continue
            error = np.abs(to_numpy(found[rows]).astype(np.float64) - wanted)
            bound = 1.01 * ROUNDING[output.dtype] * np.abs(wanted) + allowed
            bound += 2.0**-25 if output.dtype == "F16" else 1e-37
            largest, share = float(error.max()), float((error / bound).max())
            self.largest, self.share = max(self.largest, largest), max(self.share, share)
            if not share <= 1:
                self._problem(
                    output.name,
                    f"differs from the float64 reference by {largest:.3g}, {share:.3g} times the rounding allowed",
                )

    def _quantized(self, output: OutputTensor, quantized: Quantized, found: list[mx.array]) -> None:
        how, wanted_of = quantized.layers[output.name], _rounded(output)
        for rows in blocks(output.shape):
            plain = wanted_of(rows)[0]
            wanted, held = mx.quantize(plain, **how), [part[rows] for part in found]
            if _is_exact(output):
                for part, right in zip(held, wanted, strict=True):
                    self._same(output.name, part, right)
                continue
            value = _dequantized(wanted, how)
            own, apart = (
                np.asarray(mx.abs(value - other)).astype(np.float64)
                for other in (plain.astype(mx.float32), _dequantized(held, how))
            )
            rounding = 4 * ROUNDING[output.dtype] * np.linalg.norm(np.asarray(plain.astype(mx.float32)), axis=-1)
            # One value that lay between two steps may have gone the other way; a row may have got another step.
            for axis, share in ((None, QUANTIZED_APART), (-1, 3.0)):
                allowed = share * np.linalg.norm(own, axis=axis) + 4 * own.max() + rounding.max()
                ratio = float((np.linalg.norm(apart, axis=axis) / np.maximum(allowed, 1e-37)).max())
                if not ratio <= 1:
                    self._problem(
                        output.name, f"quantised to values {ratio:.3g} times as far from the reference as allowed"
                    )

    def adapters(self) -> None:
        """Live and sidecar LoRA: ``scale * lora_a @ lora_b`` must equal ``s * (B @ A).T``."""
        live, loras = self._expected.placement == "live", self._expected.loras
        assert loras is not None
        path = self._directory / ("adapters/adapters.safetensors" if live else "specstream.safetensors")
        held, prefix = load(path), "" if live else LORA_PREFIX
        for item in loras.items:
            a, b = factors64(item)
            lora_a, lora_b = (
                to_numpy(held[f"{prefix}{item.module}.{side}"]).astype(np.float64) for side in ("lora_a", "lora_b")
            )
            left, right = (lora_a, lora_b) if item.embedding else (lora_b.T, lora_a.T)
            wanted, size = item.scale * (b @ a), abs(item.scale) * float((np.abs(b) @ np.abs(a)).max())
            error = float(np.abs(loras.scale * (left @ right) - wanted).max())
            if not error <= 1e-6 * max(size, 1e-30):
                self._problem(item.module, f"its LoRA differs from s*B@A by {error:.3g}")
            if item.magnitude is not None:
                assert np.array_equal(to_numpy(held[f"{item.module}.m"]), float64(item.magnitude))

    def streams(self) -> None:
        """The stream tensors, which are copied."""
        held = load(self._directory / "specstream.safetensors")
        for name, source in self._expected.streams.tensors.items():
            files = np.concatenate([float64(row).reshape(-1) for row in source.rows])
            if not np.array_equal(to_numpy(held[PREFIX + name]).reshape(-1), files):
                self._problem(PREFIX + name, "differs from the input")

    def _same(self, name: str, found: mx.array, wanted: mx.array) -> None:
        if found.dtype != wanted.dtype or not bool(mx.array_equal(found, wanted).item()):
            self._problem(name, "differs from the base although nothing changes it")

    def _problem(self, name: str, what: str) -> None:
        """Note the first problem of a tensor."""
        if not any(problem.startswith(f"{name}: ") for problem in self.problems):
            self.problems.append(f"{name}: {what}")


def _is_exact(output: OutputTensor) -> bool:
    """Whether nothing but a cast is done to the tensor, so that every bit of the output is known."""
    return not output.changes and not isinstance(output.source, DequantizedTensor)


def _rounded(output: OutputTensor) -> Callable[[slice], tuple[mx.array, Array, Array]]:
    """Rows of a tensor in the dtype it is written in; of a changed one also in float64, and the error allowed."""
    dtype = mlx_dtype(output.dtype)
    if _is_exact(output):
        read, nothing = rows_of(output.source), np.zeros(0)
        return lambda rows: (read(rows).astype(dtype), nothing, nothing)
    reference = Reference.of(output.source, output.changes)

    def rounded(rows: slice) -> tuple[mx.array, Array, Array]:
        wanted, allowed = reference.rows(rows)
        return mx.array(wanted.astype(np.float32)).astype(dtype), wanted, allowed

    return rounded


def _dequantized(parts: Any, how: dict[str, Any]) -> mx.array:
    """The float32 values of rows of a quantised weight."""
    weight, scales = parts[:2]
    return mx.dequantize(weight, scales, parts[2] if len(parts) > 2 else None, **how).astype(mx.float32)
