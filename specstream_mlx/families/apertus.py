"""Apertus."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class ApertusFamily(DecoderFamily):
    """Llama's shape, with norms of queries and keys."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("apertus",)
