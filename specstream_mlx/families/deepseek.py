"""DeepSeek 1."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class DeepseekFamily(DecoderFamily):
    """Llama's shape, with experts."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("deepseek",)
