"""The tensors of ``model*.safetensors`` to be written: where each comes from, what changes it, what it is stored as."""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from specstream_convert.base import Base
from specstream_convert.changes import Change, Replace, cast, changed
from specstream_convert.safetensors_io import FLOATS
from specstream_convert.stored import StoredTensor
from specstream_mlx.errors import InvalidInputError


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
            value = changed(self.source.read_float32(), self.changes)
            if not bool(mx.isfinite(value).all().item()):
                raise InvalidInputError(f"{self.changes[-1].tensors[0].place}: makes values of {self.name} not finite")
            return cast(value, self.dtype, self.source.place)
        if self.source.dtype not in FLOATS:
            return self.source.read()
        return cast(self.source.read_finite(), self.dtype, self.source.place)


def plan_outputs(
    base: Base, changes: Mapping[str, tuple[Change, ...]], dtype: str | None, one_file: bool, untied: bool = False
) -> tuple[OutputTensor, ...]:
    """Every tensor of the base with what becomes of it; the input's shards are kept unless ``one_file``.

    With ``untied`` the LM head of a tied base becomes a tensor of its own, made from the embedding.
    """
    many = len(base.files) > 1 and not one_file
    files = {
        file.path: f"model-{i + 1:05d}-of-{len(base.files):05d}.safetensors" if many else "model.safetensors"
        for i, file in enumerate(base.files)
    }
    sources = dict(base.tensors)
    if untied:
        sources[f"{base.layout.head}.weight"] = base.tensors[f"{base.layout.embedding}.weight"]
    outputs = []
    for name, source in sources.items():
        stored = dtype if dtype is not None and source.dtype in FLOATS else source.dtype
        applied = changes.get(name, ())
        whole = next((change.tensor for change in applied if isinstance(change, Replace)), source)
        outputs.append(OutputTensor(name, files[source.file.path], stored, whole.shape, source, applied))
    return tuple(outputs)
