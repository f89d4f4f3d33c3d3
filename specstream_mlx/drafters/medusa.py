"""Medusa: heads on the target's last hidden state, one per depth (Cai et al., arXiv 2401.10774).

Head ``k`` guesses the token ``k`` after the root from the state that the root was drawn from::

    x_0 = M^N after the final norm         x_i = x_{i-1} + SiLU(W_i x_{i-1} + b_i)         logits = W x_n

No head sees a token, the root neither, so the guesses of one depth do not depend on another's. Medusa-1 and Medusa-2
differ in how they are trained; here they are one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from specstream_mlx.drafters.head import BaseSizes
from specstream_mlx.drafters.marginals import MarginalState
from specstream_mlx.drafters.protocol import Anchor, Wish
from specstream_mlx.formats.drafter_config import Settings
from specstream_mlx.target.target import Passed, Target


class ResidualBlock(nn.Module):
    """``x + SiLU(W x + b)``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def __call__(self, x: mx.array) -> mx.array:
        """(..., D) -> (..., D)."""
        return x + nn.silu(self.linear(x))


class MedusaHead(nn.Module):
    """The guess for one depth."""

    def __init__(self, hidden_size: int, vocab_size: int, num_layers: int) -> None:
        super().__init__()
        self.blocks = [ResidualBlock(hidden_size) for _ in range(num_layers)]
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """(..., D) normed hidden states -> (..., V) logits."""
        for block in self.blocks:
            x = block(x)
        logits: mx.array = self.lm_head(x)
        return logits


class MedusaHeads(nn.Module):
    """All heads."""

    def __init__(self, num_heads: int, num_layers: int, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.heads = [MedusaHead(hidden_size, vocab_size, num_layers) for _ in range(num_heads)]


class Medusa:
    """As ``protocol.Drafter``."""

    name = "medusa"
    ways = ("deferred",)

    def __init__(self, weights: MedusaHeads, num_layers: int) -> None:
        """``num_layers``: N, of the target."""
        self.weights = weights
        self.max_depth = len(weights.heads)
        self.taps = (num_layers,)

    @classmethod
    def from_settings(cls, raw: Mapping[str, Any], base: BaseSizes, where: str) -> "Medusa":
        """As ``head.Head``."""
        settings = Settings(raw, where)
        num_heads, num_layers = settings.integer("num_heads"), settings.integer("num_layers", default=1)
        settings.check()
        return cls(MedusaHeads(num_heads, num_layers, base.hidden_size, base.vocab_size), base.num_layers)

    def begin(self, target: Target, prompt: Sequence[int]) -> "MedusaState":
        """As ``Drafter``."""
        return MedusaState(self, target)


class MedusaState(MarginalState):
    """The heads keep nothing between passes."""

    def __init__(self, drafter: Medusa, target: Target) -> None:
        self._drafter, self._target = drafter, target

    def foresees(self, passed: Passed, node: int, wish: Wish) -> bool:
        """As ``DraftState``."""
        return wish.tree is not None

    def marginals(self, anchor: Anchor, depth: int) -> mx.array:
        """As ``MarginalState``."""
        (tap,) = self._drafter.taps
        x = self._target.family.norm(anchor.passed.taps[tap][:, anchor.node : anchor.node + 1])[0]
        return mx.concatenate([head(x) for head in self._drafter.weights.heads[:depth]])
