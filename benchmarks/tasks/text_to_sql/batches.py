"""Batches of token ids in a seeded order, examples of like length side by side to save padding."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .task import examples
from .tokenizer import ExampleEncoder
from .words import Split

POOL_BATCHES = 16
WIDTH_STEP = 16


@dataclass(frozen=True)
class Batch:
    """Right-padded examples.

    Attributes:
        tokens: (B, L) ids; padding is end-of-text.
        prompt_lengths: (B,) number of prompt tokens, `<s>` included.
        lengths: (B,) number of tokens, `</s>` included.
    """

    tokens: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor

    def answer_targets(self) -> torch.Tensor:
        """(B, L - 1) mask of the next-token targets that belong to answers."""
        index = torch.arange(1, self.tokens.shape[1])[None]
        return (index >= self.prompt_lengths[:, None]) & (index < self.lengths[:, None])

    def targets(self) -> torch.Tensor:
        """(B, L - 1) mask of all next-token targets that are not padding."""
        return torch.arange(1, self.tokens.shape[1])[None] < self.lengths[:, None]


def collate(encoded: list[tuple[list[int], int]], eos_id: int) -> Batch:
    """Pad (ids, prompt length) pairs to one batch."""
    # Widths come in few sizes, since the CPU prepares its matrix kernels anew for every size.
    width = -(-max(len(ids) for ids, _ in encoded) // WIDTH_STEP) * WIDTH_STEP + 1
    tokens = torch.full((len(encoded), width), eos_id, dtype=torch.long)
    for row, (ids, _) in enumerate(encoded):
        tokens[row, : len(ids)] = torch.tensor(ids)
    return Batch(
        tokens,
        torch.tensor([prompt for _, prompt in encoded]),
        torch.tensor([len(ids) for ids, _ in encoded]),
    )


def pool(encoder: ExampleEncoder, split: Split, seed: int, index: int, batch_size: int) -> list[Batch]:
    """The `index`-th pool of batches of a seed: freshly generated, bucketed by length, shuffled."""
    rng = random.Random(f"pool/{seed}/{index}")
    drawn = itertools.islice(examples(split, rng.getrandbits(48)), POOL_BATCHES * batch_size)
    encoded = sorted((encoder.whole(e) for e in drawn), key=lambda pair: len(pair[0]))
    batches = [collate(encoded[i : i + batch_size], encoder.eos_id) for i in range(0, len(encoded), batch_size)]
    rng.shuffle(batches)
    return batches


def stream(encoder: ExampleEncoder, split: Split, seed: int, batch_size: int, start: int = 0) -> Iterator[Batch]:
    """Endless batches from batch number `start` on; a restarted run sees what it would have seen."""
    for index in itertools.count(start // POOL_BATCHES):
        skip = start - index * POOL_BATCHES if index == start // POOL_BATCHES else 0
        yield from pool(encoder, split, seed, index, batch_size)[skip:]
