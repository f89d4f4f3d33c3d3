"""Drafters whose guess for every depth does not depend on the guesses before it: streams, Medusa's heads."""

import mlx.core as mx

from specstream_mlx.drafters.fill import fill
from specstream_mlx.drafters.protocol import Anchor, DraftState, Wish
from specstream_mlx.target.rows import Draft


class MarginalState(DraftState):
    """Proposes from logits by depth."""

    def marginals(self, anchor: Anchor, depth: int) -> mx.array:
        """(depth, V) logits; row ``g - 1`` guesses the token ``g`` after the root."""
        raise NotImplementedError

    def propose(self, anchor: Anchor, wish: Wish) -> Draft:
        """As ``DraftState``."""
        return fill(anchor.root, self.marginals(anchor, wish.depth), wish)
