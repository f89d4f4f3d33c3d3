"""How often a drafter is right, per depth and rank, on text that the model makes."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import make_sampler

from specstream_mlx.drafters.protocol import Anchor, Drafter, DraftState, Wish
from specstream_mlx.engine.sampling import TargetSampler
from specstream_mlx.engine.session import Session
from specstream_mlx.engine.single import passes
from specstream_mlx.planning.plan import make_plan
from specstream_mlx.target.rows import Draft, Riders
from specstream_mlx.target.target import Target
from specstream_mlx.target.tree import DraftTree

RANKS = 8


class AcceptanceCounts:
    """Counts of guesses against what the model then said.

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


class Watched:
    """A drafter whose candidates are noted, and whose drafts are those of a chain."""

    def __init__(self, drafter: Drafter, num_ranks: int) -> None:
        self.drafter, self.num_ranks = drafter, num_ranks
        self.name, self.max_depth, self.ways, self.taps = drafter.name, drafter.max_depth, drafter.ways, drafter.taps
        self.seen: list[tuple[int, list[list[int]]]] = []  # tokens before the root and it, candidates by depth

    def begin(self, target: Target, prompt: Sequence[int]) -> DraftState:
        """As ``Drafter``."""
        return _WatchedState(self, self.drafter.begin(target, prompt))


class _WatchedState(DraftState):
    """Asks for the runners-up too, and drafts the best guesses alone."""

    def __init__(self, watched: Watched, state: DraftState) -> None:
        self._watched, self._state = watched, state
        self._num_tokens = 0

    def riders(self, wish: Wish | None) -> Riders | None:
        """As ``DraftState``."""
        return self._state.riders(wish)

    def commit(self, tokens: Sequence[int] | mx.array) -> None:
        """As ``DraftState``."""
        self._num_tokens += len(tokens)
        self._state.commit(tokens)

    def propose(self, anchor: Anchor, wish: Wish) -> Draft:
        """As ``DraftState``."""
        ranks = range(self._watched.num_ranks)
        paths = [(*((0,) * depth), rank) for depth in range(wish.depth) for rank in ranks]
        draft = self._state.propose(anchor, replace(wish, tree=DraftTree.from_paths(paths)))
        ids: list[int] = draft.tokens.tolist()  # type: ignore[assignment]
        by_depth: list[list[int]] = [[] for _ in range(draft.tree.max_depth)]
        best = [0]
        for node in range(1, draft.tree.size):
            if draft.tree.parents[node] == best[-1] and draft.tree.ranks[node] == 0:
                best.append(node)
        for node in range(1, draft.tree.size):
            if draft.tree.parents[node] in best:
                by_depth[draft.tree.depths[node] - 1].append(node)
        for nodes in by_depth:
            nodes.sort(key=lambda node: draft.tree.ranks[node])
        self._watched.seen.append((self._num_tokens, [[ids[node] for node in nodes] for nodes in by_depth]))
        return Draft(DraftTree.chain(len(best) - 1), draft.tokens[mx.array(best)])


def measure_acceptance(
    model: Target,
    prompts: Sequence[Sequence[int]],
    drafter: Drafter,
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
    counts = AcceptanceCounts(drafter.max_depth, min(RANKS, model.vocab_size))
    plan = make_plan("chain", drafter.max_depth, ways=drafter.ways)
    for number, prompt in enumerate(prompts):
        if progress is not None:
            progress("acceptance", number, len(prompts))
        watched = Watched(drafter, counts.hits.shape[1])
        session = Session(
            model,
            watched,
            model.make_cache(),
            plan,
            None,
            TargetSampler(make_sampler(temperature), None, model.vocab_size, seed=number),
            max_tokens=max_tokens,
            stop_tokens=set(stop_tokens),
        )
        tokens = [token for outcome in passes(session, prompt) for token in outcome.tokens]
        for num_tokens, candidates in watched.seen:
            counts.add(candidates, tokens[num_tokens:])
    if progress is not None:
        progress("acceptance", len(prompts), len(prompts))
    return counts
