"""What every tensor of an output must be, computed apart from the conversion, in NumPy float64.

Nothing here uses the converter's reader, arithmetic or writer, so they do not vouch for themselves. Every conversion of
these tests is held beside it (``conftest.py``); PEFT's own logits are the third witness.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from specstream_convert.base.dequantize import DequantizedTensor
from specstream_convert.changes.initial import Initial
from specstream_convert.changes.kinds import AddScaled, Change, Lora, Replace, Rescale, SetRows
from specstream_convert.files.stored import StoredTensor

BLOCK = 1 << 18  # elements of one block of a float64 computation: a few of them fit a processor's cache
EPSILON = 2.0**-23  # of the float32 arithmetic that is checked
Array = np.ndarray[Any, Any]
_STORED = {
    "F32": mx.float32,
    "BF16": mx.bfloat16,
    "F16": mx.float16,
    "U32": mx.uint32,
    "U8": mx.uint8,
}


def to_numpy(array: mx.array) -> Array:
    """Float values as NumPy float32, widened by bit shifts where NumPy has no such dtype."""
    if array.dtype == mx.bfloat16:
        return (np.array(array.view(mx.uint16)).astype(np.uint32) << 16).view(np.float32)
    return np.array(array).astype(np.float32)


def rows_of(tensor: StoredTensor) -> Callable[[slice], mx.array]:
    """Rows of a stored tensor in its stored dtype, read at the place that the file's own header gives.

    Those of a weight that is dequantised come in float32.
    """
    if isinstance(tensor, DequantizedTensor):
        return lambda rows: mx.array(dequantized64(tensor, rows).astype(np.float32))
    path = tensor.file.data_path
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[tensor.raw]
    dtype, shape = _STORED[entry["dtype"]], entry["shape"]
    start, end = (8 + length + offset for offset in entry["data_offsets"])

    def bytes_of(begin: int, end: int) -> mx.array:
        with path.open("rb") as file:
            return mx.array(np.fromfile(file, np.uint8, count=end - begin, offset=begin)).view(dtype)

    if tensor.transposed:
        whole = bytes_of(start, end).reshape(shape)
        return lambda rows: mx.contiguous(whole[:, rows].T)
    row_bytes = (end - start) // shape[0]

    def read_rows(rows: slice) -> mx.array:
        value = bytes_of(start + rows.start * row_bytes, start + rows.stop * row_bytes)
        return value.reshape((rows.stop - rows.start, *shape[1:]))

    return read_rows


def float64(tensor: StoredTensor) -> Array:
    """A stored tensor in float64."""
    return to_numpy(rows_of(tensor)(slice(0, tensor.shape[0]))).astype(np.float64)


def dequantized64(tensor: DequantizedTensor, rows: slice) -> Array:
    """Rows of a quantised weight in float64, unpacked bit by bit."""
    packed = rows_of(StoredTensor(tensor.file, tensor.raw))(rows)
    bits = np.unpackbits(np.array(packed).view(np.uint8), axis=-1, bitorder="little")
    codes = bits.reshape(*bits.shape[:-1], -1, tensor.bits) @ (1 << np.arange(tensor.bits))
    scales = rows_of(tensor.scales)(rows)
    if tensor.biases is not None:
        values, gains = codes.astype(np.float64), to_numpy(scales).astype(np.float64)
    else:
        values = _E4M3[codes] if tensor.bits == 8 else _E2M1[codes]
        codes = np.array(scales)
        gains = _E4M3[codes] if tensor.mode == "nvfp4" else np.exp2(codes.astype(np.float64) - 127)
    result = values * np.repeat(gains, tensor.group_size, axis=-1)
    if tensor.biases is not None:
        result += np.repeat(_numpy_rows(tensor.biases)(rows).astype(np.float64), tensor.group_size, axis=-1)
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


def factors64(lora: Lora) -> tuple[Array, Array]:
    """``A`` and ``B`` such that the change is ``s * B @ A`` in the weight's own orientation, in float64."""
    a, b = float64(lora.a), float64(lora.b)
    if lora.initial is not None:
        a0, b0 = initial64(lora.initial)
        a, b = np.concatenate([a, a0]), np.concatenate([b, -b0], axis=1)
    return (b.T, a.T) if lora.embedding else (a, b)


@cache
def initial64(initial: Initial) -> tuple[Array, Array]:
    """``A0`` and ``B0`` that the training started from, in float64, by a decomposition of the whole weight."""
    weight = float64(initial.weight)
    u, sigma, vh = np.linalg.svd(weight if initial.kind == "pissa" else weight[:, : initial.rank], full_matrices=False)
    if initial.kind == "pissa":
        rank = initial.rank
        return vh[:rank], u[:, :rank] * sigma[:rank] / initial.scale
    return u.T @ weight, u


def _numpy_rows(tensor: StoredTensor) -> Callable[[slice], Array]:
    read = rows_of(tensor)
    return lambda rows: to_numpy(read(rows))


def blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of rows that cover a tensor, each of :data:`BLOCK` elements or one row."""
    block = max(1, BLOCK // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], block):
        yield slice(start, min(start + block, shape[0]))


class Reference:
    """One tensor after its changes, any rows of it, each with the error that float32 arithmetic may make.

    Args:
        shape: of the tensor.
        rows: gives rows of the tensor before its changes.
        changes: what is done to it.
        slack: the error that the rows themselves may have, relative to the largest value of a block.
    """

    def __init__(
        self, shape: tuple[int, ...], rows: Callable[[slice], Array], changes: Sequence[Change], slack: float = 0.0
    ) -> None:
        self.shape = shape
        self._slack = slack
        self._source = rows
        self._steps: list[tuple[Change, Any]] = []
        for change in changes:
            self._add(change)

    @classmethod
    def of(cls, tensor: StoredTensor, changes: Sequence[Change]) -> "Reference":
        """A stored tensor and what is done to it."""
        slack = 8 * EPSILON if isinstance(tensor, DequantizedTensor) else 0.0
        return cls(tensor.shape, _numpy_rows(tensor), changes, slack)

    def _add(self, change: Change) -> None:
        match change:
            case Replace(tensor):
                self.shape, self._steps, self._slack = tensor.shape, [], 0.0
                self._source = _numpy_rows(tensor)
            case SetRows(tensor, rows):
                self._steps.append((change, (np.array(rows), float64(tensor))))
            case Lora():
                self._steps.append((change, factors64(change)))
            case Rescale(magnitude, axis):
                norms = None
                if axis == 0:
                    norms = np.sqrt(sum((self.rows(rows)[0] ** 2).sum(0) for rows in self.blocks()))
                self._steps.append((change, (float64(magnitude), norms)))
            case AddScaled(tensor, _):
                self._steps.append((change, float64(tensor)))

    def blocks(self) -> Iterator[slice]:
        """Slices that cover all rows."""
        return blocks(self.shape)

    def rows(self, rows: slice) -> tuple[Array, Array]:
        """Rows in float64, and the error allowed to float32 arithmetic."""
        value = self._source(rows).astype(np.float64)
        error = np.full_like(value, self._slack * np.abs(value).max(initial=0))
        for change, data in self._steps:
            value, error = _step(change, data, rows, value, error)
        return value, error


def _step(change: Change, data: Any, rows: slice, value: Array, error: Array) -> tuple[Array, Array]:
    match change:
        case SetRows():
            indices, wanted = data
            inside = (indices >= rows.start) & (indices < rows.stop)
            value[indices[inside] - rows.start] = wanted[inside]
            error[indices[inside] - rows.start] = 0
            return value, error
        case Lora():
            a, b = data
            size = np.abs(value) + abs(change.scale) * (np.abs(b[rows]) @ np.abs(a))
            return value + change.scale * (b[rows] @ a), error + (a.shape[0] + 8) * EPSILON * size
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
