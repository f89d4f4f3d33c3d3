"""Phi 1 to 3."""

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
