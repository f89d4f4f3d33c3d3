"""Klear."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class KlearFamily(DecoderFamily):
    """Llama's shape, with experts."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("Klear",)
