"""Draft heads: what they draft is what the papers' formulas give, and the text is plain decoding's.

A head that is wrong drafts badly and changes no token, so every guess of every pass is compared with a PyTorch
forward over the whole text. Each docstring names a break that turns the test red.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from specstream_mlx import DraftOptions, PrefixCache, SpecStreamModel, stream_generate
from specstream_mlx.drafters.head import Head
from specstream_mlx.drafters.protocol import Anchor, Wish
from specstream_mlx.target.rows import Draft
from specstream_mlx.target.tree import DraftTree
from tests.drafters import reference, tiny_drafters
from tests.drafters.tiny_drafters import SETTINGS, VARIANTS, make_head
from tests.tiny import END_OF_TEXT, NumberTokenizer, make_base, our_tokens, plain_tokens, random_prompt

HEADS = (*SETTINGS, *VARIANTS)
DRAFTS = {
    "chain": ("chain", None),
    "tree": ("tree", "cartesian:3x2x2x1"),
    "likeliest": ("tree", "best-first:9"),
    "auto": ("auto", None),
}
FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "opt-projected", "cohere2", "gpt_oss")


def plain_model(family: str = "llama", seed: int = 11) -> SpecStreamModel:
    """A base without an adapter."""
    base = make_base(family, seed)
    return SpecStreamModel(base, base.model_type)


class Reference:
    """A head in PyTorch beside the base in mlx-lm, over whole texts."""

    def __init__(self, kind: str, model: SpecStreamModel, head: Head) -> None:
        self.kind, settings = VARIANTS.get(kind, (kind, SETTINGS.get(kind, {})))
        self.settings: Mapping[str, Any] = {"num_layers": 1} | settings
        self.base = model.base
        self.tensors = {name: as_torch(value) for name, value in tree_flatten(head.weights.parameters())}
        self.embedding = self.tensors.get("embed_tokens.weight", as_torch(self.base.model.embed_tokens.weight))

    def hidden(self, text: list[int]) -> list[torch.Tensor]:
        """The hidden states of a text before the first layer, after every layer, and after the final norm."""
        x = self.base.model.embed_tokens(mx.array([text]))
        states = [x]
        for layer in self.base.model.layers:
            x = layer(x, "causal" if len(text) > 1 else None, None)
            states.append(x)
        return [as_torch(state[0]) for state in (*states, self.base.model.norm(x))]

    def logits(self, text: list[int], path: list[int]) -> torch.Tensor:
        """(V,) of the guess after ``path``, which follows ``text``, the root its last token; columns are ids."""
        states = self.hidden(text[:-1])
        if self.kind == "medusa":
            return self._medusa(states[-1][-1])[len(path)]
        if self.kind == "hydra":
            embedded = self.embedding[[text[-1], *path]]
            return reference.hydra(self.tensors, self.settings["num_layers"], states[-1][-1], embedded)
        embedded = self.embedding[[*text[1:], *path]]
        if self.kind == "eagle":
            features, step = states[-1], reference.eagle
        else:
            taps = self.settings.get("taps", [2, len(states) // 2 - 1, len(states) - 2 - 3])
            fused = torch.cat([states[tap] for tap in taps], -1)
            features, step = fused @ self.tensors["fc.weight"].T, reference.eagle3
        for row in range(len(path) + 1):
            out = step(self.tensors, self.settings, features, embedded[: len(text) - 1 + row])
            features = torch.cat([features, out[-1:]])
        if self.kind == "eagle":
            return features[-1] @ as_torch(self.base.lm_head.weight).T
        narrow = reference.eagle3_logits(self.tensors, self.settings, features[-1:])[0]
        if "d2t" not in self.tensors:
            return narrow
        wide = torch.full((len(self.embedding),), float("-inf"))
        wide[torch.arange(len(narrow)) + self.tensors["d2t"].long()] = narrow
        return wide

    def _medusa(self, hidden: torch.Tensor) -> torch.Tensor:
        names = {}
        for name, value in self.tensors.items():  # heads.0.blocks.1.linear.bias -> 0.1.linear.bias
            last = name.replace("lm_head", str(self.settings["num_layers"]))
            names[last.removeprefix("heads.").replace("blocks.", "")] = value
        return reference.medusa(names, self.settings["num_heads"], self.settings["num_layers"], hidden)


def as_torch(value: mx.array) -> torch.Tensor:
    return torch.from_numpy(np.array(value))


@pytest.mark.parametrize("draft", ["chain", "tree", "likeliest"])
@pytest.mark.parametrize("kind", HEADS)
def test_every_guess_is_that_of_the_formulas(kind, draft):
    """Break: read the layer below; pair a feature with its own token; keep a row of a guess; rotate by one more."""
    model = plain_model()
    head = make_head(kind, model)
    known = Reference(kind, model, head)
    mode, tree = DRAFTS[draft]
    prompt = random_prompt(9, seed=5)
    text, guesses = list(prompt), 0
    options = {"draft": mode, "drafter": head, "draft_options": DraftOptions(tree=tree)}
    for response in stream_generate(model, NumberTokenizer([]), prompt, 22, prefill_step_size=3, **options):
        outcome = response.outcome
        verified, tokens = outcome.tree, outcome.node_tokens
        assert tokens[0] == text[-1]
        siblings: dict[int, list[int]] = {}
        for node in range(1, verified.size):
            siblings.setdefault(verified.parents[node], []).append(tokens[node])
        for parent, drafted in siblings.items():
            path = [tokens[node] for node in verified.ancestors(parent)[1:]]
            best = known.logits(text, path).topk(len(drafted)).indices.tolist()
            assert drafted == best, (kind, text, path)
            guesses += len(drafted)
        text += outcome.tokens
    assert guesses > 20


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tokens_are_plain_decodings(family, kind, draft):
    """Break: accept any child."""
    model = plain_model(family)
    mode, tree = DRAFTS[draft]
    for seed, length in ((1, 1), (2, 8)):
        prompt = random_prompt(length, seed)
        options = {"draft": mode, "drafter": make_head(kind, model), "draft_options": DraftOptions(tree=tree)}
        assert our_tokens(model, prompt, 24, **options) == plain_tokens(model.base, prompt, 24)


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_plain_decodings_when_sampled(family, kind):
    """Every family: windows, learned positions, scaled embeddings, caps."""
    model = plain_model(family)
    head, prompt = make_head(kind, model), random_prompt(7, seed=3)
    processors = make_logits_processors({7: 1.5}, 1.3)
    for draft in ("chain", "likeliest"):
        mode, tree = DRAFTS[draft]
        options = {"draft": mode, "drafter": head, "draft_options": DraftOptions(tree=tree), "seed": 4}
        shared = {"sampler": make_sampler(0.9), "logits_processors": processors}
        expected = plain_tokens(model.base, prompt, 18, seed=4, sampler=make_sampler(0.9), logits_processors=processors)
        assert our_tokens(model, prompt, 18, **options, **shared) == expected


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("cache", ["kept", "prefix", "quantised", "size-limited"])
def test_tokens_are_plain_decodings_with_every_cache(cache, kind):
    """Break: a head's own rows are put where the target's are."""
    model = plain_model("qwen3" if cache == "size-limited" else "llama")
    head, prompt = make_head(kind, model), random_prompt(8, seed=6)
    more = {
        "quantised": {"kv_bits": 8, "quantized_kv_start": 12, "kv_group_size": 32},
        "size-limited": {"max_kv_size": 14},
    }
    if cache == "quantised":
        model = SpecStreamModel(make_base("llama", 11, head_dim=32), "llama")
        head = make_head(kind, model)
    options: dict[str, Any] = {"draft": "tree", "drafter": head, "draft_options": DraftOptions(tree="cartesian:2x2x1")}
    if cache in more:
        expected = plain_tokens(model.base, prompt, 16, **more[cache])
        assert our_tokens(model, prompt, 16, **options, **more[cache]) == expected
        return
    if cache == "kept":
        caches, theirs = model.make_cache(), make_prompt_cache(model.base)
        for turn in range(2):
            ids = random_prompt(5, seed=20 + turn)
            expected = plain_tokens(model.base, ids, 10, end_of_text=[], prompt_cache=theirs)
            found = our_tokens(model, ids, 10, tokenizer=NumberTokenizer([]), prompt_cache=caches, **options)
            assert found == expected
        return
    kept = PrefixCache(model)
    for length in (6, 8):
        expected = plain_tokens(model.base, prompt[:length], 10)
        ids = kept.reuse(prompt[:length])
        found = our_tokens(model, ids, 10, prompt_cache=kept.caches, **options)
        kept.tokens += found
        assert found == expected


@pytest.mark.parametrize("kind", SETTINGS)
def test_stop_rules_end_the_text_where_plain_decoding_does(kind):
    """Inside an accepted path too: any id may end the text."""
    model = plain_model()
    head, prompt = make_head(kind, model), random_prompt(8, seed=9)
    text = plain_tokens(model.base, prompt, 20, end_of_text=[])
    for stop in {text[1], text[4], text[7], END_OF_TEXT}:
        found = our_tokens(model, prompt, 20, tokenizer=NumberTokenizer([stop]), draft="tree", drafter=head)
        assert found == plain_tokens(model.base, prompt, 20, end_of_text=[stop])
    for limit in (1, 2, 5):
        assert our_tokens(model, prompt, limit, drafter=head, tokenizer=NumberTokenizer([])) == text[:limit]


@pytest.mark.parametrize("kind", HEADS)
def test_withdrawn_tokens_leave_nothing_behind(kind):
    """Break: withdraw does not bring back what was pending."""
    model = plain_model()
    head, prompt = make_head(kind, model), random_prompt(6, seed=8)
    tree = DraftTree.cartesian([2, 2, 1])

    def draft(withdraws: bool) -> list[int]:
        caches, state = model.make_cache(), head.begin(model, prompt)
        if state.reads_prompt:
            state.ran(model.read(mx.array(prompt[:-1]), caches, head.taps), range(5), 0)
        else:
            model(mx.array([prompt[:-1]]), cache=caches)
        passed = model.verify(Draft(DraftTree.chain(0), mx.array(prompt[-1:])), caches, taps=head.taps)
        model.commit(passed, [0], caches)
        anchor = Anchor(passed, 0, mx.argmax(passed.logits, axis=-1), caches)
        wish = Wish(3, tree, 0, "deferred")
        for token, proposes in ((3, True), (4, False)) if withdraws else ():
            state.ran(passed.taps, [0], passed.start)
            state.commit([token])
            if proposes:
                state.propose(Anchor(passed, 0, mx.array([token]), caches), wish)
            state.withdraw()
        state.ran(passed.taps, [0], passed.start)
        state.commit(anchor.root)
        return state.propose(anchor, wish).tokens.tolist()

    assert draft(True) == draft(False)


@pytest.mark.parametrize("kind", tiny_drafters.KINDS)
def test_the_registry_makes_every_kind(kind):
    """What other tests pick up."""
    model = plain_model()
    made = tiny_drafters.make(kind, model)
    prompt = random_prompt(8, seed=4)
    assert our_tokens(model, prompt, 12, drafter=made, draft="tree") == plain_tokens(model.base, prompt, 12)


def test_a_parked_drafter_goes_on_with_the_whole_text():
    """Rows of plain passes reach the layer when drafting resumes. Break: forget them."""
    model = plain_model()
    head = make_head("eagle", model)
    known = Reference("eagle", model, head)
    prompt = random_prompt(6, seed=8)
    caches, state = model.make_cache(), head.begin(model, prompt)
    state.ran(model.read(mx.array(prompt[:-1]), caches, head.taps), range(5), 0)
    text = list(prompt)
    for _ in range(4):
        passed = model.verify(Draft(DraftTree.chain(0), mx.array(text[-1:])), caches, taps=head.taps)
        model.commit(passed, [0], caches)
        state.ran(passed.taps, [0], passed.start)
        text.append(mx.argmax(passed.logits, axis=-1).item())
        state.commit(text[-1:])
    draft = state.propose(Anchor(passed, 0, mx.array(text[-1:]), caches), Wish(1, DraftTree.chain(1), 0, "deferred"))
    assert draft.tokens.tolist()[1] == known.logits(text, []).argmax().item()
