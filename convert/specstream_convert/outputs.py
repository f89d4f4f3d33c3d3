"""The tensors of ``model*.safetensors`` to be written: where each comes from, what changes it, what it is stored as."""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from specstream_convert.base import Base
from specstream_convert.changes import Change, cast, changed
from specstream_convert.safetensors_io import FLOATS
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

    def read(self) -> mx.array:
        """The value to be written, in :attr:`dtype`.

        Raises:
            InvalidInputError: values that are not finite, or that ``dtype`` cannot hold.
        """
        if self.changes:
            return cast(changed(self.source.read_float32(), self.changes), self.dtype, self.source.place)
        if self.source.dtype not in FLOATS:
            return self.source.read()
        return cast(self.source.read_finite(), self.dtype, self.source.place)


def plan_outputs(
    base: Base, changes: Mapping[str, tuple[Change, ...]], dtype: str | None, one_file: bool
) -> tuple[OutputTensor, ...]:
    """Every tensor of the base with what becomes of it; the input's shards are kept unless ``one_file``."""
    many = len(base.files) > 1 and not one_file
    files = {
        file.path: f"model-{i + 1:05d}-of-{len(base.files):05d}.safetensors" if many else "model.safetensors"
        for i, file in enumerate(base.files)
    }
    outputs = []
    for name, source in base.tensors.items():
        stored = dtype if dtype is not None and source.dtype in FLOATS else source.dtype
        outputs.append(OutputTensor(name, files[source.file.path], stored, source.shape, source, changes.get(name, ())))
    return tuple(outputs)
