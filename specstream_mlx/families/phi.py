"""Phi 1 to 3, Phi-MoE, and Phixtral of Phi 2."""

from collections.abc import Mapping
from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily
from specstream_mlx.families.hugging_face import HuggingFace


class PhiFamily(DecoderFamily):
    """The final norm has a name of its own."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("phi",)
    NORM: ClassVar[str] = "model.final_layernorm"


class Phi3Family(DecoderFamily):
    """Llama's shape; queries, keys and values are one linear layer."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("phi3",)
    HUGGING_FACE: ClassVar[HuggingFace | None] = HuggingFace(
        values="self_attn.qkv_proj", rope_types=("default", "linear", "longrope", "su"), window="ignored"
    )


class PhiMoeFamily(DecoderFamily):
    """Llama's shape, with experts and layer norms."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("phimoe",)


class PhixtralFamily(DecoderFamily):
    """Parallel blocks with experts; the final norm is a part of the head."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("phixtral", "phi-msft")
    EMBEDDING: ClassVar[str] = "transformer.embd.wte"
    LAYERS: ClassVar[str] = "transformer.h"
    NORM: ClassVar[str] = "lm_head.ln"
    HEAD: ClassVar[str] = "lm_head.linear"
    ATTENTION: ClassVar[str] = "mixer"
    SIZES: ClassVar[Mapping[str, str]] = {
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "vocab_size": "num_vocab",
    }
