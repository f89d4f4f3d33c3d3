"""``simple`` is the algorithm on a page, and the oracle of ``single``: the same passes, drafts and tokens."""

import functools
import itertools
import sys
from pathlib import Path
from typing import get_args

import mlx.core as mx
import pytest
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from specstream_mlx import DraftOptions, stream_generate
from specstream_mlx.drafters.scripted import Scripted
from specstream_mlx.engine import simple
from specstream_mlx.options import Insertion
from specstream_mlx.planning.control import Control
from specstream_mlx.planning.plan import make_plan
from tests.cache_cases import HEADS, QUANTISED
from tests.drafter_cases import DRAFTERS, ByPlace, drafter_of
from tests.tiny import NumberTokenizer, make_model, plain_tokens, random_prompt

GENERATE = sys.modules[stream_generate.__module__]
DRAFTS = {
    "off": ("off", None),
    "chain": ("chain", None),
    "tree": ("tree", None),
    "cartesian": ("tree", "cartesian:3x2x2x1"),
    "best-first": ("tree", "best-first:12"),
    "auto": ("auto", None),
    "pruned": ("tree", "cartesian:3x2x2"),
}
FAMILIES = ("llama", "phi3", "opt", "gpt2", "gemma3_text", "qwen3")
UNLIMITED = ("llama", "gemma3_text")  # mlx-lm makes their caches without a size limit
CACHES = ("fresh", "kept", "quantised", "size-limited")
SAMPLERS = ("greedy", "sampled", "penalised", "remembering")
ENDS = ("length", "end-of-text", "stop string", "two tokens")
MAX_TOKENS = 18


class Remembering:
    """A sampler of one's own, which must be asked once per token and in order."""

    def __init__(self):
        self.asked = 0

    def __call__(self, logprobs):
        self.asked += 1
        return mx.argpartition(-logprobs, kth=1, axis=-1)[:, self.asked % 2]


def sampling(name):
    if name == "greedy":
        return {}
    if name == "remembering":
        return {"sampler": Remembering()}
    processors = make_logits_processors({7: 1.5}, 1.3) if name == "penalised" else None
    return {"sampler": make_sampler(0.8, top_p=0.95), "logits_processors": processors, "seed": 3}


def can_meet(family, cache):
    if cache == "quantised":
        return family in HEADS
    return cache != "size-limited" or family not in UNLIMITED


def cases(name, draft):
    """Every cache with every sampler, in turn with family, way and end of text."""
    seed = DRAFTERS.index(name) + 3 * list(DRAFTS).index(draft)
    for number, (cache, sampler) in enumerate(itertools.product(CACHES, SAMPLERS), start=seed):
        if (number + CACHES.index(cache)) % 2 and draft != "auto":
            continue
        family = next(f for f in FAMILIES[number % 6 :] + FAMILIES if can_meet(f, cache))
        yield number, family, cache, sampler, ENDS[number // 3 % 4], get_args(Insertion)[number % 3]


def run(model, drafter, draft, way, caching, sampler, end, turns):
    """The passes of one or two turns, and what the caches hold afterwards."""
    mode, tree = DRAFTS[draft]
    options = DraftOptions(
        tree=tree,
        insertion=way if way in drafter.ways else None,
        prune_threshold=0.012 if draft == "pruned" else None,
    )
    caches = model.make_cache() if caching == "kept" else None
    how = {"quantised": QUANTISED | {"quantized_kv_start": 20}, "size-limited": {"max_kv_size": 24}}.get(caching, {})
    seen = []
    for prompt, text in turns:
        end_of_text = (text[7],) if end == "end-of-text" else ()
        responses = stream_generate(
            model,
            NumberTokenizer(end_of_text=end_of_text),
            prompt,
            2 if end == "two tokens" else MAX_TOKENS,
            draft=mode,
            drafter=drafter,
            draft_options=options,
            stop=[f"{text[8]} {text[9]}"] if end == "stop string" else [],
            prefill_step_size=6,
            prompt_cache=caches,
            **sampling(sampler),
            **how,
        )
        for response in responses:
            outcome = response.outcome
            seen.append((outcome.tokens, outcome.accepted, outcome.tree, outcome.node_tokens, response.tokens))
            seen.append((response.text, response.accepted_by_depth, response.logprobs.tolist()))
        if end != "stop string":  # after which single has begun the next pass
            seen.append(response.stream_passes)
    if caches is not None and end != "stop string":
        seen.append([cache.offset for cache in caches])
        seen.append([cache.keys[..., : cache.offset, :].tolist() for cache in caches])
    return seen


@pytest.mark.parametrize(
    ("name", "draft"),
    [(name, draft) for name in DRAFTERS for draft in DRAFTS if draft != "pruned" or "streams" in name],
)
def test_single_makes_the_passes_of_simple(monkeypatch, name, draft):
    """Red when: a pass launched ahead is built on another choice, key, text or cache than the one it stands for."""
    single = GENERATE.passes
    for number, family, cache, sampler, end, way in cases(name, draft):
        model = make_model(family, 3, HEADS.get(family))
        prompt = random_prompt(6, number) * 2
        second = random_prompt(3, number + 1)
        text = plain_tokens(model.base, prompt, MAX_TOKENS, end_of_text=(), **sampling(sampler))
        # A stop string closes the passes; that their caches can be gone on with is a promise of single alone.
        more = [(second, text)] if cache == "kept" and end != "stop string" else []
        found = []
        for passes in (single, lambda session, ids, step, progress: simple.passes(session, ids, step)):
            drafter = drafter_of(name, model, text, len(prompt), number)
            with monkeypatch.context() as patch:
                patch.setattr(GENERATE, "passes", passes)
                if draft == "auto":
                    plan = make_plan("auto", drafter.max_depth, ways=drafter.ways)
                    control = functools.partial(ByPlace, drafter.ways, number)
                    patch.setattr(GENERATE, "steer", lambda *_, p=plan, c=control: (p, c()))
                found.append(run(model, drafter, draft, way, cache, sampler, end, [(prompt, text), *more]))
        case = (family, cache, sampler, end, way)
        assert len(found[0]) == len(found[1]), case
        for index, (ours, oracle) in enumerate(zip(*found, strict=True)):
            assert ours == oracle, (case, index)


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
@pytest.mark.parametrize("draft", ["chain", "auto"])
def test_passes_near_a_change_are_those_of_simple(monkeypatch, draft, accuracy):
    """Every pass is foreseen, and is then the next one or none: up to the end, and where the caches change their kind.

    Red when: a foreseen pass reaches across the end of the text, or across the rows at which caches change their kind.
    """
    monkeypatch.setattr(Control, "observe", lambda *_: None)
    model = make_model("phi3", 3, HEADS["phi3"])
    prompt = random_prompt(7, 1)
    changes = [{"max_tokens": number} for number in range(1, 13)]
    changes += [QUANTISED | {"quantized_kv_start": number} for number in range(8, 18)]
    changes += [{"max_kv_size": number} for number in range(8, 18)]
    for change in changes:
        how = {"max_tokens": MAX_TOKENS} | change
        text = plain_tokens(model.base, prompt, end_of_text=(), **how)
        found = []
        for passes in (GENERATE.passes, lambda session, ids, step, progress: simple.passes(session, ids, step)):
            with monkeypatch.context() as patch:
                patch.setattr(GENERATE, "passes", passes)
                drafter = Scripted(text, len(prompt), accuracy, beside=model.drafter)
                options = DraftOptions(insertion="leaf")
                tokenizer = NumberTokenizer(end_of_text=())
                more = {"draft": draft, "drafter": drafter, "draft_options": options}
                responses = list(stream_generate(model, tokenizer, prompt, **more, **how))
            found.append([(response.outcome.tree, response.tokens) for response in responses])
        assert found[0] == found[1], change
        assert [token for _, tokens in found[0] for token in tokens] == text


def test_simple_is_a_page():
    """Red when: what belongs to ``single`` or to a session is written there."""
    lines = [line for line in Path(simple.__file__).read_text("utf-8").splitlines() if line.strip()]
    assert len(lines) <= 80
