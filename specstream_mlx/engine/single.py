"""The drafting loop (method section 4): prefill -> draft -> verify -> commit -> emit.

Plain decoding is the same loop with an empty tree. The prompt's last token is the first root, so its pass is a
verification pass like any other and yields the first token.
"""

import copy
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.generate import generation_stream

from specstream_mlx.engine.acceptance import accept
from specstream_mlx.engine.sampling import TargetSampler
from specstream_mlx.errors import UsageError
from specstream_mlx.models.model import SpecStreamModel, VerificationPass
from specstream_mlx.options import Insertion
from specstream_mlx.planning.control import Control
from specstream_mlx.planning.plan import DraftPlan
from specstream_mlx.target.caches import CacheGrowth, is_full
from specstream_mlx.target.tree import DraftTree

_CLEAR_CACHE_EVERY = 64  # passes


@dataclass
class DraftStatistics:
    """Counts over one generation.

    Attributes:
        target_passes: passes of the target that produced tokens, the prefill's last one included.
        stream_passes: passes for streams that were not run along with the tree.
        generation_tokens: tokens produced, end-of-text included.
        drafted_by_depth: (gamma,) passes whose tree reached depth d + 1.
        accepted_by_depth: (gamma,) passes in which a node of depth d + 1 was accepted.
    """

    drafted_by_depth: list[int]
    accepted_by_depth: list[int]
    target_passes: int = 0
    stream_passes: int = 0
    generation_tokens: int = 0

    def record(self, tree: DraftTree, num_accepted: int) -> None:
        """Count one pass that verified ``tree`` and accepted ``num_accepted`` drafts besides its own token."""
        self.target_passes += 1
        self.generation_tokens += num_accepted + 1
        for depth in range(tree.max_depth):
            self.drafted_by_depth[depth] += 1
            self.accepted_by_depth[depth] += depth < num_accepted


@dataclass
class _Pass:
    """A pass whose graph is built."""

    verified: VerificationPass
    drawn: mx.array  # (T,) the target's token after every node
    drafted: bool  # whether streams were run for its tree
    started: bool = field(default=False, init=False)

    def start(self) -> None:
        """Put it under way on the device, once."""
        if not self.started:
            mx.async_eval(self.drawn, self.verified.node_tokens)  # type: ignore[no-untyped-call]
            self.started = True


@dataclass
class _Foreseen(_Pass):
    """The pass after one that is still under way, built as if that one ended at the end of its likeliest path.

    For a tree of the root alone that is certain, and the pass is started at once. Otherwise nothing is started, so
    that the caches can be put back to what they were.
    """

    num_tokens: int  # kept from the pass before it
    before: list[dict[str, Any]] | None  # the caches' attributes to put back; None: certain


@dataclass
class Loop:
    """The state of one generation between passes."""

    model: SpecStreamModel
    caches: list[Any]
    plan: DraftPlan
    control: Control | None  # None: the plan's tree in every pass, or plain decoding
    sampler: TargetSampler
    history: list[int] | None = None  # every id before the root, kept only for logits processors
    keeps_cache: bool = False  # whether somebody goes on with the caches afterwards
    growth: CacheGrowth = field(default_factory=CacheGrowth)
    watch: Callable[[int, mx.array], None] | None = None  # told the tokens so far and (gamma, V) stream logits
    statistics: DraftStatistics = field(init=False)
    choice: tuple[DraftTree | None, Insertion] | None = None  # how the next tree is drafted; None: plain decoding
    adapter: str | None = field(init=False)  # of the model, when the generation began

    def __post_init__(self) -> None:
        self.adapter = self.model.adapter
        self.statistics = DraftStatistics([0] * self.model.gamma, [0] * self.model.gamma)
        self.choose()

    @property
    def may_draft(self) -> bool:
        """Whether rejected rows can be taken back, and streams may be used at all."""
        return self.plan.drafts and not is_full(self.caches)

    def check_adapter(self) -> None:
        """Refuse to go on with another adapter than the text so far was made with.

        Raises:
            UsageError: the model's adapter was switched.
        """
        if self.model.adapter != self.adapter:
            raise UsageError(
                f"the adapter was switched from {self.adapter!r} to {self.model.adapter!r} in the middle of a "
                "generation; finish or close it first"
            )

    def choose(self) -> None:
        """Decide how to draft the next tree."""
        if not self.may_draft:
            self.choice = None
        elif self.control is None:
            self.choice = (self.plan.tree, self.plan.insertion)
        else:
            self.choice = self.control.choose(self.caches[0].offset)
            if self.choice is not None and self.plan.tree is None:
                self.choice = (None, self.choice[1])

    def build(self, tree: DraftTree, node_tokens: mx.array, drafted: bool, remaining: int | None) -> _Pass:
        """A verification pass and the target's draws on it; at least one of the ``remaining`` tokens will be its."""
        num_streams = self._num_streams(remaining and remaining - 1, self.caches[0].offset + 1)
        verified = self.model.verify(
            node_tokens,
            tree,
            self.caches,
            insertion="deferred" if self.choice is None or num_streams == 0 else self.choice[1],
            num_streams=num_streams,
            prune_threshold=self.plan.prune_threshold if tree.size > 1 else None,
        )
        history = mx.array(self.history) if self.history else None
        drawn = self.sampler.draw(verified.logits, verified.tree, verified.node_tokens, history)
        return _Pass(verified, drawn, drafted)

    def foresee(self, current: _Pass, remaining: int | None) -> _Foreseen | None:
        """The pass after ``current``, while that is under way; None where it depends on what is read back first."""
        verified, tree = current.verified, current.verified.tree
        num_tokens = tree.leaf + 1
        left = None if remaining is None else remaining - num_tokens
        cached = verified.start + num_tokens
        if (left is not None and left <= 0) or self.history is not None or self.watch is not None:
            return None
        if self.choice is None:
            stays = not self.may_draft or (self.control is not None and self.control.stays_plain)
            if not stays or tree.size > 1 or current.drafted:
                return None
        else:
            if self.sampler.in_order:
                return None
            self.choose()
            fixed = self.choice is not None and self.choice[0] is not None and self.plan.prune_threshold is None
            if not fixed or not self.model.has_streams_of(verified, tree.leaf, self._num_streams(left, cached)):
                return None
            if tree.size > 1 and self.growth.changes(self.caches, cached):  # which could not be taken back
                return None
        before = None if tree.size == 1 else [_attributes(cache) for cache in self.caches]
        self.model.commit(verified, range(num_tokens), self.caches)
        self.growth.advance(self.caches)
        self.sampler.advance(num_tokens)
        following = self.build(*self._draft(verified, tree.leaf, current.drawn[tree.leaf : num_tokens], left), left)
        return _Foreseen(following.verified, following.drawn, following.drafted, num_tokens, before)

    def withdraw(self, foreseen: _Foreseen) -> None:
        """Put caches and sampler back to where they were before a pass was foreseen; it must not be certain."""
        assert foreseen.before is not None
        for cache, attributes in zip(self.caches, foreseen.before, strict=True):
            vars(cache).update(attributes)
        self.sampler.advance(-foreseen.num_tokens)

    def draft(
        self, verified: VerificationPass, node: int, root: int, remaining: int | None
    ) -> tuple[DraftTree, mx.array, bool]:
        """The next tree, its tokens, and whether streams made it: those anchored at the last accepted node."""
        self.choose()
        tree, node_tokens, drafted = self._draft(verified, node, mx.array([root]), remaining)
        mx.async_eval(node_tokens)  # type: ignore[no-untyped-call]  # runs while the next pass's graph is built
        return tree, node_tokens, drafted

    def _draft(
        self, verified: VerificationPass, node: int, root: mx.array, remaining: int | None
    ) -> tuple[DraftTree, mx.array, bool]:
        cached = self.caches[0].offset
        num_streams = self._num_streams(remaining, cached)
        if self.choice is None or num_streams == 0:
            return DraftTree.chain(0), root, False
        if not self.model.has_streams_of(verified, node, num_streams):
            self.statistics.stream_passes += 1
        logits = self.model.stream_logits(verified, node, self.caches, num_streams)
        if self.watch is not None:
            self.watch(self.statistics.generation_tokens, logits)
        return *self.plan.draft(root, logits, self.choice[0], self._max_depth(remaining, cached)), True

    def _max_depth(self, remaining: int | None, cached: int) -> int | None:
        """The deepest guess of use after ``cached`` rows.

        Only auto minds how many tokens are still wanted; the other modes draft their whole tree.
        """
        reach = self.growth.max_depth(self.caches, cached)
        if self.plan.mode != "auto" or remaining is None:
            return reach
        return remaining - 1 if reach is None else min(reach, remaining - 1)

    def _num_streams(self, remaining: int | None, cached: int) -> int:
        """How many streams the next tree needs, whose root follows ``cached`` rows."""
        if self.choice is None:
            return 0
        deepest = self.model.gamma if self.choice[0] is None else self.choice[0].max_depth
        max_depth = self._max_depth(remaining, cached)
        return deepest if max_depth is None else max(min(deepest, max_depth), 0)

    def record(self, made: _Pass, nodes: Sequence[int], seconds: float | None) -> None:
        """Count a pass that took ``seconds``, where that says something about the pass."""
        tree = made.verified.tree
        self.statistics.record(tree, len(nodes) - 1)
        if self.control is not None:
            self.control.record(made.drafted, tree, nodes)
            if seconds is not None:
                self.control.observe(made.drafted, tree, seconds)


def _attributes(cache: Any) -> dict[str, Any]:
    """What a cache holds; its arrays are shared, and stay as they are when the cache changes its own."""
    return {name: tree_map(copy.copy, value) for name, value in vars(cache).items()}


class _Clock:
    """Times the passes of a loop, from one read-back to the next."""

    MOST_AWAY = 0.1  # a pass during which the caller was busy for longer than this share says nothing

    def __init__(self) -> None:
        self._last: float | None = None
        self._away = 0.0

    def left(self, seconds: float) -> None:
        """The caller had the tokens for this long."""
        self._away += seconds

    def lap(self) -> float | None:
        """Seconds since the last call; None for the first one and for passes that the caller held up."""
        now = time.perf_counter()
        seconds = None if self._last is None else now - self._last
        if seconds is not None and self._away > self.MOST_AWAY * seconds:
            seconds = None
        self._last, self._away = now, 0.0
        return seconds


def generate_tokens(
    prompt: list[int],
    loop: Loop,
    *,
    max_tokens: int,
    stop_tokens: set[int],
    prefill_step_size: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> Generator[list[int], None, None]:
    """Yield the tokens of one pass after another, ending after a stop token or ``max_tokens``.

    The next pass is already under way when tokens are yielded. However the generator ends, the caches then hold the
    prompt and every token yielded, as mlx-lm leaves them.
    """
    model, caches = loop.model, loop.caches
    prefill(model, prompt[:-1], caches, prefill_step_size, progress, len(prompt), loop.growth)
    if loop.history is not None:
        loop.history = prompt[:-1]
    current: _Pass | None = None
    foreseen: _Foreseen | None = None
    tokens: list[int] = []
    root = prompt[-1]
    draft = DraftTree.chain(0), mx.array([root]), False
    clock = _Clock()
    try:
        while True:
            remaining = max_tokens - loop.statistics.generation_tokens if max_tokens > 0 else None
            with mx.stream(generation_stream):
                was_foreseen = current is not None
                if current is None:
                    current = loop.build(*draft, remaining)
                current.start()
                foreseen = loop.foresee(current, remaining)
                if foreseen is not None and foreseen.before is None:
                    foreseen.start()
            if tokens:
                away = time.perf_counter()
                yield tokens
                clock.left(time.perf_counter() - away)
                loop.check_adapter()
            elif progress is not None:
                progress(len(prompt), len(prompt))
            verified = current.verified
            accepted = accept(
                verified.tree,
                to_list(verified.node_tokens),
                to_list(current.drawn),
                max_tokens=remaining,
                stop_tokens=stop_tokens,
            )
            tokens = list(accepted.tokens)
            seconds = clock.lap()
            loop.record(current, accepted.nodes, seconds if was_foreseen or current.drafted else None)
            if loop.history is not None:
                loop.history += [root, *tokens[:-1]]
            root = tokens[-1]
            finished = root in stop_tokens or len(tokens) == remaining
            certain = foreseen is not None and foreseen.before is None
            if foreseen is not None and not certain and (finished or accepted.nodes[-1] != verified.tree.leaf):
                loop.withdraw(foreseen)
                foreseen = None
            if foreseen is None:
                loop.sampler.advance(len(tokens))
                with mx.stream(generation_stream):
                    model.commit(verified, accepted.nodes, caches)
                    loop.growth.advance(caches)
                    if not finished:
                        left = None if remaining is None else remaining - len(tokens)
                        draft = loop.draft(verified, accepted.nodes[-1], root, left)
            elif not finished:
                foreseen.before = None  # lets go of the caches, so that the pass can write into them
            if finished:
                break
            current, foreseen = foreseen, None
            if loop.statistics.target_passes % _CLEAR_CACHE_EVERY == 0:
                mx.clear_cache()
        if foreseen is not None:  # it has fed the last token already
            model.commit(foreseen.verified, [0], caches)
            loop.sampler.advance(0)
        elif loop.keeps_cache:
            prefill(model, [root], caches, prefill_step_size, None, 1, loop.growth)
        current = foreseen = None
        yield tokens
    finally:
        if current is not None:  # closed while passes were under way: the first one's root has been yielded, no more
            if foreseen is not None and foreseen.before is not None:
                loop.withdraw(foreseen)
            elif foreseen is not None:
                loop.sampler.advance(-foreseen.num_tokens)
            model.commit(current.verified, [0], caches)
            loop.sampler.advance(0)
        loop.growth.advance(caches)


def prefill(
    model: SpecStreamModel,
    tokens: list[int],
    caches: list[Any],
    step_size: int,
    progress: Callable[[int, int], None] | None,
    total: int,
    growth: CacheGrowth | None = None,
) -> None:
    """Run the prompt but its last token through the base in chunks, as mlx-lm does."""
    with mx.stream(generation_stream):
        for begin in range(0, len(tokens), step_size):
            if progress is not None:
                progress(begin, total)
            model(mx.array(tokens[begin : begin + step_size])[None], cache=caches)
            if growth is not None:
                growth.advance(caches)
            mx.eval([cache.state for cache in caches])
            mx.clear_cache()


def to_list(ids: mx.array) -> list[int]:
    """Read (T,) ids back from the device."""
    return ids.tolist()  # type: ignore[return-value]
