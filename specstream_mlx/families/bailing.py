"""Ling and Ring of attention alone."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class BailingFamily(DecoderFamily):
    """Experts; queries, keys and values are one linear layer."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("bailing_moe",)
    EMBEDDING: ClassVar[str] = "model.word_embeddings"
    ATTENTION: ClassVar[str] = "attention"
