"""Losslessness: in float32 the tokens are mlx-lm's own, whatever is drafted.

The reference is always ``mlx_lm.generate.generate_step`` on the same weights. Each docstring names the break that
turns the test red; all were made once by hand.
"""

import copy
import functools
import random
import sys
from typing import get_args

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from benchmarks.exactness import bundled_arm, cases, tiny_arm
from specstream_mlx import DraftOptions, stream_generate
from specstream_mlx.options import Insertion
from specstream_mlx.planning.calibration import Calibration
from specstream_mlx.planning.control import Control
from specstream_mlx.planning.plan import make_plan
from specstream_mlx.planning.planner import Curve, PassCosts, candidate_trees
from specstream_mlx.target.tree import DraftTree
from tests import tiny
from tests.tiny import (
    END_OF_TEXT,
    FAMILIES,
    NumberTokenizer,
    drafter,
    make_model,
    our_tokens,
    plain_tokens,
    random_prompt,
)

DRAFTS = {
    "off": ("off", None),
    "chain": ("chain", None),
    "tree": ("tree", None),
    "cartesian": ("tree", "cartesian:3x2x2x1"),
    "best-first": ("tree", "best-first:12"),
    "auto": ("auto", None),
}
INSERTIONS = get_args(Insertion)
VARIANTS = {
    "anchor": {"stream_position": "anchor"},
    "value-rotation": {"stream_id": {"type": "value_rotation", "epsilon": 0.3}},
    "identity": {"stream_init": {"type": "identity"}, "prune": None},
    "non-residual": {"stream_init": {"type": "low_rank", "rank": 4, "residual": False}},
    "one-layer": {"num_stream_layers": 1, "prune": {"type": "low_rank", "rank": 4, "layer": 1}},
    "all-layers": {"num_stream_layers": 4, "prune": None},
    "one-stream": {"gamma": 1},
}


# Every draft with every insertion where the families' code differs most, in turn elsewhere: test_pairs.py lets every
# two of family, draft and insertion meet.
WHOLE_GRID = ("llama", "phi3", "opt", "gpt2")
GRID = [
    (family, draft, insertion)
    for i, family in enumerate(FAMILIES)
    for j, draft in enumerate(DRAFTS)
    for k, insertion in enumerate(INSERTIONS)
    if (k == 0 if draft == "off" else family in WHOLE_GRID or k == (i + j) % len(INSERTIONS))
]


@functools.cache
def family_model(family):
    return make_model(family, seed=3)


@functools.cache
def family_tokens(family, prompt_length, temp):
    """What mlx-lm makes of a prompt, with seed 7."""
    prompt = random_prompt(prompt_length, seed=prompt_length)
    sampler = make_sampler(temp, top_p=0.95)
    return tuple(plain_tokens(family_model(family).base, prompt, 24, seed=7, sampler=sampler))


def options(tree, insertion, **more):
    return DraftOptions(tree=tree, insertion=insertion, **more)


@pytest.mark.parametrize(("family", "draft", "insertion"), GRID)
def test_tokens_equal_mlx_lm_in_every_family(family, draft, insertion):
    """Red when: the tree mask shows siblings, node positions count rows instead of depths, commit keeps wrong rows.

    The scripted drafter is right seven times in ten at a random rank, so that long and branching paths are accepted.
    """
    model, (mode, tree) = family_model(family), DRAFTS[draft]
    for prompt_length, temp in ((1, 0.0), (23, 0.0), (9, 0.8)):
        expected = list(family_tokens(family, prompt_length, temp))
        with drafter(model, expected, prompt_length, 0.7, seed=1):
            tokens = our_tokens(
                model,
                random_prompt(prompt_length, seed=prompt_length),
                24,
                draft=mode,
                draft_options=options(tree, insertion),
                seed=7,
                sampler=make_sampler(temp, top_p=0.95) if temp else None,
            )
        assert tokens == expected


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_tokens_equal_mlx_lm_in_every_variant_of_a_family(name):
    """Red when: a scale or cap of the family is left out, or a window sees a row more or less than mlx-lm's.

    Prompt and text are longer than the windows, the prefill's chunks shorter; windows longer than the text are those
    of the branches in tests/target/test_tree_attention.py.
    """
    model = make_model(name, seed=3)
    tokenizer = NumberTokenizer(end_of_text=())
    prompt = random_prompt(19, seed=1)
    trees = {0.0: [("chain:4", "leaf"), ("best-first:8", "deferred")], 0.8: [("best-first:8", "parallel")]}
    for temp, drafts in trees.items():
        more = {"seed": 7, "sampler": make_sampler(temp), "prefill_step_size": 5}
        expected = plain_tokens(model.base, prompt, 20, end_of_text=(), **more)
        for tree, insertion in drafts:
            with drafter(model, expected, len(prompt), 0.7, seed=1):
                drafting = {"draft": "tree", "draft_options": options(tree, insertion), "tokenizer": tokenizer}
                assert our_tokens(model, prompt, 20, **drafting, **more) == expected


@pytest.mark.parametrize("draft", ["off", "tree"])
@pytest.mark.parametrize("name", tiny.WINDOWED)
def test_a_cache_goes_on_beyond_the_window(name, draft):
    """Red when: the window is counted from where a call began; and stock mlx-lm goes on with our caches."""
    model = make_model(name, seed=5)
    first, second = random_prompt(7, seed=10), random_prompt(4, seed=11)
    tokenizer = NumberTokenizer(end_of_text=())
    caches = model.make_cache()
    text = our_tokens(model, first, 10, draft=draft, prompt_cache=caches, tokenizer=tokenizer)
    expected = plain_tokens(model.base, [*first, *text, *second], 10, end_of_text=())
    assert text == plain_tokens(model.base, first, 10, end_of_text=())
    copies = copy.deepcopy(caches)
    assert our_tokens(model, second, 10, draft=draft, prompt_cache=caches, tokenizer=tokenizer) == expected
    assert plain_tokens(model.base, second, 10, prompt_cache=copies, end_of_text=()) == expected


@pytest.mark.parametrize("name", ["cohere", "gemma2", "gemma3", "gpt_neox", "gpt_oss", "granite", "mixtral", "phi"])
def test_tokens_equal_mlx_lm_on_a_quantised_base(name):
    """Red when: the head or the embedding of a family is looked up past its quantised form."""
    model = make_model(name, seed=6)
    nn.quantize(model.base, group_size=32, bits=8)
    prompt = random_prompt(14, seed=3)
    expected = plain_tokens(model.base, prompt, 10, end_of_text=())
    with drafter(model, expected, len(prompt), 0.7, seed=1):
        tokens = our_tokens(model, prompt, 10, draft="tree", tokenizer=NumberTokenizer(end_of_text=()))
    assert tokens == expected


@pytest.mark.parametrize("insertion", INSERTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_equal_mlx_lm_for_every_kind_of_stream(variant, insertion):
    """Red when: stream rows stay in the caches after their pass, or a main row sees a stream row."""
    model = make_model("llama", seed=4, **VARIANTS[variant])
    prompt = random_prompt(11, seed=2)
    expected = plain_tokens(model.base, prompt, 24)
    for tree in ("best-first:6", f"chain:{model.gamma}"):
        tokens = our_tokens(model, prompt, 24, draft="tree", draft_options=options(tree, insertion))
        assert tokens == expected


@pytest.mark.parametrize("insertion", INSERTIONS)
@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.3, 1.0])
def test_early_exit_pruning_changes_no_token(threshold, insertion):
    """Red when: rows of pruned layers are committed by their unpruned index or the other way round."""
    model = make_model("qwen3", seed=5)
    prompt = random_prompt(8, seed=3)
    expected = plain_tokens(model.base, prompt, 30)
    for accuracy in (0.6, 1.0):
        with drafter(model, expected, len(prompt), accuracy, seed=2):
            more = options("cartesian:3x3x2x1", insertion, prune_threshold=threshold)
            assert our_tokens(model, prompt, 30, draft="tree", draft_options=more) == expected


def test_pruning_above_the_first_stream_layer_changes_no_token():
    """Red when: the rows of layers below and above the pruner are mixed up in commit."""
    model = make_model("llama", seed=6, prune={"type": "low_rank", "rank": 4, "layer": 3})
    prompt = random_prompt(8, seed=4)
    expected = plain_tokens(model.base, prompt, 30)
    with drafter(model, expected, len(prompt), 0.6, seed=5):
        more = options("cartesian:3x3x2x1", "deferred", prune_threshold=0.012)
        assert our_tokens(model, prompt, 30, draft="tree", draft_options=more) == expected


@pytest.mark.parametrize("draft", ["chain", "tree", "auto"])
def test_always_right_and_always_wrong_drafters_give_the_same_text(draft):
    """Red when: a wrong draft is accepted, or a right one is not (the number of passes is exact)."""
    model = make_model("llama", seed=7)
    prompt = random_prompt(12, seed=5)
    expected = plain_tokens(model.base, prompt, 41, end_of_text=())
    tokenizer = NumberTokenizer(end_of_text=())
    for accuracy, passes in ((1.0, 1 + 40 // 5), (0.0, 41)):
        with drafter(model, expected, len(prompt), accuracy):
            responses = list(stream_generate(model, tokenizer, prompt, 41, draft=draft))
        assert [token for response in responses for token in response.tokens] == expected
        assert responses[-1].target_passes == passes
        assert responses[-1].tokens_per_pass == pytest.approx(41 / passes)


RATES = ((0.6, 0.2, 0.1), (0.5, 0.2, 0.1), (0.4, 0.2, 0.1), (0.3, 0.2, 0.1))
MAX_ROWS = 14


def calibration_for(tree, insertion, plain=1.0):
    """Costs under which the planner chooses just this tree and insertion."""
    dear = Curve(tuple((rows, 50.0) for rows in range(1, MAX_ROWS + 1)))
    cheap = Curve(tuple((rows, 0.5 if rows == tree.size else 50.0) for rows in range(1, MAX_ROWS + 1)))
    kind = "parallel" if insertion == "parallel" else "chain" if tree.is_chain else "tree"
    curves = {name: cheap if name == kind else dear for name in ("chain", "tree", "parallel")}
    more = {"deferred": 0.1 if insertion == "deferred" else 1.0, "leaf": 0.0 if insertion == "leaf" else 1.0}
    for name, extra in more.items():
        curves[name] = Curve(tuple((rows, seconds + extra) for rows, seconds in curves["chain"].points))
    return Calibration({}, ((0, PassCosts(plain=plain, **curves)),), RATES, (9, 9, 9, 9), "made up")


@pytest.mark.parametrize("insertion", INSERTIONS)
def test_every_plan_that_the_planner_can_choose(insertion):
    """Red when: the tree mask, positions or commits are wrong for any tree that a calibration leads to."""
    model = make_model("qwen3", seed=21)
    prompt = random_prompt(10, seed=21)
    expected = plain_tokens(model.base, prompt, 24)
    trees = candidate_trees(RATES, MAX_ROWS)
    assert len(trees) >= MAX_ROWS
    for number, tree in enumerate(trees, start=INSERTIONS.index(insertion)):
        calibration = calibration_for(tree, insertion)
        planned = calibration.plan(0)
        assert (planned.tree.size, planned.way) == (tree.size, insertion)
        tree = planned.tree  # of two trees of one size and price, the better one
        with drafter(model, expected, len(prompt), 0.8, seed=tree.size):
            draft = ("tree", "auto")[number % 2]
            more = DraftOptions(calibration=calibration)
            responses = list(stream_generate(model, NumberTokenizer(), prompt, 24, draft=draft, draft_options=more))
            assert [token for response in responses for token in response.tokens] == expected
            report = responses[-1].draft
            assert (report.plan, report.nodes, report.insertion) == ("calibrated", tree.size - 1, insertion)


class Erratic:
    """A control that changes its mind in every pass: any tree, any insertion, plain passes one or many at a time."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.trees = candidate_trees(RATES, MAX_ROWS)
        self.plain_left = 0
        self.chosen = []

    wants_times = False

    @property
    def stays_plain(self):
        return self.plain_left > 1

    def choose(self, context):
        if not self.plain_left and self.rng.random() < 0.3:
            self.plain_left = self.rng.randint(1, 4)
        self.chosen.append(None if self.plain_left else (self.rng.choice(self.trees), self.rng.choice(INSERTIONS)))
        return self.chosen[-1]

    def record(self, drafted, tree, nodes):
        if not drafted:
            self.plain_left = max(self.plain_left - 1, 0)

    def observe(self, drafted, tree, seconds):
        pass


@pytest.mark.parametrize("temp", [0.0, 0.9])
@pytest.mark.parametrize("name", ["llama", "phi3", "opt"])
def test_plans_that_change_in_mid_generation(monkeypatch, name, temp):
    """Red when: streams inserted for one plan are read by the next one, or a pass launched ahead is lost."""
    model = make_model(name, seed=22)
    sampler = make_sampler(temp)
    for seed in range(4):
        control = Erratic(seed)
        monkeypatch.setattr(
            sys.modules[stream_generate.__module__], "steer", lambda *_, c=control: (make_plan("auto", model.gamma), c)
        )
        prompt = random_prompt(3 + seed, seed=seed)
        expected = plain_tokens(model.base, prompt, 60, end_of_text=(), seed=seed, sampler=sampler)
        with drafter(model, expected, len(prompt), 0.7, seed):
            tokens = our_tokens(
                model, prompt, 60, tokenizer=NumberTokenizer(end_of_text=()), seed=seed, sampler=sampler
            )
        assert tokens == expected
        assert {choice and choice[1] for choice in control.chosen} == {None, *INSERTIONS}


def test_a_calibration_that_says_plain_decoding_starts_parked_and_probes():
    """Red when: auto drafts although no draft pays, or never looks again."""
    model = make_model("llama", seed=7)
    prompt = random_prompt(12, seed=5)
    expected = plain_tokens(model.base, prompt, 120, end_of_text=())
    options = DraftOptions(calibration=calibration_for(DraftTree.chain(4), "deferred", plain=0.2))
    with drafter(model, expected, len(prompt), 0.0):
        tokenizer = NumberTokenizer(end_of_text=())
        responses = list(stream_generate(model, tokenizer, prompt, 120, draft_options=options))
    assert [token for response in responses for token in response.tokens] == expected
    assert (responses[-1].draft.nodes, responses[-1].draft.plan) == (0, "calibrated")
    assert responses[-1].stream_passes == 2, "one probe of two passes after 48 plain ones"


def test_parking_and_probing_change_no_token(monkeypatch):
    """Red when: a pass launched ahead of a parked one is counted, sampled or rolled back wrongly."""
    monkeypatch.setattr(Control, "observe", lambda *_: None)  # no clock decides when it parks
    model = make_model("llama", seed=7)
    prompt = random_prompt(12, seed=5)
    for temp in (0.0, 0.9):
        sampler = make_sampler(temp)
        expected = plain_tokens(model.base, prompt, 90, end_of_text=(), seed=4, sampler=sampler)
        tokenizer = NumberTokenizer(end_of_text=())
        with drafter(model, expected, len(prompt), 0.1, seed=3):
            responses = list(stream_generate(model, tokenizer, prompt, 90, sampler=sampler, seed=4))
        assert [token for response in responses for token in response.tokens] == expected
        last = responses[-1]
        assert 4 <= last.stream_passes < last.target_passes - 16, "it must have parked, and drafted before that"
        assert last.generation_tokens == last.target_passes + sum(last.accepted_by_depth)


@pytest.mark.parametrize("draft", ["chain", "tree"])
def test_statistics_add_up(draft):
    """Red when: a pass is counted twice, or a draft beyond the end of the text counts as accepted."""
    model = make_model("llama", seed=7)
    prompt = random_prompt(12, seed=5)
    expected = plain_tokens(model.base, prompt, 40, end_of_text=())
    tokenizer = NumberTokenizer(end_of_text=())
    for max_tokens in (1, 2, 7, 40):
        for insertion in INSERTIONS:
            with drafter(model, expected, len(prompt), 0.7):
                more = options(None, insertion)
                last = list(stream_generate(model, tokenizer, prompt, max_tokens, draft=draft, draft_options=more))[-1]
            assert last.generation_tokens == max_tokens == last.target_passes + sum(last.accepted_by_depth)
            assert last.drafted_by_depth == [last.target_passes - 1] * 4
            assert last.finish_reason == "length"
            if insertion == "deferred":
                assert last.stream_passes == last.target_passes - 1
            elif insertion == "parallel":
                assert last.stream_passes == 0
            elif draft == "chain" and max_tokens == 40:
                misses = last.target_passes - 2 - last.accepted_by_depth[-1]  # the first pass is the root alone
                assert 0 < misses <= last.stream_passes <= misses + 1, "the last pass needs no streams"
        assert sorted(last.accepted_by_depth, reverse=True) == last.accepted_by_depth


@pytest.mark.parametrize("draft", ["chain", "cartesian", "best-first"])
def test_end_of_text_and_max_tokens_inside_an_accepted_path(draft):
    """Red when: tokens after end-of-text or beyond max_tokens are emitted, or the pass after them is run."""
    mode, tree = DRAFTS[draft]
    mode, tree = ("tree", tree) if tree else (mode, None)
    model = make_model("llama", seed=8)
    prompt = random_prompt(6, seed=6)
    free = plain_tokens(model.base, prompt, 30, end_of_text=())
    with drafter(model, free, len(prompt), 1.0):
        for length in range(1, 13):
            last = list(
                stream_generate(
                    model,
                    NumberTokenizer(end_of_text=()),
                    prompt,
                    length,
                    draft=mode,
                    draft_options=options(tree, "deferred"),
                )
            )[-1]
            assert (last.generation_tokens, last.finish_reason) == (length, "length")
            assert last.target_passes == 1 + -(-(length - 1) // 5)
        for end in dict.fromkeys(free[:12]):
            index = free.index(end)
            responses = list(
                stream_generate(
                    model,
                    NumberTokenizer(end_of_text=(end,)),
                    prompt,
                    30,
                    draft=mode,
                    draft_options=options(tree, "deferred"),
                )
            )
            assert [token for response in responses for token in response.tokens] == free[: index + 1]
            assert responses[-1].finish_reason == "stop"
            assert responses[-1].target_passes == 1 + -(-index // 5)
            assert index + 1 == responses[-1].target_passes + sum(responses[-1].accepted_by_depth)
            assert "".join(response.text for response in responses) == "".join(f"{token} " for token in free[:index])


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_prefill_in_chunks(chunk):
    """Red when: a chunk is skipped or run twice, or the prompt's last token is prefilled as well."""
    model = make_model("qwen2", seed=9)
    for length in (1, 2, chunk + 1, 40):
        prompt = random_prompt(length, seed=length)
        expected = plain_tokens(model.base, prompt, 12, prefill_step_size=chunk)
        assert our_tokens(model, prompt, 12, draft="tree", prefill_step_size=chunk) == expected


def test_generation_beyond_the_first_cache_block():
    """Red when: a commit forgets that the cache was reallocated (blocks of 256 rows)."""
    model = make_model("llama", seed=10)
    prompt = random_prompt(245, seed=7)
    expected = plain_tokens(model.base, prompt, 40, end_of_text=())
    with drafter(model, expected, len(prompt), 0.7):
        tokens = our_tokens(
            model,
            prompt,
            40,
            tokenizer=NumberTokenizer(end_of_text=()),
            draft="tree",
            draft_options=options("best-first:12", None),
        )
    assert tokens == expected


@pytest.mark.parametrize(
    "sampling",
    [
        {"temp": 1.0},
        {"temp": 0.7, "top_p": 0.9, "min_p": 0.01},
        {"temp": 1.2, "top_k": 8},
        {"temp": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    ],
    ids=str,
)
@pytest.mark.parametrize("draft", ["off", "cartesian"])
def test_sampled_text_depends_on_the_seed_alone(sampling, draft):
    """Red when: nodes of one depth draw with different keys, or the key chain counts nodes instead of tokens."""
    model = make_model("llama", seed=11)
    mode, tree = DRAFTS[draft]
    prompt = random_prompt(5, seed=8)
    sampler = make_sampler(**sampling)
    for seed in (0, 1):
        expected = plain_tokens(model.base, prompt, 24, seed=seed, sampler=sampler)
        with drafter(model, expected, len(prompt), 0.8, seed=seed):
            for more in [options(tree, insertion) for insertion in ("leaf", "deferred")] if tree else [None]:
                tokens = our_tokens(model, prompt, 24, sampler=sampler, seed=seed, draft=mode, draft_options=more)
                assert tokens == expected


def test_without_a_seed_the_global_random_state_goes_on_as_in_mlx_lm():
    """Red when: the sampler's probe or the verification leaves the global key elsewhere than plain decoding does."""
    model = make_model("llama", seed=11)
    prompt = random_prompt(5, seed=8)
    sampler = make_sampler(1.0)
    mx.random.seed(3)
    first = our_tokens(model, prompt, 9, sampler=sampler, draft="off")
    second = our_tokens(model, prompt, 9, sampler=sampler, draft="off")
    mx.random.seed(3)
    assert our_tokens(model, prompt, 9, sampler=sampler, draft="tree") == first
    assert our_tokens(model, prompt, 9, sampler=sampler, draft="tree") == second
    assert first != second


@pytest.mark.parametrize("temp", [0.0, 0.9])
def test_logits_processors_see_each_path(temp):
    """Red when: a processor gets another node's tokens, or the history misses the root."""
    model = make_model("llama", seed=12)
    prompt = random_prompt(7, seed=9)
    sampler = make_sampler(temp)
    make = {"logit_bias": {7: 2.0, 9: -3.0}, "repetition_penalty": 1.4, "presence_penalty": 0.5}
    expected = plain_tokens(
        model.base, prompt, 24, seed=1, sampler=sampler, logits_processors=make_logits_processors(**make)
    )
    with drafter(model, expected, len(prompt), 0.8):
        for draft in ("tree", "off"):
            tokens = our_tokens(
                model,
                prompt,
                24,
                seed=1,
                sampler=sampler,
                logits_processors=make_logits_processors(**make),
                draft=draft,
            )
            assert tokens == expected


@pytest.mark.parametrize("draft", ["off", "tree"])
def test_a_prompt_cache_continues_like_mlx_lm(draft):
    """Red when: the caches miss the last token of a finished text, or hold rejected rows."""
    model = make_model("llama", seed=13)
    first, second = random_prompt(9, seed=10), random_prompt(4, seed=11)
    reference_cache = make_prompt_cache(model.base)
    expected = []
    for prompt in (first, second):
        expected.append(plain_tokens(model.base, prompt, 10, prompt_cache=reference_cache))
        for cache in reference_cache:  # mlx-lm runs one token ahead of the last one it is asked for
            cache.offset = len(first) + len(expected[0]) if len(expected) == 1 else cache.offset
    caches = model.make_cache()
    for prompt, tokens in zip((first, second), expected, strict=True):
        assert our_tokens(model, prompt, 10, draft=draft, prompt_cache=caches) == tokens
    assert {cache.offset for cache in caches} == {len(first) + len(second) + sum(map(len, expected))}


@pytest.mark.parametrize("draft", ["off", "chain", "auto"])
def test_closing_the_generator_leaves_the_cache_at_what_was_yielded(draft):
    """Red when: the rows of the passes under way stay in the caches."""
    model = make_model("llama", seed=14)
    prompt = random_prompt(9, seed=12)
    caches = model.make_cache()
    responses = stream_generate(model, NumberTokenizer(end_of_text=()), prompt, 20, draft=draft, prompt_cache=caches)
    tokens = next(responses).tokens + next(responses).tokens
    responses.close()
    assert {cache.offset for cache in caches} == {len(prompt) + len(tokens)}


def test_stop_strings_end_the_text_before_them():
    """Red when: part of a stop string is emitted before it is complete."""
    model = make_model("llama", seed=15)
    prompt = random_prompt(9, seed=13)
    tokens = plain_tokens(model.base, prompt, 20, end_of_text=())
    whole = "".join(f"{token} " for token in tokens)
    stop = whole.split(" ", 4)[3] + " " + whole.split(" ", 5)[4]
    for draft in ("off", "tree"):
        responses = list(
            stream_generate(model, NumberTokenizer(end_of_text=()), prompt, 20, draft=draft, stop=["zzz", stop])
        )
        assert "".join(response.text for response in responses) == whole[: whole.index(stop)]
        assert responses[-1].finish_reason == "stop"


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    length=st.integers(1, 40),
    max_tokens=st.integers(1, 20),
    accuracy=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    tree=st.one_of(
        st.integers(1, 20).map(lambda nodes: f"best-first:{nodes}"),
        st.lists(st.integers(1, 3), min_size=1, max_size=4).map(lambda w: "cartesian:" + "x".join(map(str, w))),
        st.integers(1, 4).map(lambda depth: f"chain:{depth}"),
    ),
    insertion=st.sampled_from(INSERTIONS),
    temp=st.sampled_from([0.0, 0.9]),
    draft=st.sampled_from(["auto", "tree"]),
)
def test_any_prompt_any_tree(seed, length, max_tokens, accuracy, tree, insertion, temp, draft):
    """Red when: any combination of tree, insertion, drafter and sampler changes a token."""
    model = _property_model()
    prompt = random_prompt(length, seed)
    sampler = make_sampler(temp)
    expected = plain_tokens(model.base, prompt, max_tokens, seed=seed, sampler=sampler)
    with drafter(model, expected, length, accuracy, seed):
        tokens = our_tokens(
            model,
            prompt,
            max_tokens,
            seed=seed,
            sampler=sampler,
            draft=draft,
            draft_options=options(tree, insertion),
        )
    assert tokens == expected
    assert tokens[-1] == END_OF_TEXT or len(tokens) == max_tokens


@functools.cache
def _property_model():
    return make_model("llama", seed=16)


@pytest.mark.parametrize("name", [*FAMILIES, "bundled"])
def test_a_slice_of_the_exactness_grid(name):
    """Red when: any of the breaks above; ``python -m benchmarks.exactness`` runs the whole grid.

    The bundled model runs on two prompts; a tiny one on a tree and an insertion of its own, whatever the accuracy.
    """
    found = cases(bundled_arm(2)) if name == "bundled" else cases(tiny_arm(name, 4), True, FAMILIES.index(name))
    assert [case for equal, case in found if not equal] == []
