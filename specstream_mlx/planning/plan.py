"""The draft plan: the tree and the way to draft that a generation begins with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

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
    way: str = "leaf"
    source: Literal["default", "user", "calibrated"] = "default"
    note: str | None = None

    @property
    def drafts(self) -> bool:
        """Whether anything may be drafted at all."""
        return self.gamma > 0 and self.mode != "off"

    def report(self, drafter: str = "none", ways: Sequence[str] = ()) -> DraftReport:
        """The plan as users see it; insertion is told of a drafter that has several ways."""
        insertion = self.way if len(ways) > 1 else None
        return DraftReport(self.mode, self.gamma, self.budget, insertion, self.source, self.note, drafter)


def make_plan(
    mode: DraftMode,
    gamma: int,
    options: DraftOptions | None = None,
    vocab_size: int = 1 << 30,
    *,
    ways: Sequence[str] = get_args(Insertion),
) -> DraftPlan:
    """Resolve what the user asked for against what the drafter can do.

    Args:
        gamma: how far ahead the drafter can guess; 0: there is no drafter.
        ways: the drafter's ways to draft.

    Raises:
        UsageError: unknown mode, a tree that the drafter cannot fill, options that contradict the mode.
    """
    options = options or DraftOptions()
    if mode not in get_args(DraftMode):
        raise UsageError(f"draft is {mode!r}, expected one of {', '.join(get_args(DraftMode))}")
    if options.insertion not in (None, *get_args(Insertion)):
        raise UsageError(f"insertion is {options.insertion!r}, expected one of {', '.join(get_args(Insertion))}")
    if options.prune_threshold is not None and not 0 <= options.prune_threshold <= 1:
        raise UsageError(f"prune_threshold is {options.prune_threshold}, expected a probability 0..1")
    if gamma == 0 and mode in ("tree", "chain"):
        raise UsageError(
            f"draft {mode!r} needs streams and this model has none; use draft 'off', a converted model, or another "
            "drafter"
        )
    if mode in ("off", "chain") and options.tree is not None:
        raise UsageError(f"tree {options.tree!r} goes with draft 'tree' or 'auto', not {mode!r}")
    if gamma and options.insertion not in (None, *ways):
        raise UsageError(f"insertion {options.insertion!r} goes with the drafter 'streams' alone; leave it out")
    way = options.insertion or ways[0]
    if mode == "off" or gamma == 0:
        return DraftPlan(mode, gamma, DraftTree.chain(0), 0, way)
    source: Literal["default", "user"] = "default" if options.tree is None else "user"
    if options.tree is not None:
        tree, budget = _parse_tree(options.tree, gamma, vocab_size)
    else:
        # Without measured costs, auto takes the cheapest rows: the chain needs no mask and moves nothing on commit.
        tree = default_tree(gamma) if mode == "tree" else DraftTree.chain(gamma)
        budget = tree.size - 1
    return DraftPlan(mode, gamma, tree, budget, way, source)


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
        raise UsageError(f"tree is {text!r}: depth {depth} exceeds gamma, this drafter guesses {gamma} tokens ahead")
    if max(numbers) > vocab_size and kind == "cartesian":
        raise UsageError(f"tree is {text!r}: more candidates than the {vocab_size} tokens of the vocabulary")
    tree = DraftTree.chain(depth) if kind == "chain" else DraftTree.cartesian(numbers)
    return tree, tree.size - 1
