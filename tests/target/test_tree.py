"""The draft tree as data: order, masks, best-first choice."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specstream_mlx.target.tree import DraftTree


def test_the_tree_drawn_in_the_module():
    tree = DraftTree.from_paths([(0, 0), (0, 1), (1,)])
    assert tree.paths == ((), (0,), (0, 0), (0, 1), (1,))
    assert tree.parents == (-1, 0, 1, 1, 0)
    assert tree.depths == (0, 1, 2, 2, 1)
    assert tree.ranks == (0, 0, 0, 1, 1)
    assert tree.widths == (2, 2)
    assert tree.ancestor_mask.astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 0, 0, 0, 1],
    ]
    assert tree.ancestors(3) == [0, 1, 3]


def test_a_chain_is_causal():
    chain = DraftTree.chain(3)
    assert chain.is_chain
    assert (chain.size, chain.max_depth) == (4, 3)
    assert np.array_equal(chain.ancestor_mask, np.tri(4, dtype=bool))
    root = DraftTree.chain(0)
    assert (root.size, root.max_depth, root.widths, root.is_chain) == (1, 0, (), True)


def test_cartesian_has_the_papers_size():
    tree = DraftTree.cartesian([3, 3, 3])
    assert tree.size == 1 + 3 + 9 + 27
    assert not tree.is_chain


def test_pruning_drops_whole_subtrees():
    tree = DraftTree.from_paths([(0, 0), (0, 1), (1, 0)])
    assert tree.paths == ((), (0,), (0, 0), (0, 1), (1,), (1, 0))
    kept = tree.surviving([False, True, False, True, False, True])
    assert kept == [0, 1, 3]
    assert tree.select(kept).paths == ((), (0,), (0, 1))


def test_truncation():
    tree = DraftTree.cartesian([2, 2, 1])
    assert tree.truncate(1).paths == ((), (0,), (1,))
    assert tree.truncate(9) is tree


profiles = st.lists(
    st.lists(st.floats(0.01, 0.5), min_size=1, max_size=4).map(lambda probs: sorted(probs, reverse=True)),
    min_size=1,
    max_size=3,
)


@given(profile=profiles, budget=st.integers(0, 12))
def test_best_first_takes_the_likeliest_paths(profile, budget):
    """Compared with scoring every path of the full product; red when siblings or children are pushed wrongly."""
    logprobs = [[math.log(prob) for prob in row] for row in profile]
    tree = DraftTree.best_first(logprobs, budget)
    every = [
        path
        for depth in range(1, len(profile) + 1)
        for path in itertools.product(*(range(len(row)) for row in profile[:depth]))
    ]

    def score(path):
        return sum(logprobs[depth][rank] for depth, rank in enumerate(path))

    best = sorted(map(score, every), reverse=True)[:budget]
    assert sorted((score(path) for path in tree.paths[1:]), reverse=True) == pytest.approx(best)


@given(paths=st.lists(st.lists(st.integers(0, 2), max_size=4).map(tuple), max_size=12))
def test_every_tree_is_a_preorder(paths):
    tree = DraftTree.from_paths(paths)
    mask = tree.ancestor_mask
    for node in range(tree.size):
        assert tree.parents[node] < node
        assert np.flatnonzero(mask[node]).tolist() == tree.ancestors(node)
        assert tree.depths[node] == mask[node].sum() - 1
