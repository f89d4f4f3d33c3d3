"""Llama and Mistral, and models of the same code under other names."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily
from specstream_mlx.families.hugging_face import HuggingFace


class LlamaFamily(DecoderFamily):
    """The shape that the others are told apart from."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("llama", "mistral")
    HUGGING_FACE: ClassVar[HuggingFace | None] = HuggingFace(
        rope_types=("default", "linear", "llama3", "yarn"), window="by layer"
    )


class NamedLlamaFamily(DecoderFamily):
    """Run by mlx-lm as llama."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("iquestcoder", "xverse")
