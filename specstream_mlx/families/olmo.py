"""OLMo 2 and 3, and OLMoE."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class OlmoFamily(DecoderFamily):
    """Llama's shape, with norms after attention and feed-forward."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("olmo2", "olmo3")


class OlmoeFamily(DecoderFamily):
    """Llama's shape, with experts and norms of queries and keys."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("olmoe",)
