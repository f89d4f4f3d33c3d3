"""What a head is trained on: a packed batch read by its base, and what a loss says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..packed.packing import PackedBatch


@dataclass
class Reading:
    """A batch as the base reads it. R rows of L tokens, M rows that predict an answer token.

    Attributes:
        batch: the rows.
        main: (M, D) hidden states after the final norm of the rows that predict.
        states: (R, L, D) hidden states of every row by the number of layers below; N + 1: after the final norm.
            Only those that the head asks for.
        embedding, head: (V, D) of the base.
        vocabulary: rising ids whose logits are made; every token of the batch is among them.
    """

    batch: PackedBatch
    main: torch.Tensor
    states: dict[int, torch.Tensor]
    embedding: torch.Tensor
    head: torch.Tensor
    vocabulary: torch.Tensor

    def ahead(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The answer tokens after each predicted one.

        Returns:
            (M, count) ids, the k-th column ``k + 1`` after the predicted token, and whether each exists.
        """
        rows, targets = self.batch.main_rows, self.batch.main_targets
        entries = torch.arange(len(rows), device=rows.device)[:, None] + torch.arange(1, count + 1, device=rows.device)
        inside = entries < len(rows)
        entries = entries.clamp(max=len(rows) - 1)
        # Rows of one answer lie side by side, and between two answers there is at least one other row.
        exists = inside & (rows[entries] - rows[:, None] == torch.arange(1, count + 1, device=rows.device))
        return targets[entries], exists


@dataclass
class HeadLoss:
    """The loss, and by depth its parts and how often the head names the token it should."""

    loss: torch.Tensor
    losses: list[float]
    agreement: list[float]


def token_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocabulary: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Mean cross-entropy of (M, D) rows under the rows ``vocabulary`` of an LM head, and the share that is right."""
    logits = hidden @ weight[vocabulary].t()
    places = torch.searchsorted(vocabulary, targets)
    right = (logits.detach().argmax(-1) == places).float().mean()
    return F.cross_entropy(logits, places), float(right)


def soft_loss(logits: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mean cross-entropy against a teacher's probabilities, from the logits of both, and how often they agree."""
    wanted = teacher.softmax(-1)
    agree = (logits.detach().argmax(-1) == teacher.argmax(-1)).float().mean()
    return -(wanted * logits.log_softmax(-1)).sum(-1).mean(), float(agree)
