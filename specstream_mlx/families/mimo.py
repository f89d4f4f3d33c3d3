"""MiMo 1 and 2."""

from collections.abc import Mapping
from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class MimoFamily(DecoderFamily):
    """Llama"s shape."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("mimo",)


class Mimo2Family(DecoderFamily):
    """Experts, windows and attention sinks."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("mimo_v2_flash",)
    SIZES: ClassVar[Mapping[str, str]] = {"rms_norm_eps": "layernorm_epsilon"}
