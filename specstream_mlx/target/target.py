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
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from specstream_mlx.families import family_of
from specstream_mlx.target.caches import commit_rows, drop_rows
from specstream_mlx.target.masks import BoolMatrix, Reach, WindowView, reach, windows_of
from specstream_mlx.target.mounts import BARE, Mount
from specstream_mlx.target.rotary import PassContext, install
from specstream_mlx.target.rows import Depths, Draft, Riders, Rows, riders_alone, rows_of


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
        start = caches[0].offset
        early_exit = riders.early_exit if riders is not None else None
        exit_layer = early_exit.layer if early_exit is not None and draft.tree.size > 1 else 0
        rider_layer = riders.layer if riders is not None and riders.count else len(self.layers)
        kept: Sequence[int] = range(draft.tree.size)
        rows = rows_of(draft.tree)
        hidden = self.family.embed(draft.tokens[None], start + rows.depths)
        tapped: dict[int, mx.array] = {}
        anchors: tuple[int, ...] = ()
        layer = 0
        for boundary in sorted({0, exit_layer, rider_layer, len(self.layers), *taps}):
            hidden = self._run(hidden, range(layer, boundary), caches, start, rows, riders if anchors else None)
            layer = boundary
            if early_exit is not None and layer == exit_layer > 0:
                kept = early_exit.surviving(hidden[:, : draft.tree.size], draft)
                if len(kept) < draft.tree.size:
                    assert not anchors, "riders must begin after nodes were dropped"
                    chosen = mx.array(kept)
                    draft = Draft(draft.tree.select(kept), draft.tokens[chosen])
                    hidden = hidden[:, chosen]
                    tapped = {at: value[:, chosen] for at, value in tapped.items()}
                    rows = rows_of(draft.tree)
            if layer in taps:
                tapped[layer] = hidden[:, : draft.tree.size]
            if riders is not None and layer == rider_layer < len(self.layers):
                anchors = riders.anchors(draft.tree)
                if anchors:
                    every = len(anchors) == draft.tree.size
                    ends = hidden if every else mx.concatenate([hidden[:, a : a + 1] for a in anchors], axis=1)
                    hidden = mx.concatenate([hidden, riders.begin(ends)], axis=1)
                    rows = rows_of(draft.tree, anchors, riders.depths)
        rider_hidden = rider_logits = None
        size = draft.tree.size
        if len(anchors) > 1:  # only one anchor's riders will be wanted
            hidden, rider_hidden = hidden[:, :size], hidden[:, size:]
        logits = self.logits(hidden)
        if len(anchors) == 1:
            logits, rider_logits = logits[:size], logits[size:]
        return Passed(draft, logits, tapped, riders, anchors, rider_logits, rider_hidden, start, kept, exit_layer)

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
        hidden = riders.begin(passed.taps[riders.layer][:, node : node + 1])
        upper = range(riders.layer, len(self.layers))
        start = caches[upper[0]].offset
        hidden = self._run(hidden, upper, caches, start, riders_alone(riders.depths), riders)
        for index in upper:
            drop_rows(caches[index], start)
        return self.logits(hidden)

    def logits(self, hidden: mx.array) -> mx.array:
        """The final norm and the LM head: (1, L, D) after the last layer -> (L, V)."""
        return self.family.head(self.family.norm(hidden))[0]

    def _run(
        self,
        hidden: mx.array,
        layers: range,
        caches: Sequence[Any],
        start: int,
        rows: Rows,
        riders: Riders | None,
    ) -> mx.array:
        """Run (1, L, D) rows through some layers; ``riders`` when there are some among them."""
        if not layers:
            return hidden
        positions = None if rows.consecutive else mx.array(rows.depths + start)
        reaches = self.reaches(start, rows.depths, rows.visible)
        view = riders.view if riders is not None else None
        numbers = mx.array(rows.numbers) if view is not None else None
        with self.context.rows_at(positions, None if riders is None else rows.num_main):
            for index in layers:
                seen = reaches[self.windows[index]]
                cache = WindowView(caches[index], seen.first) if seen.first else caches[index]
                if view is not None and numbers is not None:
                    cache = view(cache, numbers)
                hidden = self.family.block(self.layers[index], hidden, seen.mask, cache, positions)
        return hidden
