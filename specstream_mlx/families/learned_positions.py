"""Families whose positions are learned and added to the token embedding: OPT and GPT-2.

Nothing in their attention knows a position. The rows of a tree get theirs at the embedding, by depth; the streams of
an anchor start from its hidden state ``M_t^{N-N_s}``, which carries position ``t`` already, and get no other. So
``stream_position`` changes nothing here, and the stream's number comes from ``P_j`` (or the value rotation) alone.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from specstream_mlx.errors import InvalidInputError
from specstream_mlx.families.decoder import DecoderFamily, Positions


class LearnedPositions(DecoderFamily):
    """What the two share: a table of positions with an end."""

    ROTARY: ClassVar[bool] = False

    def _within_table(self, positions: Positions, length: int) -> mx.array:
        """(L,) positions that exist.

        Nodes deeper than the table reaches are given its last row: no text within the context can accept them, and
        no row that it can accept sees them.

        Raises:
            InvalidInputError: the root itself lies beyond the table.
        """
        if positions[0] >= length:
            raise InvalidInputError(f"position {positions[0]} is beyond the model's {length} learned positions")
        return mx.array(np.minimum(positions, length - 1))


class OPTFamily(LearnedPositions):
    """``model.decoder.*``; pre-norm and post-norm, with and without projections around the blocks."""

    EMBEDDING: ClassVar[str] = "model.decoder.embed_tokens"
    LAYERS: ClassVar[str] = "model.decoder.layers"

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        self._decoder = base.model.decoder

    @classmethod
    def fingerprint_tensor(cls, config: Mapping[str, Any]) -> str | None:
        """The last layer norm that has weights: the final one, or the last block's."""
        if not config.get("layer_norm_elementwise_affine", True):
            return None
        if config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False):
            return "model.decoder.final_layer_norm.weight"
        return f"{cls.LAYERS}.{config['num_hidden_layers'] - 1}.final_layer_norm.weight"

    def embed(self, tokens: mx.array, positions: Positions) -> mx.array:
        """(B, L) ids at (L,) absolute positions -> (B, L, D)."""
        rows = self._within_table(positions, self.args.max_position_embeddings)
        return self._decoder.embed(tokens, rows)

    def norm(self, hidden: mx.array) -> mx.array:
        """The final norm where there is one; post-norm blocks have normed already."""
        return self._decoder.norm(hidden)

    def head(self, normed: mx.array) -> mx.array:
        """``project_out`` where there is one, then the LM head: (B, L, D) -> (B, L, V) logits."""
        return self._base.head(normed)


class GPT2Family(LearnedPositions):
    """mlx-lm's ``gpt2``: ``model.h`` between ``wte`` + ``wpe`` and ``ln_f``; the head is ``wte``."""

    EMBEDDING: ClassVar[str] = "model.wte"
    LAYERS: ClassVar[str] = "model.h"
    NORM: ClassVar[str] = "model.ln_f"
    ATTENTION: ClassVar[str] = "attn"
    SIZES: ClassVar[Mapping[str, str]] = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }

    def embed(self, tokens: mx.array, positions: Positions) -> mx.array:
        """(B, L) ids at (L,) absolute positions -> (B, L, D)."""
        return super().embed(tokens, positions) + self._base.model.wpe(
            self._within_table(positions, self.args.n_positions)
        )
