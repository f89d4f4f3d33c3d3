"""Hydra: Medusa's heads, each of which sees the tokens before its own (Ankner et al., arXiv 2402.05109).

Head ``k`` guesses the token ``k`` after the root from the state that the root was drawn from, the root, and the
``k - 1`` guesses between::

    z = [M^N after the final norm; e(root); e(g_1); ... e(g_{k-1})]
    x_1 = R z + SiLU(W_1 z + b_1)        x_i = x_{i-1} + SiLU(W_i x_{i-1} + b_i)        logits = W x_n

``e`` is the target's token embedding.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from specstream_mlx.drafters.growing import GrowingState
from specstream_mlx.drafters.head import BaseSizes
from specstream_mlx.drafters.medusa import ResidualBlock
from specstream_mlx.drafters.protocol import Anchor, Wish
from specstream_mlx.formats.drafter_config import Settings
from specstream_mlx.target.target import Passed, Target


class MergingBlock(nn.Module):
    """``R z + SiLU(W z + b)``, from several vectors to one."""

    def __init__(self, num_inputs: int, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_inputs * size, size)
        self.residual = nn.Linear(num_inputs * size, size)

    def __call__(self, z: mx.array) -> mx.array:
        """(..., num_inputs * D) -> (..., D)."""
        return self.residual(z) + nn.silu(self.linear(z))


class HydraHead(nn.Module):
    """The guess for one depth."""

    def __init__(self, depth: int, hidden_size: int, vocab_size: int, num_layers: int) -> None:
        super().__init__()
        self.merge = MergingBlock(depth + 1, hidden_size)
        self.blocks = [ResidualBlock(hidden_size) for _ in range(num_layers - 1)]
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)

    def __call__(self, z: mx.array) -> mx.array:
        """(..., (depth + 1) * D) -> (..., V) logits."""
        x = self.merge(z)
        for block in self.blocks:
            x = block(x)
        logits: mx.array = self.lm_head(x)
        return logits


class HydraHeads(nn.Module):
    """All heads."""

    def __init__(self, num_heads: int, num_layers: int, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.heads = [HydraHead(depth, hidden_size, vocab_size, num_layers) for depth in range(1, num_heads + 1)]


class Hydra:
    """As ``protocol.Drafter``."""

    name = "hydra"
    ways = ("deferred",)

    def __init__(self, weights: HydraHeads, num_layers: int) -> None:
        """``num_layers``: N, of the target."""
        self.weights = weights
        self.max_depth = len(weights.heads)
        self.taps = (num_layers,)

    @classmethod
    def from_settings(cls, raw: Mapping[str, Any], base: BaseSizes, where: str) -> "Hydra":
        """As ``head.Head``."""
        settings = Settings(raw, where)
        num_heads, num_layers = settings.integer("num_heads"), settings.integer("num_layers", default=1)
        settings.check()
        return cls(HydraHeads(num_heads, num_layers, base.hidden_size, base.vocab_size), base.num_layers)

    def begin(self, target: Target, prompt: Sequence[int]) -> "HydraState":
        """As ``Drafter``."""
        return HydraState(self, target)


class HydraState(GrowingState):
    """The heads keep nothing between passes; while a tree grows, what every row of its last depth saw."""

    def __init__(self, drafter: Hydra, target: Target) -> None:
        self._drafter, self._target = drafter, target
        self._seen = mx.zeros((0, 0))  # (k, depth * D)
        self._depth = self._position = 0

    def foresees(self, passed: Passed, node: int, wish: Wish) -> bool:
        """As ``DraftState``."""
        return wish.tree is not None

    def start(self, anchor: Anchor) -> mx.array:
        """As ``GrowingState``."""
        (tap,) = self._drafter.taps
        passed, node = anchor.passed, anchor.node
        self._seen = self._target.family.norm(passed.taps[tap][:, node : node + 1])[0]
        self._depth, self._position = 0, passed.start + passed.draft.tree.depths[node] + 1
        return self.grow(mx.array([0]), anchor.root)

    def grow(self, parents: mx.array, tokens: mx.array) -> mx.array:
        """As ``GrowingState``."""
        positions = np.full(tokens.shape, self._position + self._depth, dtype=np.int32)
        embedded = self._target.family.embed(tokens[None], positions)[0]
        self._seen = mx.concatenate([self._seen[parents], embedded], axis=-1)
        self._depth += 1
        return self._drafter.weights.heads[self._depth - 1](self._seen)
