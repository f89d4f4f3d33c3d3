"""What a draft head is: a drafter whose weights lie in an adapter directory of their own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.nn as nn

from specstream_mlx.drafters.protocol import Drafter


@dataclass(frozen=True)
class BaseSizes:
    """Of the target that a head reads: N layers, D and V."""

    num_layers: int
    hidden_size: int
    vocab_size: int


class Head(Drafter, Protocol):
    """A drafter made from ``drafter_config.json``.

    Attributes:
        weights: its module; ``drafter.safetensors`` holds these parameters, each under its name.
    """

    weights: nn.Module

    @classmethod
    def from_settings(cls, raw: Mapping[str, Any], base: BaseSizes, where: str) -> "Head":
        """A head with weights yet to be filled.

        Args:
            raw: the settings of the file.
            base: the target's sizes.
            where: names the file in messages.

        Raises:
            InvalidInputError: settings that are missing, unknown or out of range.
            UnsupportedError: a variant that we do not run.
        """
