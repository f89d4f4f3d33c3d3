"""What to draft next, decided anew in every pass of ``auto`` (method section 7.4). It never changes the text.

The control keeps a running estimate of how much more or less often each depth is right than planned, and picks the
candidate of most expected tokens per second under it. When none beats plain decoding it parks: a pause of plain
passes, then a short probe; every failed probe doubles the next pause, so what probing costs stays bounded.
"""

from collections.abc import Sequence
from statistics import median
from typing import Any, Protocol

import numpy as np

from specstream_mlx.planning.planner import Candidates, FloatArray, Rates
from specstream_mlx.planning.times import PassTimes
from specstream_mlx.target.tree import DraftTree


class Costs(Protocol):
    """What the control must know of the machine."""

    begins_with_probe: bool
    """Whether a generation drafts a few passes before it may park: what is remembered of the one before it may have
    been a busy moment, and short generations would never learn otherwise."""

    def at(self, context: int, ends: FloatArray) -> tuple[FloatArray, float]:
        """Costs of a pass over every tree, (C,), and of a plain step, after ``context`` cached rows.

        ``ends``: (C,) how often the text ends at the leaf of every tree.
        """

    def insertion(self, tree: int, context: int, end: float) -> str:
        """The best way to draft in a pass over a tree at whose leaf the text ends so often."""

    @property
    def wants_times(self) -> bool:
        """Whether there are too few times of passes to judge by."""

    @property
    def wants_plain_passes(self) -> bool:
        """Whether a few plain passes should be made to see what they cost."""

    def observe(self, tree: int | None, seconds: float) -> None:
        """Take note of what a pass took; None is a plain step."""


class LearnedCosts:
    """The costs of one tree and of plain decoding, learned from passes as they are made."""

    begins_with_probe = True
    ASSUMED = 1.5  # plain steps per drafted pass until both were seen; the paper's range on a GPU is 1.15 to 1.6
    ENOUGH = 7  # passes to judge by
    LEAF_FROM = 0.25  # leaf insertion costs less than a stream pass, by more than this on most machines

    def __init__(self, tree: DraftTree, insertion: str | None, times: PassTimes) -> None:
        """``insertion``: the only way to draft; None: the better one of leaf and deferred insertion."""
        self._insertion = insertion
        self._drafted = times.of(tree, insertion)
        self._plain = times.plain

    def at(self, context: int, ends: FloatArray) -> tuple[FloatArray, float]:
        """As ``Costs``, whatever the context and the ends."""
        if self.wants_times:
            return np.array([self.ASSUMED]), 1.0
        return np.array([median(self._drafted)]), median(self._plain)

    def insertion(self, tree: int, context: int, end: float) -> str:
        """Leaf insertion where the text ends at the leaf now and then."""
        return self._insertion or ("leaf" if end >= self.LEAF_FROM else "deferred")

    @property
    def wants_times(self) -> bool:
        """As ``Costs``."""
        return min(len(self._drafted), len(self._plain)) < self.ENOUGH

    @property
    def wants_plain_passes(self) -> bool:
        """Once drafted passes have been seen often enough, and plain ones have not."""
        return len(self._drafted) == self._drafted.maxlen and len(self._plain) < self.ENOUGH

    def observe(self, tree: int | None, seconds: float) -> None:
        """Remember one pass."""
        (self._plain if tree is None else self._drafted).append(seconds)


class Acceptance:
    """Running acceptance by depth and rank: (prior * planned rate + hits) / (prior + trials).

    Older passes and the prior fade together. A depth that was not reached follows the one before it: its planned
    rates are multiplied by what became of the same ranks there.
    """

    PRIOR = 4.0  # trials that the planned rates count for
    FADE = 0.98  # per drafted pass

    def __init__(self, rates: Rates) -> None:
        self._planned = np.array(rates, dtype=float)
        self._prior = self.PRIOR
        self._hits = np.zeros_like(self._planned)
        self._trials = np.zeros_like(self._planned)
        self._children: dict[DraftTree, list[list[int]]] = {}

    def record(self, tree: DraftTree, nodes: Sequence[int]) -> None:
        """Count a pass over ``tree`` that accepted ``nodes``, the root first."""
        self.forget(self.FADE)
        children = self._children.get(tree) or self._children.setdefault(tree, self._ranks_of_children(tree))
        for depth, node in enumerate(nodes):
            if children[node]:
                self._trials[depth, children[node]] += 1
        for depth, node in enumerate(nodes[1:]):
            if tree.ranks[node] < self._hits.shape[1]:
                self._hits[depth, tree.ranks[node]] += 1

    def forget(self, kept: float) -> None:
        """Keep this share of what was seen, so that what comes next counts for more."""
        self._prior *= kept
        self._hits *= kept
        self._trials *= kept

    def rates(self) -> FloatArray:
        """(gamma, K)."""
        rates = np.empty_like(self._planned)
        change: Any = 1.0
        for depth, planned in enumerate(self._planned):
            expected = np.minimum(planned * change, 1.0)
            row = (self._prior * expected + self._hits[depth]) / (self._prior + self._trials[depth])
            rates[depth] = row / max(row.sum(), 1.0)
            change = rates[depth] / np.maximum(planned, 1e-6)
        return rates

    def _ranks_of_children(self, tree: DraftTree) -> list[list[int]]:
        """Per node, the ranks of its children that have a rate."""
        gamma, num_ranks = self._planned.shape
        ranks: list[list[int]] = [[] for _ in range(tree.size)]
        for node, parent in enumerate(tree.parents[1:], start=1):
            if tree.depths[node] <= gamma and tree.ranks[node] < num_ranks:
                ranks[parent].append(tree.ranks[node])
        return ranks


class Control:
    """Chooses a tree, or plain decoding, for every pass."""

    KEEP = 1.02  # another tree must promise this much more to be taken
    FIRST_PAUSE = 48  # plain passes
    LONGEST_PAUSE = 768
    PROBE = 2  # drafted passes before parking again
    REMEMBERED = 0.25  # share of the counts that a probe starts from
    PROVEN = 16  # drafted passes in a row after which the next pause is the first again
    LEARNING_PAUSE = LearnedCosts.ENOUGH + 1  # plain passes made to see what they cost; the first one is not timed
    REVIEW = 8  # drafted passes between choices, when drafts are accepted and no probe is under way

    def __init__(self, candidates: Candidates, rates: Rates, costs: Costs) -> None:
        """``rates``, (gamma, K), are those the trees were planned for."""
        self._candidates = candidates
        self._acceptance = Acceptance(rates)
        self._costs = costs
        self._current: int | None = None
        self._chosen: tuple[DraftTree, str] | None = None
        self._pause = self.FIRST_PAUSE
        self._plain_left = 0
        self._probe_left = self.PROBE if costs.begins_with_probe else 0
        self._drafted_in_a_row = 0
        self._until_review = 0

    @property
    def wants_times(self) -> bool:
        """Whether passes should be made so that their times can be told."""
        return self._costs.wants_times

    @property
    def rates(self) -> FloatArray:
        """(gamma, K), how often guesses are right of late."""
        return self._acceptance.rates()

    @property
    def stays_plain(self) -> bool:
        """Whether the pass after the next one is plain too."""
        return self._plain_left > 1

    def choose(self, context: int) -> tuple[DraftTree, str] | None:
        """How to draft the next pass, which follows ``context`` cached rows; None is plain decoding."""
        if self._plain_left:
            return None
        if self._chosen is not None and self._until_review > 0:
            return self._chosen
        rates = self._acceptance.rates()
        ends = self._candidates.ends(rates)
        costs, plain = self._costs.at(context, ends)
        speed = self._candidates.tokens(rates) / costs
        best = int(np.argmax(speed))
        if self._current is not None and speed[best] < self.KEEP * speed[self._current]:
            best = self._current
        if not self._probe_left and speed[best] * plain <= 1:
            self._plain_left, self._probe_left, self._drafted_in_a_row = self._pause, self.PROBE, 0
            self._pause = min(2 * self._pause, self.LONGEST_PAUSE)
            self._acceptance.forget(self.REMEMBERED)
            return None
        self._current, self._until_review = best, 0 if self._probe_left else self.REVIEW
        self._chosen = self._candidates.trees[best], self._costs.insertion(best, context, float(ends[best]))
        return self._chosen

    def record(self, drafted: bool, tree: DraftTree, nodes: Sequence[int]) -> None:
        """Count a pass over ``tree`` that accepted ``nodes``; ``drafted`` says whether streams were run for it."""
        if not drafted:
            self._plain_left = max(self._plain_left - 1, 0)
            return
        self._acceptance.record(tree, nodes)
        self._probe_left = max(self._probe_left - 1, 0)
        self._until_review = self._until_review - 1 if len(nodes) > 1 else 0
        self._drafted_in_a_row += 1
        if self._drafted_in_a_row >= self.PROVEN:
            self._pause = self.FIRST_PAUSE
        if not self._probe_left and self._costs.wants_plain_passes:
            self._plain_left, self._until_review = self.LEARNING_PAUSE, 0

    def observe(self, drafted: bool, tree: DraftTree, seconds: float) -> None:
        """Tell what a pass over ``tree`` took."""
        if not drafted:
            self._costs.observe(None, seconds)
        elif self._current is not None and self._candidates.trees[self._current] == tree:
            self._costs.observe(self._current, seconds)
