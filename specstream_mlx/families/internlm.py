"""InternLM 2 and 3."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class InternLM2Family(DecoderFamily):
    """Llama's shape under other names."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("internlm2",)
    EMBEDDING: ClassVar[str] = "model.tok_embeddings"
    HEAD: ClassVar[str] = "output"
    ATTENTION: ClassVar[str] = "attention"


class InternLM3Family(DecoderFamily):
    """Llama's shape."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("internlm3",)
