"""Rows of several sequences in one pass: packed through every linear layer, each sequence over its own caches.

The rows of a pass lie in one line, the trees of all sequences first, then what rides beside them::

    tree 0 | tree 1 | tree 2 | riders 0 | riders 2

Weights are read once for all of them. Attention alone is computed sequence by sequence: a stock block calls mlx-lm's
``scaled_dot_product_attention`` with the cache it was given, and ``install_attention`` makes that function ask a
``Together`` to attend. So every sequence keeps the plain caches it has alone, of its own length and kind; nothing is
padded or copied, and sequences come and go without a trace.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models import base as stock

from specstream_mlx.families.decoder import DecoderFamily
from specstream_mlx.target.masks import WindowView
from specstream_mlx.target.rows import Depths, Draft, Riders, Rows, riders_alone, rows_of, stretch
from specstream_mlx.target.tree import DraftTree

_ATTENTION = "scaled_dot_product_attention"


@dataclass(frozen=True, eq=False)
class Part:
    """One sequence's part in a pass, as ``Target.verify`` takes it."""

    draft: Draft
    caches: Sequence[Any]
    riders: Riders | None = None
    taps: Sequence[int] = ()


class Seat:
    """A part while its pass is built.

    Attributes:
        draft: what is left of it after pruning; ``kept``: which of its nodes those are.
        start: cached rows before the pass.
        rows: of this sequence, its riders among them once they are ``mounted``.
        main, beside: where its tree and its riders lie in the line of all rows.
    """

    def __init__(self, part: Part, num_layers: int) -> None:
        riders, size = part.riders, part.draft.tree.size
        self.part, self.draft = part, part.draft
        self.start: int = part.caches[0].offset
        early_exit = riders.early_exit if riders is not None else None
        self.exit_layer = early_exit.layer if early_exit is not None and size > 1 else 0
        self.rider_layer = riders.layer if riders is not None and riders.count else num_layers
        self.kept: Sequence[int] = range(size)
        self.rows: Rows = rows_of(part.draft.tree)
        self.tapped: dict[int, mx.array] = {}
        self.anchors: tuple[int, ...] = ()
        self.mounted = False
        self.main = self.beside = slice(0, 0)

    @classmethod
    def of_riders(cls, riders: Riders, caches: Sequence[Any]) -> "Seat":
        """Riders in a pass without their tree, begun from a node whose row is the last in the caches."""
        seat = cls(Part(Draft(DraftTree.chain(0), mx.array([0])), caches, riders), len(caches))
        seat.start = caches[riders.layer].offset
        seat.rows, seat.mounted = riders_alone(riders.depths), True
        return seat

    @classmethod
    def of_text(cls, length: int, caches: Sequence[Any]) -> "Seat":
        """A stretch of text, whose rows each see all before them."""
        seat = cls(Part(Draft(DraftTree.chain(0), mx.array([0])), caches), len(caches))
        seat.rows = stretch(length)
        return seat

    @property
    def boundaries(self) -> set[int]:
        """Layers after which something is done to its rows."""
        return {self.exit_layer, self.rider_layer, *self.part.taps}

    @property
    def positions(self) -> tuple[Depths, Depths]:
        """The positions of its tree's rows, and of its riders."""
        depths = self.start + self.rows.depths
        return depths[: self.rows.num_main], depths[self.rows.num_main :]

    @property
    def numbers(self) -> mx.array | None:
        """The number of each of its rows, where its riders want to know."""
        riders = self.part.riders
        wanted = self.mounted and riders is not None and riders.view is not None
        return mx.array(self.rows.numbers) if wanted else None

    def cache(self, index: int, first: int, numbers: mx.array | None) -> Any:
        """What a layer is given in place of its cache, of which it sees rows from ``first`` on."""
        cache = self.part.caches[index]
        if first:
            cache = WindowView(cache, first)
        if numbers is not None and self.part.riders is not None and self.part.riders.view is not None:
            cache = self.part.riders.view(cache, numbers)
        return cache

    def drop(self, hidden: mx.array) -> mx.array:
        """The line of rows without nodes that the early exit drops."""
        assert self.part.riders is not None
        assert self.part.riders.early_exit is not None
        assert not self.anchors, "riders must begin after nodes were dropped"
        self.kept = self.part.riders.early_exit.surviving(hidden[:, self.main], self.draft)
        if len(self.kept) == self.draft.tree.size:
            return hidden
        chosen = mx.array(self.kept)
        self.draft = Draft(self.draft.tree.select(self.kept), self.draft.tokens[chosen])
        self.tapped = {at: value[:, chosen] for at, value in self.tapped.items()}
        self.rows = rows_of(self.draft.tree)
        ours = self.main.start + chosen
        if self.main == slice(0, hidden.shape[1]):
            return hidden[:, ours]
        before, after = hidden[:, : self.main.start], hidden[:, self.main.stop :]
        return mx.concatenate([before, hidden[:, ours], after], axis=1)

    def mount(self, hidden: mx.array, riders: Riders) -> mx.array:
        """The line of rows with its riders at the end, where its tree has some."""
        self.anchors = riders.anchors(self.draft.tree)
        if not self.anchors:
            return hidden
        first = self.main.start
        if len(self.anchors) == self.draft.tree.size:
            ends = hidden[:, self.main]
        else:
            ends = mx.concatenate([hidden[:, first + a : first + a + 1] for a in self.anchors], axis=1)
        self.rows, self.mounted = rows_of(self.draft.tree, self.anchors, riders.depths), True
        return mx.concatenate([hidden, riders.begin(ends)], axis=1)


def place(seats: Sequence[Seat]) -> None:
    """Say where the rows of every seat lie; riders lie in the order in which they were mounted."""
    at = 0
    for seat in seats:
        seat.main = slice(at, at + seat.rows.num_main)
        at = seat.main.stop
    for seat in sorted((seat for seat in seats if seat.mounted), key=lambda seat: seat.rider_layer):
        seat.beside = slice(at, at + len(seat.rows.depths) - seat.rows.num_main)
        at = seat.beside.stop


class Together:
    """What a layer is given in place of a cache when rows of several sequences run through it."""

    offset = 0  # every row has a position of its own

    def __init__(self, caches: Sequence[Any], masks: Sequence[Any], seats: Sequence[Seat]) -> None:
        """``caches`` and ``masks``: of each seat, for this layer."""
        self._caches, self._masks, self._seats = caches, masks, seats
        self._fetched: list[tuple[Any, Any]] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append each sequence's rows to its own cache; (1, H_kv, L, D_h) keys and values of all rows."""
        self._fetched = [
            cache.update_and_fetch(_rows(keys, seat), _rows(values, seat))
            for cache, seat in zip(self._caches, self._seats, strict=True)
        ]
        return keys, values

    def attend(self, queries: mx.array, scale: float, sinks: mx.array | None) -> mx.array:
        """Attention of (1, H, L, D_h) queries, each row over its own sequence."""
        main, beside = [], []
        for cache, mask, seat, (keys, values) in zip(
            self._caches, self._masks, self._seats, self._fetched, strict=True
        ):
            own = _rows(queries, seat)
            out = _stock_attention(own, keys, values, cache, scale, mask, sinks)
            num_main = seat.rows.num_main
            main.append(out[:, :, :num_main] if seat.mounted else out)
            if seat.mounted:
                beside.append((seat.beside.start, out[:, :, num_main:]))
        return mx.concatenate([*main, *(rows for _, rows in sorted(beside, key=lambda found: found[0]))], axis=2)


def _rows(packed: mx.array, seat: Seat) -> mx.array:
    """One sequence's rows of (1, H, L, D_h)."""
    main = packed[:, :, seat.main]
    if not seat.mounted:
        return main
    beside = packed[:, :, seat.beside]
    return beside if seat.rows.num_main == 0 else mx.concatenate([main, beside], axis=2)


_stock_attention: Callable[..., mx.array] = stock.scaled_dot_product_attention


def _attention(
    queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: mx.array | None = None
) -> mx.array:
    """mlx-lm's attention, which rows of several sequences do not share."""
    if isinstance(cache, Together):
        return cache.attend(queries, scale, sinks)
    return _stock_attention(queries, keys, values, cache, scale, mask, sinks)


def install_attention(family: DecoderFamily) -> bool:
    """Let the attention of a family's blocks ask a ``Together``; stock caches go on as before.

    Returns:
        Whether all of its blocks do.
    """
    homes = {type(getattr(layer, family.ATTENTION)).__module__ for layer in family.layers}
    names = [vars(sys.modules[home]) for home in homes]
    if not all(space.get(_ATTENTION) in (_stock_attention, _attention) for space in names):
        return False
    for space in names:
        space[_ATTENTION] = _attention
    return True
