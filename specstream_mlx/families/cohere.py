"""Command R and R7B of Cohere."""

from typing import Any, ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class CohereFamily(DecoderFamily):
    """Logits are scaled; the head is the embedding."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("cohere", "cohere2")

    @classmethod
    def scale_logits(cls, args: Any, logits: Any) -> Any:
        """(B, L, V) -> (B, L, V)."""
        return logits * args.logit_scale
