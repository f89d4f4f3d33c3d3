"""MiniMax M2."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class MiniMaxFamily(DecoderFamily):
    """Experts, norms of queries and keys, and a partial rotary embedding."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("minimax", "minimax_m2")
