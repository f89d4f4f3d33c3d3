"""Plans and candidates."""

import mlx.core as mx
import numpy as np
import pytest

from specstream_mlx.drafters.fill import fill, top_candidates
from specstream_mlx.drafters.protocol import Wish
from specstream_mlx.errors import UsageError
from specstream_mlx.options import DraftOptions
from specstream_mlx.planning.plan import default_tree, make_plan
from specstream_mlx.target.tree import DraftTree


def filled(plan, logits, root=3, depth=None):
    draft = fill(mx.array([root]), logits, Wish(depth or len(logits), plan.tree, plan.budget, plan.way))
    return draft.tree, draft.tokens


def test_candidates_are_the_likeliest_tokens_in_falling_order():
    logits = mx.random.normal((3, 50), key=mx.random.key(0))
    for count in (1, 2, 7, 50):
        expected = np.argsort(-np.array(logits), axis=-1)[:, :count]
        assert np.array_equal(np.array(top_candidates(logits, count)), expected)


def test_a_tree_is_filled_depth_by_stream_and_rank_by_rank():
    """Red when a depth takes its candidates from another stream."""
    logits = mx.random.normal((3, 50), key=mx.random.key(1))
    plan = make_plan("tree", 3, DraftOptions(tree="cartesian:2x1x2"))
    tree, tokens = filled(plan, logits, root=17)
    best = np.argsort(-np.array(logits), axis=-1)
    expected = [17] + [best[len(path) - 1][path[-1]] for path in tree.paths[1:]]
    assert tokens.tolist() == expected
    assert tree == DraftTree.cartesian([2, 1, 2])


def test_best_first_follows_the_streams_own_probabilities():
    logits = mx.log(mx.array([[0.5, 0.4, 0.05, 0.05], [0.97, 0.01, 0.01, 0.01]]))
    tree, tokens = filled(make_plan("auto", 2, DraftOptions(tree="best-first:4")), logits)
    assert tree.paths == ((), (0,), (0, 0), (1,), (1, 0))
    assert tokens.tolist() == [3, 0, 0, 1, 0]


def test_no_deeper_than_tokens_are_wanted():
    logits = 5 * mx.random.normal((4, 50), key=mx.random.key(2))
    for tree in (None, "best-first:6", "cartesian:2x2x2x2"):
        plan = make_plan("auto", 4, DraftOptions(tree=tree))
        drafted, tokens = filled(plan, logits, depth=2)
        assert drafted.max_depth == 2
        assert tokens.shape == (drafted.size,)


def test_plans_by_mode():
    assert make_plan("off", 4).drafts is False
    assert make_plan("auto", 0).drafts is False
    chain = make_plan("chain", 4)
    assert (chain.tree, chain.report().nodes) == (DraftTree.chain(4), 4)
    tree = make_plan("tree", 4).tree
    assert tree == default_tree(4)
    assert tree.max_depth == 4, "the default tree must reach as deep as the streams"
    assert make_plan("auto", 4).tree == DraftTree.chain(4)
    assert make_plan("auto", 4, DraftOptions("best-first:5")).tree is None
    assert make_plan("tree", 2, DraftOptions("cartesian:3x2")).report().plan == "user"
    assert {default_tree(gamma).max_depth for gamma in range(1, 9)} <= set(range(1, 9))


@pytest.mark.parametrize(
    ("mode", "gamma", "options", "message"),
    [
        ("fast", 4, {}, "draft is 'fast', expected one of auto, tree, chain, off"),
        ("chain", 0, {}, "needs streams and this model has none"),
        ("off", 4, {"tree": "chain:2"}, "goes with draft 'tree' or 'auto'"),
        ("tree", 4, {"tree": "chain"}, "tree is 'chain', expected chain:DEPTH"),
        ("tree", 4, {"tree": "chain:0"}, "tree is 'chain:0', expected"),
        ("tree", 4, {"tree": "chain:5"}, "depth 5 exceeds gamma, this drafter guesses 4 tokens ahead"),
        ("tree", 4, {"tree": "cartesian:2x2x2x2x2"}, "depth 5 exceeds gamma"),
        ("tree", 4, {"tree": "cartesian:2x"}, "expected chain:DEPTH"),
        ("tree", 4, {"tree": "cartesian:99x99x99"}, "970299 nodes in one pass, expected at most 1024"),
        ("tree", 4, {"tree": "best-first:3x3"}, "takes one number"),
        ("tree", 4, {"tree": "cartesian:60"}, "more candidates than the 50 tokens"),
        ("tree", 4, {"insertion": "late"}, "insertion is 'late', expected one of leaf, deferred, parallel"),
        ("tree", 4, {"prune_threshold": 1.5}, "prune_threshold is 1.5, expected a probability"),
    ],
)
def test_contradictions_are_refused(mode, gamma, options, message):
    with pytest.raises(UsageError, match=message):
        make_plan(mode, gamma, DraftOptions(**options), vocab_size=50)
