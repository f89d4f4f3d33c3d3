"""Probabilities by depth -> a tree with its tokens."""

from functools import lru_cache

import mlx.core as mx

from specstream_mlx.drafters.protocol import Wish
from specstream_mlx.target.rows import Draft
from specstream_mlx.target.tree import DraftTree


def fill(root: mx.array, logits: mx.array, wish: Wish) -> Draft:
    """Fill the wished tree with the likeliest tokens of every depth.

    Args:
        root: (1,) the newest token.
        logits: (G, V); row ``g - 1`` fills depth ``g``.
        wish: a given tree reads nothing back from the device; without one, the likeliest paths are chosen anew.
    """
    if wish.tree is not None:
        tree = wish.tree.truncate(min(wish.depth, len(logits)))
        candidates = top_candidates(logits, max(tree.widths, default=0))
    else:
        candidates = top_candidates(logits, min(wish.budget, logits.shape[-1]))
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        ranked = mx.take_along_axis(logprobs, candidates, axis=-1)[: wish.depth].astype(mx.float32)
        tree = DraftTree.best_first(ranked.tolist(), wish.budget)  # type: ignore[arg-type]
    return fill_candidates(root, candidates, tree)


def fill_candidates(root: mx.array, candidates: mx.array, tree: DraftTree) -> Draft:
    """A tree whose node of depth ``g`` and rank ``k`` is ``candidates[g - 1, k]``; (G, K) ids."""
    if tree.size == 1:
        return Draft(tree, root)
    drafted = candidates[: tree.max_depth, 0] if tree.is_chain else candidates[_places(tree)]
    return Draft(tree, mx.concatenate([root.astype(drafted.dtype), drafted]))


@lru_cache(maxsize=256)
def _places(tree: DraftTree) -> tuple[mx.array, mx.array]:
    """Depth and rank of every drafted node, (T - 1,) each."""
    places = mx.array(tree.depths[1:]) - 1, mx.array(tree.ranks[1:])
    mx.eval(places)
    return places


def top_candidates(logits: mx.array, count: int) -> mx.array:
    """The ``count`` likeliest tokens of every depth in falling order, (G, V) -> (G, count) ids."""
    if count <= 1:
        return mx.argmax(logits, axis=-1, keepdims=True)
    top = mx.argpartition(-logits, kth=count - 1, axis=-1)[:, :count]
    order = mx.argsort(-mx.take_along_axis(logits, top, axis=-1), axis=-1)
    return mx.take_along_axis(top, order, axis=-1)
