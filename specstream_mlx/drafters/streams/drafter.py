"""The streams as a drafter (method sections 1, 2 and 7).

The streams of a node begin from its hidden state ``M^{N-N_s}`` and run through the top ``N_s`` layers. The way to draft
says when: beside the verified tree, where the node is the end of its likeliest path (leaf) or whichever it is
(parallel), or on their own once the node is known (deferred). All give the same numbers, because no row of the tree
sees a stream.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, get_args

import mlx.core as mx

from specstream_mlx.drafters.marginals import MarginalState
from specstream_mlx.drafters.protocol import Anchor, Wish
from specstream_mlx.drafters.streams.parameters import Streams
from specstream_mlx.drafters.streams.value_rotation import ValueRotation
from specstream_mlx.errors import UnsupportedError, UsageError
from specstream_mlx.formats.config import StreamConfig
from specstream_mlx.options import Insertion
from specstream_mlx.target.rows import Draft, EarlyExit, Riders
from specstream_mlx.target.target import Passed, Target
from specstream_mlx.target.tree import DraftTree


class StreamsDrafter:
    """As ``protocol.Drafter``."""

    name = "streams"
    ways = get_args(Insertion)

    def __init__(self, config: StreamConfig, streams: Streams, num_layers: int) -> None:
        """``num_layers``: N, of the target."""
        self.config, self.streams = config, streams
        self.prune_threshold: float | None = None
        self.max_depth = config.gamma
        self.trunk_layer = num_layers - config.num_stream_layers
        self.taps = (self.trunk_layer,)

    @property
    def stream_depths(self) -> tuple[int, ...]:
        """(gamma,) position of each stream relative to its anchor."""
        if self.config.stream_position == "anchor":
            return (0,) * self.config.gamma
        return tuple(range(1, self.config.gamma + 1))

    def begin(self, target: Target, prompt: Sequence[int]) -> "StreamsState":
        """As ``Drafter``."""
        return StreamsState(self, target)

    def pruning(self, threshold: float, insertion: Insertion) -> "StreamsDrafter":
        """The same streams with early exit: nodes less probable than this under their parent are dropped.

        Raises:
            UsageError: there is no pruner.
            UnsupportedError: the pruner reads above the layer where streams are inserted.
        """
        if self.config.prune is None:
            raise UsageError(
                "prune_threshold does not go with this model, which has no early-exit pruner; leave it out"
            )
        if insertion != "deferred" and self.config.prune.layer > self.trunk_layer:
            raise UnsupportedError(
                f"prune.layer {self.config.prune.layer} lies above the first stream layer {self.trunk_layer + 1}; "
                f"{insertion} insertion cannot prune there, use deferred insertion"
            )
        pruned = StreamsDrafter(self.config, self.streams, self.trunk_layer + self.config.num_stream_layers)
        pruned.prune_threshold = threshold
        return pruned

    def riders(self, count: int, insertion: str, early_exit: EarlyExit | None = None) -> Riders:
        """The first ``count`` streams, which do not depend on the others, as rows beside a tree."""
        epsilon = self.config.stream_id.epsilon

        def begin(trunk: mx.array) -> mx.array:
            return self.streams(trunk, count)

        def view(cache: Any, numbers: mx.array) -> Any:
            assert epsilon is not None
            return ValueRotation(cache, numbers, epsilon)

        return Riders(
            self.trunk_layer,
            self.stream_depths[:count],
            begin,
            _ANCHORS[insertion],
            view if epsilon is not None else None,
            early_exit,
        )

    def early_exit(self, target: Target) -> EarlyExit | None:
        """What drops nodes in mid-pass; None without a threshold."""
        if self.prune_threshold is None or self.config.prune is None:
            return None
        threshold = self.prune_threshold

        def surviving(hidden: mx.array, draft: Draft) -> list[int]:
            probs = mx.softmax(self.early_exit_logits(target, hidden), axis=-1, precise=True)
            parents = mx.array(draft.tree.parents[1:])
            child_probs: list[float] = probs[parents, draft.tokens[1:]].tolist()  # type: ignore[assignment]
            return draft.tree.surviving([True, *(prob >= threshold for prob in child_probs)])

        return EarlyExit(self.config.prune.layer, surviving)

    def early_exit_logits(self, target: Target, hidden: mx.array) -> mx.array:
        """``z = LMHead(final_norm(o(M)))`` (section 6): (1, T, D) after the pruner's layer -> (T, V)."""
        assert self.config.prune is not None
        mapped = self.streams.prune(hidden)
        return target.logits(mapped) if self.config.prune.final_norm else target.family.head(mapped)[0]


class StreamsState(MarginalState):
    """The streams of one sequence keep nothing between passes."""

    def __init__(self, drafter: StreamsDrafter, target: Target) -> None:
        self.drafter, self.target = drafter, target
        self._early_exit = drafter.early_exit(target)
        self._riders = lru_cache(maxsize=64)(drafter.riders)

    def riders(self, wish: Wish | None) -> Riders | None:
        """As ``DraftState``: the streams that the next tree needs, and the early exit of this one."""
        if wish is not None:
            return self._riders(wish.depth, wish.way, self._early_exit)
        return self._riders(0, "deferred", self._early_exit) if self._early_exit is not None else None

    def foresees(self, passed: Passed, node: int, wish: Wish) -> bool:
        """As ``DraftState``: the node's streams are in the pass, and neither the tree nor pruning reads back."""
        return wish.tree is not None and self._early_exit is None and passed.carried(node, wish.depth)

    def marginals(self, anchor: Anchor, depth: int) -> mx.array:
        """As ``MarginalState``."""
        if not anchor.passed.carried(anchor.node, depth):
            self.own_passes += 1
        return self.target.ride(anchor.passed, anchor.node, self._riders(depth, "deferred"), anchor.caches)


def _none(tree: DraftTree) -> tuple[int, ...]:
    return ()


def _leaf(tree: DraftTree) -> tuple[int, ...]:
    return (tree.leaf,)


def _every(tree: DraftTree) -> tuple[int, ...]:
    return tuple(range(tree.size))


_ANCHORS: dict[str, Callable[[DraftTree], tuple[int, ...]]] = {"deferred": _none, "leaf": _leaf, "parallel": _every}
