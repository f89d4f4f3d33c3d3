"""What the trainer asks of a kind of head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from .reading import HeadLoss, Reading


@dataclass(frozen=True)
class HeadShape:
    """Of a head to be made.

    Attributes:
        config: the base's, of Hugging Face.
        depth: how many tokens ahead it guesses; of EAGLE-3: steps of its own that it is trained on.
        num_layers: of Medusa's and Hydra's heads.
        draft_vocab: rising ids that EAGLE-3 guesses among.
    """

    config: Any
    depth: int
    num_layers: int
    draft_vocab: torch.Tensor


class HeadKind(Protocol):
    """One kind of head: its module, whose parameters have the names of ``drafter.safetensors``, and its loss."""

    name: str
    whole_rows: bool  # reads every row of the text, the prompt's too, so that examples cannot share a prompt

    def make(self, shape: HeadShape, lm_head: torch.Tensor) -> nn.Module:
        """A fresh head; ``lm_head`` (V, D) is the base's."""

    def taps(self, shape: HeadShape) -> tuple[int, ...]:
        """The hidden states that the loss reads of every row; N + 1: after the final norm."""

    def loss(self, head: nn.Module, reading: Reading, noise: torch.Generator) -> HeadLoss:
        """The loss of the method's paper; ``noise`` is for what it draws."""

    def settings(self, shape: HeadShape) -> dict[str, Any]:
        """As ``drafter_config.json`` has them."""
