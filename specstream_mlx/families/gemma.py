"""Gemma 1 to 3, the language model of Gemma 3 with vision among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from specstream_mlx.families.decoder import DecoderFamily

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


class Gemma3VisionFamily(Gemma3Family):
    """The language model of a checkpoint with vision; mlx-lm leaves the vision tower out."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("gemma3",)
    EMBEDDING: ClassVar[str] = "language_model.model.embed_tokens"
    LAYERS: ClassVar[str] = "language_model.model.layers"
    NORM: ClassVar[str] = "language_model.model.norm"
    HEAD: ClassVar[str] = "language_model.lm_head"

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        self.args = base.language_model.args

    @classmethod
    def size(cls, config: Mapping[str, Any], name: str) -> Any:
        """The size that llama calls ``name``, from the language model's part of the configuration."""
        return config[name] if name in config else config.get("text_config", {}).get(name)


def _bfloat16(value: float) -> float:
    """The nearest value of bfloat16, to even where two are as near.

    >>> _bfloat16(3.0), _bfloat16(1152**0.5)
    (3.0, 34.0)
    """
    bits = int(np.float32(value).view(np.uint32))
    return float(np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32))
