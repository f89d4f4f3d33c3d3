"""A drafter that knows the text and is as right as one likes: for tests and simulations."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from specstream_mlx.drafters.marginals import MarginalState
from specstream_mlx.drafters.protocol import Anchor, Drafter, Wish, with_pruning
from specstream_mlx.target.rows import Riders
from specstream_mlx.target.target import Passed, Target


class Scripted:
    """As ``protocol.Drafter``.

    With probability ``accuracy`` a depth has the right token among its guesses, at a random one of its first three
    ranks; otherwise the right token is its last choice. 1.0 is always right at rank 0, and sure of it; 0.0 never is.

    ``beside``: a drafter of marginals whose rows and passes are all made as if it were asked, and whose logits are
    then changed; None: noise is changed.
    """

    name = "scripted"

    def __init__(
        self,
        continuation: Sequence[int],
        prompt_length: int,
        accuracy: float,
        seed: int = 0,
        *,
        max_depth: int = 4,
        beside: Drafter | None = None,
    ) -> None:
        """``continuation``: the text that follows ``prompt_length`` tokens, cached ones counted."""
        self.continuation, self.prompt_length, self.accuracy = list(continuation), prompt_length, accuracy
        self.beside = beside
        self.seed = seed
        self.max_depth = max_depth if beside is None else beside.max_depth
        self.ways: tuple[str, ...] = ("deferred",) if beside is None else beside.ways
        self.taps: tuple[int, ...] = () if beside is None else beside.taps

    def pruning(self, threshold: float, way: str) -> "Scripted":
        """With the early exit of the drafter beside it."""
        self.beside = with_pruning(self.beside, threshold, way)
        return self

    def begin(self, target: Target, prompt: Sequence[int]) -> "ScriptedState":
        """As ``Drafter``."""
        return ScriptedState(self, target, None if self.beside is None else self.beside.begin(target, prompt))


class ScriptedState(MarginalState):
    """Changes the logits of the drafter beside it, or noise."""

    def __init__(self, script: Scripted, target: Target, beside: object) -> None:
        assert beside is None or isinstance(beside, MarginalState)
        self._script, self._beside = script, beside
        self._vocab_size: int = target.args.vocab_size

    @property
    def own_passes(self) -> int:  # type: ignore[override]
        """As ``DraftState``."""
        return self._beside.own_passes if self._beside is not None else 0

    def riders(self, wish: Wish | None) -> Riders | None:
        """As ``DraftState``."""
        return self._beside.riders(wish) if self._beside is not None else None

    def foresees(self, passed: Passed, node: int, wish: Wish) -> bool:
        """As ``DraftState``."""
        return wish.tree is not None and (self._beside is None or self._beside.foresees(passed, node, wish))

    def marginals(self, anchor: Anchor, depth: int) -> mx.array:
        """As ``MarginalState``."""
        script = self._script
        # The index of the next root in the continuation; what is guessed there does not depend on what was before.
        first = anchor.passed.start + anchor.passed.draft.tree.depths[anchor.node] + 1 - script.prompt_length
        rng = np.random.default_rng([script.seed, max(first, 0)])
        if self._beside is not None:
            logits = np.array(self._beside.marginals(anchor, depth).astype(mx.float32))
        else:
            logits = rng.normal(size=(depth, self._vocab_size)).astype(np.float32)
        for row in range(len(logits)):
            index = first + 1 + row
            if index >= len(script.continuation):
                continue
            order = np.sort(logits[row])[::-1]
            right = script.continuation[index]
            if rng.random() < script.accuracy:
                rank = 0 if script.accuracy == 1 else int(rng.integers(3))
                upper = order[rank - 1] if rank else order[0] + (20 if script.accuracy == 1 else 2)
                logits[row, right] = (upper + order[rank]) / 2 if rank else upper
            else:
                logits[row, right] = order[-1] - 1
        return mx.array(logits)
