"""The draft tree as data.

A draft tree says which guesses one verification pass tests. Node 0 is the root: the newest token, already certain.
A node of depth ``g`` holds a candidate of stream ``g``, and its rank says which: 0 is the stream's best guess.
Streams do not know which candidate was picked before them, so a node is named by the ranks on its path, and a tree
is a set of such paths closed under prefix::

    paths                 nodes, parents and mask (row sees column)

    ()                    0          root        1 . . . .
    (0,)                  1 <- 0     ranks 0     1 1 . . .
    (0, 0)                2 <- 1                 1 1 1 . .
    (0, 1)                3 <- 1                 1 1 . 1 .
    (1,)                  4 <- 0                 1 . . . 1

Sorted paths are a preorder in which every best child comes first, so the likeliest path is a prefix of the rows and
committing it to the cache moves nothing.
"""

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Path = tuple[int, ...]


@dataclass(frozen=True)
class DraftTree:
    """A tree of ``T`` nodes in preorder; ``paths[i]`` are the ranks from the root to node ``i``."""

    paths: tuple[Path, ...]

    @classmethod
    def from_paths(cls, paths: Iterable[Path]) -> "DraftTree":
        """The smallest tree that holds every given path (prefixes are added)."""
        closed = {()} | {path[:length] for path in paths for length in range(1, len(path) + 1)}
        return cls(tuple(sorted(closed)))

    @classmethod
    def chain(cls, depth: int) -> "DraftTree":
        """The best guess of each of the first ``depth`` streams; depth 0 is the root alone (plain decoding)."""
        return cls.from_paths([(0,) * depth])

    @classmethod
    def cartesian(cls, widths: Sequence[int]) -> "DraftTree":
        """The paper's tree: all combinations of the top ``widths[g - 1]`` candidates of stream ``g``."""
        return cls.from_paths(itertools.product(*(range(width) for width in widths)))

    @classmethod
    def best_first(cls, logprobs: Sequence[Sequence[float]], budget: int) -> "DraftTree":
        """The ``budget`` paths of highest probability product, by a heap (DDTree, OPT-Tree).

        Args:
            logprobs: per depth, the log-probabilities of its candidates in falling order, (gamma, K). Fixed
                acceptance statistics give a fixed tree, one pass's stream log-probabilities a tree for that pass.
            budget: number of drafted nodes, the root not counted.
        """
        heap: list[tuple[float, Path]] = []
        if logprobs and logprobs[0]:
            heap.append((-logprobs[0][0], (0,)))
        paths: list[Path] = []
        while heap and len(paths) < budget:
            cost, path = heapq.heappop(heap)
            paths.append(path)
            depth, rank = len(path), path[-1]
            if rank + 1 < len(logprobs[depth - 1]):
                sibling = cost + logprobs[depth - 1][rank] - logprobs[depth - 1][rank + 1]
                heapq.heappush(heap, (sibling, (*path[:-1], rank + 1)))
            if depth < len(logprobs) and logprobs[depth]:
                heapq.heappush(heap, (cost - logprobs[depth][0], (*path, 0)))
        return cls.from_paths(paths)

    @property
    def size(self) -> int:
        """Number of rows ``T`` of a pass over this tree, the root included."""
        return len(self.paths)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of every node, which is its position relative to the root."""
        return tuple(len(path) for path in self.paths)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Candidate rank of every node; 0 for the root."""
        return tuple(path[-1] if path else 0 for path in self.paths)

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Parent of every node; -1 for the root. Parents come before their children."""
        index = {path: node for node, path in enumerate(self.paths)}
        return tuple(index[path[:-1]] if path else -1 for path in self.paths)

    @cached_property
    def max_depth(self) -> int:
        """Depth of the deepest node: how many guesses in a row can be accepted."""
        return max(self.depths)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """How many candidates each depth needs, (max_depth,)."""
        return tuple(
            1 + max(path[-1] for path in self.paths if len(path) == depth) for depth in range(1, self.max_depth + 1)
        )

    @cached_property
    def is_chain(self) -> bool:
        """Whether every node has at most one child, so that plain causal attention is the tree's mask."""
        return self.max_depth == self.size - 1

    @cached_property
    def leaf(self) -> int:
        """The end of the likeliest path, best child after best child; its path is nodes 0 to ``leaf``."""
        node = 0
        while node + 1 < self.size and self.paths[node + 1] == (*self.paths[node], 0):
            node += 1
        return node

    @cached_property
    def ancestor_mask(self) -> npt.NDArray[np.bool_]:
        """(T, T) bool; row i sees column j when j is i or an ancestor of i."""
        mask = np.eye(self.size, dtype=np.bool_)
        for node, parent in enumerate(self.parents[1:], start=1):
            mask[node] |= mask[parent]
        return mask

    def ancestors(self, node: int) -> list[int]:
        """The nodes from the root to ``node``, both included."""
        path = [node]
        while path[-1] != 0:
            path.append(self.parents[path[-1]])
        return path[::-1]

    def truncate(self, depth: int) -> "DraftTree":
        """The same tree without nodes deeper than ``depth``."""
        return self if self.max_depth <= depth else DraftTree(tuple(p for p in self.paths if len(p) <= depth))

    def surviving(self, alive: Sequence[bool]) -> list[int]:
        """Nodes left when every node that is not ``alive`` falls with its whole subtree; the root always stays."""
        kept = [True] * self.size
        for node, parent in enumerate(self.parents[1:], start=1):
            kept[node] = kept[parent] and alive[node]
        return [node for node in range(self.size) if kept[node]]

    def select(self, nodes: Sequence[int]) -> "DraftTree":
        """The sub-tree of ``nodes``, which must hold the root and be closed under parents (see ``surviving``)."""
        return DraftTree(tuple(self.paths[node] for node in nodes))
