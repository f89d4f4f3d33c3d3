"""Ministral 3, and the language models of Mistral 3 and Pixtral with vision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from specstream_mlx.families.decoder import DecoderFamily
from specstream_mlx.families.refused import REFUSED
from specstream_mlx.families.vision import WithVision

if TYPE_CHECKING:
    import mlx.core as mx


class Ministral3Family(DecoderFamily):
    """Queries are scaled by a factor that grows with their position, which a block makes from ``cache.offset``."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("ministral3",)

    def block(self, layer: Any, hidden: mx.array, mask: Any, cache: Any, positions: mx.array | None = None) -> mx.array:
        """Run a block: (B, L, D) -> (B, L, D)."""
        scale = None if positions is None else self._scale(positions, hidden)
        out: mx.array = layer(hidden, scale, mask, cache)
        return out

    def _scale(self, positions: mx.array, hidden: mx.array) -> mx.array:
        """``1 + beta * log(1 + floor(position / length))`` of every row, (B or 1, 1, L, 1)."""
        import mlx.core as mx

        rope = self.args.rope_parameters
        steps = mx.floor(positions / rope["original_max_position_embeddings"])
        scale = 1 + rope["llama_4_scaling_beta"] * mx.log(1 + steps)
        return scale.reshape(-1, 1, hidden.shape[1], 1).astype(hidden.dtype)


class MistralVisionFamily(WithVision):
    """Llama as the language model of a checkpoint with vision."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("pixtral",)


class Mistral3VisionFamily(WithVision, Ministral3Family):
    """Ministral 3 or llama as the language model, as ``text_config`` says."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("mistral3", "llava")

    @classmethod
    def refusal(cls, config: Mapping[str, Any]) -> str | None:
        """Mistral 4 as the language model."""
        return REFUSED.get("mistral4") if _language_model(config) == "mistral4" else None

    def block(self, layer: Any, hidden: mx.array, mask: Any, cache: Any, positions: mx.array | None = None) -> mx.array:
        """Run a block: (B, L, D) -> (B, L, D)."""
        family = Ministral3Family if self.args.model_type == "ministral3" else DecoderFamily
        return family.block(self, layer, hidden, mask, cache, positions)


def _language_model(config: Mapping[str, Any]) -> Any:
    return (config.get("text_config") or {}).get("model_type")
