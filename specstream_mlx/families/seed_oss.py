"""Seed-OSS."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class SeedOssFamily(DecoderFamily):
    """Llama's shape, with biases."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("seed_oss",)
