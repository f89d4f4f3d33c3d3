"""GPT-BigCode: StarCoder 1 and SantaCoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from specstream_mlx.families.decoder import Positions
from specstream_mlx.families.learned_positions import LearnedPositions

if TYPE_CHECKING:
    import mlx.core as mx


class GPTBigCodeFamily(LearnedPositions):
    """GPT-2 with one head for all keys and values."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("gpt_bigcode",)
    EMBEDDING: ClassVar[str] = "transformer.wte"
    POSITIONS: ClassVar[str | None] = "transformer.wpe"
    LAYERS: ClassVar[str] = "transformer.h"
    NORM: ClassVar[str] = "transformer.ln_f"
    ATTENTION: ClassVar[str] = "attn"
    SIZES: ClassVar[Mapping[str, str]] = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }

    def embed(self, tokens: mx.array, positions: Positions) -> mx.array:
        """(B, L) ids at (L,) absolute positions -> (B, L, D)."""
        rows = self._within_table(positions, self.args.n_positions)
        return super().embed(tokens, positions) + self._base.transformer.wpe(rows)
