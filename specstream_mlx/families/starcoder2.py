"""StarCoder 2."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class StarCoder2Family(DecoderFamily):
    """Llama's shape, with layer norms and biases."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("starcoder2",)
