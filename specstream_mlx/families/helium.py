"""Helium."""

from typing import Any, ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class HeliumFamily(DecoderFamily):
    """Llama's shape."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("helium",)

    @classmethod
    def has_head(cls, base: Any) -> bool:
        """A base has a layer for its head even where the embedding is the head."""
        return not base.args.tie_word_embeddings
