"""What a fine-tune does to one tensor of the base, as data, and its exact result in float32.

    Replace      W' = T                                a module trained in full, or a resized vocabulary
    SetRows      W'[rows] = T                          trained token rows
    Lora         W' = W + s * B @ A  (out, in)         LoRA of a linear layer; of an embedding s * (B @ A).T
    Rescale      W' = m * W / ||W||                    DoRA; the norm is per row, for an embedding per column
    AddScaled    b' = b + s * T                        the bias of LoRA B

Changes of one tensor apply in this order, block of rows by block of rows; nothing is rounded until the last is done.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from specstream_convert.changes.initial import Initial
from specstream_convert.files.stored import StoredTensor
from specstream_mlx.errors import InvalidInputError
from specstream_mlx.formats.safetensors import mlx_dtype


@dataclass(frozen=True)
class Lora:
    """The LoRA of one module, in PEFT's orientation; as a change, what it adds to the module's weight.

    Attributes:
        module: PEFT's path, and mlx-lm's once it is mapped onto the base.
        a: (r, in); of an embedding (r, rows).
        b: (out, r); of an embedding (width, r).
        scale: the factor of ``B @ A``.
        embedding: the weight is an embedding (rows, width), and the change is ``s * (B @ A).T``.
        magnitude: DoRA's, of every row of the weight; of an embedding, of every column.
        bias: of ``B``; it is added to the module's bias, never kept live.
        initial: factors the training started from and took out of the base; the change is ``s * (B @ A - B0 @ A0)``,
            which is a LoRA of the sum of both ranks.
    """

    module: str
    a: StoredTensor
    b: StoredTensor
    scale: float
    embedding: bool = False
    magnitude: StoredTensor | None = None
    bias: StoredTensor | None = None
    initial: Initial | None = None

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """What the change reads; every kind of change has it."""
        return (self.a, self.b)

    @property
    def weight(self) -> str:
        """The base tensor it changes when merged."""
        return f"{self.module}.weight"

    @property
    def rank(self) -> int:
        """The rank of the change."""
        return self.a.shape[0] + (self.initial.rank if self.initial else 0)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight it changes."""
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.embedding else shape

    def read(self) -> tuple[mx.array, mx.array]:
        """The ``A`` and ``B`` of the change, in float32."""
        a, b = self.read_trained()
        if self.initial is None:
            return a, b
        a0, b0 = self.initial.read()
        return mx.concatenate([a, a0]), mx.concatenate([b, -b0], axis=1)

    def read_trained(self) -> tuple[mx.array, mx.array]:
        """``A`` and ``B`` as the adapter holds them, in float32."""
        return self.a.read_float32(), self.b.read_float32()

    def merged(self) -> "tuple[Change, ...]":
        """What merging does to :attr:`weight`."""
        if self.magnitude is None:
            return (self,)
        return (self, Rescale(self.magnitude, axis=0 if self.embedding else 1))


@dataclass(frozen=True)
class Replace:
    """The whole tensor is another one."""

    tensor: StoredTensor

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return (self.tensor,)


@dataclass(frozen=True)
class SetRows:
    """Rows ``rows`` are those of ``tensor``, in that order."""

    tensor: StoredTensor
    rows: tuple[int, ...]

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return (self.tensor,)


@dataclass(frozen=True)
class Rescale:
    """Every row (``axis`` 1) or column (``axis`` 0) gets the norm that ``magnitude`` says."""

    magnitude: StoredTensor
    axis: int

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return (self.magnitude,)


@dataclass(frozen=True)
class AddScaled:
    """A scaled tensor of the same shape is added."""

    tensor: StoredTensor
    scale: float

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return (self.tensor,)


Change = Replace | SetRows | Lora | Rescale | AddScaled


Step = Callable[[mx.array, slice], mx.array]  # float32 rows of the weight, and which rows they are


class Rows(Protocol):
    """A tensor that is read in blocks of rows."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def blocks(self, *, finite: bool = False) -> Iterator[tuple[slice, mx.array]]:
        """Which rows, and their values; with ``finite`` others are refused."""


def changed(source: Rows, changes: Sequence[Change]) -> Iterator[mx.array]:
    """``source`` after ``changes``, in float32, in blocks of rows.

    It is computed on the CPU, whose products are never rounded to fewer bits.
    """
    steps: tuple[Step, ...] = ()
    for change in changes:
        if isinstance(change, Replace):
            source, steps = change.tensor, ()
        else:
            steps = (*steps, _step(change, source, steps))
    return _run(source, steps)


def _run(source: Rows, steps: Sequence[Step]) -> Iterator[mx.array]:
    for rows, value in source.blocks(finite=True):
        with mx.stream(mx.cpu):
            result = value.astype(mx.float32)
            for step in steps:
                result = step(result, rows)
            mx.eval(result)
        yield result


def _step(change: SetRows | Lora | Rescale | AddScaled, source: Rows, before: Sequence[Step]) -> Step:
    """What ``change`` does to a block of rows of ``source`` after the steps ``before``."""
    match change:
        case SetRows(tensor, indices):
            where, wanted = np.array(indices), tensor.read_float32()
            return lambda value, rows: _set_rows(value, rows, where, wanted)
        case Lora():
            a, b = change.read()
            left, right = (a.T, b.T) if change.embedding else (b, a)
            return lambda value, rows: value + change.scale * (left[rows] @ right)
        case Rescale(magnitude, axis):
            gains = magnitude.read_float32()
            if axis == 0:  # the norm of a column is known when all its rows have been seen
                with mx.stream(mx.cpu):
                    gains = gains / mx.sqrt(_sum_of_squares(source, before))
                return lambda value, rows: value * gains
            return lambda value, rows: value * (gains[rows, None] / mx.sqrt(mx.sum(value * value, 1, keepdims=True)))
        case AddScaled(tensor, scale):
            added = tensor.read_float32()
            return lambda value, rows: value + scale * added[rows]


def _set_rows(value: mx.array, rows: slice, indices: np.ndarray[Any, Any], wanted: mx.array) -> mx.array:
    inside = np.flatnonzero((indices >= rows.start) & (indices < rows.stop))
    if inside.size:
        value[mx.array(indices[inside] - rows.start)] = wanted[mx.array(inside)]
    return value


def _sum_of_squares(source: Rows, steps: Sequence[Step]) -> mx.array:
    """(columns,) sums over all rows."""
    total = mx.zeros(source.shape[1])
    for value in _run(source, steps):
        total = total + mx.sum(value * value, axis=0)
        mx.eval(total)
    return total


def cast(value: mx.array, dtype: str, place: str) -> mx.array:
    """Cast to ``dtype``, refusing a finite value that the target cannot hold."""
    target = mlx_dtype(dtype)
    if value.dtype == target:
        return value
    result = value.astype(target)
    if not bool(mx.isfinite(result).all().item()):
        raise InvalidInputError(f"{place}: values above the range of {dtype}; choose --dtype bfloat16 or float32")
    return result
