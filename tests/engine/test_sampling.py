"""The target's draws: their distribution by enumeration and over many seeds, and mlx-lm's samplers token by token."""

import itertools
import math
from typing import get_args

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import sample_utils
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from specstream_mlx import DraftOptions
from specstream_mlx.engine.acceptance import accept
from specstream_mlx.engine.sampling import TargetSampler
from specstream_mlx.options import Insertion
from specstream_mlx.target.tree import DraftTree
from tests.tiny import END_OF_TEXT, NumberTokenizer, drafter, make_model, our_tokens, plain_tokens, random_prompt
from tests.tolerances import FLOAT32, FLOAT64

V = 4
SAMPLERS = {
    "plain": {"temp": 1.0},
    "cold": {"temp": 0.6},
    "top-p": {"temp": 1.0, "top_p": 0.8},
    "top-k": {"temp": 1.3, "top_k": 2},
    "min-p": {"temp": 1.0, "min_p": 0.1},
    "min-p-keep": {"temp": 1.0, "min_p": 0.9, "min_tokens_to_keep": 3},
    "xtc": {"temp": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.2, "xtc_special_tokens": [1]},
    "all": {"temp": 0.8, "top_p": 0.95, "min_p": 0.05, "top_k": 3, "xtc_probability": 1.0, "xtc_threshold": 0.3},
}
PROCESSORS = {
    "none": {},
    "all": {
        "logit_bias": {0: 1.5, 2: -1.0},
        "repetition_penalty": 1.5,
        "repetition_context_size": 2,
        "presence_penalty": 0.4,
        "presence_context_size": 1,
        "frequency_penalty": 0.3,
        "frequency_context_size": 5,
    },
}


class EnumeratedNoise:
    """Takes the place of mlx-lm's categorical draw: the i-th token falls where ``uniform[i]`` lies in its distribution.

    Which ``i`` it is, the global random key says, as it does for the real draw; the key moves on as there.
    """

    def __init__(self, seed: int, splits: int) -> None:
        mx.random.seed(seed)
        self.index_of = {}
        for step in range(8 * splits):
            if step % splits == splits - 1:  # xtc takes a key before the draw does
                self.index_of[tuple(mx.random.state[0].tolist())] = step // splits
            mx.eval(mx.random.uniform())
        self.uniform: list[float] = []
        self.probs: np.ndarray | None = None

    def __call__(self, logits: mx.array, temp: float) -> mx.array:
        key = tuple(mx.random.state[0].tolist())
        mx.eval(mx.random.uniform())
        scores = np.array(logits[0], dtype=np.float64) / temp
        probs = np.exp(scores - scores.max())
        self.probs = probs / probs.sum()
        if key not in self.index_of or self.index_of[key] >= len(self.uniform):
            return mx.array([0])
        return mx.array([int(np.searchsorted(np.cumsum(self.probs), self.uniform[self.index_of[key]]))])


@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_outcome_of_a_pass_has_the_probability_of_plain_decoding(monkeypatch, name, processors):
    """All outcomes of three draws, each with its exact probability, through a pass over a tree.

    Noise is one uniform number per token. What plain decoding draws from it is constant between the steps of the
    cumulated distribution, so one number per outcome stands for all, with the outcome's probability as its weight.
    Red when: nodes of one depth share no noise, a depth has the noise of another, or a row gets a processor's changes
    for another path.
    """
    splits = 2 if "xtc_probability" in SAMPLERS[name] else 1
    noise = EnumeratedNoise(3, splits)
    monkeypatch.setattr(sample_utils, "categorical_sampling", noise)
    sampler = make_sampler(**SAMPLERS[name])
    logits_processors = make_logits_processors(**PROCESSORS[processors])
    rng = np.random.default_rng(5)
    table = {
        c: rng.normal(size=V).astype(np.float32) * 1.5 for n in range(3) for c in itertools.product(range(V), repeat=n)
    }
    prompt = [1, 3, 1]
    tree = DraftTree.from_paths([(0, 0), (0, 1), (1, 0)])
    node_tokens = [prompt[-1], 2, 1, 2, 0, 3]
    paths = [tuple(node_tokens[n] for n in tree.ancestors(node)[1:]) for node in range(tree.size)]
    logits = mx.array(np.stack([table[path] for path in paths]))

    def plain_probs(context: tuple[int, ...]) -> np.ndarray:
        row = mx.array(table[context])[None]
        for processor in logits_processors:
            row = processor(mx.array([*prompt, *context]), row)
        sampler(row - mx.logsumexp(row, keepdims=True))
        assert noise.probs is not None
        return noise.probs

    emitted: dict[tuple[int, ...], float] = {}
    expected: dict[tuple[int, ...], float] = {}
    for outcome in itertools.product(range(V), repeat=3):
        probability, uniform = 1.0, []
        for depth, token in enumerate(outcome):
            probs = plain_probs(outcome[:depth])
            uniform.append(float(np.cumsum(probs)[token] - probs[token] / 2))
            probability *= float(probs[token])
        if probability < FLOAT64:
            continue
        noise.uniform = uniform
        target = TargetSampler(sampler, logits_processors, V, seed=3)
        history = mx.array(prompt[:-1]) if logits_processors else None
        drawn = target.draw(logits, tree, mx.array(node_tokens), history)
        tokens = accept(tree, node_tokens, drawn.tokens.tolist()).tokens
        emitted[tokens] = emitted.get(tokens, 0.0) + probability
        accepted = next(n for n in range(1, 4) if n == 3 or outcome[:n] not in paths)
        expected[outcome[:accepted]] = expected.get(outcome[:accepted], 0.0) + probability
    assert emitted == pytest.approx(expected, abs=FLOAT64)
    assert sum(emitted.values()) == pytest.approx(1, abs=FLOAT32)
    assert len({len(tokens) for tokens in emitted}) > 1


def test_chi_square_over_many_seeds():
    """The first three tokens of 300 seeded texts against the model's exact distribution of them.

    Threshold: the 99.9% quantile of chi-square. The seeds are fixed, so the outcome is too.
    Red when: noise is used twice, or depends on what is drafted.
    """
    model = make_model("llama", seed=31, base_changes={"vocab_size": 7})
    prompt = [6, 3, 6, 2]
    sampler = make_sampler(1.0, top_k=3)

    def probs(context: list[int]) -> np.ndarray:
        logprobs = model(mx.array([context]))[0, -1:]
        logprobs = sample_utils.apply_top_k(logprobs - mx.logsumexp(logprobs), 3)
        return np.array(mx.softmax(logprobs[0]), dtype=np.float64)

    expected = {}
    for first in range(7):
        for second in range(7):
            p = probs(prompt)[first] * probs([*prompt, first])[second]
            if p > 0:
                third = probs([*prompt, first, second])
                expected |= {(first, second, token): p * q for token, q in enumerate(third) if q > 0}
    seeds = 300
    counts = dict.fromkeys(expected, 0)
    for seed in range(seeds):
        tokens = our_tokens(
            model,
            prompt,
            3,
            tokenizer=NumberTokenizer(end_of_text=()),
            sampler=sampler,
            seed=seed,
            draft="tree",
            draft_options=DraftOptions(tree="cartesian:3x2"),
        )
        counts[tuple(tokens)] += 1
    # Rare outcomes together, as usual, so that every cell expects at least five.
    common = [outcome for outcome, p in expected.items() if p * seeds >= 5]
    cells = [(counts[outcome], expected[outcome] * seeds) for outcome in common]
    cells.append((seeds - sum(c for c, _ in cells), seeds - sum(e for _, e in cells)))
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells if mean > 0)
    freedom = len(cells) - 1
    # Wilson and Hilferty: chi-square as the cube of a normal variable, 3.09 its 99.9% quantile.
    threshold = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert freedom >= 12
    assert statistic < threshold


@pytest.mark.parametrize("name", ["greedy", *SAMPLERS])
def test_samplers_and_processors_equal_mlx_lm_token_by_token(name):
    """Red when: a penalty looks at another node's path, or the context size counts from elsewhere."""
    model = make_model("llama", seed=32)
    prompt = random_prompt(6, seed=3)
    sampling = {"temp": 0.0} if name == "greedy" else SAMPLERS[name]
    if "xtc_probability" in sampling:
        sampling = sampling | {"xtc_probability": 0.5, "xtc_threshold": 0.05}
    sampler = make_sampler(**sampling)
    logits_processors = make_logits_processors(**PROCESSORS["all"])
    expected = plain_tokens(
        model.base, prompt, 16, seed=4, sampler=sampler, logits_processors=logits_processors, end_of_text=()
    )
    for tree, insertion in (("cartesian:2x2x1", "deferred"), ("best-first:6", "parallel")):
        with drafter(model, expected, len(prompt), 0.8, seed=1):
            tokens = our_tokens(
                model,
                prompt,
                16,
                tokenizer=NumberTokenizer(end_of_text=()),
                seed=4,
                sampler=sampler,
                logits_processors=logits_processors,
                draft="tree",
                draft_options=DraftOptions(tree=tree, insertion=insertion),
            )
        assert tokens == expected


class Alternating:
    """A processor that remembers: even tokens after odd calls, odd ones after even calls."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        self.calls.append(tokens.tolist())
        banned = mx.arange(logits.shape[-1]) % 2 == len(self.calls) % 2
        return mx.where(banned, -mx.inf, logits)


class Generator:
    """A sampler with noise of its own."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(9)

    def __call__(self, logprobs: mx.array) -> mx.array:
        assert logprobs.shape == (1, 97)
        return mx.argmax(logprobs + mx.array(self.rng.gumbel(size=97).astype(np.float32)), axis=-1)


@pytest.mark.parametrize("draft", ["off", "chain", "tree", "auto"])
@pytest.mark.parametrize("sampler", [None, make_sampler(0.9), Generator], ids=["greedy", "seeded", "own"])
def test_processors_and_samplers_that_remember(sampler, draft):
    """Red when: one is asked for a node off the path, twice for a token, or past the end of the text."""
    model = make_model("llama", seed=33)
    prompt = random_prompt(5, seed=6)
    make = (lambda: Generator()) if sampler is Generator else (lambda: sampler)
    free = plain_tokens(
        model.base, prompt, 24, end_of_text=(), seed=2, sampler=make(), logits_processors=[Alternating()]
    )
    for end_of_text in ((), (free[9],)):
        expected = free if not end_of_text else free[: free.index(free[9]) + 1]
        processor = Alternating()
        with drafter(model, free, len(prompt), 1.0):
            tokens = our_tokens(
                model,
                prompt,
                24,
                tokenizer=NumberTokenizer(end_of_text=end_of_text),
                seed=2,
                sampler=make(),
                logits_processors=[processor],
                draft=draft,
            )
        assert tokens == expected
        assert processor.calls == [[*prompt, *expected[:n]] for n in range(len(expected))]


@pytest.mark.parametrize("insertion", get_args(Insertion))
def test_a_sampler_that_remembers_is_not_asked_for_what_may_be_withdrawn(insertion):
    """Red when: a pass is foreseen with it, or plain decoding asks it twice for one token."""
    model = make_model("llama", seed=33)
    prompt = random_prompt(5, seed=6)
    expected = plain_tokens(model.base, prompt, 16, end_of_text=(END_OF_TEXT,), sampler=Generator())
    options = DraftOptions(tree="chain:3", insertion=insertion)
    for accuracy in (1.0, 0.7):
        with drafter(model, expected, len(prompt), accuracy):
            tokens = our_tokens(model, prompt, 16, sampler=Generator(), draft="tree", draft_options=options)
        assert tokens == expected
    assert our_tokens(model, prompt, 16, sampler=Generator(), draft="off") == expected
