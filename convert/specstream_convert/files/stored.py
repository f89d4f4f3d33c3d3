"""The tensors of a checkpoint: which file holds each, under which name, and in which orientation."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx

from specstream_convert.report import TensorFate
from specstream_mlx.formats.messages import at
from specstream_mlx.formats.safetensors import TensorFile, row_blocks


@dataclass(frozen=True)
class StoredTensor:
    """A tensor still in its file. ``transposed`` tensors are stored (in, out) and read (out, in)."""

    file: TensorFile
    raw: str
    transposed: bool = False

    @property
    def place(self) -> str:
        """``file:tensor``, for messages."""
        return at(self.file.path, self.raw)

    def fate(self, fate: str, target: str | None = None) -> TensorFate:
        """What became of it, for the report."""
        return TensorFate(self.file.path.name, self.raw, fate, target)

    @property
    def dtype(self) -> str:
        """The safetensors name of the dtype."""
        return self.file.tensors[self.raw].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape it is read in."""
        shape = self.file.tensors[self.raw].shape
        return shape[::-1] if self.transposed else shape

    def read(self) -> mx.array:
        """The tensor in its stored dtype."""
        return self._oriented(self.file.read(self.raw))

    def read_finite(self) -> mx.array:
        """The float tensor in its stored dtype, refused unless every value is finite."""
        return self._oriented(self.file.read_finite(self.raw))

    def read_float32(self) -> mx.array:
        """The float tensor in float32, refused unless every value is finite."""
        return self._oriented(self.file.read_float32(self.raw))

    def blocks(self, *, finite: bool = False) -> Iterator[tuple[slice, mx.array]]:
        """Slices of rows and their values in the stored dtype; ``finite`` as in :meth:`read_finite`.

        A transposed tensor is read whole: its rows are scattered over the file.
        """
        if not self.transposed:
            yield from self.file.blocks(self.raw, finite=finite)
            return
        value = self.file.read_finite(self.raw) if finite else self.file.read(self.raw)
        for rows in row_blocks(self.shape):
            yield rows, mx.contiguous(value[:, rows].T)

    def equals(self, other: "StoredTensor") -> bool:
        """Whether dtype, shape and every value are the same."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        pairs = zip(self.blocks(), other.blocks(), strict=True)
        return all(bool(mx.array_equal(first, second).item()) for (_, first), (_, second) in pairs)

    def require_float(self) -> None:
        """Refuse a tensor whose dtype has no exact float32 value here."""
        self.file.require_float(self.raw)

    def _oriented(self, value: mx.array) -> mx.array:
        return mx.contiguous(value.T) if self.transposed else value


@dataclass(frozen=True)
class Weights:
    """The tensors of one checkpoint, in one file or in shards; ``path`` stands for all of it in messages."""

    path: Path
    files: tuple[TensorFile, ...]

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by its raw name, which is in one of the files only."""
        return {raw: StoredTensor(file, raw) for file in self.files for raw in file.tensors}
