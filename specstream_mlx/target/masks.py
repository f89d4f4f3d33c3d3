"""What the rows of a pass see: the prefix, their ancestors, and what lies within a layer's window.

A mask is a boolean (T, S + T) array, prefix then rows of the pass; a chain needs no more than the causal mask.

Where mlx-lm gives a layer with a sliding window a rotating cache, which overwrites rows that a rejected draft would
need back, that layer gets a plain one here, and its rows see what lies within the window by their positions
(``reach``): the same rows as in mlx-lm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_map
from mlx_lm.models.cache import KVCache, RotatingKVCache

from specstream_mlx.errors import UnsupportedError

BoolMatrix = npt.NDArray[np.bool_]


class WindowView:
    """A KV cache that shows attention its rows from ``first`` on; everything else is the wrapped cache's."""

    def __init__(self, cache: Any, first: int) -> None:
        self._cache = cache
        self._first = first

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append (1, H_kv, L, D_h) keys and values."""
        return tree_map(lambda rows: rows[..., self._first :, :], self._cache.update_and_fetch(keys, values))


def windows_of(caches: Sequence[Any]) -> list[int | None]:
    """How far back each layer sees, in rows, as mlx-lm's own caches for a model tell; None: without limit.

    Raises:
        UnsupportedError: a layer keeps the past in a form from which rows cannot be taken back.
    """
    windows: list[int | None] = []
    for index, cache in enumerate(caches):
        if type(cache) is KVCache:
            windows.append(None)
        elif type(cache) is RotatingKVCache and cache.keep == 0 and isinstance(cache.max_size, int):
            windows.append(cache.max_size)
        else:
            raise UnsupportedError(
                f"layer {index} keeps the past in a {type(cache).__name__}, from which rejected rows cannot be taken "
                "back; run this model with mlx-lm"
            )
    return windows


@dataclass(frozen=True)
class Reach:
    """What the rows of a pass see in a layer: cached rows from ``first`` on and one another, under ``mask``."""

    first: int
    mask: mx.array | str | None


def reach(
    start: int, depths: npt.NDArray[np.int32], visible: BoolMatrix | None, window: int | None, *, named: bool = True
) -> Reach:
    """What the L rows of a pass that follow ``start`` cached ones see in a layer with this window.

    A row at position ``p`` sees positions ``p - window + 1 .. p``, a rider by the position it is rotated to. Cached
    rows lie at the position of their index.

    Args:
        depths: (L,) positions relative to ``start``.
        visible: (L, L) bool, which rows of the pass see which; None: each sees all before it.
        window: rows, the row itself counted; None: without limit.
        named: whether the mask may be "causal".
    """
    length = len(depths)
    unlimited = window is None or start + int(depths.max()) < window
    if visible is None and not (unlimited and named):
        visible = np.tri(length, dtype=np.bool_)
    if window is None or unlimited:
        return Reach(0, attention_mask(start, length, visible))
    assert visible is not None
    positions = start + depths
    first = max(0, int(positions.min()) - window + 1)
    seen = np.concatenate([np.ones((length, start - first), dtype=np.bool_), visible], axis=1)
    seen &= within(window, positions, np.concatenate([np.arange(first, start), positions]))
    return Reach(first, None if seen.all() else mx.array(seen))


def within(window: int, positions: npt.NDArray[Any], others: npt.NDArray[Any]) -> BoolMatrix:
    """Which ``others`` lie in the window of a row at each of ``positions``: (..., L) and (..., S) -> (..., L, S)."""
    near: BoolMatrix = positions[..., :, None] - others[..., None, :] < window
    return near


def attention_mask(start: int, length: int, visible: BoolMatrix | None) -> mx.array | str | None:
    """The mask of a pass whose L rows follow ``start`` cached ones.

    Args:
        start: cached rows S; every row of the pass sees them all.
        length: L.
        visible: (L, L) bool, which rows of the pass see which; None: each sees all before it.

    Returns:
        None for a single row, "causal", or a (L, S + L) bool array.
    """
    if length == 1:
        return None
    if visible is None:
        return "causal"
    return mx.concatenate([mx.ones((length, start), dtype=mx.bool_), mx.array(visible)], axis=1)


def with_riders(tree_mask: BoolMatrix, anchors: Sequence[int], num_riders: int) -> BoolMatrix:
    """Extend a tree's mask by the rows that ride beside some of its nodes, anchor after anchor (method section 1).

    Rider ``j`` of node ``n`` sees what ``n`` sees, and riders 1..j of ``n``. No row of the tree sees a rider::

        tree 0-1, both anchors    0  1 | 0.1 0.2 1.1 1.2
                             0    1  .    .   .   .   .
                             1    1  1    .   .   .   .
                             0.1  1  .    1   .   .   .
                             0.2  1  .    1   1   .   .
                             1.1  1  1    .   .   1   .
                             1.2  1  1    .   .   1   1

    Args:
        tree_mask: (T, T) bool.
        anchors: A nodes.
        num_riders: riders 1..num_riders of each.

    Returns:
        (T + A * num_riders, T + A * num_riders) bool.
    """
    size, rows = len(tree_mask), len(anchors) * num_riders
    own = np.kron(np.eye(len(anchors), dtype=np.bool_), np.tri(num_riders, dtype=np.bool_))
    return np.block(
        [
            [tree_mask, np.zeros((size, rows), dtype=np.bool_)],
            [np.repeat(tree_mask[list(anchors)], num_riders, axis=0), own],
        ]
    )
