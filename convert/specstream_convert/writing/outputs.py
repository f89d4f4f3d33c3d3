"""The tensors of ``model*.safetensors`` to be written: where each comes from, what changes it, what it is stored as."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx

from specstream_convert.base.model import Base
from specstream_convert.changes.kinds import Change, Replace, cast, changed
from specstream_convert.files.stored import StoredTensor
from specstream_mlx.errors import InvalidInputError
from specstream_mlx.formats.safetensors import FLOATS
from specstream_mlx.formats.tensor_writer import Entry, TensorOut


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
            values = (self._finite(value) for value in changed(self.source, self.changes))
        else:
            values = (value for _, value in self.source.blocks(finite=self.source.dtype in FLOATS))
        return (cast(value, self.dtype, self.source.place) for value in values)

    def tensor_out(self) -> TensorOut:
        """What is written for it."""
        return TensorOut((Entry(self.name, self.dtype, self.shape),), lambda: ((value,) for value in self.blocks()))

    def _finite(self, value: mx.array) -> mx.array:
        if not bool(mx.isfinite(value).all().item()):
            raise InvalidInputError(f"{self.changes[-1].tensors[0].place}: makes values of {self.name} not finite")
        return value


def plan_outputs(
    base: Base, changes: Mapping[str, tuple[Change, ...]], dtype: str | None, untied: bool = False
) -> tuple[OutputTensor, ...]:
    """Every tensor of the base with what becomes of it; the input's shards are kept.

    With ``untied`` the LM head of a tied base becomes a tensor of its own, made from the embedding.
    """
    many = len(base.files) > 1
    files = {
        file.path: f"model-{i + 1:05d}-of-{len(base.files):05d}.safetensors" if many else "model.safetensors"
        for i, file in enumerate(base.files)
    }
    sources = dict(base.tensors)
    if untied:
        sources[f"{base.family.HEAD}.weight"] = base.tensors[f"{base.family.EMBEDDING}.weight"]
    outputs = []
    for name, source in sources.items():
        stored = dtype if dtype is not None and source.dtype in FLOATS else source.dtype
        applied = changes.get(name, ())
        whole = next((change.tensor for change in applied if isinstance(change, Replace)), source)
        outputs.append(OutputTensor(name, files[source.file.path], stored, whole.shape, source, applied))
    return tuple(outputs)
