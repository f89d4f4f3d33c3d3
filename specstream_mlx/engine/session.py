"""One sequence between passes: its caches, its draws, its drafter's state, and what it does next."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream

from specstream_mlx.drafters.protocol import Anchor, Drafter, DraftState, Wish, root_alone
from specstream_mlx.engine.acceptance import Accepted, accept
from specstream_mlx.engine.sampling import Drawn, TargetSampler
from specstream_mlx.planning.control import Control
from specstream_mlx.planning.plan import DraftPlan
from specstream_mlx.target.caches import CacheGrowth, is_full
from specstream_mlx.target.mounts import Mount
from specstream_mlx.target.rows import Draft
from specstream_mlx.target.target import Passed, Target
from specstream_mlx.target.tree import DraftTree


@dataclass
class DraftStatistics:
    """Counts over one generation.

    Attributes:
        target_passes: passes of the target that produced tokens, the prefill's last one included.
        generation_tokens: tokens produced, end-of-text included.
        drafted_by_depth: (gamma,) passes whose tree reached depth d + 1.
        accepted_by_depth: (gamma,) passes in which a node of depth d + 1 was accepted.
    """

    drafted_by_depth: list[int]
    accepted_by_depth: list[int]
    target_passes: int = 0
    generation_tokens: int = 0

    def record(self, tree: DraftTree, num_accepted: int) -> None:
        """Count one pass that verified ``tree`` and accepted ``num_accepted`` drafts besides its own token."""
        self.target_passes += 1
        self.generation_tokens += num_accepted + 1
        for depth in range(tree.max_depth):
            self.drafted_by_depth[depth] += 1
            self.accepted_by_depth[depth] += depth < num_accepted


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one pass gave: the tree that was verified, the target's draws at its nodes, and the accepted path."""

    tree: DraftTree
    node_tokens: list[int]
    drawn: Drawn
    accepted: Accepted

    @property
    def tokens(self) -> list[int]:
        """The new tokens."""
        return list(self.accepted.tokens)

    @property
    def drafted_paths(self) -> list[list[int]]:
        """The ids of every path from below the root to a leaf of the tree."""
        inner = set(self.tree.parents)
        leaves = [node for node in range(1, self.tree.size) if node not in inner]
        return [[self.node_tokens[node] for node in self.tree.ancestors(leaf)[1:]] for leaf in leaves]


class Session:
    """The state of one generation. Every method builds graphs; ``outcome`` alone reads back.

    Attributes:
        caches: one per layer; after ``commit`` they hold every token but the newest.
        statistics: counts so far.
        choice: the tree and the way to draft the next one; a tree of None is made anew in every pass. None: no draft.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        caches: list[Any],
        plan: DraftPlan,
        control: Control | None,
        sampler: TargetSampler,
        *,
        max_tokens: int = -1,
        stop_tokens: Container[int] = (),
        growth: CacheGrowth | None = None,
        mount: Mount | None = None,
        keeps_cache: bool = False,
        keeps_history: bool = False,
    ) -> None:
        """Begin a sequence; ``prefill`` runs its prompt.

        Args:
            control: decides anew in every pass; None: the plan's tree in every pass, or plain decoding.
            max_tokens: most tokens; -1: no limit.
            growth: how the caches change their kind.
            mount: layers that are in place while passes of this session are built; None: those in place by then.
            keeps_cache: whether somebody goes on with the caches afterwards.
            keeps_history: whether logits processors want every id before the root.
        """
        self.target, self.caches, self.plan, self.control, self.sampler = target, caches, plan, control, sampler
        self.drafter = drafter if plan.drafts else None
        self.max_tokens, self.stop_tokens = max_tokens, stop_tokens
        self.growth = growth or CacheGrowth()
        self.keeps_cache = keeps_cache
        self.history: list[int] | None = [] if keeps_history else None
        self.statistics = DraftStatistics([0] * plan.gamma, [0] * plan.gamma)
        self.state: DraftState = DraftState()
        self.choice: tuple[DraftTree | None, str] | None = None
        self._mount = mount

    def prefill(
        self, prompt: Sequence[int], step_size: int = 2048, progress: Callable[[int, int], None] | None = None
    ) -> Draft:
        """Run the prompt but its last token; returns that token as the first draft, a root alone."""
        prompt_tokens = list(prompt[:-1])
        prefill(self.target, prompt_tokens, self.caches, step_size, progress, len(prompt), self.growth, self._mount)
        if self.history is not None:
            self.history = list(prompt[:-1])
        if self.drafter is not None:
            self.state = self.drafter.begin(self.target, prompt)
        self.choose()
        return Draft(DraftTree.chain(0), mx.array([prompt[-1]]))

    @property
    def remaining(self) -> int | None:
        """How many more tokens are wanted; None: any number."""
        return None if self.max_tokens < 0 else self.max_tokens - self.statistics.generation_tokens

    @property
    def may_draft(self) -> bool:
        """Whether rejected rows can be taken back, and anything may be drafted at all."""
        return self.drafter is not None and not is_full(self.caches)

    @property
    def stays_plain(self) -> bool:
        """Whether the pass after the next one is plain too."""
        return not self.may_draft or (self.control is not None and self.control.stays_plain)

    @property
    def wants_times(self) -> bool:
        """Whether the control has yet to learn what passes cost."""
        return self.control is not None and self.control.wants_times

    def choose(self, cached: int | None = None) -> None:
        """Decide how to draft the next tree, whose root follows ``cached`` rows; None: those that are cached now."""
        if not self.may_draft:
            self.choice = None
        elif self.control is None:
            self.choice = (self.plan.tree, self.plan.way)
        else:
            self.choice = self.control.choose(self.caches[0].offset if cached is None else cached)
            if self.choice is not None and self.plan.tree is None:
                self.choice = (None, self.choice[1])

    def wish(self, remaining: int | None, cached: int) -> Wish | None:
        """What to ask of the drafter for a tree whose root follows ``cached`` rows; None: no draft.

        Only auto minds how many tokens are still wanted; the other modes draft their whole tree.
        """
        if self.choice is None:
            return None
        tree, way = self.choice
        depth = self.plan.gamma if tree is None else tree.max_depth
        reach = self.growth.max_depth(self.caches, cached)
        if self.plan.mode == "auto" and remaining is not None:
            reach = remaining - 1 if reach is None else min(reach, remaining - 1)
        depth = depth if reach is None else min(depth, reach)
        return Wish(depth, tree, self.plan.budget, way) if depth > 0 else None

    def verify(self, draft: Draft, remaining: int | None) -> tuple[Passed, Drawn]:
        """A pass over a draft, with the target's draws; one of the ``remaining`` tokens at least will be its."""
        following = self.wish(None if remaining is None else remaining - 1, self.caches[0].offset + 1)
        taps = self.drafter.taps if self.drafter is not None else ()
        with self.target.building(self._mount):
            passed = self.target.verify(draft, self.caches, riders=self.state.riders(following), taps=taps)
        history = mx.array(self.history) if self.history else None
        return passed, self.sampler.draw(passed.logits, passed.draft.tree, passed.draft.tokens, history)

    def outcome(self, passed: Passed, drawn: Drawn) -> Outcome:
        """Read the pass back and walk the accepted path."""
        node_tokens = to_list(passed.draft.tokens)
        accepted = accept(
            passed.draft.tree,
            node_tokens,
            to_list(drawn.tokens),
            max_tokens=self.remaining,
            stop_tokens=self.stop_tokens,
        )
        return Outcome(passed.draft.tree, node_tokens, drawn, accepted)

    def ended(self, outcome: Outcome) -> bool:
        """Whether the text ends with this pass; asked after ``record``."""
        return outcome.tokens[-1] in self.stop_tokens or self.remaining == 0

    def commit(self, passed: Passed, nodes: Sequence[int], tokens: Sequence[int] | mx.array) -> None:
        """Keep the rows of a path, and draw on from after it; ``tokens``, (k,), are those drawn at its nodes."""
        self.target.commit(passed, nodes, self.caches)
        self.growth.advance(self.caches)
        self.sampler.advance(len(nodes))
        self.state.commit(tokens)

    def propose(self, passed: Passed, node: int, root: mx.array, remaining: int | None) -> Draft:
        """The next draft, whose root was drawn at ``node``; for what is already chosen."""
        anchor = Anchor(passed, node, root, self.caches)
        wish = self.wish(remaining, self.caches[0].offset)
        if wish is None:
            return root_alone(anchor)
        with self.target.building(self._mount):
            return self.state.propose(anchor, wish)

    def record(self, outcome: Outcome, drafted: bool, seconds: float | None = None) -> None:
        """Count a pass; ``drafted``: whether it verified more than a root, pruned or not.

        Args:
            seconds: what it took, where that says something about the pass.
        """
        tree, nodes = outcome.tree, outcome.accepted.nodes
        self.statistics.record(tree, len(nodes) - 1)
        if self.history is not None:
            self.history += [outcome.node_tokens[0], *outcome.tokens[:-1]]
        if self.control is not None:
            self.control.record(drafted, tree, nodes)
            if seconds is not None:
                self.control.observe(drafted, tree, seconds)

    def finish(self, token: int) -> None:
        """Run the newest token too where somebody goes on with the caches, and let nothing be pending in them."""
        if self.keeps_cache:
            prefill(self.target, [token], self.caches, 2048, None, 1, self.growth, self._mount)


def prefill(
    target: Target,
    tokens: list[int],
    caches: list[Any],
    step_size: int,
    progress: Callable[[int, int], None] | None,
    total: int,
    growth: CacheGrowth | None = None,
    mount: Mount | None = None,
) -> None:
    """Run tokens through the base in chunks, as mlx-lm does; ``mount`` is in place while a chunk is built."""
    with mx.stream(generation_stream):
        for begin in range(0, len(tokens), step_size):
            if progress is not None:
                progress(begin, total)
            with target.building(mount):
                target(mx.array(tokens[begin : begin + step_size])[None], cache=caches)
            if growth is not None:
                growth.advance(caches)
            mx.eval([cache.state for cache in caches])
            mx.clear_cache()


def to_list(ids: mx.array) -> list[int]:
    """Read (T,) ids back from the device."""
    return ids.tolist()  # type: ignore[return-value]
