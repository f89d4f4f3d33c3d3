"""Several sequences together: each generates what it generates alone, token by token."""

import random
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from specstream_mlx.drafters.prompt_lookup import PromptLookup
from specstream_mlx.drafters.scripted import Scripted
from specstream_mlx.drafters.two_model import TwoModel
from specstream_mlx.engine.batch import Batch, Step
from specstream_mlx.engine.generate import new_session
from specstream_mlx.engine.session import Session
from specstream_mlx.planning.shared import Asking, RowCosts, share_rows
from tests.tiny import END_OF_TEXT, NumberTokenizer, make_model, our_tokens, plain_tokens, random_prompt


def run(batch: Batch, joining: list[tuple[int, Session, list[int]]], leaving: dict[int, Session] | None = None):
    """Run rounds until all have ended; sequences join in the round given. Returns tokens and errors by session."""
    tokens: dict[int, list[int]] = {}
    errors: dict[int, Exception] = {}
    waiting = sorted(joining, key=lambda entry: entry[0])
    number = 0
    while waiting or len(batch):
        while waiting and waiting[0][0] <= number:
            _, session, prompt = waiting.pop(0)
            batch.add(session, prompt)
            tokens[id(session)] = []
        if leaving and number in leaving:
            batch.remove(leaving[number])
        for step in batch.step():
            take(step, tokens, errors)
        number += 1
    return tokens, errors


def take(step: Step, tokens: dict[int, list[int]], errors: dict[int, Exception]) -> None:
    if step.outcome is not None:
        tokens[id(step.session)] += step.outcome.tokens
    if step.error is not None:
        errors[id(step.session)] = step.error


SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"sampler": make_sampler(0.8, top_p=0.9)},
    "penalised": {
        "sampler": make_sampler(1.0),
        "logits_processors": make_logits_processors(repetition_penalty=1.3, repetition_context_size=8),
    },
}
CACHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "quantised": {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 9},
    "limited": {"max_kv_size": 20},
}
MODEL = make_model("qwen3", base_changes={"head_dim": 32})
SECOND = make_model("qwen3", seed=3)


def drafter_of(kind: str, text: list[int], prompt: list[int], seed: int) -> Any:
    """A drafter, and what it takes besides."""
    if kind == "none":
        return "none"
    if kind == "two-model":
        return TwoModel(SECOND, 3)
    if kind == "prompt-lookup":
        return PromptLookup(4)
    return Scripted(text, len(prompt), 0.7, seed, beside=MODEL.drafter)


@settings(max_examples=12)
@given(st.integers(0, 2**32 - 1))
def test_together_is_alone(seed):
    rng = random.Random(seed)
    batch = Batch(MODEL, prefill_step_size=rng.choice((3, 64)), ahead=rng.random() < 0.7)
    joining, expected, leaving = [], {}, {}
    for index in range(rng.randint(2, 4)):
        prompt = random_prompt(rng.randint(1, 14), seed % 1000 + index)
        how = {**SAMPLERS[rng.choice(sorted(SAMPLERS))], **CACHES[rng.choice(sorted(CACHES))]}
        how |= {"seed": index, "max_tokens": rng.randint(1, 24)}
        stock = dict(how)
        text = plain_tokens(MODEL.base, prompt, stock.pop("max_tokens"), **stock)
        draft = rng.choice(("auto", "tree", "chain", "auto"))
        drafter = drafter_of(
            rng.choice(("scripted", "scripted", "two-model", "prompt-lookup", "none")), text, prompt, index
        )
        if drafter == "none":
            draft = "off"
        session, ids = new_session(MODEL, NumberTokenizer(), prompt, drafter=drafter, draft=draft, **how)
        joining.append((rng.randint(0, 12), session, ids))
        expected[id(session)] = text
        if rng.random() < 0.2:
            leaving[rng.randint(2, 14)] = session
    tokens, errors = run(batch, joining, leaving)
    assert not errors
    gone = {id(session) for session in leaving.values()}
    for key, text in expected.items():
        if key in gone:
            assert tokens[key] == text[: len(tokens[key])]
        else:
            assert tokens[key] == text


@pytest.mark.parametrize(
    "family", ["qwen3", "gpt2", "opt", "llama-sliding", "llama-dynamic", "gemma2", "gpt_oss", "phi3", "qwen3_moe"]
)
def test_families_together(family):
    model = make_model(family)
    joining, expected = [], []
    for index in range(3):
        prompt = random_prompt(3 + 5 * index, index)
        text = plain_tokens(model.base, prompt, 16)
        expected.append(text)
        script = Scripted(text, len(prompt), 0.8, index, beside=model.drafter)
        session, ids = new_session(model, NumberTokenizer(), prompt, drafter=script, draft="tree", max_tokens=16)
        joining.append((index, session, ids))
    tokens, errors = run(Batch(model), joining)
    assert not errors
    assert [tokens[id(session)] for _, session, _ in joining] == expected


@pytest.mark.parametrize("mode", ["shared", "lossless"])
@pytest.mark.parametrize("insertion", ["leaf", "deferred", "parallel"])
def test_streams_ride_together(mode, insertion):
    """Proposals of the streams are those that each sequence would have alone, so counts are the same too."""
    from specstream_mlx import DraftOptions

    model = make_model("llama", mode=mode) if mode == "shared" else make_model("llama")
    options = DraftOptions(insertion=insertion)
    sessions, alone = [], []
    for index in range(3):
        prompt = random_prompt(4 + index, index)
        how = {"draft": "tree", "draft_options": options, "max_tokens": 12}
        alone.append(our_tokens(model, prompt, **how))
        single, _ = new_session(model, NumberTokenizer(), prompt, **how)
        batch = Batch(model, ahead=False)
        tokens, _ = run(batch, [(0, single, prompt)])
        assert tokens[id(single)] == alone[-1]
        sessions.append((0, new_session(model, NumberTokenizer(), prompt, **how)[0], prompt, single))
    tokens, errors = run(Batch(model), [entry[:3] for entry in sessions])
    assert not errors
    for (_, session, _, single), text in zip(sessions, alone, strict=True):
        assert tokens[id(session)] == text
        assert session.statistics == single.statistics
        assert session.state.own_passes == single.state.own_passes


def test_one_that_fails_ends_alone():
    def failing(tokens: mx.array, logits: mx.array) -> mx.array:
        if len(tokens) > 8:
            raise ValueError("no such token")
        return logits

    prompts = [random_prompt(5, 0), random_prompt(6, 1)]
    text = plain_tokens(MODEL.base, prompts[1], 12)
    bad, _ = new_session(MODEL, NumberTokenizer(), prompts[0], logits_processors=[failing], draft="tree", max_tokens=30)
    good, _ = new_session(MODEL, NumberTokenizer(), prompts[1], draft="tree", max_tokens=12)
    tokens, errors = run(Batch(MODEL), [(0, bad, prompts[0]), (0, good, prompts[1])])
    assert set(errors) == {id(bad)}
    assert "no such token" in str(errors[id(bad)])
    assert tokens[id(good)] == text


def test_one_that_is_left_alone_goes_on_alone_and_back():
    """From alone to together and back, in the middle of passes that were launched ahead."""
    prompts = [random_prompt(5, index) for index in range(3)]
    texts = [plain_tokens(MODEL.base, prompt, 40, end_of_text=()) for prompt in prompts]
    joining = []
    for index, prompt in enumerate(prompts):
        script = Scripted(texts[index], len(prompt), 1.0, beside=MODEL.drafter)
        session, _ = new_session(
            MODEL, NumberTokenizer(()), prompt, drafter=script, draft="chain", max_tokens=(40, 4, 9)[index]
        )
        joining.append((4 * index, session, prompt))
    tokens, _ = run(Batch(MODEL), joining)
    for (_, session, _), text, count in zip(joining, texts, (40, 4, 9), strict=True):
        assert tokens[id(session)] == text[:count]


def test_rows_are_shared_where_they_pay():
    rates = [[0.9, 0.05], [0.8, 0.05], [0.7, 0.05]]
    steep, flat = (lambda rows: rows), (lambda rows: 1 + 0.001 * rows)
    asking = [Asking(rates, 3), Asking([[0.1], [0.1]], 2)]
    trees = share_rows(flat, 2, asking, max_drafted=4)
    assert trees[0].size > trees[1].size
    assert sum(tree.size - 1 for tree in trees) <= 4
    assert all(tree.size == 1 for tree in share_rows(steep, 8, asking * 4))


def test_with_many_sequences_drafts_shrink_to_nothing():
    rates = [[0.7, 0.1], [0.6, 0.1]]

    def seconds(rows: float) -> float:  # weights are read in any case; beyond 16 rows arithmetic decides
        return max(1.0, rows / 16)

    drafted = [
        sum(tree.size - 1 for tree in share_rows(seconds, count, [Asking(rates, 2)] * count))
        for count in (1, 8, 16, 32)
    ]
    assert drafted[0] > 0
    assert drafted[1] >= drafted[2] >= drafted[3] == 0


def test_depth_is_bounded_by_what_is_wanted():
    (tree,) = share_rows(lambda rows: 1.0, 1, [Asking([[0.9], [0.9], [0.9]], 1)])
    assert tree.max_depth == 1
    (tree,) = share_rows(lambda rows: 1.0, 1, [Asking([[0.9]], 0)])
    assert tree.size == 1


def test_row_costs_are_learned():
    costs = RowCosts()
    assert costs.wants_variety
    for _ in range(3):
        for rows in (1, 4, 9, 16):
            costs.observe(rows, 0.01 + 0.002 * rows)
    assert not costs.wants_variety
    assert costs.seconds(8) == pytest.approx(0.026, abs=0.0013)
    costs.observe(4, 5.0)  # the machine was away
    assert costs.seconds(8) == pytest.approx(0.026, abs=0.0013)


def test_end_of_text_is_the_last_token():
    for index in range(3):
        prompt = random_prompt(4, index)
        session, _ = new_session(MODEL, NumberTokenizer(), prompt, max_tokens=200)
        tokens, _ = run(Batch(MODEL), [(0, session, prompt)])
        assert END_OF_TEXT not in tokens[id(session)][:-1]


def test_batch_generate_is_mlx_lms_and_each_is_alone():
    """The answers, ids and log-probabilities of ``batch_generate`` are those of single generations."""
    from specstream_mlx import batch_generate

    class Tokenizer(NumberTokenizer):
        def decode(self, ids):
            return " ".join(map(str, ids))

    prompts = [random_prompt(length, length) for length in (3, 9, 5)]
    limits = [6, 12, 20]
    answers = batch_generate(
        MODEL,
        Tokenizer(),
        prompts,
        max_tokens=limits,
        return_token_ids=True,
        return_logprobs=True,
        return_prompt_caches=True,
        completion_batch_size=2,
    )
    for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        text = plain_tokens(MODEL.base, prompt, limit)
        ids = answers.token_ids[index]
        assert ids == [token for token in text if token != END_OF_TEXT]
        assert answers.texts[index] == " ".join(map(str, ids))
        assert answers.caches[index][0].offset == len(prompt) + len(text)
        rows = MODEL(mx.array([[*prompt, *ids]]))[0, len(prompt) - 1 : -1]
        rows = rows - mx.logsumexp(rows, axis=-1, keepdims=True)
        expected = rows[mx.arange(len(ids)), mx.array(ids)].tolist()
        assert answers.logprobs[index] == pytest.approx(expected, abs=1e-3)
    assert answers.stats.generation_tokens == sum(len(ids) for ids in answers.token_ids) + sum(
        len(plain_tokens(MODEL.base, p, n)) - len(ids)
        for p, n, ids in zip(prompts, limits, answers.token_ids, strict=True)
    )
    before = [cache.offset for cache in answers.caches[0]]
    again = batch_generate(MODEL, Tokenizer(), [[7, 8]], prompt_caches=[answers.caches[0]], max_tokens=4)
    assert [cache.offset for cache in answers.caches[0]] == before
    assert again.texts[0]


def test_a_pass_that_fails_can_be_tried_again_with_fewer(monkeypatch):
    """Red when: rows of a pass that failed half-way stay in the caches."""
    prompts = [random_prompt(5, index) for index in range(3)]
    texts = [plain_tokens(MODEL.base, prompt, 14, end_of_text=()) for prompt in prompts]
    batch = Batch(MODEL)
    sessions = []
    for prompt in prompts:
        session, ids = new_session(MODEL, NumberTokenizer(()), prompt, draft="chain", max_tokens=14)
        batch.add(session, ids)
        sessions.append(session)
    tokens: dict[int, list[int]] = {id(session): [] for session in sessions}
    errors: dict[int, Exception] = {}
    for _ in range(5):
        for step in batch.step():
            take(step, tokens, errors)
    layer = MODEL.layers[2]
    kind = type(layer)
    real = kind.__call__

    def failing(self, hidden, mask, cache):
        if self is layer:
            raise RuntimeError("[malloc] out of memory")
        return real(self, hidden, mask, cache)

    with monkeypatch.context() as patched:
        patched.setattr(kind, "__call__", failing)
        with pytest.raises(RuntimeError, match="malloc"):
            batch.step()
    batch.remove(sessions[2])
    while len(batch):
        for step in batch.step():
            take(step, tokens, errors)
    assert not errors
    assert [tokens[id(session)] for session in sessions[:2]] == texts[:2]
