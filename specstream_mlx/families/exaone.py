"""EXAONE 3.5, 4 and with experts."""

from collections.abc import Mapping
from typing import Any, ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class ExaoneFamily(DecoderFamily):
    """GPT-2's names."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("exaone",)
    EMBEDDING: ClassVar[str] = "transformer.wte"
    LAYERS: ClassVar[str] = "transformer.h"
    NORM: ClassVar[str] = "transformer.ln_f"
    ATTENTION: ClassVar[str] = "attn.attention"
    SIZES: ClassVar[Mapping[str, str]] = {"num_hidden_layers": "num_layers"}


class Exaone4Family(DecoderFamily):
    """Norms after attention and feed-forward; layers without a window may have no rotary embedding."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("exaone4", "exaone_moe")

    def is_rotary(self, layer: Any) -> bool:
        """As the block says."""
        return bool(layer.self_attn.use_rope)
