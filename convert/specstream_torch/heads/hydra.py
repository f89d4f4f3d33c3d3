"""Hydra's heads (arXiv 2402.05109): Medusa's loss, each head also given the true tokens before its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .kind import HeadShape
from .medusa import ResidualBlock, weighted
from .reading import HeadLoss, Reading, token_loss


class MergingBlock(nn.Module):
    """``R z + SiLU(W z + b)``; at first ``R`` picks the hidden state out of ``z``."""

    def __init__(self, num_inputs: int, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_inputs * size, size)
        self.residual = nn.Linear(num_inputs * size, size)
        with torch.no_grad():
            for parameter in (self.linear.weight, self.linear.bias, self.residual.weight, self.residual.bias):
                parameter.zero_()
            self.residual.weight[:, :size].copy_(torch.eye(size))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """(..., num_inputs * D) -> (..., D)."""
        return self.residual(z) + F.silu(self.linear(z))


class HydraHead(nn.Module):
    """One depth; its LM head begins as the base's."""

    def __init__(self, depth: int, lm_head: torch.Tensor, num_layers: int) -> None:
        super().__init__()
        vocab_size, size = lm_head.shape
        self.merge = MergingBlock(depth + 1, size)
        self.blocks = nn.ModuleList(ResidualBlock(size) for _ in range(num_layers - 1))
        self.lm_head = nn.Linear(size, vocab_size, bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(lm_head)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """(..., (depth + 1) * D) -> (..., D), which the LM head takes."""
        x = self.merge(z)
        for block in self.blocks:
            x = block(x)
        return x


class HydraHeads(nn.Module):
    """All depths."""

    def __init__(self, shape: HeadShape, lm_head: torch.Tensor) -> None:
        super().__init__()
        self.heads = nn.ModuleList(HydraHead(depth, lm_head, shape.num_layers) for depth in range(1, shape.depth + 1))


class HydraKind:
    """As ``HeadKind``."""

    name = "hydra"
    whole_rows = False

    def make(self, shape: HeadShape, lm_head: torch.Tensor) -> nn.Module:
        """As ``HeadKind``."""
        return HydraHeads(shape, lm_head)

    def taps(self, shape: HeadShape) -> tuple[int, ...]:
        """As ``HeadKind``."""
        return ()

    def loss(self, head: nn.Module, reading: Reading, noise: torch.Generator) -> HeadLoss:
        """As ``HeadKind``."""
        heads: Any = head.heads
        targets, exists = reading.ahead(len(heads))
        seen = torch.cat([reading.batch.main_targets[:, None], targets], 1)  # the root, then the true guesses
        parts = []
        for k, one in enumerate(heads):
            rows = exists[:, k]
            if not bool(rows.any()):
                break
            embedded = reading.embedding[seen[rows, : k + 1]].float().flatten(1)
            hidden = one(torch.cat([reading.main[rows], embedded], 1))
            parts.append(token_loss(hidden, one.lm_head.weight, targets[rows, k], reading.vocabulary))
        return weighted(parts)

    def settings(self, shape: HeadShape) -> dict[str, Any]:
        """As ``HeadKind``."""
        return {"num_heads": shape.depth, "num_layers": shape.num_layers}
