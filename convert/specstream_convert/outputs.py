"""The tensors of ``model*.safetensors`` to be written: where each comes from, what changes it, what it is stored as."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx

from specstream_convert.base import Base
from specstream_convert.changes import Change, cast, changed
from specstream_convert.safetensors_io import FLOATS, Entry, TensorOut
from specstream_convert.stored import StoredTensor


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output; ``source`` is the base's tensor before ``changes``."""

    name: str
    file: str  # name of the output file
    dtype: str
    shape: tuple[int, ...]
    source: StoredTensor
    changes: tuple[Change, ...] = ()

    def blocks(self) -> Iterator[mx.array]:
        """The value to be written, in :attr:`dtype`, in blocks of rows.

        Raises:
            InvalidInputError: values that are not finite, or that ``dtype`` cannot hold.
        """
        if self.changes:
            values = changed(self.source, self.changes)
        else:
            values = (value for _, value in self.source.blocks(finite=self.source.dtype in FLOATS))
        return (cast(value, self.dtype, self.source.place) for value in values)

    def tensor_out(self) -> TensorOut:
        """What is written for it."""
        return TensorOut((Entry(self.name, self.dtype, self.shape),), lambda: ((value,) for value in self.blocks()))


def plan_outputs(base: Base, changes: Mapping[str, tuple[Change, ...]], dtype: str | None) -> tuple[OutputTensor, ...]:
    """Every tensor of the base with what becomes of it; the input's shards are kept."""
    many = len(base.files) > 1
    files = {
        file.path: f"model-{i + 1:05d}-of-{len(base.files):05d}.safetensors" if many else "model.safetensors"
        for i, file in enumerate(base.files)
    }
    outputs = []
    for name, source in base.tensors.items():
        stored = dtype if dtype is not None and source.dtype in FLOATS else source.dtype
        outputs.append(OutputTensor(name, files[source.file.path], stored, source.shape, source, changes.get(name, ())))
    return tuple(outputs)
