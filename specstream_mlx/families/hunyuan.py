"""Hunyuan, dense and with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from specstream_mlx.families.decoder import DecoderFamily

if TYPE_CHECKING:
    import mlx.core as mx


class HunyuanDenseFamily(DecoderFamily):
    """Llama's shape, with norms of queries and keys."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("hunyuan_v1_dense",)


class HunyuanFamily(DecoderFamily):
    """Experts; blocks return their keys and values too."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("hunyuan",)

    @classmethod
    def refusal(cls, config: Mapping[str, Any]) -> str | None:
        """Attention across layers, which the largest model has."""
        if config.get("use_cla"):
            return "has layers that attend to the keys and values of another layer (use_cla)"
        return None

    def block(self, layer: Any, hidden: mx.array, mask: Any, cache: Any, positions: mx.array | None = None) -> mx.array:
        """Run a block, (B, L, D) -> (B, L, D)."""
        out: mx.array = layer(hidden, mask, cache)[0]
        return out
