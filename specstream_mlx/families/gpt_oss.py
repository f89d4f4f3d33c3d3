"""gpt-oss."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class GptOssFamily(DecoderFamily):
    """Llama's shape, with experts, attention sinks and windows."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("gpt_oss",)
