"""How often streams are right, per depth and rank, on text that the model makes."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import make_sampler

from specstream_mlx.engine.sampling import TargetSampler
from specstream_mlx.engine.single import Loop, generate_tokens
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.options import DraftOptions
from specstream_mlx.planning.control import steer
from specstream_mlx.planning.plan import top_candidates

RANKS = 8


class AcceptanceCounts:
    """Counts of stream guesses against what the model then said.

    Depth d is tried at an anchor when all depths before it were right at some rank below K.
    """

    def __init__(self, gamma: int, ranks: int = RANKS) -> None:
        self.hits = np.zeros((gamma, ranks), dtype=int)
        self.trials = np.zeros(gamma, dtype=int)

    def add(self, candidates: Sequence[Sequence[int]], following: Sequence[int]) -> None:
        """Compare one anchor's guesses, (gamma, K), with the tokens that stand where they point."""
        for depth, (guesses, token) in enumerate(zip(candidates, following, strict=False)):
            self.trials[depth] += 1
            if token not in guesses:
                return
            self.hits[depth, guesses.index(token)] += 1

    def rates(self) -> tuple[tuple[float, ...], ...]:
        """(gamma, K); half a miss is added to every depth, so that few trials do not promise certainty."""
        return tuple(
            tuple(int(count) / (int(trials) + 0.5) for count in row)
            for row, trials in zip(self.hits, self.trials, strict=True)
        )


def measure_acceptance(
    model: SpecStreamModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 128,
    stop_tokens: Sequence[int] = (),
    temperature: float = 0.0,
    progress: Callable[[str, int, int], None] | None = None,
) -> AcceptanceCounts:
    """Answer the prompts, drafting a chain, and compare every anchor's guesses with the answer.

    Args:
        prompts: ids.
        temperature: 0 is greedy; above, answers are sampled with the prompt's number as seed.
    """
    counts = AcceptanceCounts(model.gamma, min(RANKS, model.args.vocab_size))
    for number, prompt in enumerate(prompts):
        if progress is not None:
            progress("acceptance", number, len(prompts))
        guesses: list[tuple[int, Any]] = []

        def watch(num_tokens: int, logits: mx.array, seen: list[tuple[int, Any]] = guesses) -> None:
            seen.append((num_tokens, top_candidates(logits, counts.hits.shape[1]).tolist()))

        plan, _ = steer("chain", model, DraftOptions())
        sampler = TargetSampler(make_sampler(temperature), None, model.args.vocab_size, seed=number)
        loop = Loop(model, model.make_cache(), plan, None, sampler, watch=watch)
        tokens: list[int] = []
        for new in generate_tokens(list(prompt), loop, max_tokens=max_tokens, stop_tokens=set(stop_tokens)):
            tokens += new
        for num_tokens, candidates in guesses:
            counts.add(candidates, tokens[num_tokens:])
    if progress is not None:
        progress("acceptance", len(prompts), len(prompts))
    return counts
