"""Draws and tree -> accepted path."""

import pytest

from specstream_mlx.engine.acceptance import accept
from specstream_mlx.target.tree import DraftTree

TREE = DraftTree.from_paths([(0, 0), (0, 1), (1,)])  # nodes: root, a, aa, ab, b
NODES = [10, 20, 30, 31, 21]


@pytest.mark.parametrize(
    ("drawn", "nodes", "tokens"),
    [
        ([99, 30, 1, 2, 3], (0,), (99,)),
        ([20, 99, 1, 2, 3], (0, 1), (20, 99)),
        ([20, 31, 1, 2, 3], (0, 1, 3), (20, 31, 2)),
        ([20, 30, 1, 2, 3], (0, 1, 2), (20, 30, 1)),
        ([21, 30, 1, 2, 3], (0, 4), (21, 3)),
        ([30, 30, 1, 2, 3], (0,), (30,)),
    ],
)
def test_the_walk_follows_the_drawn_children(drawn, nodes, tokens):
    """Red when row i is compared with node i instead of its children."""
    accepted = accept(TREE, NODES, drawn)
    assert (accepted.nodes, accepted.tokens) == (nodes, tokens)
    assert accepted.num_drafts == len(nodes) - 1


def test_the_walk_ends_at_a_stop_token():
    accepted = accept(TREE, NODES, [20, 31, 1, 2, 3], stop_tokens={20})
    assert (accepted.nodes, accepted.tokens) == ((0,), (20,))


def test_the_walk_ends_at_max_tokens():
    accepted = accept(TREE, NODES, [20, 31, 1, 2, 3], max_tokens=2)
    assert (accepted.nodes, accepted.tokens) == ((0, 1), (20, 31))
