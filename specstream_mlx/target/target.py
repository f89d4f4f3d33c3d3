"""A model that runs rows: it verifies draft trees and knows no drafter.

Layers are mlx-lm's own blocks, driven in segments::

    tokens of the tree (T)
      embed, layers 1 .. k              early exit may drop nodes in between (method section 6)
      riders begin after layer k        beside the tree's rows, which never see them (method section 1)
      layers k + 1 .. N -> M^N          -> norm, LM head -> logits

Taps are the hidden states of the tree's rows after some layers, which a drafter may want.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache

from specstream_mlx.families import family_of
from specstream_mlx.target.caches import commit_rows, drop_rows
from specstream_mlx.target.masks import BoolMatrix, Reach, reach, windows_of
from specstream_mlx.target.mounts import BARE, Mount
from specstream_mlx.target.rotary import PassContext, install
from specstream_mlx.target.rows import Depths, Draft, Riders
from specstream_mlx.target.together import Part, Seat, Together, install_attention, place


@dataclass(frozen=True, eq=False)
class Passed:
    """What one pass over a draft computed.

    Attributes:
        draft: what was verified, after pruning; T nodes.
        logits: (T, V); row i predicts the token after node i.
        taps: (1, T, D) hidden states of every node, by the number of layers below.
        riders: which ran beside the tree, and ``anchors`` the nodes that had some.
        rider_logits: (G, V) of the one anchor, else None.
        rider_hidden: (1, A * G, D) before the final norm, of several anchors, else None.
        start: cached rows before the pass.
        kept: (T,) the rows that these nodes have in layers below ``exit_layer``, where nothing was pruned.
    """

    draft: Draft
    logits: mx.array
    taps: Mapping[int, mx.array]
    riders: Riders | None
    anchors: tuple[int, ...]
    rider_logits: mx.array | None
    rider_hidden: mx.array | None
    start: int
    kept: Sequence[int]
    exit_layer: int

    @property
    def arrays(self) -> list[mx.array]:
        """What may be read after the pass; evaluated with it, another thread can go on."""
        more = [array for array in (self.rider_logits, self.rider_hidden) if array is not None]
        return [self.draft.tokens, *self.taps.values(), *more]

    def carried(self, node: int, count: int) -> bool:
        """Whether ``count`` riders of ``node`` ran beside the tree."""
        return self.riders is not None and node in self.anchors and count <= self.riders.count


class Target(nn.Module):
    """An mlx-lm model that can verify draft trees.

    Called like any mlx-lm model it is the base: ``model(inputs, cache=cache)``, so stock generation works on it too.

    Passes may be built in several threads; what is mounted is changed under a lock.
    """

    def __init__(self, base: nn.Module, model_type: str) -> None:
        """Wrap ``base`` in place.

        Raises:
            UnsupportedError: the family or its cache is not supported.
        """
        super().__init__()
        self.base = base
        self.model_type = model_type
        self.family = family_of(base, model_type)
        self.context = PassContext()  # what the wrapped modules read; LoRA on riders alone shares it
        self.windows = windows_of(self.family.prompt_caches())
        install(self.family, self.context)
        self._mounted = BARE
        self._lock = threading.RLock()

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """The base model: (B, L) ids -> (B, L, V) logits."""
        return self.base(inputs, cache=cache)

    @property
    def args(self) -> Any:
        """The base model's arguments."""
        return self.base.args

    @property
    def layers(self) -> Sequence[Any]:
        """The base model's blocks, N of them."""
        return self.family.layers

    @property
    def vocab_size(self) -> int:
        """V, tokens of the vocabulary."""
        return int(self.family.size(vars(self.args), "vocab_size"))

    @property
    def context_length(self) -> int | None:
        """Tokens the model was made for; None when its configuration does not say."""
        return self.family.size(vars(self.args), "max_position_embeddings")

    def tokens_within_context(self, max_tokens: int, num_tokens: int) -> int:
        """How many of ``max_tokens`` (-1: any number) can follow ``num_tokens`` tokens.

        Rotary positions go on for ever. Learned ones end, and then so does the text, as with ``max_tokens``: plain
        decoding would read past the table.
        """
        if self.family.ROTARY or self.context_length is None:
            return max_tokens
        left = self.context_length - num_tokens
        return left if max_tokens == -1 else min(max_tokens, left)

    @contextmanager
    def building(self, mount: Mount | None = None) -> Iterator[None]:
        """Build passes with these layers in place, whatever other threads build; None: with what is in place."""
        with self._lock:
            before = self._mounted
            self._put(before if mount is None else mount)
            try:
                yield
            finally:
                self._put(before)

    def mount(self, mount: Mount) -> None:
        """Leave these layers in place from now on."""
        with self._lock:
            self._put(mount)

    @property
    def mounted(self) -> Mount:
        """The layers in place."""
        return self._mounted

    def _put(self, mount: Mount) -> None:
        if mount is not self._mounted:
            self._mounted.take(self.base)
            mount.put(self.base)
            self._mounted = mount

    def make_cache(self) -> list[Any]:
        """A fresh prompt cache, one of mlx-lm's plain caches per layer, also where a window limits what it sees."""
        return [KVCache() for _ in self.layers]

    def reaches(self, start: int, depths: Depths, visible: BoolMatrix | None) -> dict[int | None, Reach]:
        """What the rows of a pass see, for each window that a layer has; as ``reach`` takes them."""
        named = self.family.SHARED_ATTENTION
        return {window: reach(start, depths, visible, window, named=named) for window in set(self.windows)}

    def verify(
        self,
        draft: Draft,
        caches: Sequence[Any],
        *,
        riders: Riders | None = None,
        taps: Sequence[int] = (),
    ) -> Passed:
        """Run the target over a draft; all rows of its tree are appended to ``caches`` until ``commit``.

        Args:
            draft: its root follows the cached tokens.
            caches: one per layer, changed in place.
            riders: rows to run beside the tree. Their early exit reads back from the device in mid-pass.
            taps: layers after which to keep the hidden states of the tree's rows; 0 is the embedding.
        """
        return self.verify_together([Part(draft, caches, riders, taps)])[0]

    def verify_together(self, parts: Sequence[Part]) -> list[Passed]:
        """As ``verify`` for the drafts of several sequences, whose rows run through every linear layer together.

        Rows see their own sequence alone, on its own caches. Models whose attention is written out in their blocks
        verify one draft after another.
        """
        if len(parts) > 1 and not self.runs_together:
            return [self._verify([part])[0] for part in parts]
        return self._verify(parts)

    @cached_property
    def runs_together(self) -> bool:
        """Whether rows of several sequences can run in one pass."""
        return install_attention(self.family)

    def _verify(self, parts: Sequence[Part]) -> list[Passed]:
        """The pass over all parts: rows of trees first, riders of all parts behind them."""
        seats = [Seat(part, len(self.layers)) for part in parts]
        tokens = mx.concatenate([part.draft.tokens for part in parts]) if len(parts) > 1 else parts[0].draft.tokens
        depths = [seat.start + seat.rows.depths for seat in seats]
        hidden = self.family.embed(tokens[None], np.concatenate(depths) if len(parts) > 1 else depths[0])
        place(seats)
        layer = 0
        for boundary in sorted({0, len(self.layers)}.union(*(seat.boundaries for seat in seats))):
            hidden = self._run(hidden, range(layer, boundary), seats)
            layer = boundary
            for seat in seats:
                if layer == seat.exit_layer > 0:
                    hidden = seat.drop(hidden)
                    place(seats)
            for seat in seats:
                if layer in seat.part.taps:
                    seat.tapped[layer] = hidden[:, seat.main]
                riders = seat.part.riders
                if riders is not None and layer == seat.rider_layer < len(self.layers):
                    hidden = seat.mount(hidden, riders)
                    place(seats)
        return self._read_out(hidden, seats)

    def _read_out(self, hidden: mx.array, seats: Sequence[Seat]) -> list[Passed]:
        """The logits of every row that is certain to be wanted, and what else the pass gave."""
        riding = sorted((seat for seat in seats if seat.anchors), key=lambda seat: seat.beside.start)
        left = {id(seat): hidden[:, seat.beside] for seat in riding if len(seat.anchors) > 1}
        behind = seats[-1].main.stop
        places: dict[int, slice] = {}
        wanted = [seat for seat in riding if id(seat) not in left]  # of several anchors, only one's will be
        for seat in wanted:
            places[id(seat)] = slice(behind, behind + seat.beside.stop - seat.beside.start)
            behind = places[id(seat)].stop
        if left:
            rows = [hidden[:, : seats[-1].main.stop], *(hidden[:, seat.beside] for seat in wanted)]
            hidden = mx.concatenate(rows, axis=1) if wanted else rows[0]
        logits = self.logits(hidden)
        passed = []
        for seat in seats:
            rider_logits = logits[places[id(seat)]] if id(seat) in places else None
            whole = len(seats) == 1 and len(logits) == seat.main.stop
            passed.append(
                Passed(
                    seat.draft,
                    logits if whole else logits[seat.main],
                    seat.tapped,
                    seat.part.riders,
                    seat.anchors,
                    rider_logits,
                    left.get(id(seat)),
                    seat.start,
                    seat.kept,
                    seat.exit_layer,
                )
            )
        return passed

    def read(self, tokens: mx.array, caches: Sequence[Any], taps: Sequence[int]) -> dict[int, mx.array]:
        """Append a stretch of text, (L,) ids, to ``caches``; its (1, L, D) hidden states after the layers ``taps``."""
        seat = Seat.of_text(len(tokens), caches)
        place([seat])
        hidden = self.family.embed(tokens[None], seat.start + seat.rows.depths)
        tapped: dict[int, mx.array] = {}
        layer = 0
        for boundary in sorted({0, len(self.layers), *taps}):
            hidden = self._run(hidden, range(layer, boundary), [seat])
            layer = boundary
            if layer in taps:
                tapped[layer] = hidden
        return tapped

    def commit(self, passed: Passed, nodes: Sequence[int], caches: Sequence[Any]) -> None:
        """Keep the rows of ``nodes`` (a path from the root) in the caches and drop all others of the pass."""
        unpruned = [passed.kept[node] for node in nodes]
        for index, cache in enumerate(caches):
            commit_rows(cache, passed.start, unpruned if index < passed.exit_layer else nodes)

    def ride(self, passed: Passed, node: int, riders: Riders, caches: Sequence[Any]) -> mx.array:
        """The logits of a node's riders, (G, V): those that ran beside the tree, or a pass of their own.

        A pass of their own runs the layers above ``riders.layer``; ``caches`` must be committed up to and including
        ``node`` and are left as they were, and the layer must have been tapped.
        """
        count = riders.count
        if passed.carried(node, count):
            if passed.rider_logits is not None:
                return passed.rider_logits[:count]
            assert passed.rider_hidden is not None
            assert passed.riders is not None
            first = passed.anchors.index(node) * passed.riders.count
            return self.logits(passed.rider_hidden[:, first : first + count])
        return self.ride_together([(passed, node, riders, caches)])[0]

    def ride_together(self, rides: Sequence[tuple[Passed, int, Riders, Sequence[Any]]]) -> list[mx.array]:
        """As ``ride`` in a pass of their own, for the riders of several sequences that begin after the same layer."""
        if len(rides) > 1 and not self.runs_together:
            return [self.ride_together([ride])[0] for ride in rides]
        seats, begun = [], []
        for passed, node, riders, caches in rides:
            begun.append(riders.begin(passed.taps[riders.layer][:, node : node + 1]))
            seats.append(Seat.of_riders(riders, caches))
        place(seats)
        upper = range(rides[0][2].layer, len(self.layers))
        hidden = self._run(mx.concatenate(begun, axis=1) if len(begun) > 1 else begun[0], upper, seats)
        for seat in seats:
            for index in upper:
                drop_rows(seat.part.caches[index], seat.start)
        logits = self.logits(hidden)
        return [logits[seat.beside] for seat in seats] if len(seats) > 1 else [logits]

    def logits(self, hidden: mx.array) -> mx.array:
        """The final norm and the LM head: (1, L, D) after the last layer -> (L, V)."""
        return self.family.head(self.family.norm(hidden))[0]

    def _run(self, hidden: mx.array, layers: range, seats: Sequence[Seat]) -> mx.array:
        """Run (1, L, D) rows through some layers, each row over the caches of its own sequence."""
        if not layers:
            return hidden
        alone = seats[0] if len(seats) == 1 else None
        num_main = seats[-1].main.stop
        riding = any(seat.mounted for seat in seats)
        if alone is not None:
            positions = None if alone.rows.consecutive else mx.array(alone.rows.depths + alone.start)
        else:
            positions = mx.array(
                np.concatenate([*(seat.positions[0] for seat in seats), *(seat.positions[1] for seat in seats)])
            )
        reaches = [self.reaches(seat.start, seat.rows.depths, seat.rows.visible) for seat in seats]
        numbers = [seat.numbers for seat in seats]
        with self.context.rows_at(positions, num_main if riding else None):
            for index in layers:
                seen = [of_seat[self.windows[index]] for of_seat in reaches]
                caches = [
                    seat.cache(index, sight.first, own) for seat, sight, own in zip(seats, seen, numbers, strict=True)
                ]
                layer = self.layers[index]
                if alone is not None:
                    hidden = self.family.block(layer, hidden, seen[0].mask, caches[0], positions)
                else:
                    together = Together(caches, [sight.mask for sight in seen], seats)
                    hidden = self.family.block(layer, hidden, None, together, positions)
        return hidden
