"""Drafters beside one another: what they guess, what of it is accepted, and that none changes a token."""

import functools

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.sample_utils import make_sampler

from specstream_mlx import DraftOptions, SpecStreamModel, stream_generate
from specstream_mlx.drafters.prompt_lookup import PromptLookup
from specstream_mlx.drafters.protocol import Anchor, Wish
from specstream_mlx.drafters.two_model import TwoModel
from specstream_mlx.target.tree import DraftTree
from tests.drafter_cases import DRAFTERS, drafter_of
from tests.tiny import NumberTokenizer, make_base, make_model, our_tokens, plain_tokens, random_prompt


@functools.cache
def model():
    return make_model("llama", seed=71)


def guesses(drafter, prompt, tokens, tree, depth=4, budget=None):
    """What is drafted after some text, by path."""
    state = drafter.begin(model(), prompt)
    state.commit(tokens)
    anchor = Anchor(None, 0, mx.array(tokens[-1:]), ())
    draft = state.propose(anchor, Wish(depth, tree, budget or tree.size - 1, "deferred"))
    return dict(zip(draft.tree.paths[1:], draft.tokens.tolist()[1:], strict=True))


def test_prompt_lookup_guesses_what_followed_the_longest_run_and_then_the_latest():
    """Red when: a shorter match comes first, an older one does, or the end of the prompt is not seen."""
    prompt = [2, 3, 4, 5, 9, 3, 8, 7, 2]
    chain = DraftTree.chain(4)
    assert list(guesses(PromptLookup(4), prompt, [3], chain).values()) == [4, 5, 9, 3]
    assert list(guesses(PromptLookup(4), prompt, [6, 3], chain).values()) == [8, 7, 2, 6]
    assert guesses(PromptLookup(4), prompt, [6], chain) == {}
    assert list(guesses(PromptLookup(4), prompt, [3], chain, depth=2).values()) == [4, 5]


def test_prompt_lookup_fills_a_tree_with_other_continuations():
    """Red when: two continuations with one beginning stand in the tree twice, or the tree has too many nodes."""
    prompt = [3, 4, 5, 3, 4, 6, 3, 7, 1]
    found = guesses(PromptLookup(2), prompt, [3], None, depth=2, budget=6)
    assert found == {(0,): 7, (0, 0): 1, (1,): 4, (1, 0): 6, (1, 1): 5}
    assert len(guesses(PromptLookup(2), prompt, [3], None, depth=2, budget=3)) == 3


@pytest.mark.parametrize("draft", ["chain", "tree"])
def test_a_draft_model_that_is_the_target_is_always_right(draft):
    """Red when: the draft model's cache lacks rows of the text, or holds rows of wrong guesses."""
    prompt = random_prompt(12, seed=5)
    expected = plain_tokens(model().base, prompt, 41, end_of_text=())
    how = {"draft": draft, "drafter": TwoModel(model(), 4)}
    responses = list(stream_generate(model(), NumberTokenizer(end_of_text=()), prompt, 41, **how))
    assert [token for response in responses for token in response.tokens] == expected
    assert responses[-1].target_passes == 1 + 40 // 5
    assert responses[-1].stream_passes == 4 * (40 // 5)


def test_a_draft_model_follows_a_text_that_is_not_its_own():
    """Red when: after a wrong guess the draft model goes on from its own text instead of the target's."""
    prompt, sampler = random_prompt(12, seed=5), make_sampler(1.0)
    expected = plain_tokens(model().base, prompt, 60, end_of_text=(), sampler=sampler, seed=2)
    guessed = []

    class Noted(TwoModel):
        def begin(self, target, ids):
            state = super().begin(target, ids)
            propose = state.propose

            def noted(anchor, wish):
                draft = propose(anchor, wish)
                guessed.append(draft.tokens.tolist())
                return draft

            state.propose = noted
            return state

    how = {"draft": "chain", "drafter": Noted(model(), 3), "sampler": sampler, "seed": 2}
    assert our_tokens(model(), prompt, 60, tokenizer=NumberTokenizer(end_of_text=()), **how) == expected
    place, right = 0, []
    for root, *chain in guessed:
        place = expected.index(root, place)
        text = [*prompt, *expected[: place + 1]]
        right.append(chain == plain_tokens(model().base, text, len(chain), end_of_text=()))
    assert all(right)
    assert len(right) > 20


def test_a_draft_model_whose_positions_end_is_not_asked_beyond_them():
    """Red when: the table of positions is read beyond its end."""
    base = make_base("opt", seed=72, max_position_embeddings=16)
    asked = []
    call = type(base).__call__

    class Watched(type(base)):
        def __call__(self, inputs, cache=None):
            asked.append(cache[0].offset + inputs.shape[1])
            return call(self, inputs, cache=cache)

    base.__class__ = Watched
    draft = SpecStreamModel(base, "opt")
    prompt = random_prompt(9, seed=6)
    expected = plain_tokens(model().base, prompt, 20, end_of_text=())
    for mode in ("chain", "tree", "auto"):
        how = {"draft": mode, "drafter": TwoModel(draft, 4)}
        assert our_tokens(model(), prompt, 20, tokenizer=NumberTokenizer(end_of_text=()), **how) == expected
    assert max(asked) == 16


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(DRAFTERS),
    seed=st.integers(0, 10_000),
    length=st.integers(1, 20),
    repeated=st.integers(1, 3),
    max_tokens=st.integers(1, 20),
    tree=st.one_of(
        st.integers(1, 12).map(lambda nodes: f"best-first:{nodes}"),
        st.lists(st.integers(1, 3), min_size=1, max_size=4).map(lambda w: "cartesian:" + "x".join(map(str, w))),
        st.integers(1, 4).map(lambda depth: f"chain:{depth}"),
    ),
    temp=st.sampled_from([0.0, 0.9]),
    draft=st.sampled_from(["auto", "tree"]),
)
def test_any_drafter_any_prompt_any_tree(name, seed, length, repeated, max_tokens, tree, temp, draft):
    """Red when: any combination of drafter, tree and sampler changes a token."""
    prompt, sampler = random_prompt(length, seed) * repeated, make_sampler(temp)
    expected = plain_tokens(model().base, prompt, max_tokens, seed=seed, sampler=sampler)
    drafter = drafter_of(name, model(), expected, len(prompt), seed)
    options = DraftOptions(tree=tree)
    how = {"seed": seed, "sampler": sampler, "draft": draft, "drafter": drafter, "draft_options": options}
    assert our_tokens(model(), prompt, max_tokens, **how) == expected
