"""Tiny drafters of every kind that needs no streams, for any target of the tests: ``make(kind, target)``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from specstream_mlx.drafters.head import Head
from specstream_mlx.drafters.heads import HEADS
from specstream_mlx.drafters.prompt_lookup import PromptLookup
from specstream_mlx.drafters.protocol import Drafter
from specstream_mlx.drafters.two_model import TwoModel
from specstream_mlx.formats.drafter_config import DRAFTER_CONFIG, DRAFTER_WEIGHTS, DrafterConfig
from specstream_mlx.models.heads import sizes_of
from specstream_mlx.target.target import Target
from tests.tiny import make_base, randomise

LAYER = {"intermediate_size": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "depth": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "medusa": {"num_heads": 4, "num_layers": 2},
    "hydra": {"num_heads": 4, "num_layers": 2},
    "eagle": LAYER,
    "eagle3": LAYER | {"draft_vocab_size": 61},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "eagle-own-embedding": ("eagle", LAYER | {"own_embedding": True, "num_layers": 2, "qkv_bias": True}),
    "eagle3-whole-vocabulary": ("eagle3", LAYER | {"norm_before_residual": True, "taps": [1, 2, 4]}),
    "eagle3-other-width": ("eagle3", LAYER | {"hidden_size": 24, "own_embedding": True, "draft_vocab_size": 61}),
}


def make_head(kind: str, target: Target, seed: int = 7) -> Head:
    """A random head of a kind, or of one of the ``VARIANTS``."""
    kind, settings = VARIANTS.get(kind, (kind, SETTINGS.get(kind, {})))
    sizes = sizes_of(target.base, target.family)
    head = HEADS[kind].from_settings(settings, sizes, kind)
    randomise(head.weights, seed)
    if "d2t" in head.weights:
        size = head.weights.d2t.shape[0]
        ids = np.sort(np.random.default_rng(seed).permutation(sizes.vocab_size)[:size])
        head.weights.d2t = mx.array(ids - np.arange(size), dtype=mx.int32)
    head.weights.eval()
    mx.eval(head.weights.parameters())  # as loaded weights are: another thread can go on with them
    return head


def save_head(kind: str, target: Target, path: Path, seed: int = 7) -> Path:
    """A random head as an adapter directory."""
    head, (name, settings) = make_head(kind, target, seed), VARIANTS.get(kind, (kind, SETTINGS.get(kind, {})))
    path.mkdir(parents=True)
    sizes = sizes_of(target.base, target.family)
    base = {"hidden_size": sizes.hidden_size, "vocab_size": sizes.vocab_size}
    (path / DRAFTER_CONFIG).write_text(json.dumps(DrafterConfig(name, settings, base).to_dict()))
    mx.save_safetensors(str(path / DRAFTER_WEIGHTS), dict(tree_flatten(head.weights.parameters())))
    return path


def _two_model(target: Target, seed: int) -> Drafter:
    return TwoModel(Target(make_base("llama", seed, num_hidden_layers=2), "llama"))


def _prompt_lookup(target: Target, seed: int) -> Drafter:
    return PromptLookup(4)


_OTHERS: dict[str, Callable[[Target, int], Drafter]] = {"two-model": _two_model, "prompt-lookup": _prompt_lookup}
KINDS = (*SETTINGS, *VARIANTS, *_OTHERS)


def make(kind: str, target: Target, seed: int = 7) -> Drafter:
    """A drafter of one of the ``KINDS``; the target must have the vocabulary of ``tests.tiny``."""
    return _OTHERS[kind](target, seed) if kind in _OTHERS else make_head(kind, target, seed)
