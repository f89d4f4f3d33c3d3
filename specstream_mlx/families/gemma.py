"""Gemma 1 to 4, the language models of those with vision among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from specstream_mlx.families.decoder import DecoderFamily
from specstream_mlx.families.vision import WithVision

if TYPE_CHECKING:
    import mlx.core as mx


class GemmaFamily(DecoderFamily):
    """Embeddings are scaled by ``sqrt(D)``; the head is the embedding."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("gemma",)

    @classmethod
    def embedding_scale(cls, args: Any) -> float | None:
        """``sqrt(D)``."""
        return args.hidden_size**0.5


class Gemma2Family(GemmaFamily):
    """Logits are capped. Attention is written out, because its scores are capped too."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("gemma2",)
    SHARED_ATTENTION: ClassVar[bool] = False

    @classmethod
    def logit_cap(cls, args: Any) -> float | None:
        """30 in the checkpoints."""
        return args.final_logit_softcapping

    def over_heads(self, mask: mx.array) -> mx.array:
        """Grouped-query heads lie in two axes here."""
        grouped = self.args.num_attention_heads > self.args.num_key_value_heads
        return mask[:, None, None] if grouped else mask[:, None]


class Gemma3Family(DecoderFamily):
    """The embedding's scale is rounded to bfloat16, as in the checkpoints' own code."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("gemma3_text",)

    @classmethod
    def embedding_scale(cls, args: Any) -> float | None:
        """``sqrt(D)``, to eight bits of precision."""
        return _bfloat16(args.hidden_size**0.5)


class Gemma3VisionFamily(WithVision, Gemma3Family):
    """The language model of a checkpoint with vision."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("gemma3",)


class Gemma4Family(GemmaFamily):
    """Logits are capped, and blocks return more than their rows: dense models and experts without inputs per layer."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("gemma4_text",)

    @classmethod
    def refusal(cls, config: Mapping[str, Any]) -> str | None:
        """Inputs per layer and shared keys, which the smallest models have; where nothing is said, they have them."""
        text = config.get("text_config") or config
        if text.get("hidden_size_per_layer_input", 256):
            return "has layers that take inputs made from the token itself (hidden_size_per_layer_input)"
        if text.get("num_kv_shared_layers", 20):
            return "has layers that attend to the keys and values of another layer (num_kv_shared_layers)"
        return None

    @classmethod
    def logit_cap(cls, args: Any) -> float | None:
        """30 in the checkpoints."""
        return args.final_logit_softcapping

    def block(self, layer: Any, hidden: mx.array, mask: Any, cache: Any, positions: mx.array | None = None) -> mx.array:
        """Run a block, (B, L, D) -> (B, L, D); its keys and values, which it returns too, are in the cache."""
        out: mx.array = layer(hidden, mask, cache)[0]
        return out


class Gemma4VisionFamily(WithVision, Gemma4Family):
    """The language model of a checkpoint with vision."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("gemma4", "gemma4_unified")


def _bfloat16(value: float) -> float:
    """The nearest value of bfloat16, to even where two are as near.

    >>> _bfloat16(3.0), _bfloat16(1152**0.5)
    (3.0, 34.0)
    """
    bits = int(np.float32(value).view(np.uint32))
    return float(np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32))
