"""Medusa's heads (arXiv 2401.10774): ``L = sum_k 0.8^k CE(head_k(h_t), y_{t+1+k})``, section 2.2.

Medusa-1 reads a frozen base. Medusa-2 trains a LoRA of the base along with the heads (``lora_rank`` of the trainer);
their losses are added there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .kind import HeadShape
from .reading import HeadLoss, Reading, token_loss

DECAY = 0.8  # of a head's weight, per depth


class ResidualBlock(nn.Module):
    """``x + SiLU(W x + b)``, at first the identity."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        return x + F.silu(self.linear(x))


class MedusaHead(nn.Module):
    """One depth; its LM head begins as the base's."""

    def __init__(self, lm_head: torch.Tensor, num_layers: int) -> None:
        super().__init__()
        vocab_size, size = lm_head.shape
        self.blocks = nn.ModuleList(ResidualBlock(size) for _ in range(num_layers))
        self.lm_head = nn.Linear(size, vocab_size, bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(lm_head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D), which the LM head takes."""
        for block in self.blocks:
            x = block(x)
        return x


class MedusaHeads(nn.Module):
    """All depths."""

    def __init__(self, shape: HeadShape, lm_head: torch.Tensor) -> None:
        super().__init__()
        self.heads = nn.ModuleList(MedusaHead(lm_head, shape.num_layers) for _ in range(shape.depth))


class MedusaKind:
    """As ``HeadKind``."""

    name = "medusa"
    whole_rows = False

    def make(self, shape: HeadShape, lm_head: torch.Tensor) -> nn.Module:
        """As ``HeadKind``."""
        return MedusaHeads(shape, lm_head)

    def taps(self, shape: HeadShape) -> tuple[int, ...]:
        """As ``HeadKind``."""
        return ()

    def loss(self, head: nn.Module, reading: Reading, noise: torch.Generator) -> HeadLoss:
        """As ``HeadKind``."""
        heads: Any = head.heads
        targets, exists = reading.ahead(len(heads))
        return weighted(
            [
                token_loss(
                    one(reading.main[exists[:, k]]), one.lm_head.weight, targets[exists[:, k], k], reading.vocabulary
                )
                for k, one in enumerate(heads)
                if bool(exists[:, k].any())
            ]
        )

    def settings(self, shape: HeadShape) -> dict[str, Any]:
        """As ``HeadKind``."""
        return {"num_heads": shape.depth, "num_layers": shape.num_layers}


def weighted(parts: list[tuple[torch.Tensor, float]]) -> HeadLoss:
    """The losses of all depths as one, each deeper one of less weight."""
    total = torch.stack([DECAY ** (k + 1) * loss for k, (loss, _) in enumerate(parts)]).sum()
    return HeadLoss(total, [float(loss.detach()) for loss, _ in parts], [right for _, right in parts])
