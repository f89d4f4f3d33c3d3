"""Qwen 2 and 3, dense and with experts."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily
from specstream_mlx.families.hugging_face import HuggingFace


class Qwen2Family(DecoderFamily):
    """Llama's shape, with biases in attention."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("qwen2",)
    HUGGING_FACE: ClassVar[HuggingFace | None] = HuggingFace(rope_theta=None)


class Qwen3Family(DecoderFamily):
    """Llama's shape, with norms of queries and keys."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("qwen3",)
    HUGGING_FACE: ClassVar[HuggingFace | None] = HuggingFace()


class QwenExpertsFamily(DecoderFamily):
    """Llama's shape, with experts."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("qwen2_moe", "qwen3_moe")
