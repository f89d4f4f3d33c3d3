"""Muse Glimmer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from specstream_mlx.families.decoder import DecoderFamily, Positions

if TYPE_CHECKING:
    import mlx.core as mx


class MuseGlimmerFamily(DecoderFamily):
    """Embeddings are normed, logits scaled and capped; layers without a window have no rotary embedding."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("muse_glimmer",)

    def is_rotary(self, layer: Any) -> bool:
        """As the block says."""
        return bool(layer.self_attn.use_rope)

    def embed(self, tokens: mx.array, positions: Positions) -> mx.array:
        """(B, L) ids -> (B, L, D), normed without weights."""
        import mlx.core as mx

        return mx.fast.rms_norm(super().embed(tokens, positions), None, self.args.rms_norm_eps)

    @classmethod
    def scale_logits(cls, args: Any, logits: Any) -> Any:
        """(B, L, V) -> (B, L, V)."""
        return logits * args.output_multiplier

    @classmethod
    def logit_cap(cls, args: Any) -> float | None:
        """20 in the checkpoints."""
        return args.final_logit_softcapping
