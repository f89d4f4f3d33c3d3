"""The draft plan: which tree to verify next, from which stream guesses, and how the streams are inserted."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import mlx.core as mx

from specstream_mlx.errors import UsageError
from specstream_mlx.options import DraftMode, DraftOptions, DraftReport, Insertion
from specstream_mlx.target.tree import DraftTree

DEFAULT_NODES = 6
MAX_NODES = 1024
# Assumed acceptance of a stream's k-th guess when its parent was right. Nothing was measured for it: it shapes the
# default tree and no more, until calibration replaces it by what the model at hand does.
ASSUMED_ACCEPTANCE = ((0.85, 0.07, 0.02), (0.78, 0.09, 0.03), (0.72, 0.10, 0.04), (0.66, 0.10, 0.04))


@dataclass(frozen=True)
class DraftPlan:
    """How to draft: a fixed tree, or with ``tree`` None a best-first tree of ``budget`` nodes made anew every pass.

    In ``auto`` the tree is where the control starts; a tree of the root alone is plain decoding.
    """

    mode: DraftMode
    gamma: int
    tree: DraftTree | None
    budget: int
    insertion: Insertion = "leaf"
    prune_threshold: float | None = None
    source: Literal["default", "user", "calibrated"] = "default"
    note: str | None = None

    @property
    def drafts(self) -> bool:
        """Whether streams may be used at all."""
        return self.gamma > 0 and self.mode != "off"

    def report(self) -> DraftReport:
        """The plan in the terms of ``generate --json``."""
        return DraftReport(self.mode, self.gamma, self.budget, self.insertion, self.source, self.note)

    def draft(
        self, root: mx.array, stream_logits: mx.array, tree: DraftTree | None, max_depth: int | None = None
    ) -> tuple[DraftTree, mx.array]:
        """The next tree and its tokens.

        Args:
            root: (1,) the newest token.
            stream_logits: (gamma, V) from the node that the root followed; row ``g - 1`` fills depth ``g``.
            tree: the tree to fill; None: the ``budget`` likeliest paths under the streams' own probabilities.
            max_depth: deepest guess of use, when fewer tokens than that are still wanted.

        Returns:
            The tree, and (T,) ids of its nodes; a given tree reads nothing back from the device.
        """
        if tree is not None:
            tree = tree if max_depth is None else tree.truncate(max_depth)
            candidates = top_candidates(stream_logits, max(tree.widths, default=0))
        else:
            depth = min(self.gamma, self.gamma if max_depth is None else max_depth)
            candidates = top_candidates(stream_logits, min(self.budget, stream_logits.shape[-1]))
            logprobs = stream_logits - mx.logsumexp(stream_logits, axis=-1, keepdims=True)
            ranked = mx.take_along_axis(logprobs, candidates, axis=-1)[:depth].astype(mx.float32)
            tree = DraftTree.best_first(ranked.tolist(), self.budget)  # type: ignore[arg-type]
        if tree.size == 1:
            return tree, root
        drafted = candidates[: tree.max_depth, 0] if tree.is_chain else candidates[_places(tree)]
        return tree, mx.concatenate([root.astype(drafted.dtype), drafted])


@lru_cache(maxsize=256)
def _places(tree: DraftTree) -> tuple[mx.array, mx.array]:
    """Stream and rank of every drafted node, (T - 1,) each."""
    places = mx.array(tree.depths[1:]) - 1, mx.array(tree.ranks[1:])
    mx.eval(places)
    return places


def top_candidates(stream_logits: mx.array, count: int) -> mx.array:
    """The ``count`` likeliest tokens of every stream in falling order, (gamma, V) -> (gamma, count) ids."""
    if count <= 1:
        return mx.argmax(stream_logits, axis=-1, keepdims=True)
    top = mx.argpartition(-stream_logits, kth=count - 1, axis=-1)[:, :count]
    order = mx.argsort(-mx.take_along_axis(stream_logits, top, axis=-1), axis=-1)
    return mx.take_along_axis(top, order, axis=-1)


def make_plan(mode: DraftMode, gamma: int, options: DraftOptions | None = None, vocab_size: int = 1 << 30) -> DraftPlan:
    """Resolve what the user asked for against the model's number of streams.

    Raises:
        UsageError: unknown mode, a tree that the streams cannot fill, options that contradict the mode.
    """
    options = options or DraftOptions()
    if mode not in get_args(DraftMode):
        raise UsageError(f"draft is {mode!r}, expected one of {', '.join(get_args(DraftMode))}")
    if options.insertion not in (None, *get_args(Insertion)):
        raise UsageError(f"insertion is {options.insertion!r}, expected one of {', '.join(get_args(Insertion))}")
    if options.prune_threshold is not None and not 0 <= options.prune_threshold <= 1:
        raise UsageError(f"prune_threshold is {options.prune_threshold}, expected a probability 0..1")
    if gamma == 0 and mode in ("tree", "chain"):
        raise UsageError(f"draft {mode!r} needs streams and this model has none; use draft 'off' or a converted model")
    if mode in ("off", "chain") and options.tree is not None:
        raise UsageError(f"tree {options.tree!r} goes with draft 'tree' or 'auto', not {mode!r}")
    insertion = options.insertion or "leaf"
    if mode == "off" or gamma == 0:
        return DraftPlan(mode, gamma, DraftTree.chain(0), 0, insertion)
    source: Literal["default", "user"] = "default" if options.tree is None else "user"
    if options.tree is not None:
        tree, budget = _parse_tree(options.tree, gamma, vocab_size)
    else:
        # Without measured costs, auto takes the cheapest rows: the chain needs no mask and moves nothing on commit.
        tree = default_tree(gamma) if mode == "tree" else DraftTree.chain(gamma)
        budget = tree.size - 1
    return DraftPlan(mode, gamma, tree, budget, insertion, options.prune_threshold, source)


def default_tree(gamma: int, nodes: int = DEFAULT_NODES) -> DraftTree:
    """The fixed tree used when nothing was calibrated: best-first under assumed acceptance."""
    return DraftTree.best_first([[math.log(rate) for rate in row] for row in assumed_rates(gamma)], nodes)


def assumed_rates(gamma: int) -> list[tuple[float, ...]]:
    """Acceptance per depth and rank, (gamma, K), where nothing was measured."""
    return [ASSUMED_ACCEPTANCE[min(depth, len(ASSUMED_ACCEPTANCE) - 1)] for depth in range(gamma)]


def _parse_tree(text: str, gamma: int, vocab_size: int) -> tuple[DraftTree | None, int]:
    kind, _, argument = text.partition(":")
    try:
        numbers = [int(number) for number in argument.split("x")]
    except ValueError:
        numbers = []
    wanted = "chain:DEPTH, cartesian:K1xK2x.. or best-first:NODES"
    if kind not in ("chain", "cartesian", "best-first") or not numbers or min(numbers) < 1:
        raise UsageError(f"tree is {text!r}, expected {wanted}")
    if kind != "cartesian" and len(numbers) > 1:
        raise UsageError(f"tree is {text!r}: {kind} takes one number; expected {wanted}")
    nodes = math.prod(numbers) if kind == "cartesian" else numbers[0]
    if nodes > MAX_NODES:
        raise UsageError(f"tree is {text!r}: {nodes} nodes in one pass, expected at most {MAX_NODES}")
    if kind == "best-first":
        return None, numbers[0]
    depth = numbers[0] if kind == "chain" else len(numbers)
    if depth > gamma:
        raise UsageError(f"tree is {text!r}: depth {depth} exceeds gamma, this model has {gamma} streams")
    if max(numbers) > vocab_size and kind == "cartesian":
        raise UsageError(f"tree is {text!r}: more candidates than the {vocab_size} tokens of the vocabulary")
    tree = DraftTree.chain(depth) if kind == "chain" else DraftTree.cartesian(numbers)
    return tree, tree.size - 1
