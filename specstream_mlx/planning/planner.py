"""Costs and acceptance -> the tree and insertion that make the most tokens per second; pure functions.

A pass over a tree yields one token plus, for every drafted node, the probability that its whole path is accepted.
Under acceptance rates per depth and rank that probability is a product, so for a given number of rows the best tree
holds the paths of highest product (Sequoia's dynamic programme finds the same tree, since here a child's rate does
not depend on its parent's rank). What a pass costs depends on its rows in steps, and can fall as rows grow, so every
number of rows is tried. Of trees of one size, a chain is taken to cost no more than another.
"""

import heapq
import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt

from specstream_mlx.options import Insertion
from specstream_mlx.target.tree import DraftTree, Path

FloatArray = npt.NDArray[np.float64]
Rates = Sequence[Sequence[float]]  # (gamma, K): how often stream d + 1's k-th guess is right when its parent was


@dataclass(frozen=True)
class Curve:
    """What passes cost by rows: measured points, straight lines between them and beyond the last."""

    points: tuple[tuple[int, float], ...]

    @property
    def max_rows(self) -> int:
        """The most rows that were measured."""
        return self.points[-1][0]

    def at(self, rows: int) -> float:
        """The cost of ``rows`` rows."""
        index = bisect_left(self.points, rows, key=lambda point: point[0])
        if index < len(self.points) and self.points[index][0] == rows:
            return self.points[index][1]
        if len(self.points) == 1 or index == 0:
            return self.points[0][1]
        (x0, y0), (x1, y1) = self.points[min(index, len(self.points) - 1) - 1 :][:2]
        slope = (y1 - y0) / (x1 - x0)
        return y0 + slope * (rows - x0) if rows < x1 else y1 + max(slope, 0.0) * (rows - x1)


@dataclass(frozen=True)
class PassCosts:
    """What passes cost at one length of context, all in one unit.

    Attributes:
        plain: one step of plain decoding as the loop runs it, the next step under way.
        chain: verification of T rows whose mask is causal.
        tree: verification of T rows with a tree's mask.
        parallel: verification of T rows with the streams of every row inserted beside them.
        deferred: a whole pass over a chain of T rows, then a pass for T - 1 streams of the row where the text ended.
        leaf: a whole pass over a chain of T rows with T - 1 streams of the last one, the text having ended there.
    """

    plain: float
    chain: Curve
    tree: Curve
    parallel: Curve
    deferred: Curve
    leaf: Curve

    def stream_pass(self, num_streams: int) -> float:
        """A pass for streams alone."""
        return max(self.deferred.at(num_streams + 1) - self.chain.at(num_streams + 1), 0.0)

    def of(self, tree: DraftTree, insertion: str, end: float) -> float:
        """A whole pass over ``tree``, the streams for the next tree included.

        Args:
            end: how often the text ends at ``tree.leaf``; elsewhere leaf insertion needs a stream pass besides.
        """
        at_leaf, more = self.at_leaf(tree, insertion)
        return at_leaf + (1 - end) * more

    def at_leaf(self, tree: DraftTree, insertion: str) -> tuple[float, float]:
        """A whole pass over ``tree`` where the text ends at its leaf, and what more it costs elsewhere."""
        if insertion == "parallel":
            return self.parallel.at(tree.size), 0.0
        verification = (self.chain if tree.is_chain else self.tree).at(tree.size)
        streams = self.stream_pass(tree.max_depth)
        if insertion == "deferred":
            return verification + streams, 0.0
        rows = tree.max_depth + 1
        with_leaf = verification + self.leaf.at(rows) - self.chain.at(rows)
        return max(with_leaf, min(verification, self.leaf.at(rows))), streams

    def best_of(self, tree: DraftTree, end: float, insertion: str | None = None) -> tuple[float, str]:
        """A pass with the cheapest insertion, or with the given one."""
        ways = get_args(Insertion) if insertion is None else (insertion,)
        return min(((self.of(tree, way, end), way) for way in ways), key=lambda found: found[0])


class Candidates:
    """Trees whose expected tokens are computed together, in a few array operations."""

    def __init__(self, trees: Sequence[DraftTree], num_ranks: int) -> None:
        """``num_ranks``: K of the rates to come; higher ranks are never right."""
        self.trees = tuple(trees)
        paths = sorted({path for tree in trees for path in tree.paths[1:]}, key=lambda path: (len(path), path))
        index = {path: place for place, path in enumerate(paths)}
        self._leaves = np.array([len(tree.paths[tree.leaf]) for tree in trees])
        self._member = np.array(
            [[path in held for path in paths] for held in (set(t.paths) for t in trees)], dtype=float
        )
        self._levels = []
        for _, group in itertools.groupby(paths, key=len):
            level = list(group)
            parents = np.array([index.get(path[:-1], -1) for path in level])
            self._levels.append((parents, np.array([min(path[-1], num_ranks) for path in level])))

    def tokens(self, rates: npt.ArrayLike) -> FloatArray:
        """Expected tokens per pass of every tree, (C,), under (gamma, K) rates."""
        padded = np.pad(np.asarray(rates, dtype=float), ((0, 0), (0, 1)))
        before, parts = np.ones(1), []
        offset = 0
        for depth, (parents, ranks) in enumerate(self._levels):
            known = padded[depth, ranks] if depth < len(padded) else 0.0
            parts.append(before[parents - offset if depth else 0] * known)
            offset += len(before) if depth else 0
            before = parts[-1]
        return 1 + self._member @ np.concatenate(parts) if parts else np.ones(len(self.trees))

    def ends(self, rates: npt.ArrayLike) -> FloatArray:
        """How often the text ends at the leaf of every tree, (C,), under (gamma, K) rates."""
        first = np.asarray(rates, dtype=float)[:, 0]
        reached = np.concatenate([np.ones(1), np.cumprod(first)])
        return np.append(reached, np.zeros(max(self._leaves.max() - len(first), 0)))[self._leaves]


@dataclass(frozen=True)
class Plan:
    """The planner's answer; a tree of the root alone is plain decoding."""

    tree: DraftTree
    way: str
    tokens: float
    seconds: float
    plain_seconds: float

    @property
    def speedup(self) -> float:
        """Expected tokens per second over those of plain decoding."""
        return self.tokens * self.plain_seconds / self.seconds


def best_paths(rates: Rates) -> Iterator[Path]:
    """Paths in falling order of their probability; the first B of them are the best tree of B nodes.

    Hopeless paths are among them, at the end: where cost falls as rows grow, padding a pass can pay.
    """
    order = [sorted(range(len(row)), key=row.__getitem__, reverse=True) for row in rates]
    heap: list[tuple[float, tuple[int, ...], Path, float]] = []

    def push(parent_rate: float, places: tuple[int, ...], parent: Path) -> None:
        """Add the child of ``parent`` at ``places[-1]``, an index into the order of its depth."""
        depth = len(parent)
        if depth < len(order) and places[-1] < len(order[depth]):
            rank = order[depth][places[-1]]
            heapq.heappush(heap, (-parent_rate * rates[depth][rank], places, (*parent, rank), parent_rate))

    push(1.0, (0,), ())
    while heap:
        negative, places, path, parent_rate = heapq.heappop(heap)
        yield path
        push(-negative, (*places, 0), path)
        push(parent_rate, (*places[:-1], places[-1] + 1), path[:-1])


def candidate_trees(rates: Rates, max_rows: int) -> list[DraftTree]:
    """Trees that can be best under some costs: the chains, and of each size and depth the likeliest paths."""
    trees = [DraftTree.chain(depth) for depth in range(1, min(len(rates), max_rows - 1) + 1)]
    for depth in range(len(rates), 0, -1):
        paths: list[Path] = []
        for path in itertools.islice(best_paths(rates[:depth]), max_rows - 1):
            paths.append(path)
            trees.append(DraftTree.from_paths(paths))
    return list(dict.fromkeys(trees))


def expected_tokens(tree: DraftTree, rates: Rates) -> float:
    """Expected tokens per pass over ``tree``."""
    return float(Candidates([tree], len(rates[0]) if rates else 0).tokens(rates)[0])


def solve(
    costs: PassCosts,
    rates: Rates,
    max_rows: int | None = None,
    *,
    insertion: str | None = None,
    drafting: bool = False,
) -> Plan:
    """The plan of most expected tokens per second.

    Args:
        costs: at the length of context to plan for.
        rates: (gamma, K).
        max_rows: most rows of a pass; None: as many as were measured.
        insertion: the only one to use; None: the cheaper one.
        drafting: leave plain decoding out, and take the best tree whether it pays or not.
    """
    plain = Plan(DraftTree.chain(0), "deferred", 1.0, costs.plain, costs.plain)
    trees = candidate_trees(rates, max_rows or max(costs.chain.max_rows, costs.tree.max_rows))
    if not trees:
        return plain
    plans = [] if drafting else [plain]
    candidates = Candidates(trees, len(rates[0]))
    for tree, tokens, end in zip(trees, candidates.tokens(rates), candidates.ends(rates), strict=True):
        seconds, inserted = costs.best_of(tree, float(end), insertion)
        plans.append(Plan(tree, inserted, float(tokens), seconds, costs.plain))
    return max(plans, key=lambda plan: plan.tokens / plan.seconds)
