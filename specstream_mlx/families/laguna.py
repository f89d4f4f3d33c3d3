"""Laguna."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class LagunaFamily(DecoderFamily):
    """Experts, windows, and a gate after attention."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("laguna",)
