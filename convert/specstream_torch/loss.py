"""Batches, anchors and the training loss.

``L = - alpha_0 sum_t log p(y_{t+1} | y_<=t) - sum_j alpha_j sum_t log p(y_{t+1+j} | y_<=t)``, ``t`` from the last
prompt token on. Each sum is taken as the mean over its own targets, so that neither length nor the sub-sampling
of anchors changes the balance; a target past the end of the answer does not exist and counts nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from .modeling import NO_ANCHOR, forward_hidden, lm_head, prune_hidden, stream_module

IGNORE = -100


@dataclass(frozen=True)
class Example:
    """One tokenised training row; ``answer`` ends with the end-of-text token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass
class Batch:
    """Right-padded sequences with what to predict where."""

    input_ids: torch.Tensor  # (B, L)
    main_targets: torch.Tensor  # (B, L): y_{t+1} in row t, IGNORE before the last prompt token and at the end
    anchors: torch.Tensor  # (B, A), filled with NO_ANCHOR
    stream_targets: torch.Tensor  # (B, A, gamma): y_{t+1+j}, IGNORE past the end

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        return Batch(*(t.to(device) for t in (self.input_ids, self.main_targets, self.anchors, self.stream_targets)))


def make_batch(
    examples: Sequence[Example],
    gamma: int,
    *,
    pad_id: int = 0,
    max_anchors: int | None = None,
    generator: torch.Generator | None = None,
) -> Batch:
    """Pad examples into a batch whose anchors are the positions that have a stream target.

    Those are ``t = len(prompt) - 1`` (the last prompt token) up to two before the end: at the last but one only
    the main stream still has a token to predict. With ``max_anchors`` a random subset per example is kept.
    """
    if any(not example.prompt or not example.answer for example in examples):
        raise ValueError("an example has an empty prompt or an empty answer")
    length = max(len(example) for example in examples)
    input_ids = torch.full((len(examples), length), pad_id)
    # Targets reach past the end of the rows, where there is nothing to predict.
    targets = torch.full((len(examples), length + gamma + 1), IGNORE)
    chosen = []
    for row, example in enumerate(examples):
        tokens = torch.tensor(example.prompt + example.answer)
        start = len(example.prompt)
        input_ids[row, : len(tokens)] = tokens
        targets[row, start : len(tokens)] = tokens[start:]
        anchors = torch.arange(start - 1, len(tokens) - 2)
        if max_anchors is not None and len(anchors) > max_anchors:
            anchors = anchors[torch.randperm(len(anchors), generator=generator)[:max_anchors].sort().values]
        chosen.append(anchors)
    width = max(1, *(len(anchors) for anchors in chosen)) if chosen else 1
    table = torch.full((len(examples), width), NO_ANCHOR)
    for row, anchors in enumerate(chosen):
        table[row, : len(anchors)] = anchors
    ahead = table.clamp(min=0)[:, :, None] + 1 + torch.arange(1, gamma + 1)  # t + 1 + j
    stream_targets = targets.gather(1, ahead.flatten(1)).view_as(ahead)
    stream_targets = stream_targets.masked_fill(table[:, :, None] == NO_ANCHOR, IGNORE)
    return Batch(input_ids, targets[:, 1 : length + 1].contiguous(), table, stream_targets)


@dataclass
class LossReport:
    """The loss of one batch and its parts; everything but ``loss`` is detached.

    ``accuracies[0]`` is the main stream's top-1 accuracy on the targets, ``accuracies[j]`` stream ``j``'s: an
    estimate of its acceptance. ``chain_tokens`` estimates the tokens per pass of a chain draft: one plus the mean
    number of leading streams that are right. Lossless mode leaves the main stream out (NaN).
    """

    loss: torch.Tensor
    main_loss: float = float("nan")
    stream_losses: list[float] = field(default_factory=list)
    prune_loss: float | None = None
    accuracies: list[float] = field(default_factory=list)
    chain_tokens: float = float("nan")


def streaming_loss(
    model: nn.Module,
    batch: Batch,
    *,
    main_weight: float | None = None,
    stream_weight: float | Sequence[float] = 0.1,
    prune_weight: float = 1.0,
) -> LossReport:
    """Compute the loss of method section 8 on one batch.

    ``main_weight`` is ``alpha_0``: 1 in shared mode and 0 in lossless mode, where the main stream is frozen.
    ``stream_weight`` is ``alpha_j``, one for all or one per stream. The pruner, when there is one, learns the
    next token from the detached trunk, so that it moves nothing but itself.
    """
    config = stream_module(model).config
    if main_weight is None:
        main_weight = 0.0 if config.mode == "lossless" else 1.0
    if config.mode == "lossless" and main_weight:
        raise ValueError(f"main_weight is {main_weight}, expected 0: lossless mode does not train the main stream")
    weights = [stream_weight] * config.gamma if isinstance(stream_weight, int | float) else list(stream_weight)
    if len(weights) != config.gamma:
        raise ValueError(f"stream_weight has {len(weights)} values, expected gamma = {config.gamma}")

    hidden = forward_hidden(model, batch.input_ids, batch.anchors)
    predicts = batch.main_targets != IGNORE
    rows = [hidden.streams[batch.stream_targets != IGNORE]]
    targets = [batch.stream_targets[batch.stream_targets != IGNORE]]
    if main_weight:
        rows.append(hidden.main[predicts])
        targets.append(batch.main_targets[predicts])
    logits = lm_head(model, torch.cat(rows)).float()  # only the rows that have a target
    target = torch.cat(targets)
    losses = F.cross_entropy(logits, target, reduction="none")
    right = logits.detach().argmax(-1) == target

    stream_losses = torch.zeros(batch.stream_targets.shape, dtype=losses.dtype, device=losses.device)
    stream_losses = stream_losses.masked_scatter(batch.stream_targets != IGNORE, losses[: len(targets[0])])
    stream_right = torch.zeros_like(batch.stream_targets, dtype=torch.bool)
    stream_right[batch.stream_targets != IGNORE] = right[: len(targets[0])]
    counts = (batch.stream_targets != IGNORE).sum(dim=(0, 1))  # (gamma,)
    per_stream = stream_losses.sum(dim=(0, 1)) / counts.clamp(min=1)
    total = (per_stream * torch.tensor(weights, device=losses.device)).sum()
    report = LossReport(total, stream_losses=per_stream.tolist())

    report.accuracies = [float("nan"), *(stream_right.sum(dim=(0, 1)) / counts.clamp(min=1)).tolist()]
    if main_weight:
        main_loss = losses[len(targets[0]) :].mean()
        report.loss = report.loss + main_weight * main_loss
        report.main_loss = float(main_loss.detach())
        report.accuracies[0] = float(right[len(targets[0]) :].float().mean())
    anchored = batch.anchors != NO_ANCHOR
    if anchored.any():
        report.chain_tokens = 1.0 + float(stream_right[anchored].cumprod(-1).sum(-1).float().mean())
    if config.prune_rank is not None:
        pruner = prune_hidden(model, hidden.trunk.detach()[predicts])
        prune_loss = F.cross_entropy(lm_head(model, pruner).float(), batch.main_targets[predicts])
        report.loss = report.loss + prune_weight * prune_loss
        report.prune_loss = float(prune_loss.detach())
    return report
