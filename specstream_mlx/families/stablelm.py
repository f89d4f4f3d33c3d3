"""StableLM 2."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class StableLMFamily(DecoderFamily):
    """Llama's shape, with layer norms."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("stablelm",)
