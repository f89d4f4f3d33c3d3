"""Qwen 1 to 3, dense and with experts, and the language models of those with vision."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily
from specstream_mlx.families.hugging_face import HuggingFace
from specstream_mlx.families.vision import WithVision


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


class QwenFamily(DecoderFamily):
    """Qwen 1: GPT-2's names, and a rotary embedding."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("qwen",)
    EMBEDDING: ClassVar[str] = "transformer.wte"
    LAYERS: ClassVar[str] = "transformer.h"
    NORM: ClassVar[str] = "transformer.ln_f"
    ATTENTION: ClassVar[str] = "attn"
    ROPE: ClassVar[str] = "rotary_emb"


class QwenVisionFamily(WithVision):
    """The language model of a checkpoint with vision: Qwen 2 or 3, dense or with experts."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
