"""Calibrated costs of many trees at once, as the control asks for them in every review."""

from collections.abc import Sequence
from typing import get_args

import numpy as np

from specstream_mlx.options import Insertion
from specstream_mlx.planning.planner import FloatArray, PassCosts
from specstream_mlx.target.tree import DraftTree


class TabulatedCosts:
    """Calibrated costs at a few lengths of context, straight lines between them."""

    wants_plain_passes = False
    wants_times = False
    begins_with_probe = False

    def __init__(
        self, trees: Sequence[DraftTree], table: Sequence[tuple[int, PassCosts]], insertion: str | None = None
    ) -> None:
        """``table``: rising lengths of context with their costs; ``insertion``: the only one to use."""
        self._contexts = [context for context, _ in table]
        self._plain = np.array([costs.plain for _, costs in table])
        self._insertions = get_args(Insertion) if insertion is None else (insertion,)
        # What a pass costs where the text ends at the tree's leaf, and what more elsewhere: (contexts, insertions, C).
        found = np.array([[[of.at_leaf(tree, way) for tree in trees] for way in self._insertions] for _, of in table])
        self._costs, self._more = found[..., 0], found[..., 1]

    def at(self, context: int, ends: FloatArray) -> tuple[FloatArray, float]:
        """As ``control.Costs``; beyond the measured lengths, those of the nearest."""
        below, part = self._place(context)
        costs, plain = self._of(below, ends), self._plain[below]
        if part:
            costs = costs + part * (self._of(below + 1, ends) - costs)
            plain = plain + part * (self._plain[below + 1] - plain)
        return costs, float(plain)

    def insertion(self, tree: int, context: int, end: float) -> str:
        """As ``control.Costs``, by the nearest measured length."""
        below, part = self._place(context)
        nearest = below + (part > 0.5)
        costs = self._costs[nearest, :, tree] + (1 - end) * self._more[nearest, :, tree]
        return self._insertions[int(np.argmin(costs))]

    def _of(self, place: int, ends: FloatArray) -> FloatArray:
        return np.min(self._costs[place] + (1 - ends) * self._more[place], axis=0)

    def observe(self, tree: int | None, seconds: float) -> None:
        """Calibrated costs stay as they are."""

    def _place(self, context: int) -> tuple[int, float]:
        place = float(np.interp(context, self._contexts, range(len(self._contexts))))
        return int(place), place - int(place)
