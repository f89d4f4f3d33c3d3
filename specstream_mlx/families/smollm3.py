"""SmolLM 3."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class SmolLM3Family(DecoderFamily):
    """Llama's shape, where some layers have no rotary embedding."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("smollm3",)
