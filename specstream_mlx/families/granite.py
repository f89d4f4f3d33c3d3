"""Granite 3 of attention alone, dense and with experts."""

from typing import Any, ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class GraniteFamily(DecoderFamily):
    """Embeddings and logits are scaled; the residual multiplier is in the blocks."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("granite", "granitemoe")

    @classmethod
    def embedding_scale(cls, args: Any) -> float | None:
        """12 in the checkpoints."""
        return args.embedding_multiplier

    @classmethod
    def scale_logits(cls, args: Any, logits: Any) -> Any:
        """(B, L, V) -> (B, L, V)."""
        return logits / args.logits_scaling
