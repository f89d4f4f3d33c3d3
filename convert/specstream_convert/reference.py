"""What every tensor of the output must be, computed apart from the conversion: ``mx.load`` and NumPy float64.

Nothing here uses this package's reader, arithmetic or writer, so they do not vouch for themselves.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from specstream_convert.changes import AddLowRank, AddScaled, Change, Factors, Replace, Rescale, SetRows
from specstream_convert.dequantize import DequantizedTensor
from specstream_convert.initial import Initial
from specstream_convert.stored import StoredTensor

ROWS = 1 << 22  # elements of one block of a float64 computation
EPSILON = 2.0**-23  # of the float32 arithmetic that is checked
Array = np.ndarray[Any, Any]


def to_numpy(array: mx.array) -> Array:
    """Float values as NumPy float32, widened by bit shifts where NumPy has no such dtype."""
    if array.dtype == mx.bfloat16:
        return (np.array(array.view(mx.uint16)).astype(np.uint32) << 16).view(np.float32)
    return np.array(array).astype(np.float32)


def load(path: Path) -> dict[str, mx.array]:
    """``mx.load`` of a safetensors file: lazy arrays."""
    tensors: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
    return tensors


def read(tensor: StoredTensor) -> mx.array:
    """A stored tensor through ``mx.load``, in its stored dtype; a quantised one in float32."""
    if isinstance(tensor, DequantizedTensor):
        return mx.array(dequantized64(tensor).astype(np.float32))
    value = load(tensor.file.data_path)[tensor.raw]
    if tensor.transposed:
        value = mx.contiguous(value.T)
    mx.eval(value)
    return value


def float64(tensor: StoredTensor) -> Array:
    """A stored tensor in float64."""
    return to_numpy(read(tensor)).astype(np.float64)


def dequantized64(tensor: DequantizedTensor) -> Array:
    """A quantised weight in float64, unpacked bit by bit."""
    bits = np.unpackbits(np.array(load(tensor.file.data_path)[tensor.raw]).view(np.uint8), axis=-1, bitorder="little")
    codes = bits.reshape(*bits.shape[:-1], -1, tensor.bits) @ (1 << np.arange(tensor.bits))
    scales = read(tensor.scales)
    if tensor.biases is not None:
        values, gains = codes.astype(np.float64), to_numpy(scales).astype(np.float64)
    else:
        values = _E4M3[codes] if tensor.bits == 8 else _E2M1[codes]
        codes = np.array(scales)
        gains = _E4M3[codes] if tensor.mode == "nvfp4" else np.exp2(codes.astype(np.float64) - 127)
    result = values * np.repeat(gains, tensor.group_size, axis=-1)
    if tensor.biases is not None:
        result += np.repeat(float64(tensor.biases), tensor.group_size, axis=-1)
    return result


def _small_floats(exponent_bits: int, mantissa_bits: int) -> Array:
    """Every value of a small float format without infinities, by its code: sign, exponent, mantissa."""
    codes = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    mantissa = codes % (1 << mantissa_bits) / (1 << mantissa_bits)
    exponent = (codes >> mantissa_bits) % (1 << exponent_bits)
    bias = (1 << (exponent_bits - 1)) - 1
    values = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))
    return np.where(codes >> (exponent_bits + mantissa_bits), -values, values)


_E2M1 = _small_floats(2, 1)
_E4M3 = _small_floats(4, 3)
_E4M3[[0x7F, 0xFF]] = np.nan


def factors64(factors: Factors) -> tuple[Array, Array]:
    """``A`` and ``B`` such that the change is ``s * B @ A`` in the weight's own orientation, in float64."""
    a, b = float64(factors.a), float64(factors.b)
    if factors.initial is not None:
        a0, b0 = initial64(factors.initial)
        a, b = np.concatenate([a, a0]), np.concatenate([b, -b0], axis=1)
    return (b.T, a.T) if factors.embedding else (a, b)


@cache
def initial64(initial: Initial) -> tuple[Array, Array]:
    """``A0`` and ``B0`` that the training started from, in float64, by a decomposition of the whole weight."""
    weight = float64(initial.weight)
    u, sigma, vh = np.linalg.svd(weight if initial.kind == "pissa" else weight[:, : initial.rank], full_matrices=False)
    if initial.kind == "pissa":
        rank = initial.rank
        return vh[:rank], u[:, :rank] * sigma[:rank] / initial.scale
    return u.T @ weight, u


class Reference:
    """One tensor after its changes, block of rows by block of rows, each with the error float32 may make."""

    def __init__(self, value: mx.array, changes: Sequence[Change], slack: float = 0.0) -> None:
        """``slack`` is the error that ``value`` itself may have."""
        self._value = value
        self._slack = slack
        self._steps: list[tuple[Change, Any]] = []
        self.shape = tuple(value.shape)
        for change in changes:
            self._add(change)

    def _add(self, change: Change) -> None:
        match change:
            case Replace(tensor):
                self._value, self._steps, self._slack = read(tensor), [], 0.0
                self.shape = tuple(self._value.shape)
            case SetRows(tensor, rows):
                self._steps.append((change, (np.array(rows), float64(tensor))))
            case AddLowRank(factors):
                self._steps.append((change, factors64(factors)))
            case Rescale(magnitude, axis):
                norms = np.sqrt(sum((value**2).sum(0) for _, value, _ in self.blocks())) if axis == 0 else None
                self._steps.append((change, (float64(magnitude), norms)))
            case AddScaled(tensor, _):
                self._steps.append((change, float64(tensor)))

    def blocks(self) -> Iterator[tuple[slice, Array, Array]]:
        """Slices of rows, their values in float64, and the error allowed to float32 arithmetic."""
        block = max(1, ROWS // max(1, int(np.prod(self.shape[1:]))))
        for start in range(0, self.shape[0], block):
            rows = slice(start, min(start + block, self.shape[0]))
            value = to_numpy(self._value[rows]).astype(np.float64)
            error = np.full_like(value, self._slack)
            for change, data in self._steps:
                value, error = _step(change, data, rows, value, error)
            yield rows, value, error

    def float32(self) -> mx.array:
        """The whole tensor, rounded once."""
        result = np.empty(self.shape, np.float32)
        for rows, value, _ in self.blocks():
            result[rows] = value
        return mx.array(result)


def _step(change: Change, data: Any, rows: slice, value: Array, error: Array) -> tuple[Array, Array]:
    match change:
        case SetRows():
            indices, wanted = data
            inside = (indices >= rows.start) & (indices < rows.stop)
            value[indices[inside] - rows.start] = wanted[inside]
            error[indices[inside] - rows.start] = 0
            return value, error
        case AddLowRank(factors):
            a, b = data
            size = np.abs(value) + abs(factors.scale) * (np.abs(b[rows]) @ np.abs(a))
            return value + factors.scale * (b[rows] @ a), error + (a.shape[0] + 8) * EPSILON * size
        case Rescale(_, axis):
            magnitude, norms = data
            norm = np.linalg.norm(value, axis=1, keepdims=True) if axis == 1 else norms[None]
            gain = (magnitude[rows, None] if axis == 1 else magnitude[None]) / norm
            relative = (16 + np.sqrt(value.shape[1 - axis])) * EPSILON
            if axis == 1:
                relative = relative + np.linalg.norm(error, axis=1, keepdims=True) / norm
            return gain * value, np.abs(gain) * error + relative * np.abs(gain * value)
        case AddScaled(_, scale):
            added = scale * data[rows]
            return value + added, error + 4 * EPSILON * (np.abs(value) + np.abs(added))
        case Replace():
            raise AssertionError("a replacement starts the steps anew")
