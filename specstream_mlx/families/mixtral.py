"""Mixtral."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class MixtralFamily(DecoderFamily):
    """Llama's shape, with experts."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("mixtral",)
