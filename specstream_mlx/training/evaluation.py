"""Acceptance on a validation split: how often streams are right, and the tokens per pass that this gives."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.training.batches import IGNORE, Example, make_batch
from specstream_mlx.training.loss import LossWeights, loss_only


@dataclass(frozen=True)
class Validation:
    """Figures of a validation split; teacher-forced, all anchors of every answer.

    Attributes:
        loss: the weighted loss, as in training.
        main_loss: next-token loss of the main stream; NaN in lossless mode, where it does not change.
        agreement: (gamma,) how often stream j's likeliest token is the answer's.
        acceptance: (gamma,) the same, among the anchors where all streams before j are right.
        tokens_per_pass: what chain drafting would give on these answers, greedy: exactly that when they are the
            model's own greedy answers, an estimate otherwise.
        num_answers: how many answers there were.
    """

    loss: float
    main_loss: float
    agreement: list[float]
    acceptance: list[float]
    tokens_per_pass: float
    num_answers: int

    def to_dict(self) -> dict[str, Any]:
        """For a log; NaN becomes None."""
        raw = asdict(self)
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in raw.items()}


def validate(
    model: SpecStreamModel,
    examples: Sequence[Example],
    weights: LossWeights,
    *,
    batch_size: int,
    num_batches: int = -1,
    rows_per_chunk: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> Validation:
    """Measure the streams on the first ``num_batches`` batches of ``examples`` (-1: on all)."""
    count = len(examples) if num_batches == -1 else min(len(examples), num_batches * batch_size)
    assert count > 0
    rows = sorted(range(count), key=lambda row: len(examples[row]))
    losses: list[tuple[float, float, int]] = []
    right = np.zeros(model.gamma)
    prefix_right = np.zeros(model.gamma)
    reached = np.zeros(model.gamma)
    targets = np.zeros(model.gamma)
    tokens = passes = 0
    model.eval()
    for start in range(0, count, batch_size):
        batch = make_batch([examples[row] for row in rows[start : start + batch_size]], model.gamma)
        report = loss_only(model, batch, weights, rows_per_chunk=rows_per_chunk)
        mx.clear_cache()
        losses.append((report.loss, report.main, len(batch.tokens)))
        exists = batch.stream_targets != IGNORE
        so_far = np.logical_and.accumulate(report.stream_right, axis=2)
        before = np.concatenate([np.ones_like(so_far[:, :, :1]), so_far[:, :, :-1]], axis=2) & exists
        right += report.stream_right.sum(axis=(0, 1))
        targets += exists.sum(axis=(0, 1))
        prefix_right += so_far.sum(axis=(0, 1))
        reached += before.sum(axis=(0, 1))
        for stream_right, length in zip(report.stream_right, batch.answer_lengths, strict=True):
            tokens += int(length)
            passes += chain_passes(stream_right, int(length))
        if progress is not None:
            progress(min(start + batch_size, count), count)
    model.train()
    number = sum(size for *_, size in losses)
    return Validation(
        loss=sum(loss * size for loss, _, size in losses) / number,
        main_loss=sum(main * size for _, main, size in losses) / number,
        agreement=(right / np.maximum(targets, 1)).tolist(),
        acceptance=(prefix_right / np.maximum(reached, 1)).tolist(),
        tokens_per_pass=tokens / passes,
        num_answers=number,
    )


def chain_passes(stream_right: npt.NDArray[np.bool_], length: int) -> int:
    """Passes of the target, the prefill included, that chain drafting needs for an answer of ``length`` tokens.

    Args:
        stream_right: (A, gamma); row a is the anchor just before ``answer[a]``, whose stream j guesses
            ``answer[a + j]``.
        length: of the answer.
    """
    passes, anchor = 1, 0  # the prefill gives answer[0], drawn at anchor 0
    while anchor + 1 < length:
        wrong = np.flatnonzero(~stream_right[anchor])
        anchor += 1 + (int(wrong[0]) if len(wrong) else stream_right.shape[1])
        passes += 1
    return passes
