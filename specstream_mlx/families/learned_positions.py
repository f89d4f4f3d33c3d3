"""Families whose positions are learned and added to the token embedding.

Nothing in their attention knows a position. The rows of a tree get theirs at the embedding, by depth; the streams of
an anchor start from its hidden state ``M_t^{N-N_s}``, which carries position ``t`` already, and get no other. So
``stream_position`` changes nothing here, and the stream's number comes from ``P_j`` (or the value rotation) alone.
There are no more positions than ``max_position_embeddings``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from specstream_mlx.errors import InvalidInputError
from specstream_mlx.families.decoder import DecoderFamily, Positions

if TYPE_CHECKING:
    import mlx.core as mx


class LearnedPositions(DecoderFamily):
    """A table of positions with an end."""

    ROTARY: ClassVar[bool] = False

    def _within_table(self, positions: Positions, length: int) -> mx.array:
        """(L,) positions that exist.

        Nodes deeper than the table reaches are given its last row: no text within the context can accept them, and
        no row that it can accept sees them.

        Raises:
            InvalidInputError: the root itself lies beyond the table.
        """
        import mlx.core as mx

        if positions[0] >= length:
            raise InvalidInputError(f"position {positions[0]} is beyond the model's {length} learned positions")
        return mx.array(np.minimum(positions, length - 1))
