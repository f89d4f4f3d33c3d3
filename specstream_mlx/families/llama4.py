"""The text models of Llama 4 that mlx-lm runs without chunks (MobileLLM-Pro)."""

from typing import Any, ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class Llama4TextFamily(DecoderFamily):
    """Llama's shape, where some layers have no rotary embedding."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("llama4_text",)
    HEAD: ClassVar[str] = "output"

    def is_rotary(self, layer: Any) -> bool:
        """As the block says."""
        return bool(layer.self_attn.use_rope)
