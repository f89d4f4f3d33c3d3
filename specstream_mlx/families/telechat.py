"""TeleChat 3."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class TelechatFamily(DecoderFamily):
    """Llama's shape."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("telechat3",)
