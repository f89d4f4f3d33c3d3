"""Costs and acceptance -> the tree and insertion that make the most tokens per second; pure functions.

A pass over a tree yields one token plus, for every drafted node, the probability that its whole path is accepted.
Under acceptance rates per depth and rank that probability is a product, so for a given number of rows the best tree
holds the paths of highest product (Sequoia's dynamic programme finds the same tree, since here a child's rate does
not depend on its parent's rank). What a pass costs depends on its rows in steps, and can fall as rows grow, so every
number of rows is tried.
"""

import heapq
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from specstream_mlx.drafting import Insertion
from specstream_mlx.tree import DraftTree, Path

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
        streams: the stream pass of deferred insertion.
    """

    plain: float
    chain: Curve
    tree: Curve
    parallel: Curve
    streams: float

    def of(self, tree: DraftTree, insertion: Insertion) -> float:
        """A whole pass over ``tree``, the streams for the next tree included."""
        if insertion == "parallel":
            return self.parallel.at(tree.size)
        return (self.chain if tree.is_chain else self.tree).at(tree.size) + self.streams


@dataclass(frozen=True)
class Candidate:
    """A way to draft: a tree, an insertion, and the expected number of accepted nodes at every depth, (gamma,)."""

    tree: DraftTree
    insertion: Insertion
    accepted: tuple[float, ...]

    @property
    def tokens(self) -> float:
        """Expected tokens per pass."""
        return 1 + sum(self.accepted)


@dataclass(frozen=True)
class Plan:
    """The planner's answer; a tree of the root alone is plain decoding."""

    tree: DraftTree
    insertion: Insertion
    tokens: float
    seconds: float
    plain_seconds: float

    @property
    def speedup(self) -> float:
        """Expected tokens per second over those of plain decoding."""
        return self.tokens * self.plain_seconds / self.seconds


def expected_accepted(tree: DraftTree, rates: Rates) -> tuple[float, ...]:
    """Expected number of accepted nodes at every depth, (gamma,); ranks without a rate are never right."""
    by_depth = [0.0] * len(rates)
    product: dict[Path, float] = {(): 1.0}
    for path in tree.paths[1:]:
        depth, rank = len(path), path[-1]
        known = depth <= len(rates) and rank < len(rates[depth - 1])
        product[path] = product[path[:-1]] * rates[depth - 1][rank] if known else 0.0
        if known:
            by_depth[depth - 1] += product[path]
    return tuple(by_depth)


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


def candidates(rates: Rates, max_rows: int) -> list[Candidate]:
    """Every way to draft that can be best under some cost: chains, and the best tree of each size, both insertions."""
    trees = [DraftTree.chain(depth) for depth in range(1, min(len(rates), max_rows - 1) + 1)]
    paths: list[Path] = []
    for path in best_paths(rates):
        if len(paths) == max_rows - 1:
            break
        paths.append(path)
        trees.append(DraftTree.from_paths(paths))
    unique = list(dict.fromkeys(trees))
    insertions: tuple[Insertion, ...] = ("deferred", "parallel")
    return [Candidate(tree, insertion, expected_accepted(tree, rates)) for tree in unique for insertion in insertions]


def solve(costs: PassCosts, rates: Rates, max_rows: int | None = None, *, drafting: bool = False) -> Plan:
    """The plan of most expected tokens per second.

    Args:
        costs: at the length of context to plan for.
        rates: (gamma, K).
        max_rows: most rows of a pass; None: as many as were measured.
        drafting: leave plain decoding out, and take the best tree whether it pays or not.
    """
    plain = Plan(DraftTree.chain(0), "deferred", 1.0, costs.plain, costs.plain)
    plans = [] if drafting else [plain]
    for candidate in candidates(rates, max_rows or max(costs.chain.max_rows, costs.tree.max_rows)):
        seconds = costs.of(candidate.tree, candidate.insertion)
        plans.append(Plan(candidate.tree, candidate.insertion, candidate.tokens, seconds, costs.plain))
    return max(plans, key=lambda plan: plan.tokens / plan.seconds, default=plain)
