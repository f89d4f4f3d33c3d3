"""The rows of a pass: the nodes of a tree, and rows that ride beside them from a layer on.

A rider is data to the target: it is told where riders begin, at which positions, and from what. Speculative streams
are riders; the target does not know them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from specstream_mlx.target.masks import BoolMatrix, with_riders
from specstream_mlx.target.tree import DraftTree

Depths = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Draft:
    """A tree of T nodes and the (T,) ids of their tokens; the root's is the newest token, which is certain."""

    tree: DraftTree
    tokens: mx.array


@dataclass(frozen=True)
class EarlyExit:
    """Nodes may be dropped in the middle of a pass (method section 6).

    Attributes:
        layer: after this many layers.
        surviving: (1, T, D) hidden states there and the draft -> the nodes that stay, rising, closed under parents.
    """

    layer: int
    surviving: Callable[[mx.array, Draft], list[int]]


@dataclass(frozen=True)
class Riders:
    """G rows per anchor that run beside a tree in the layers above ``layer``; no row of the tree sees one.

    Rider ``j`` of an anchor sees what the anchor sees, and riders 1..j of the same anchor.

    Attributes:
        layer: they begin after this many layers, from the hidden states of their anchors there.
        depths: (G,) position of every rider relative to its anchor.
        begin: (1, A, D) hidden states of A anchors -> (1, A * G, D), anchor after anchor.
        anchors: a tree, as it is after pruning -> its nodes that have riders in the pass.
        view: what a layer is given in place of its cache, from the cache and the (L,) number of every row, which is
            0 for a row of the tree and j for rider j; None: the cache itself.
        early_exit: drops nodes of the tree before riders begin.
    """

    layer: int
    depths: tuple[int, ...]
    begin: Callable[[mx.array], mx.array]
    anchors: Callable[[DraftTree], tuple[int, ...]] = lambda tree: ()
    view: Callable[[Any, mx.array], Any] | None = None
    early_exit: EarlyExit | None = None

    @property
    def count(self) -> int:
        """G, riders per anchor."""
        return len(self.depths)


class Rows:
    """What is fixed about the rows of a pass.

    Attributes:
        depths: (L,) position of every row relative to the first.
        visible: (L, L) which rows see which; None: each sees all before it.
        num_main: rows from this one on are riders.
        numbers: (L,) 0 for a row of the tree, j for rider j of its anchor.
        consecutive: whether positions just count up.
    """

    def __init__(self, depths: Depths, visible: BoolMatrix, num_main: int, num_riders: int = 0) -> None:
        self.depths, self.num_main = depths, num_main
        self.visible = None if np.array_equal(visible, np.tri(len(depths), dtype=np.bool_)) else visible
        self.consecutive = np.array_equal(depths, np.arange(len(depths)))
        beside = len(depths) - num_main
        self.numbers = [0] * num_main + [1 + row % num_riders for row in range(beside)]


@lru_cache(maxsize=256)
def rows_of(tree: DraftTree, anchors: tuple[int, ...] = (), rider_depths: tuple[int, ...] = ()) -> Rows:
    """The rows of a pass over ``tree``, made once.

    Args:
        anchors: nodes whose riders follow the tree's rows.
        rider_depths: position of every such rider relative to its anchor.
    """
    main = np.array(tree.depths, dtype=np.int32)
    if not anchors or not rider_depths:
        return Rows(main, tree.ancestor_mask, tree.size)
    riders = main[list(anchors), None] + np.array(rider_depths, dtype=np.int32)
    depths = np.concatenate([main, riders.reshape(-1)])
    visible = with_riders(tree.ancestor_mask, anchors, len(rider_depths))
    return Rows(depths, visible, tree.size, len(rider_depths))


@lru_cache(maxsize=64)
def riders_alone(depths: tuple[int, ...]) -> Rows:
    """The rows of a pass for the riders of one anchor, which is the last cached row: depth 0 lies one after it."""
    count = len(depths)
    return Rows(np.array(depths, dtype=np.int32) - 1, np.tri(count, dtype=np.bool_), 0, count)
