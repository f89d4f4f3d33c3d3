"""A base model with streams: one verification pass, one stream pass.

Layers are mlx-lm's own blocks, driven in segments: below the stream layers, and the top ``N_s`` stream layers::

    tokens of the tree (T)
      embed, layers 1 .. N - N_s        -> trunk M^{N-N_s}      early exit may drop nodes here (method section 6)
      layers N - N_s + 1 .. N           -> M^N -> logits        streams of the anchors ride along from here
    accepted node, where it was no anchor
      streams of its trunk row (gamma)
      layers N - N_s + 1 .. N           -> S^N -> stream logits

The insertion says which nodes are anchors: every node (parallel, as in the paper), the end of the likeliest path
(leaf), or none (deferred). All compute the same numbers, because a main row never sees a stream row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import KVCache, make_prompt_cache

from specstream_mlx.drafters.streams.parameters import Streams
from specstream_mlx.errors import UnsupportedError, UsageError
from specstream_mlx.families import family_of
from specstream_mlx.formats.config import StreamConfig
from specstream_mlx.formats.places import ADAPTER_WEIGHTS, resolve
from specstream_mlx.models.adapters import OWN, Adapter, AdapterShelf, check_adapter_configuration, read_adapter
from specstream_mlx.options import Insertion
from specstream_mlx.target.caches import commit_rows, drop_rows
from specstream_mlx.target.tree import DraftTree
from specstream_mlx.target.tree_attention import (
    BoolMatrix,
    PassContext,
    Reach,
    ValueRotation,
    WindowView,
    install,
    reach,
    windows_of,
    with_streams,
)

Depths = npt.NDArray[np.int32]


@dataclass(frozen=True)
class VerificationPass:
    """What one pass over a tree computed.

    Attributes:
        tree: the tree that was verified, after pruning; T nodes.
        node_tokens: (T,) ids.
        logits: (T, V); row i predicts the token after node i.
        trunk: (1, T, D), ``M^{N-N_s}`` of every node.
        anchors: nodes whose streams were run beside the tree, A of them.
        num_streams: how many streams of each.
        stream_logits: (num_streams, V) of the one anchor of leaf insertion, else None.
        stream_hidden: (1, A * num_streams, D), ``S^N`` before the final norm, of parallel insertion, else None.
        start: cached rows before the pass.
        kept: (T,) the rows that these nodes had before pruning.
    """

    tree: DraftTree
    node_tokens: mx.array
    logits: mx.array
    trunk: mx.array
    anchors: Sequence[int]
    num_streams: int
    stream_logits: mx.array | None
    stream_hidden: mx.array | None
    start: int
    kept: Sequence[int]


class SpecStreamModel(nn.Module):
    """An mlx-lm model that can verify draft trees and, when it has streams, draft them.

    Called like any mlx-lm model it is the base: ``model(inputs, cache=cache)``, so stock generation works on it too.
    """

    def __init__(
        self,
        base: nn.Module,
        model_type: str,
        stream_config: StreamConfig | None = None,
        streams: Streams | None = None,
    ) -> None:
        """Wrap ``base`` in place; ``streams`` and ``stream_config`` come together or not at all.

        Raises:
            UnsupportedError: the family or its cache is not supported.
        """
        super().__init__()
        self.base = base
        self.model_type = model_type
        self.family = family_of(base, model_type)
        self.context = PassContext()  # what the modules wrapped by the seam read; stream-only LoRA layers share it
        self.windows = windows_of(make_prompt_cache(base))
        install(self.family, self.context)
        self._shelf = AdapterShelf(base)
        if stream_config is not None:
            self.add_adapter(OWN, Adapter(stream_config, streams))
        self.use_adapter(OWN if stream_config is not None else None)

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

    def load_adapter(self, path_or_repo: str | Path, name: str | None = None) -> str:
        """Read an adapter and keep it in memory, beside any others; ``use_adapter`` puts it to use.

        Args:
            path_or_repo: a stream adapter, a LoRA that mlx-lm wrote, or a repository id.
            name: what to call it here; None: the directory's name, or the repository's.

        Returns:
            The name.

        Raises:
            UsageError: the name is taken.
            InvalidInputError: a damaged adapter, or one of another base. The model is as it was.
            UnsupportedError: a format version or a kind of adapter that we do not run. The model is as it was.
        """
        directory = resolve(path_or_repo, weights=ADAPTER_WEIGHTS, judge=check_adapter_configuration)
        local = Path(path_or_repo).expanduser().is_dir()
        name = name or (directory.resolve().name if local else str(path_or_repo))
        self._shelf.check_free(name)
        with self._shelf.bare_base():
            adapter = read_adapter(directory, self.base, self.family, self.context)
        self.add_adapter(name, adapter)
        return name

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Keep an adapter that was made here, beside any others.

        Raises:
            UsageError: the name is taken.
        """
        self._shelf.check_free(name)
        self._shelf.resident[name] = adapter

    def use_adapter(self, name: str | None) -> None:
        """Put a loaded adapter to use, or with None the base alone, which then decodes plainly.

        Takes no time worth the name: the base's weights stay where they are. The streams that lie in a model's own
        directory are an adapter too, called ``"own"``. A prompt cache goes on with the adapter it was made with, or
        with any that leaves the text to the base.

        Raises:
            UsageError: no adapter of this name is loaded.
        """
        adapter = self._shelf.put(name)
        self.stream_config, self.streams = adapter.stream_config, adapter.streams
        self.pass_times = adapter.pass_times

    def unload_adapter(self, name: str) -> None:
        """Free an adapter's memory; when it is in use, the base alone is in use afterwards.

        Raises:
            UsageError: no adapter of this name is loaded.
        """
        self._shelf.get(name)
        if self.adapter == name:
            self.use_adapter(None)
        del self._shelf.resident[name]

    @property
    def adapter(self) -> str | None:
        """The name of the adapter in use; None: the base alone."""
        return self._shelf.name

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Every adapter in memory, by name; ``num_bytes`` is what it takes."""
        return dict(self._shelf.resident)

    @property
    def gamma(self) -> int:
        """Number of streams; 0 without streams."""
        return self.stream_config.gamma if self.stream_config is not None else 0

    @property
    def num_trunk_layers(self) -> int:
        """``N - N_s``, the layers below the first stream layer."""
        return len(self.layers) - (self.stream_config.num_stream_layers if self.stream_config is not None else 0)

    @property
    def prune_layer(self) -> int:
        """The layer after which the early-exit pruner reads; 0 without a pruner."""
        return self.stream_config.prune.layer if self.stream_config and self.stream_config.prune else 0

    def check_pruning(self, insertion: Insertion) -> None:
        """Make sure that a pass with this insertion can prune.

        Raises:
            UsageError: the model has no pruner.
            UnsupportedError: the pruner reads above the layer where streams are inserted.
        """
        if self.prune_layer == 0:
            raise UsageError("prune_threshold is given, but this model has no early-exit pruner")
        if insertion != "deferred" and self.prune_layer > self.num_trunk_layers:
            raise UnsupportedError(
                f"prune.layer {self.prune_layer} lies above the first stream layer {self.num_trunk_layers + 1}; "
                f"{insertion} insertion cannot prune there, use deferred insertion"
            )

    def make_cache(self) -> list[Any]:
        """A fresh prompt cache, one of mlx-lm's plain caches per layer, also where a window limits what it sees."""
        return [KVCache() for _ in self.layers]

    def reaches(self, start: int, depths: Depths, visible: BoolMatrix | None) -> dict[int | None, Reach]:
        """What the rows of a pass see, for each window that a layer has; as ``reach`` takes them."""
        named = self.family.SHARED_ATTENTION
        return {window: reach(start, depths, visible, window, named=named) for window in set(self.windows)}

    def verify(
        self,
        node_tokens: mx.array,
        tree: DraftTree,
        caches: Sequence[Any],
        *,
        insertion: Insertion = "deferred",
        num_streams: int | None = None,
        prune_threshold: float | None = None,
    ) -> VerificationPass:
        """Run the target over a tree; all its rows are appended to ``caches`` until ``commit``.

        Args:
            node_tokens: (T,) ids of the tree's nodes.
            tree: T nodes; its root follows the cached tokens.
            caches: one per layer, changed in place.
            insertion: which nodes' streams are run along with the tree.
            num_streams: only the first so many streams, which do not depend on the others; None: all of them.
            prune_threshold: early exit: drop nodes whose probability under their parent's early-exit distribution
                is below this, with their subtrees. Reads back T numbers in mid-pass.
        """
        start = caches[0].offset
        prune_layer = 0
        if prune_threshold is not None and tree.size > 1:
            self.check_pruning(insertion)
            prune_layer = self.prune_layer
        trunk_layer = self.num_trunk_layers
        count = self.gamma if num_streams is None else num_streams
        kept: Sequence[int] = range(tree.size)
        rows = rows_of(tree, (), ())
        hidden = self.family.embed(node_tokens[None], start + rows.depths)
        trunk = hidden
        anchors: tuple[int, ...] = ()
        layer = 0
        for boundary in sorted({prune_layer, trunk_layer, len(self.layers)}):
            hidden = self._run(hidden, range(layer, boundary), caches, start, rows, count if anchors else None)
            layer = boundary
            if prune_threshold is not None and layer == prune_layer > 0:
                kept = self._surviving(hidden, node_tokens, tree, prune_threshold)
                if len(kept) < tree.size:
                    selected = mx.array(kept)
                    tree, node_tokens = tree.select(kept), node_tokens[selected]
                    hidden, trunk = hidden[:, selected], trunk[:, selected] if layer > trunk_layer else trunk
                    rows = rows_of(tree, (), ())
            if layer == trunk_layer:
                trunk = hidden
                anchors = _anchors(tree, insertion)
                if anchors:
                    assert self.streams is not None
                    ends = trunk if len(anchors) == tree.size else trunk[:, anchors[0] : anchors[0] + 1]
                    hidden = mx.concatenate([hidden, self.streams(ends, count)], axis=1)
                    rows = rows_of(tree, anchors, self._stream_depths[:count])
        stream_hidden = stream_logits = None
        if len(anchors) > 1:  # only one anchor's streams will be wanted
            hidden, stream_hidden = hidden[:, : tree.size], hidden[:, tree.size :]
        logits = self.family.head(self.family.norm(hidden))[0]
        if len(anchors) == 1:
            logits, stream_logits = logits[: tree.size], logits[tree.size :]
        return VerificationPass(
            tree, node_tokens, logits, trunk, anchors, count, stream_logits, stream_hidden, start, kept
        )

    def commit(self, verified: VerificationPass, nodes: Sequence[int], caches: Sequence[Any]) -> None:
        """Keep the rows of ``nodes`` (a path from the root) in the caches and drop all others of the pass."""
        unpruned = [verified.kept[node] for node in nodes]
        for index, cache in enumerate(caches):
            commit_rows(cache, verified.start, unpruned if index < self.prune_layer else nodes)

    def stream_logits(
        self, verified: VerificationPass, node: int, caches: Sequence[Any], num_streams: int | None = None
    ) -> mx.array:
        """What the streams anchored at ``node`` predict; row ``j - 1`` is stream ``j``, the token after the next ``j``.

        Where these streams were not run along with the tree, this is a pass of its own over their rows of the top
        ``N_s`` layers, and ``caches`` must already be committed up to and including ``node``. They are left as they
        were.

        Args:
            num_streams: only the first so many streams, which do not depend on the others; None: all of them.

        Returns:
            (num_streams, V).
        """
        count = self.gamma if num_streams is None else num_streams
        if self.has_streams_of(verified, node, count):
            if verified.stream_logits is not None:
                return verified.stream_logits[:count]
            assert verified.stream_hidden is not None
            first = verified.anchors.index(node) * verified.num_streams
            return self.family.head(self.family.norm(verified.stream_hidden[:, first : first + count]))[0]
        assert self.streams is not None
        hidden = self.streams(verified.trunk[:, node : node + 1], count)
        upper = range(self.num_trunk_layers, len(self.layers))
        start = caches[upper[0]].offset
        # The anchor is the last cached row, so depth 0 of this pass lies one position after it.
        depths = np.array(self._stream_depths[:count], dtype=np.int32) - 1
        hidden = self._run(hidden, upper, caches, start, Rows(depths, np.tri(count, dtype=np.bool_), 0), count)
        for index in upper:
            drop_rows(caches[index], start)
        return self.family.head(self.family.norm(hidden))[0]

    def has_streams_of(self, verified: VerificationPass, node: int, num_streams: int) -> bool:
        """Whether so many streams of ``node`` were run along with the tree, so that no pass of their own is needed."""
        return node in verified.anchors and num_streams <= verified.num_streams

    def early_exit_logits(self, hidden: mx.array) -> mx.array:
        """``z = LMHead(final_norm(o(M)))`` (section 6): (1, T, D) after the pruner's layer -> (T, V)."""
        assert self.streams is not None
        assert self.stream_config is not None
        assert self.stream_config.prune is not None
        mapped = self.streams.prune(hidden)
        if self.stream_config.prune.final_norm:
            mapped = self.family.norm(mapped)
        return self.family.head(mapped)[0]

    def _run(
        self,
        hidden: mx.array,
        layers: range,
        caches: Sequence[Any],
        start: int,
        rows: "Rows",
        num_streams: int | None,
    ) -> mx.array:
        """Run (1, L, D) rows through some layers; ``num_streams`` per anchor when there are stream rows among them."""
        if not layers:
            return hidden
        positions = None if rows.consecutive else mx.array(rows.depths + start)
        reaches = self.reaches(start, rows.depths, rows.visible)
        num_main_rows = None if num_streams is None else rows.num_main
        epsilon = self.stream_config.stream_id.epsilon if self.stream_config is not None else None
        stream_index: mx.array | None = None
        if num_streams is not None and epsilon is not None:
            num_stream_rows = len(rows.depths) - rows.num_main
            stream_index = mx.array([0] * rows.num_main + [1 + row % num_streams for row in range(num_stream_rows)])
        with self.context.rows_at(positions, num_main_rows):
            for index in layers:
                seen = reaches[self.windows[index]]
                cache = WindowView(caches[index], seen.first) if seen.first else caches[index]
                if stream_index is not None and epsilon is not None:
                    cache = ValueRotation(cache, stream_index, epsilon)
                hidden = self.layers[index](hidden, seen.mask, cache)
        return hidden

    @property
    def _stream_depths(self) -> tuple[int, ...]:
        """(gamma,) position of each stream relative to its anchor."""
        assert self.stream_config is not None
        if self.stream_config.stream_position == "anchor":
            return (0,) * self.gamma
        return tuple(range(1, self.gamma + 1))

    def _surviving(self, hidden: mx.array, node_tokens: mx.array, tree: DraftTree, threshold: float) -> list[int]:
        """Nodes whose token is likely enough under the early-exit distribution of their parent."""
        probs = mx.softmax(self.early_exit_logits(hidden), axis=-1, precise=True)
        parents = mx.array(tree.parents[1:])
        child_probs: list[float] = probs[parents, node_tokens[1:]].tolist()  # type: ignore[assignment]
        return tree.surviving([True, *(prob >= threshold for prob in child_probs)])


class Rows:
    """What is fixed about the rows of a pass.

    Attributes:
        depths: (L,) position of every row relative to the first.
        visible: (L, L) which rows see which; None: each sees all before it.
        num_main: rows from this one on are streams.
        consecutive: whether positions just count up.
    """

    def __init__(self, depths: Depths, visible: BoolMatrix, num_main: int) -> None:
        self.depths, self.num_main = depths, num_main
        self.visible = None if np.array_equal(visible, np.tri(len(depths), dtype=np.bool_)) else visible
        self.consecutive = np.array_equal(depths, np.arange(len(depths)))


@lru_cache(maxsize=256)
def rows_of(tree: DraftTree, anchors: tuple[int, ...], stream_depths: tuple[int, ...]) -> Rows:
    """The rows of a pass over ``tree``, made once.

    Args:
        anchors: nodes whose streams follow the tree's rows.
        stream_depths: position of every such stream relative to its anchor.
    """
    main = np.array(tree.depths, dtype=np.int32)
    if not anchors:
        return Rows(main, tree.ancestor_mask, tree.size)
    streams = main[list(anchors), None] + np.array(stream_depths, dtype=np.int32)
    depths = np.concatenate([main, streams.reshape(-1)])
    return Rows(depths, with_streams(tree.ancestor_mask, anchors, len(stream_depths)), tree.size)


def _anchors(tree: DraftTree, insertion: Insertion) -> tuple[int, ...]:
    if insertion == "deferred":
        return ()
    return (tree.leaf,) if insertion == "leaf" else tuple(range(tree.size))
