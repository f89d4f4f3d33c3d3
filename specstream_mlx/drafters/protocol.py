"""What the engine asks of whoever guesses the next tokens.

Weights are shared by all requests, state is not: a ``Drafter`` holds weights, a ``DraftState`` belongs to one sequence.
A new drafter is one file in this room, and says nothing to the engine but through these two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from specstream_mlx.errors import UsageError
from specstream_mlx.target.rows import Draft, Riders
from specstream_mlx.target.target import Passed, Target
from specstream_mlx.target.tree import DraftTree


@dataclass(frozen=True)
class Wish:
    """How to draft the next tree.

    Attributes:
        depth: the deepest guess of use, at least 1.
        tree: the tree to fill, as far as ``depth``; None: the ``budget`` likeliest paths under the drafter's own
            probabilities.
        budget: most drafted nodes where ``tree`` is None.
        way: one of the drafter's ways.
    """

    depth: int
    tree: DraftTree | None
    budget: int
    way: str


@dataclass(frozen=True, eq=False)
class Anchor:
    """Where the next tree begins: the node at which the text of a pass ended, and the token drawn there.

    Attributes:
        passed: the pass.
        node: the last accepted node.
        root: (1,) the token drawn at it, which is the newest one; on the device.
        caches: the target's, committed up to and including ``node``.
    """

    passed: Passed
    node: int
    root: mx.array
    caches: Sequence[Any]


class DraftState:
    """A drafter's part in one sequence. The defaults are those of a drafter without rows or caches of its own.

    Attributes:
        own_passes: passes that the drafter made besides the target's.
    """

    own_passes: int = 0

    def riders(self, wish: Wish | None) -> Riders | None:
        """Rows to run beside the next pass's tree, so that ``propose`` finds them; ``wish`` is the one after it."""
        return None

    def foresees(self, passed: Passed, node: int, wish: Wish) -> bool:
        """Whether ``propose`` at this node of a pass under way reads nothing back and makes no pass of its own."""
        return False

    def propose(self, anchor: Anchor, wish: Wish) -> Draft:
        """The next tree and its tokens; the root alone where nothing is to be guessed."""
        raise NotImplementedError

    def commit(self, tokens: Sequence[int] | mx.array) -> None:
        """The text grew by these k ids: of the last draft, k - 1 guesses in a row were right.

        They are on the device, and may not be known yet, where the pass is still under way.
        """

    def withdraw(self) -> None:
        """Go back to before the last ``commit``, and forget what was proposed after it."""


class Drafter(Protocol):
    """The weights of a drafter, or what it knows, for every sequence."""

    @property
    def name(self) -> str:
        """As ``--drafter`` takes it."""

    @property
    def max_depth(self) -> int:
        """How far ahead it can guess."""

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways to draft, which differ in cost and in nothing else; "deferred": once the node is known."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the target after which it reads hidden states; 0 is the embedding."""

    def begin(self, target: Target, prompt: Sequence[int]) -> DraftState:
        """The state of a sequence that begins with ``prompt``, (S,) ids; the last one is the first root."""


def root_alone(anchor: Anchor) -> Draft:
    """No guess: the next pass is plain decoding."""
    return Draft(DraftTree.chain(0), anchor.root)


def with_pruning(drafter: Drafter | None, threshold: float, way: str) -> Drafter:
    """The drafter with early exit (method section 6).

    Raises:
        UsageError: it has no pruner.
        UnsupportedError: the pruner cannot act in this way to draft.
    """
    pruning = getattr(drafter, "pruning", None)
    if pruning is None:
        raise UsageError("prune_threshold does not go with this drafter, which has no early-exit pruner; leave it out")
    pruned: Drafter = pruning(threshold, way)
    return pruned
