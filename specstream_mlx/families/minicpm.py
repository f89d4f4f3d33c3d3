"""MiniCPM 1 to 3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from specstream_mlx.families.decoder import DecoderFamily

if TYPE_CHECKING:
    import mlx.core as mx


class MiniCPMFamily(DecoderFamily):
    """Embeddings are scaled, and what enters a head of its own; the residual multiplier is in the blocks."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("minicpm", "minicpm3")

    @classmethod
    def embedding_scale(cls, args: Any) -> float | None:
        """12 in the checkpoints."""
        return args.scale_emb

    def head(self, normed: mx.array) -> mx.array:
        """The LM head on normed hidden states, (B, L, D) -> (B, L, V) logits."""
        own = self.has_head(self._base)
        return super().head(normed / (self.args.hidden_size / self.args.dim_model_base) if own else normed)
