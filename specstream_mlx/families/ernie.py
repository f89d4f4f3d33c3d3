"""ERNIE 4.5."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class ErnieFamily(DecoderFamily):
    """Llama's shape, dense and with experts."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("ernie4_5", "ernie4_5_moe")
