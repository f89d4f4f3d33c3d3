"""An LM head in a model's files beside the embedding: mlx-lm drops it where the configuration ties both."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

_HEADS = ("lm_head", "embed_out")
_EMBEDDINGS = ("embed_tokens", "embed_in", "wte")
_PARTS = (".weight", ".scales", ".biases", ".bias")


@dataclass(frozen=True)
class HeadTensors:
    """The tensors of a head and of the embedding, by their last names, with their files."""

    head: Mapping[str, tuple[str, Path]]
    embedding: Mapping[str, tuple[str, Path]]

    @classmethod
    def among(cls, held: Mapping[str, Path]) -> "HeadTensors | None":
        """Those among all tensors of a model; None where no head is stored."""
        head, embedding = (_named(held, names) for names in (_HEADS, _EMBEDDINGS))
        return cls(head, embedding) if ".weight" in head else None

    @property
    def place(self) -> str:
        """File and tensor of the head."""
        name, file = self.head[".weight"]
        return f"{file}:{name}"

    def is_embedding(self) -> bool:
        """Whether the head is the embedding's copy, number for number."""
        if self.head.keys() != self.embedding.keys():
            return False
        files = {file for part in (self.head, self.embedding) for _, file in part.values()}
        arrays: dict[Path, dict[str, mx.array]] = {file: mx.load(str(file)) for file in files}  # type: ignore[misc]
        pairs = [
            (arrays[file][name], arrays[self.embedding[part][1]][self.embedding[part][0]])
            for part, (name, file) in self.head.items()
        ]
        return all(
            one.shape == other.shape and one.dtype == other.dtype and bool(mx.array_equal(one, other).item())
            for one, other in pairs
        )


def _named(held: Mapping[str, Path], modules: tuple[str, ...]) -> dict[str, tuple[str, Path]]:
    found = {}
    for name, file in held.items():
        for part in _PARTS:
            if name.endswith(part) and name.removesuffix(part).rpartition(".")[2] in modules:
                found[part] = (name, file)
    return found
