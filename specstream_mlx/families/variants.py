"""Families that are llama-shaped but for a scale, a cap or a name."""

from collections.abc import Mapping
from typing import Any, ClassVar

import mlx.core as mx

from specstream_mlx.families.decoder import DecoderFamily, Positions


class CohereFamily(DecoderFamily):
    """Logits are scaled; the head is the embedding."""

    def head(self, normed: mx.array) -> mx.array:
        """(B, L, D) -> (B, L, V) logits."""
        return super().head(normed) * self.args.logit_scale


class GemmaFamily(DecoderFamily):
    """Embeddings are scaled by ``sqrt(D)``; the head is the embedding."""

    def embed(self, tokens: mx.array, positions: Positions) -> mx.array:
        """(B, L) ids -> (B, L, D)."""
        return super().embed(tokens, positions) * self.args.hidden_size**0.5


class Gemma2Family(GemmaFamily):
    """Logits are capped. Attention is written out, because its scores are capped too."""

    SHARED_ATTENTION: ClassVar[bool] = False

    def head(self, normed: mx.array) -> mx.array:
        """(B, L, D) -> (B, L, V) logits."""
        cap = self.args.final_logit_softcapping
        return mx.tanh(super().head(normed) / cap) * cap

    def over_heads(self, mask: mx.array) -> mx.array:
        """Grouped-query heads lie in two axes here."""
        grouped = self.args.num_attention_heads > self.args.num_key_value_heads
        return mask[:, None, None] if grouped else mask[:, None]


class Gemma3Family(DecoderFamily):
    """The embedding's scale is rounded to bfloat16, as in the checkpoints' own code."""

    def embed(self, tokens: mx.array, positions: Positions) -> mx.array:
        """(B, L) ids -> (B, L, D)."""
        hidden = super().embed(tokens, positions)
        return hidden * mx.array(self.args.hidden_size**0.5, mx.bfloat16).astype(hidden.dtype)


class Gemma3VisionFamily(Gemma3Family):
    """The language model of a checkpoint that sees; mlx-lm leaves the eyes out."""

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


class GPTNeoXFamily(DecoderFamily):
    """Parallel blocks (they are mlx-lm's own) under other names."""

    EMBEDDING: ClassVar[str] = "model.embed_in"
    LAYERS: ClassVar[str] = "model.h"
    NORM: ClassVar[str] = "model.final_layer_norm"
    HEAD: ClassVar[str] = "model.embed_out"
    ATTENTION: ClassVar[str] = "attention"
    SIZES: ClassVar[Mapping[str, str]] = {"rope_theta": "rotary_emb_base"}


class GraniteFamily(DecoderFamily):
    """Embeddings and logits are scaled; the residual multiplier is in the blocks."""

    def embed(self, tokens: mx.array, positions: Positions) -> mx.array:
        """(B, L) ids -> (B, L, D)."""
        return super().embed(tokens, positions) * self.args.embedding_multiplier

    def head(self, normed: mx.array) -> mx.array:
        """(B, L, D) -> (B, L, V) logits."""
        return super().head(normed) / self.args.logits_scaling


class PhiFamily(DecoderFamily):
    """The final norm has a name of its own."""

    NORM: ClassVar[str] = "model.final_layernorm"
