"""Layers that take the place of a base's own, and leave it again, without touching one of its weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.nn as nn
from mlx.utils import tree_unflatten


@dataclass(frozen=True)
class MountedLayer:
    """A layer of the base and the one that takes its place; ``path`` is where, as in a tensor's name."""

    path: str
    bare: nn.Module
    adapted: nn.Module


@dataclass(frozen=True, eq=False)
class Mount:
    """Layers that are put in place together; none: the bare base."""

    layers: tuple[MountedLayer, ...] = ()

    def put(self, base: nn.Module) -> None:
        """Put the layers into a bare base."""
        put_layers(base, [(layer.path, layer.adapted) for layer in self.layers])

    def take(self, base: nn.Module) -> None:
        """Put the base's own layers back."""
        put_layers(base, [(layer.path, layer.bare) for layer in self.layers])


BARE = Mount()


def put_layers(base: nn.Module, layers: Sequence[tuple[str, nn.Module]]) -> None:
    """Put modules into a base, by path; no weight is touched or copied."""
    if layers:
        base.update_modules(tree_unflatten(list(layers)))
