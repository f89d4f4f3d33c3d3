"""The loss of method section 8 over part of the vocabulary, with its gradient taken while the logits are there.

The head is frozen, so all that training asks of it is the gradient of its input. Logits are made for a chunk of rows
at a time, over the rows of the head that the step needs: the tokens of the task's answers, those of the batch, and a
random sample of the others, which keeps the rest of the vocabulary down. A stream's target is a mixture of the token
and of what the main stream, which has read further, thinks of the same position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .packing import PackedBatch

CHUNK_ROWS = 1024


@dataclass
class PackedLoss:
    """The loss and what it says of drafting; `agreement[j - 1]` is how often stream j names main's own choice.

    `chain` is one plus the mean number of leading streams that do: the tokens per pass of a chain, were the text the
    model's own.
    """

    loss: torch.Tensor
    main_loss: float
    main_accuracy: float
    stream_losses: list[float]
    agreement: list[float]
    chain: float


def head_rows(
    frequent: torch.Tensor, batch: PackedBatch, num_random: int, vocab_size: int, generator: torch.Generator
) -> torch.Tensor:
    """The sorted ids whose logits a step makes; all of the batch's answer tokens are among them."""
    drawn = torch.randint(vocab_size, (num_random,), generator=generator)
    return torch.unique(torch.cat((frequent, batch.main_targets.cpu(), batch.tokens.flatten().cpu(), drawn)))


class _HeadGradient(torch.autograd.Function):
    """Hands a gradient that was made with the logits back to the hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * dy.to(gradient.dtype), None, None


def packed_loss(
    main: torch.Tensor,
    streams: torch.Tensor | None,
    head: torch.Tensor,
    batch: PackedBatch,
    vocabulary: torch.Tensor,
    *,
    stream_weight: float,
    distill: float,
) -> PackedLoss:
    """Compute the loss of main (M, D) and streams (R, A, G, D) under the rows `vocabulary` of the head (V, D).

    Each sum is the mean over its own targets. `distill` is the weight of main's opinion in a stream's target.
    """
    part = head[vocabulary]
    targets = torch.searchsorted(vocabulary, batch.main_targets)
    keep_probs = streams is not None and distill > 0
    with torch.no_grad():
        shares = batch.main_counts / batch.main_counts.sum().clamp(min=1)
        value, gradient, choices, probs = _cross_entropy(main, part, targets, shares, None, 0.0, keep_probs)
        total = (value * shares).sum()
        main_loss = float(value.mean())
        main_accuracy = float((choices == targets).float().mean())
    loss = _HeadGradient.apply(main, total, gradient)
    if streams is None:
        return PackedLoss(loss, main_loss, main_accuracy, [], [], float("nan"))
    with torch.no_grad():
        exists = batch.stream_targets >= 0
        counts = exists.sum((0, 1)).clamp(min=1)  # (G,)
        weights = (stream_weight / counts).expand(exists.shape)[exists]
        ahead = torch.searchsorted(vocabulary, batch.stream_targets[exists])
        entries = batch.stream_main[exists]
        flat = streams[exists]
        values, part_gradient, guesses, _ = _cross_entropy(
            flat, part, ahead, weights, (probs, entries) if keep_probs else None, distill, False
        )
        gradient = torch.zeros_like(streams)
        gradient[exists] = part_gradient
        per_row = torch.zeros(exists.shape, device=values.device)
        per_row[exists] = values
        agrees = torch.zeros_like(exists)
        agrees[exists] = guesses == choices[entries]
        chain = agrees[batch.anchored].cumprod(-1).sum(-1).float().mean()
    loss = loss + _HeadGradient.apply(streams, (values * weights).sum(), gradient)
    return PackedLoss(
        loss,
        main_loss,
        main_accuracy,
        (per_row.sum((0, 1)) / counts).tolist(),
        (agrees.sum((0, 1)) / counts).tolist(),
        1 + float(chain),
    )


def _cross_entropy(
    hidden: torch.Tensor,
    part: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    teacher: tuple[torch.Tensor | None, torch.Tensor] | None,
    distill: float,
    keep_probs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return per row the loss and the best id, the weighted gradient of `hidden` and, if asked, the probabilities."""
    values, gradients, choices, kept = [], [], [], []
    for start in range(0, len(hidden), CHUNK_ROWS):
        span = slice(start, start + CHUNK_ROWS)
        logits = (hidden[span] @ part.t()).float()
        choices.append(logits.argmax(-1))
        normaliser = logits.logsumexp(-1, keepdim=True)
        index = targets[span, None]
        value = normaliser[:, 0] - logits.gather(1, index)[:, 0]
        if teacher is None or teacher[0] is None:
            slope = logits.sub_(normaliser).exp_()
            if keep_probs:
                kept.append(slope.to(hidden.dtype, copy=True))
        else:
            wanted = teacher[0][teacher[1][span]].float()
            soft = normaliser[:, 0] - (wanted * logits).sum(-1)
            value = (1 - distill) * value + distill * soft
            slope = logits.sub_(normaliser).exp_().sub_(wanted, alpha=distill)
        own = 1.0 if teacher is None else 1.0 - distill
        slope.scatter_add_(1, index, torch.full_like(index, -own, dtype=slope.dtype))
        slope *= weights[span, None]
        values.append(value)
        # The gradients are of the size 1 / rows: bfloat16 has the range of float32, so nothing underflows.
        gradients.append(slope.to(part.dtype) @ part)
    return torch.cat(values), torch.cat(gradients), torch.cat(choices), torch.cat(kept) if kept else None
