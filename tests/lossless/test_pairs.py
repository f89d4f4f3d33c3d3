"""Every pair of family, mode, insertion, draft, drafter, sampler and cache, token by token beside mlx-lm.

All combinations would be some tens of thousands; ``all_pairs`` makes a list in which every two choices that can meet do
meet at least once.
"""

import itertools
import random
from functools import lru_cache
from typing import get_args

import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from specstream_mlx import DraftOptions, PrefixCache, SpecStreamModel
from specstream_mlx.options import Insertion
from tests.adapter_cases import save_adapter
from tests.cache_cases import HEADS, QUANTISED
from tests.drafter_cases import DRAFTERS, drafter_of
from tests.tiny import EVERY_FAMILY, NumberTokenizer, make_base, our_tokens, plain_tokens, random_prompt

MODES = {
    "shared": {},
    "value-rotation": {"stream_id": {"type": "value_rotation", "epsilon": 0.3}, "stream_init": {"type": "identity"}},
    "at-anchor": {"stream_position": "anchor", "num_stream_layers": 3},
    "lossless": {"mode": "lossless"},
}
DRAFTS = {
    "chain": ("chain", None, None),
    "cartesian": ("tree", "cartesian:3x2x1x1", None),
    "best-first": ("tree", "best-first:8", None),
    "auto": ("auto", "cartesian:2x2x1", None),
    "pruned": ("tree", "cartesian:3x2x2", 0.01),
}
SAMPLERS = {
    "greedy": (None, None),
    "sampled": (lambda: make_sampler(0.9), None),
    "penalised": (
        lambda: make_sampler(0.8, top_p=0.95, xtc_probability=0.3, xtc_threshold=0.05),
        lambda: make_logits_processors({7: 1.5}, 1.3, presence_penalty=0.2),
    ),
}
CACHES = ("fresh", "kept", "prefix", "quantised", "size-limited")
AXES = {
    "family": EVERY_FAMILY,
    "mode": tuple(MODES),
    "insertion": get_args(Insertion),
    "draft": tuple(DRAFTS),
    "drafter": DRAFTERS,
    "sampler": tuple(SAMPLERS),
    "cache": CACHES,
}
MAX_TOKENS = 12  # past the window, the point of quantisation and the size limit


@lru_cache(maxsize=64)
def base_of(family):
    return make_base(family, seed=41, **HEADS.get(family, {}))


def can_meet(case):
    """Whether a (partial) case has a result at all; the refusals are tested where they are made."""
    family, cache = case.get("family"), case.get("cache")
    if family is not None and cache == "quantised" and family not in HEADS:
        return False
    if family is not None and cache == "size-limited" and hasattr(base_of(family), "make_cache"):
        return False  # mlx-lm ignores the size there
    if family == "llama-dynamic" and cache == "kept":
        return False  # two turns are longer than its context
    if cache == "prefix" and case.get("sampler") == "penalised":
        return False  # penalties must see what is not run again
    if "streams" not in case.get("drafter", "streams") and (
        case.get("insertion", "deferred") != "deferred" or case.get("draft") == "pruned"
    ):
        return False  # which streams alone have
    above = case.get("draft") == "pruned" and case.get("mode") == "at-anchor"  # pruning above the first stream layer
    return not above or case.get("insertion") in (None, "deferred")


def pairs_of(case):
    return set(itertools.combinations(sorted(case.items()), 2))


def completed(pair, rng):
    """A whole case that holds a pair of choices; None at a dead end."""
    case = dict(pair)
    for axis in rng.sample(list(AXES), len(AXES)):
        if axis not in case:
            choices = [choice for choice in AXES[axis] if can_meet(case | {axis: choice})]
            if not choices:
                return None
            case[axis] = rng.choice(choices)
    return case


@lru_cache(maxsize=1)
def all_pairs():
    """Cases, each a choice on all axes, that hold every possible pair of choices; the same ones every time."""
    rng = random.Random(0)
    left = {pair for pair in every_pair() if can_meet(dict(pair))}
    cases = []
    while left:
        tries = filter(None, (completed(min(left), rng) for _ in range(60)))
        best = max(tries, key=lambda case: len(pairs_of(case) & left))
        cases.append(best)
        left -= pairs_of(best)
    return cases


def every_pair():
    axes = [[(axis, choice) for choice in AXES[axis]] for axis in sorted(AXES)]
    return itertools.chain(*(itertools.product(one, other) for one, other in itertools.combinations(axes, 2)))


def model_of(case, path):
    """A model with the mode's streams; lossless ones come from a file, for they have a LoRA."""
    base = make_base(case["family"], seed=41, **HEADS.get(case["family"], {}))
    model = SpecStreamModel(base, base.model_type)
    prune = {"prune": None} if case["draft"] != "pruned" else {}
    model.use_adapter(model.load_adapter(save_adapter(path, base, 42, **MODES[case["mode"]], **prune)))
    return model


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_pair_gives_mlx_lms_tokens(family, tmp_path):
    """Red when two things that work alone do not work together."""
    for number, case in enumerate(case for case in all_pairs() if case["family"] == family):
        model = model_of(case, tmp_path / str(number))
        mode, tree, threshold = DRAFTS[case["draft"]]
        sampler, processors = SAMPLERS[case["sampler"]]
        prompts = [random_prompt(11, seed=number), random_prompt(4, seed=number + 100)]
        if case["drafter"] == "prompt-lookup":
            prompts = [(prompt[:4] * 3)[: len(prompt)] for prompt in prompts]
        how = {"prefill_step_size": 6}
        how |= {"quantised": QUANTISED | {"quantized_kv_start": 14}, "size-limited": {"max_kv_size": 17}}.get(
            case["cache"], {}
        )
        theirs = make_prompt_cache(model.base) if case["cache"] == "kept" else None
        kept = PrefixCache(model) if case["cache"] == "prefix" else None
        ours = model.make_cache() if case["cache"] == "kept" else None
        if kept is not None:
            prompts[1] = prompts[0][:8] + prompts[1]
        cached = 0
        for prompt in prompts if case["cache"] in ("kept", "prefix") else prompts[:1]:
            how |= {"sampler": sampler() if sampler else None}
            how |= {"logits_processors": processors() if processors else None}
            expected = plain_tokens(model.base, prompt, MAX_TOKENS, seed=3, end_of_text=(), **how, prompt_cache=theirs)
            rest = kept.reuse(prompt) if kept is not None else prompt
            tokens = our_tokens(
                model,
                rest,
                MAX_TOKENS,
                seed=3,
                tokenizer=NumberTokenizer(end_of_text=()),
                draft=mode,
                drafter=drafter_of(case["drafter"], model, expected, cached + len(prompt), number),
                draft_options=DraftOptions(tree=tree, insertion=case["insertion"], prune_threshold=threshold),
                prompt_cache=kept.caches if kept is not None else ours,
                **how,
            )
            assert tokens == expected, case
            if kept is not None:
                kept.tokens += tokens
            cached += len(prompt) + MAX_TOKENS if theirs is not None else 0


def test_the_pairs_are_complete():
    held = set().union(*map(pairs_of, all_pairs()))
    for pair in every_pair():
        assert (pair in held) is can_meet(dict(pair)), pair
