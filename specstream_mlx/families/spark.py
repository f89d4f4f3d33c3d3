"""Spark 2.5."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class SparkFamily(DecoderFamily):
    """Windows, and a gate after attention; queries, keys and values are one linear layer."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("spark2_5",)
    EMBEDDING: ClassVar[str] = "model.embedding"
