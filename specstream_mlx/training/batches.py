"""Token sequences -> batches: anchors, what each row is to predict, and the order in which examples come.

Everything depends on the seed and the step alone, so an interrupted training goes on with the batch it was due.
"""

import random
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
IGNORE = -1
"""A target that does not exist: before the answer, past its end, or of an anchor that fills up a table."""
_PAD_ROWS = 16  # rows come in few lengths, so that freed memory is used again


@dataclass(frozen=True)
class Example:
    """One training row; ``answer`` ends with the end-of-text token unless it was cut."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences with what to predict where.

    Attributes:
        tokens: (B, L) ids.
        main_targets: (B, L); row t holds ``y_{t+1}``.
        anchors: (B, A) positions; those whose targets are all ``IGNORE`` fill up the table.
        stream_targets: (B, A, G); entry j - 1 holds ``y_{t+1+j}``.
        answer_lengths: (B,).
    """

    tokens: IntArray
    main_targets: IntArray
    anchors: IntArray
    stream_targets: IntArray
    answer_lengths: IntArray


def make_batch(
    examples: Sequence[Example],
    gamma: int,
    *,
    max_anchors: int | None = None,
    seed: int = 0,
) -> Batch:
    """Pad examples into a batch whose anchors are the positions that have a stream target.

    Those are the last prompt token up to two before the end: at the last but one only the main stream still has a
    token to predict. With ``max_anchors`` a random subset per example is kept, drawn with ``seed``.
    """
    assert all(example.prompt and example.answer for example in examples)
    longest = max(len(example) for example in examples)
    length = -(-longest // _PAD_ROWS) * _PAD_ROWS
    tokens = np.zeros((len(examples), length), dtype=np.int32)
    # Targets reach past the end of the rows, where there is nothing to predict.
    targets = np.full((len(examples), length + gamma + 1), IGNORE, dtype=np.int32)
    rng = np.random.default_rng(seed)
    chosen = []
    for row, example in enumerate(examples):
        ids = np.array(example.prompt + example.answer, dtype=np.int32)
        start = len(example.prompt)
        tokens[row, : len(ids)] = ids
        targets[row, start : len(ids)] = ids[start:]
        anchors = np.arange(start - 1, len(ids) - 2, dtype=np.int32)
        if max_anchors is not None and len(anchors) > max_anchors:
            anchors = np.sort(rng.choice(anchors, max_anchors, replace=False))
        chosen.append(anchors)
    width = max(1, *(len(anchors) for anchors in chosen))
    table = np.zeros((len(examples), width), dtype=np.int32)
    real = np.zeros((len(examples), width), dtype=np.bool_)
    for row, anchors in enumerate(chosen):
        table[row, : len(anchors)] = anchors
        real[row, : len(anchors)] = True
    ahead = table[:, :, None] + 1 + np.arange(1, gamma + 1)
    stream_targets = np.take_along_axis(targets, ahead.reshape(len(examples), -1), axis=1).reshape(ahead.shape)
    stream_targets[~real] = IGNORE
    lengths = np.array([len(example.answer) for example in examples], dtype=np.int32)
    return Batch(tokens, targets[:, 1 : length + 1], table, stream_targets, lengths)


AnchorChunk = tuple[IntArray, slice]
"""Some anchors of a batch: which sequences, and which columns of the table; an index of ``anchors``."""


def anchor_chunks(batch: Batch, rows_per_chunk: int) -> Iterator[AnchorChunk]:
    """All anchors that have a target, at most ``rows_per_chunk`` stream rows at a time.

    A sequence takes part up to its last anchor, so that long answers do not fill up the others.
    """
    counts = (batch.stream_targets[:, :, 0] != IGNORE).sum(axis=1)
    start = 0
    while start < counts.max():
        sequences = np.flatnonzero(counts > start).astype(np.int32)
        step = max(1, rows_per_chunk // (len(sequences) * batch.stream_targets.shape[2]))
        yield sequences, slice(start, start + step)
        start += step


def iterate_batches(examples: Sequence[Sized], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield row indices for ever, epoch after epoch: shuffled, then batched with rows of like length."""
    epoch = 0
    while True:
        shuffle = random.Random(mixed_seed(seed, epoch))
        order = list(range(len(examples)))
        shuffle.shuffle(order)
        pool = 50 * batch_size  # sorted by length within a pool: little padding, still random company
        batches = []
        for start in range(0, len(order), pool):
            rows = sorted(order[start : start + pool], key=lambda row: len(examples[row]))
            batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        shuffle.shuffle(batches)
        yield from batches
        epoch += 1


def mixed_seed(seed: int, number: int) -> int:
    """A seed of its own for each (seed, number)."""
    return (seed * 1_000_003 + number) % 2**31
