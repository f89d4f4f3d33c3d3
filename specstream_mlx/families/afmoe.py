"""AFMoE (Trinity)."""

from typing import Any, ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class AfmoeFamily(DecoderFamily):
    """Embeddings may be scaled; layers without a window have no rotary embedding."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("afmoe",)

    @classmethod
    def embedding_scale(cls, args: Any) -> float | None:
        """``sqrt(D)`` where the model says so."""
        return args.hidden_size**0.5 if args.mup_enabled else None

    def is_rotary(self, layer: Any) -> bool:
        """Layers with a window alone."""
        return bool(layer.self_attn.is_local_attention)
