"""One sequence, the next pass launched ahead: the same tokens and passes as ``simple``, sooner.

While a pass is under way, the graph of the one after it is built as if the text ended at the end of the draft's
likeliest path. For a draft of the root alone that is certain, and the pass is started at once. Otherwise nothing is
started, so that caches, draws and the drafter's state can be put back when the text ended elsewhere.
"""

import copy
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.generate import generation_stream

from specstream_mlx.engine.sampling import Drawn
from specstream_mlx.engine.session import Outcome, Session
from specstream_mlx.target.caches import arrays_of
from specstream_mlx.target.rows import Draft
from specstream_mlx.target.target import Passed

_CLEAR_CACHE_EVERY = 64  # passes


@dataclass
class _Pass:
    """A pass whose graph is built."""

    passed: Passed
    drawn: Drawn
    drafted: bool  # whether its draft was more than the root
    started: bool = field(default=False, init=False)

    def start(self) -> None:
        """Put it under way on the device, once."""
        if not self.started:
            mx.async_eval(self.drawn.tokens, *self.passed.arrays)  # type: ignore[no-untyped-call]
            self.started = True


@dataclass
class _Foreseen(_Pass):
    """The pass after one that is still under way."""

    num_tokens: int  # kept from the pass before it
    before: list[dict[str, Any]] | None  # the caches' attributes to put back; None: it is certain
    thread: int  # where its graph was built: nothing but a started pass can be evaluated elsewhere

    @property
    def certain(self) -> bool:
        """Whether it follows whatever the pass before it says."""
        return self.before is None


def passes(
    session: Session,
    prompt: Sequence[int],
    prefill_step_size: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> Generator[Outcome, None, None]:
    """One pass after another, ending after a stop token or the last token wanted.

    However the generator ends, the caches then hold the prompt and every token yielded, as mlx-lm leaves them.
    """
    draft = session.prefill(prompt, prefill_step_size, progress)
    yield from passes_from(session, draft, progress=progress and partial(progress, len(prompt), len(prompt)))


def passes_from(
    session: Session,
    begin: Draft | tuple[Passed, Outcome],
    *,
    progress: Callable[[], None] | None = None,
    gives_up: Callable[[], bool] = bool,
) -> Generator[Outcome, None, tuple[Passed, Outcome] | None]:
    """As ``passes``, from a first draft, or from after a pass that was committed and yielded.

    Args:
        progress: called when the first pass is done.
        gives_up: whether somebody else is to go on; asked before a pass is launched.

    Returns:
        Where it gave up, the last pass, committed and yielded; None where the text ended.
    """
    draft = begin if isinstance(begin, Draft) else None
    passed, outcome = (None, None) if isinstance(begin, Draft) else begin
    told = outcome is not None
    current: _Pass | None = None
    foreseen: _Foreseen | None = None
    finished = False
    clock = _Clock()
    try:
        while True:
            was_foreseen = current is not None
            ahead = not clock.alone and not gives_up()
            clock.alone = clock.alone and not was_foreseen  # what is built already is launched ahead
            if ahead or was_foreseen:  # the next pass is under way when tokens are yielded
                current = _start(session, current, draft, passed, outcome)
            if ahead:
                assert current is not None
                with mx.stream(generation_stream):
                    foreseen = _foresee(session, current)
            if outcome is not None and not told:
                away = time.perf_counter()
                yield outcome
                clock.left(time.perf_counter() - away)
            told = False
            if current is None and passed is not None and outcome is not None and gives_up():
                finished = True
                return passed, outcome
            if foreseen is not None and not foreseen.certain and foreseen.thread != threading.get_ident():
                _withdraw(session, foreseen)
                foreseen = None
            if current is None:
                current = _start(session, None, draft, passed, outcome)
            draft = None
            passed = current.passed
            outcome = session.outcome(passed, current.drawn)
            if progress is not None and session.statistics.target_passes == 0:
                progress()
            nodes, tokens = outcome.accepted.nodes, outcome.tokens
            telling = was_foreseen or current.drafted or clock.alone  # not the plain pass after a drafted one
            seconds = clock.lap(session.wants_times)
            session.record(outcome, current.drafted, seconds if telling else None)
            finished = session.ended(outcome)
            if foreseen is not None and not foreseen.certain and (finished or nodes[-1] != passed.draft.tree.leaf):
                _withdraw(session, foreseen)
                foreseen = None
            if foreseen is None:
                with mx.stream(generation_stream):
                    session.commit(passed, nodes, tokens)
                    if clock.alone or gives_up():  # no pass that evaluates them follows before another thread may go on
                        kept = [array for cache in session.caches for array in arrays_of(cache)]
                        mx.async_eval(*kept)  # type: ignore[no-untyped-call]
            elif not finished:
                foreseen.before = None  # lets go of the caches, so that the pass can write into them
            if finished:
                break
            current, foreseen = foreseen, None
            if session.statistics.target_passes % _CLEAR_CACHE_EVERY == 0:
                mx.clear_cache()
        if foreseen is not None:  # it has fed the last token already
            session.target.commit(foreseen.passed, [0], session.caches)
        else:
            session.finish(tokens[-1])
        current = foreseen = None
        yield outcome
        return None
    except GeneratorExit:
        if current is None and outcome is not None and not finished:  # closed while nothing was under way
            session.finish(outcome.tokens[-1])
        raise
    finally:
        if current is not None:  # closed while passes were under way: the first one's root has been yielded, no more
            if foreseen is not None and not foreseen.certain:
                _withdraw(session, foreseen)
            elif foreseen is not None:
                session.sampler.advance(-foreseen.num_tokens)
            session.target.commit(current.passed, [0], session.caches)
        session.growth.advance(session.caches)
        session.sampler.finish()


def _start(
    session: Session, current: _Pass | None, draft: Draft | None, passed: Passed | None, outcome: Outcome | None
) -> _Pass:
    """Put a pass under way: one that is built, over a given draft, or over the next one after ``passed``."""
    with mx.stream(generation_stream):
        if current is None:
            if draft is None:
                assert passed is not None
                assert outcome is not None
                session.choose()
                node, root = outcome.accepted.nodes[-1], mx.array(outcome.tokens[-1:])
                draft = session.propose(passed, node, root, session.remaining)
                mx.async_eval(draft.tokens)  # type: ignore[no-untyped-call]  # runs while the pass's graph is built
            current = _build(session, draft, session.remaining)
        current.start()
    return current


def _build(session: Session, draft: Draft, remaining: int | None) -> _Pass:
    return _Pass(*session.verify(draft, remaining), draft.tree.size > 1)


def _foresee(session: Session, current: _Pass) -> _Foreseen | None:
    """The pass after ``current``, while that is under way; None where it depends on what is read back first."""
    passed, tree = current.passed, current.passed.draft.tree
    num_tokens = tree.leaf + 1
    left = None if session.remaining is None else session.remaining - num_tokens
    cached = passed.start + num_tokens
    if (left is not None and left <= 0) or session.history is not None:
        return None
    if session.choice is None:
        if not session.stays_plain or tree.size > 1 or current.drafted:
            return None
    else:
        if session.sampler.in_order:
            return None
        session.choose(cached)
        wish = session.wish(left, cached)
        if wish is None or not session.state.foresees(passed, tree.leaf, wish):
            return None
        assert not session.growth.changes(session.caches, cached), "no wish reaches so far: it could not be taken back"
    before = None if tree.size == 1 else [_attributes(cache) for cache in session.caches]
    drawn = current.drawn.tokens
    session.commit(passed, range(num_tokens), drawn[:num_tokens])
    draft = session.propose(passed, tree.leaf, drawn[tree.leaf : num_tokens], left)
    following = _build(session, draft, left)
    foreseen = _Foreseen(
        following.passed, following.drawn, following.drafted, num_tokens, before, threading.get_ident()
    )
    if foreseen.certain:
        foreseen.start()
    return foreseen


def _withdraw(session: Session, foreseen: _Foreseen) -> None:
    """Put caches, draws and drafter back to where they were before a pass was foreseen; it must not be certain."""
    assert foreseen.before is not None
    for cache, attributes in zip(session.caches, foreseen.before, strict=True):
        vars(cache).update(attributes)
    session.sampler.advance(-foreseen.num_tokens)
    session.state.withdraw()


def _attributes(cache: Any) -> dict[str, Any]:
    """What a cache holds; its arrays are shared, and stay as they are when the cache changes its own."""
    return {name: tree_map(copy.copy, value) for name, value in vars(cache).items()}


class _Clock:
    """Times the passes of a generation, from one read-back to the next.

    A pass that was under way while the caller was busy says nothing. Where times are wanted and the caller is often
    away, passes are made alone: begun after the caller has come back, and timed from there.

    Attributes:
        alone: whether the next pass is begun after its predecessor's tokens were yielded, as the first two are, so that
            the first token waits for nothing.
    """

    MOST_AWAY = 0.1  # share of a pass

    def __init__(self) -> None:
        self.alone = True
        self._laps = 0
        self._last = self._back = self._away = 0.0

    def left(self, seconds: float) -> None:
        """The caller had the tokens for this long."""
        self._away += seconds
        self._back = time.perf_counter()

    def lap(self, wanted: bool) -> float | None:
        """Seconds of the pass just read back; None for the first two and for one that the caller held up."""
        now = time.perf_counter()
        busy = self._away > self.MOST_AWAY * (now - self._last)
        seconds = now - self._back if self.alone else None if busy else now - self._last
        self._laps += 1
        warm = self._laps > 2
        self.alone = self._laps < 2 or (warm and wanted and busy)
        self._last, self._away = now, 0.0
        return seconds if warm else None
