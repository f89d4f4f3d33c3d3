"""dots.llm1."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class Dots1Family(DecoderFamily):
    """Llama's shape, with experts and norms of queries and keys."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("dots1",)
