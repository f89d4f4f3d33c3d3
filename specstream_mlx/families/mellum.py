"""Mellum 2."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class MellumFamily(DecoderFamily):
    """Experts and windows."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("mellum",)
