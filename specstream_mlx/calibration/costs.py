"""cost(T): what passes of the loaded model take on this machine, timed as the loop makes them."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream

from specstream_mlx.drafters.protocol import Anchor, Drafter, DraftState, Wish
from specstream_mlx.planning.planner import Curve, PassCosts
from specstream_mlx.target.rows import Draft
from specstream_mlx.target.target import Passed, Target
from specstream_mlx.target.tree import DraftTree

Progress = Callable[[str, int, int], None]

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32)
MOST_STREAM_ROWS = 160  # of a pass with riders of every row
BY_ROWS = {"parallel"}  # ways that are timed by the rows of one pass; others by the depth of a whole cycle
CONTEXTS = (128, 512, 2048)
PLAIN_STEPS = 4  # plain steps timed together, since they overlap
CYCLES = 4  # drafted passes timed together, for the same reason
_PREFILL_STEP = 512


@dataclass
class _Timing:
    """One kind of pass; ``run`` makes it and waits for it."""

    kind: str
    rows: int
    run: Callable[[], None]
    steps: int
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def sample_tree(rows: int, gamma: int) -> DraftTree:
    """A tree of ``rows`` nodes that is no chain: one path as deep as it goes, and further guesses for depth 1."""
    depth = max(min(gamma, rows - 2), 1)
    return DraftTree.from_paths([(0,) * depth, *((rank,) for rank in range(1, rows - depth))])


def usable_contexts(model: Target, wanted: Sequence[int] = CONTEXTS, depth: int = 0) -> list[int]:
    """Those lengths that leave room for passes in the model's context, at least one; drafts reach ``depth``."""
    limit = model.context_length or 1 << 30
    room = limit - max(ROWS[-1], CYCLES * (depth + 2)) - PLAIN_STEPS
    return sorted({length for length in wanted if length <= room}) or [max(room // 2, 1)]


def measure_costs(
    model: Target,
    contexts: Sequence[int],
    drafter: Drafter | None = None,
    *,
    rows: Sequence[int] = ROWS,
    repeats: int = 7,
    progress: Progress | None = None,
) -> list[tuple[int, PassCosts]]:
    """Time every kind of pass at every length of context, all kinds in turn, ``repeats`` times; medians.

    A kind whose pass takes longer than its most tokens would plainly is not tried with more rows than twice that.
    The text is random: it decides nothing here.
    """
    caches = model.make_cache()
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, max(contexts))
    done = 0
    costs = []
    for number, context in enumerate(contexts):
        with mx.stream(generation_stream):
            while done < context:
                end = min(done + _PREFILL_STEP, context)
                model(mx.array(tokens[done:end])[None], cache=caches)
                mx.eval([cache.state for cache in caches])
                done = end
        report = (lambda i, n, base=number: progress("passes", base * n + i, len(contexts) * n)) if progress else None
        costs.append((context, _measure_at(model, drafter, caches, context, rows, repeats, report)))
    return costs


def _measure_at(
    model: Target,
    drafter: Drafter | None,
    caches: Sequence[Any],
    context: int,
    rows: Sequence[int],
    repeats: int,
    report: Callable[[int, int], None] | None,
) -> PassCosts:
    depth = drafter.max_depth if drafter is not None else 0
    ways = drafter.ways if drafter is not None else ()
    state = drafter.begin(model, [1] * context) if drafter is not None else DraftState()
    timings = [_Timing("plain", 1, lambda: _plain(model, caches), PLAIN_STEPS, [])]
    for count in rows:
        timings.append(_pass_timing("chain", model, state, caches, DraftTree.chain(count - 1), None))
        if count >= 3:
            timings.append(_pass_timing("tree", model, state, caches, sample_tree(count, max(depth, 1)), None))
        for way in set(ways) & BY_ROWS:
            if count >= 2 and count * (1 + depth) <= MOST_STREAM_ROWS:
                wish = Wish(depth, DraftTree.chain(depth), depth, way)
                timings.append(_pass_timing(way, model, state, caches, DraftTree.chain(count - 1), wish))
    for reach in sorted({*(count - 1 for count in rows if 2 <= count <= depth), depth} - {0}):
        timings += [_cycle_timing(way, model, drafter, caches, reach) for way in ways if way not in BY_ROWS]

    def once(timing: _Timing) -> float:
        for cache in caches:
            cache.offset = context
        started = time.perf_counter()
        timing.run()
        return (time.perf_counter() - started) / timing.steps

    too_dear: set[str] = set()
    kept = []
    for timing in timings:  # the first time compiles, allocates, and is not counted
        if timing.kind in too_dear:
            continue
        once(timing)
        if timing.kind == "plain":
            plain = once(timing)
        elif all(once(timing) > 2 * (depth + 1) * plain for _ in range(3)):  # not for one hiccup of the machine
            too_dear.add(timing.kind)
        kept.append(timing)
    for repeat in range(repeats):
        shift = repeat * len(kept) // repeats  # neighbours stay neighbours
        for timing in kept[shift:] + kept[:shift]:
            timing.seconds.append(once(timing))
        if report is not None:
            report(repeat + 1, repeats)

    def curve(kind: str) -> Curve:
        points = tuple((timing.rows, timing.median) for timing in kept if timing.kind == kind)
        return Curve(points or chain.points)

    chain = Curve(tuple((timing.rows, timing.median) for timing in kept if timing.kind == "chain"))
    return PassCosts(kept[0].median, chain, *(curve(kind) for kind in ("tree", "parallel", "deferred", "leaf")))


def _pass_timing(
    kind: str, model: Target, state: DraftState, caches: Sequence[Any], tree: DraftTree, wish: Wish | None
) -> _Timing:
    draft = Draft(tree, mx.array([1] * tree.size))

    def run() -> None:
        with mx.stream(generation_stream):
            passed = model.verify(draft, caches, riders=state.riders(wish) if wish is not None else None)
            drawn = mx.argmax(passed.logits, axis=-1)
            mx.async_eval(drawn)  # type: ignore[no-untyped-call]
            drawn.tolist()
            model.commit(passed, [0], caches)

    return _Timing(kind, tree.size, run, 1, [])


def _cycle_timing(way: str, model: Target, drafter: Drafter | None, caches: Sequence[Any], depth: int) -> _Timing:
    """Passes over a chain whose drafts are all right, with what drafts the next one, as the loop makes them."""
    assert drafter is not None
    tree = DraftTree.chain(depth)
    wish = Wish(depth, tree, depth, way)
    taps = drafter.taps
    state = drafter.begin(model, ([1, 2] * caches[0].offset)[: caches[0].offset])

    def start(draft: Draft) -> tuple[Passed, mx.array]:
        passed = model.verify(draft, caches, riders=state.riders(wish), taps=taps)
        return passed, mx.argmax(passed.logits, axis=-1)

    def run() -> None:
        with mx.stream(generation_stream):
            passed, drawn = start(Draft(tree, mx.array([1] * tree.size)))
            for left in reversed(range(CYCLES)):
                mx.async_eval(drawn)  # type: ignore[no-untyped-call]
                model.commit(passed, range(tree.size), caches)
                foreseen = state.foresees(passed, depth, wish)
                root = drawn[depth:]
                if not foreseen:
                    root = mx.array(drawn.tolist()[depth:])  # type: ignore[index]
                state.commit(drawn)
                draft = state.propose(Anchor(passed, depth, root, caches), wish)
                if not foreseen:
                    mx.async_eval(draft.tokens)  # type: ignore[no-untyped-call]
                before = drawn
                if left:
                    passed, drawn = start(Draft(tree, _padded(draft, tree.size)))
                before.tolist()
            draft.tokens.tolist()

    return _Timing(way, depth + 1, run, CYCLES, [])


def _padded(draft: Draft, size: int) -> mx.array:
    """The tokens of a draft, repeated where a drafter found fewer than it was asked for."""
    tokens = draft.tokens
    return tokens if len(tokens) == size else mx.concatenate([tokens] * size)[:size]


def _plain(model: Target, caches: Sequence[Any]) -> None:
    """Plain steps as the loop makes them: the next one is under way when a token is read back."""
    root = DraftTree.chain(0)
    with mx.stream(generation_stream):
        token = mx.array([1])
        pending: list[mx.array] = []
        for _ in range(PLAIN_STEPS):
            token = mx.argmax(model.verify(Draft(root, token), caches).logits, axis=-1)
            mx.async_eval(token)  # type: ignore[no-untyped-call]
            pending.append(token)
            if len(pending) > 1:
                pending.pop(0).tolist()
        pending.pop().tolist()
