"""One budget of rows for several sequences in a pass: which of them drafts how much; pure functions.

A pass costs what all its rows cost together, and gives one token for each sequence besides every drafted node with the
probability that its whole path is accepted. The likeliest paths of all sequences go into one heap, and as many are
taken as make the most tokens per second. With many sequences the rows of their own tokens fill the pass, and nothing is
drafted.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from specstream_mlx.planning.planner import FloatArray, Rates, best_paths
from specstream_mlx.target.tree import DraftTree, Path


@dataclass(frozen=True)
class Asking:
    """A sequence that could draft.

    Attributes:
        rates: (gamma, K), how often its guesses are right.
        max_depth: the deepest guess of use now.
        beside: what a guess further ahead costs beside the tree, in rows: a stream runs some of the layers.
    """

    rates: Rates
    max_depth: int
    beside: float = 0.0


def share_rows(
    seconds: Callable[[float], float], num_rows: int, asking: Sequence[Asking], max_drafted: int = 64
) -> list[DraftTree]:
    """The tree of each sequence; a root alone is plain decoding.

    Args:
        seconds: what a pass of so many rows costs.
        num_rows: rows that the pass has in any case, a root of every sequence among them.
        asking: the sequences that could draft.
        max_drafted: most drafted nodes of a pass.
    """
    taken: list[list[Path]] = [[] for _ in asking]
    heap: list[tuple[float, int, Path]] = []
    waiting: list[Iterator[Path]] = [best_paths(sequence.rates[: sequence.max_depth]) for sequence in asking]

    def push(index: int) -> None:
        path = next(waiting[index], None)
        if path is not None:
            heapq.heappush(heap, (-_probability(path, asking[index].rates), index, path))

    for index in range(len(asking)):
        push(index)
    rows, tokens = float(num_rows), float(num_rows)
    best, kept = tokens / seconds(rows), [0] * len(asking)
    depths = [0] * len(asking)
    for _ in range(max_drafted):
        if not heap:
            break
        negative, index, path = heapq.heappop(heap)
        taken[index].append(path)
        tokens -= negative
        deeper = len(path) - depths[index]
        if deeper > 0:
            depths[index] = len(path)
        rows += 1 + asking[index].beside * max(deeper, 0)
        push(index)
        if tokens / seconds(rows) > best:
            best, kept = tokens / seconds(rows), [len(paths) for paths in taken]
    return [DraftTree.from_paths(paths[:count]) for paths, count in zip(taken, kept, strict=True)]


def _probability(path: Path, rates: Rates) -> float:
    found = 1.0
    for depth, rank in enumerate(path):
        found *= rates[depth][rank] if rank < len(rates[depth]) else 0.0
    return found


class RowCosts:
    """What passes cost by their rows: a straight line through what was measured, recent passes first.

    Until enough was measured, ``seconds`` is a guess: a row costs ``ASSUMED`` of a pass.
    """

    ASSUMED = 0.04
    ENOUGH = 8  # passes
    FADE = 0.97  # per pass

    def __init__(self) -> None:
        self._moments: FloatArray = np.zeros(5)  # of (1, rows, seconds, rows * rows, rows * seconds)
        self._seen = 0

    @property
    def wants_variety(self) -> bool:
        """Whether passes of another number of rows would tell more."""
        return self._seen < self.ENOUGH or self._spread() < 0.25

    def observe(self, rows: float, seconds: float) -> None:
        """Take note of what a pass took; one that took far longer than expected says nothing."""
        if self._seen >= self.ENOUGH and seconds > 3 * self.seconds(rows):
            self._moments *= self.FADE  # a machine that stays slow is believed in the end
            return
        self._moments = self.FADE * self._moments + np.array([1, rows, seconds, rows * rows, rows * seconds])
        self._seen += 1

    def seconds(self, rows: float) -> float:
        """What a pass of so many rows costs."""
        if self._seen < self.ENOUGH or self._spread() < 0.25:
            return 1 + self.ASSUMED * rows
        weight, of_rows, of_seconds, squares, products = self._moments / self._moments[0]
        slope = max((products - of_rows * of_seconds) / (squares - of_rows**2), 0.0) * weight
        least = 0.1 * of_seconds
        return float(max(of_seconds + slope * (rows - of_rows), least))

    def _spread(self) -> float:
        """The variance of rows."""
        if not self._moments[0]:
            return 0.0
        _, of_rows, _, squares, _ = self._moments / self._moments[0]
        return float(squares - of_rows**2)
