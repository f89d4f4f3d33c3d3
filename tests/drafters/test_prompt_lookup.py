"""Prompt lookup: what is drafted is what followed the longest known run of tokens where it occurred last."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specstream_mlx.drafters.prompt_lookup import PromptLookup
from specstream_mlx.drafters.protocol import Anchor, DraftState, Wish
from specstream_mlx.target.rows import Draft
from specstream_mlx.target.tree import DraftTree

NOTHING: Any = None


def look_up(tokens: Sequence[int], count: int, longest: int = 3) -> list[int]:
    """Up to ``count`` tokens that followed the last ``longest`` tokens, or the last few, where they last occurred."""
    for length in range(min(longest, len(tokens) - 1), 0, -1):
        tail = list(tokens[-length:])
        for begin in range(len(tokens) - length - 1, -1, -1):
            if list(tokens[begin : begin + length]) == tail:
                return list(tokens[begin + length : begin + length + count])
    return []


def propose(state: DraftState, root: int, tree: DraftTree, depth: int | None = None) -> Draft:
    anchor = Anchor(NOTHING, 0, mx.array([root]), [])
    return state.propose(anchor, Wish(depth or tree.max_depth, tree, tree.size - 1, "deferred"))


def chain(tokens: Sequence[int], count: int) -> list[int]:
    """The guesses after a text, drafted as a chain."""
    draft = propose(PromptLookup().begin(NOTHING, tokens), tokens[-1], DraftTree.chain(count))
    root, *guesses = draft.tokens.tolist()  # type: ignore[misc]
    assert root == tokens[-1]
    assert draft.tree == DraftTree.chain(len(guesses))
    return guesses


@pytest.mark.parametrize("rule", [look_up, chain])
def test_looking_up_finds_the_latest_and_longest_repetition(rule):
    assert rule([1, 2, 3, 9, 1, 2, 3], 2) == [9, 1]
    assert rule([5, 2, 8, 1, 2, 3, 5, 2], 2) == [8, 1]
    assert rule([3, 7, 3, 8, 3], 3) == [8, 3]
    assert rule([1, 2, 3], 4) == []
    assert rule([1, 1], 1) == [1]


def test_no_guess_is_the_root_alone():
    draft = propose(PromptLookup().begin(NOTHING, [1, 2, 3]), 3, DraftTree.chain(4))
    assert (draft.tree, draft.tokens.tolist()) == (DraftTree.chain(0), [3])


PIECES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=8)


@settings(deadline=None, max_examples=200)
@given(pieces=PIECES, depth=st.integers(1, 6), asked=st.integers(0, 255))
def test_chains_equal_the_plain_rule_however_the_text_came(pieces, depth, asked):
    """Red when: a run is entered too early or too late, or tokens are lost that came while nobody asked."""
    state = PromptLookup(depth).begin(NOTHING, pieces[0])
    text = list(pieces[0])
    for index, piece in enumerate([[], *pieces[1:]]):
        if piece:
            text += piece
            state.commit(mx.array(piece) if index % 2 else piece)
        if asked >> index & 1:
            draft = propose(state, text[-1], DraftTree.chain(depth))
            assert draft.tokens.tolist() == [text[-1], *look_up(text, depth)]
            assert draft.tree.is_chain


@settings(deadline=None, max_examples=200)
@given(text=st.lists(st.integers(0, 3), min_size=2, max_size=40), depth=st.integers(1, 5), width=st.integers(2, 3))
def test_trees_hold_the_chain_and_what_followed_elsewhere(text, depth, width):
    """Red when: a tree loses the likeliest path, has more nodes than asked for, or guesses what never followed."""
    wanted = DraftTree.cartesian([width] * min(depth, 3))
    draft = propose(PromptLookup(depth).begin(NOTHING, text), text[-1], wanted)
    ids: list[int] = draft.tokens.tolist()  # type: ignore[assignment]
    assert draft.tree.size <= wanted.size
    assert draft.tree.max_depth <= wanted.max_depth
    best = [node for node in range(1, draft.tree.size) if not any(draft.tree.paths[node])]
    guesses = look_up(text, wanted.max_depth)
    assert [ids[node] for node in best][: len(guesses)] == guesses
    for node in range(1, draft.tree.size):
        path = [text[-1], *(ids[step] for step in draft.tree.ancestors(node)[1:])]
        assert any(text[i : i + len(path)] == path for i in range(len(text) - len(path) + 1))
    siblings = [(draft.tree.parents[node], ids[node]) for node in range(1, draft.tree.size)]
    assert len(siblings) == len(set(siblings))
