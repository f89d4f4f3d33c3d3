"""Drafters whose guess depends on the guesses before it: Hydra, EAGLE. Their trees grow level by level.

Every node that has children is a row of the drafter; one step runs the rows of one depth together::

    tree            step 1      step 2           step 3
    root - a - c    start       rows a, b        row c
         \\   \\ d    guesses     guesses          guesses
          b - e     a, b        c, d and e       ...
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import mlx.core as mx

from specstream_mlx.drafters.fill import top_candidates
from specstream_mlx.drafters.protocol import Anchor, DraftState, Wish
from specstream_mlx.target.rows import Draft
from specstream_mlx.target.tree import DraftTree, Path

BEAM = 10  # most rows per depth while the likeliest paths are looked for, and most guesses of each (EAGLE-2)


class GrowingState(DraftState):
    """Proposes a tree whose every node knows its path."""

    def start(self, anchor: Anchor) -> mx.array:
        """Begin a tree: (1, V) logits of the token after the root."""
        raise NotImplementedError

    def grow(self, parents: mx.array, tokens: mx.array) -> mx.array:
        """Run the rows of the next depth.

        Args:
            parents: (k,) which row of the last step each one follows.
            tokens: (k,) their ids.

        Returns:
            (k, V) logits of the token after each.
        """
        raise NotImplementedError

    def ids(self, guesses: mx.array) -> mx.array:
        """The target's ids of guesses, which are columns of the logits."""
        return guesses

    def finish(self) -> None:
        """The tree is done; forget its rows."""

    def propose(self, anchor: Anchor, wish: Wish) -> Draft:
        """As ``DraftState``."""
        if wish.tree is not None:
            draft = self._filled(anchor, wish.tree.truncate(wish.depth))
        else:
            draft = self._likeliest(anchor, wish)
        self.finish()
        return draft

    def _filled(self, anchor: Anchor, tree: DraftTree) -> Draft:
        """The best guesses of every node in the shape of ``tree``; nothing is read back."""
        plan = _plan(tree)
        logits, drafted = self.start(anchor), []
        for index, step in enumerate(plan.steps):
            guesses = self.ids(top_candidates(logits, min(step.width, logits.shape[-1])))
            drafted.append(guesses[0, :1] if step.single else guesses[step.child_rows, step.child_ranks])
            if index + 1 < len(plan.steps):
                following = plan.steps[index + 1]
                logits = self.grow(following.parents, drafted[-1][following.rows])
        tokens = mx.concatenate([anchor.root.astype(mx.int32), *(ids.astype(mx.int32) for ids in drafted)])
        return Draft(tree, tokens if tree.is_chain else tokens[plan.order])

    def _likeliest(self, anchor: Anchor, wish: Wish) -> Draft:
        """The ``budget`` paths of highest probability, looked for with a beam; read back once (EAGLE-2)."""
        logits = self.start(anchor)
        width = min(BEAM, wish.budget, logits.shape[-1])
        guesses, scores = self._scored(logits, width)
        guesses, scores = guesses[0], scores[0]
        tokens, parents = [guesses], [mx.full((width,), -1, dtype=mx.int32)]
        all_scores, rows = [scores], mx.zeros((width,), dtype=mx.int32)
        places = mx.arange(width, dtype=mx.int32)  # of this depth's rows among all nodes
        total = width
        for _ in range(wish.depth - 1):
            logits = self.grow(rows, guesses)
            deeper, more = self._scored(logits, width)
            reached = (scores[:, None] + more).reshape(-1)
            tokens.append(deeper.reshape(-1))
            parents.append(mx.repeat(places, width))
            all_scores.append(reached)
            kept = mx.argpartition(-reached, kth=width - 1)[:width].astype(mx.int32)
            rows, guesses, scores = kept // width, tokens[-1][kept], reached[kept]
            places = total + kept
            total += len(reached)
        table = [mx.concatenate(column) for column in (all_scores, tokens, parents)]
        mx.eval(table)
        scored, named, above = (column.tolist() for column in table)
        tree, ids = _best_paths(scored, named, above, wish.budget)  # type: ignore[arg-type]
        return Draft(tree, mx.concatenate([anchor.root.astype(mx.int32), mx.array(ids, dtype=mx.int32)]))

    def _scored(self, logits: mx.array, width: int) -> tuple[mx.array, mx.array]:
        """The best guesses of every row, falling, and their log-probabilities, (k, width) each."""
        best = top_candidates(logits, width)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        scores = mx.take_along_axis(logprobs, best, axis=-1).astype(mx.float32)
        # Rounding must not make a child likelier than its parent.
        return self.ids(best).astype(mx.int32), mx.minimum(scores, 0)


@dataclass(frozen=True, eq=False)
class _Step:
    """The rows of one depth: its nodes that have children.

    Attributes:
        rows: (k,) their places among all nodes of that depth.
        parents: (k,) the rows of the step before that they follow.
        width: how many guesses the widest needs.
        child_rows, child_ranks: (c,) the row and the rank of every node of the next depth.
        single: one row with one child.
    """

    rows: mx.array
    parents: mx.array
    width: int
    child_rows: mx.array
    child_ranks: mx.array
    single: bool


@dataclass(frozen=True, eq=False)
class _Plan:
    """The steps of a tree, and (T,) where each node's token lies among the root and all steps' tokens."""

    steps: tuple[_Step, ...]
    order: mx.array


@lru_cache(maxsize=256)
def _plan(tree: DraftTree) -> _Plan:
    nodes = [[node for node in range(tree.size) if tree.depths[node] == d] for d in range(tree.max_depth + 1)]
    inner = set(tree.parents)
    steps = []
    rows_above: list[int] = []
    for level, below in pairwise(nodes):
        rows = [node for node in level if node in inner]
        steps.append(
            _Step(
                rows=mx.array([level.index(node) for node in rows]),
                parents=mx.array([rows_above.index(tree.parents[node]) if rows_above else 0 for node in rows]),
                width=1 + max(tree.ranks[node] for node in below),
                child_rows=mx.array([rows.index(tree.parents[node]) for node in below]),
                child_ranks=mx.array([tree.ranks[node] for node in below]),
                single=len(below) == 1 and tree.ranks[below[0]] == 0,
            )
        )
        rows_above = rows
    laid = [node for level in nodes for node in level]
    order = mx.array([laid.index(node) for node in range(tree.size)])
    mx.eval(order, [[step.rows, step.parents, step.child_rows, step.child_ranks] for step in steps])
    return _Plan(tuple(steps), order)


def _best_paths(scores: list[float], tokens: list[int], parents: list[int], budget: int) -> tuple[DraftTree, list[int]]:
    """The best ``budget`` nodes as a tree, and their ids in its order; parents come before their children."""
    chosen = sorted(sorted(range(len(scores)), key=lambda node: (-scores[node], node))[:budget])
    paths: dict[int, Path] = {-1: ()}
    children: dict[int, int] = {}
    for node in chosen:
        parent = parents[node]
        rank = children.get(parent, 0)
        children[parent] = rank + 1
        paths[node] = (*paths[parent], rank)
    tree = DraftTree.from_paths(paths[node] for node in chosen)
    named = {paths[node]: tokens[node] for node in chosen}
    return tree, [named[path] for path in tree.paths[1:]]
