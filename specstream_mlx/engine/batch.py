"""Several sequences at once: each round is one pass over the drafts of all of them.

Sequences join and leave between rounds. What each generates is what it would alone: it keeps its own tree, caches,
draws, stop rules and drafter's state, and shares nothing but the pass. A prompt is run in chunks between rounds, so
nobody waits for a long one. A sequence that is alone goes on as ``single`` does, its next pass launched ahead.

How much each sequence drafts is decided for all together where their mode is "auto": see ``planning.shared``.
"""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
from mlx_lm.generate import generation_stream

from specstream_mlx.drafters.protocol import Anchor
from specstream_mlx.engine.session import Outcome, Session, first_draft
from specstream_mlx.engine.single import passes_from
from specstream_mlx.planning.shared import Asking, RowCosts, share_rows
from specstream_mlx.target.caches import drop_rows, is_full
from specstream_mlx.target.mounts import Mount
from specstream_mlx.target.rows import Draft, Riders
from specstream_mlx.target.target import Passed, Target
from specstream_mlx.target.tree import DraftTree

_CLEAR_CACHE_EVERY = 64  # rounds
_PLAIN_EVERY = 3  # rounds of which one drafts nothing, while it is not known what rows cost


@dataclass(eq=False)
class Seated:
    """A sequence in a batch.

    Attributes:
        begin: what its next pass begins with: its first draft, or the last pass.
        done, total: prompt tokens.
    """

    session: Session
    total: int
    prefilling: Generator[None, None, None] | None
    first: Draft
    begin: Draft | tuple[Passed, Outcome] | None = None
    done: int = 0


@dataclass(frozen=True, eq=False)
class Step:
    """What a round gave one sequence: a pass, or the error that ended it."""

    session: Session
    outcome: Outcome | None = None
    error: Exception | None = None
    ended: bool = False


@dataclass
class BatchCounts:
    """Rounds and passes so far, and how many sequences took part."""

    rounds: int = 0
    passes: int = 0
    rows: int = 0
    sequences: int = 0
    history: dict[int, int] = field(default_factory=dict)


class Batch:
    """Sequences that are generated together; used by one thread.

    Attributes:
        costs: what passes cost by their rows, as far as it was seen.
    """

    def __init__(
        self, target: Target, *, prefill_step_size: int = 512, costs: RowCosts | None = None, ahead: bool = True
    ) -> None:
        """Begin with no sequence.

        Args:
            prefill_step_size: prompt tokens that are run between two rounds.
            costs: of an earlier batch of the same model.
            ahead: whether a sequence that is alone may have its next pass launched ahead.
        """
        self.target = target
        self.costs = costs or RowCosts()
        self.counts = BatchCounts()
        self._step_size, self._ahead = prefill_step_size, ahead
        self._seated: list[Seated] = []
        self._alone: Seated | None = None
        self._passes: Generator[Outcome, None, tuple[Passed, Outcome] | None] | None = None

    def __len__(self) -> int:
        return len(self._seated)

    @property
    def sessions(self) -> list[Session]:
        """Those in the batch, the oldest first."""
        return [seated.session for seated in self._seated]

    def add(
        self,
        session: Session,
        prompt: Sequence[int],
        *,
        before: Sequence[int] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Let a sequence take part from the next round on.

        Args:
            prompt: what its caches do not hold yet, at least a token.
            before: what they hold.
            progress: called with (prompt tokens done, in all) before every chunk.
        """
        chunks = session.prefilling(prompt, self._step_size, progress, before=before)
        self._seated.append(Seated(session, len(prompt), chunks, first_draft(prompt)))

    def remove(self, session: Session) -> None:
        """End a sequence; its caches hold what was yielded of it, the newest token perhaps not."""
        for seated in self._seated:
            if seated.session is session:
                self._leave(seated)
                return

    def close(self) -> None:
        """End all of them."""
        for session in self.sessions:
            self.remove(session)

    def step(self) -> list[Step]:
        """A chunk of one prompt, if any waits, and a pass over all sequences that are ready.

        What goes wrong with one sequence ends that one. An error of the pass itself, such as want of memory, is raised,
        and the round can be tried again with fewer sequences.
        """
        steps = self._prefill()
        ready = [seated for seated in self._seated if seated.prefilling is None]
        if not ready:
            return steps
        self.counts.rounds += 1
        if self.counts.rounds % _CLEAR_CACHE_EVERY == 0:
            mx.clear_cache()
        if self._ahead and len(self._seated) == 1:
            return [*steps, self._single(ready[0])]
        steps += self._settle()
        ready = [seated for seated in ready if seated.begin is not None]
        groups: dict[tuple[int, ...], list[Seated]] = {}
        for seated in ready:
            mount = seated.session.mount
            in_place = () if mount is None else tuple(id(layer.adapted) for layer in mount.layers)
            groups.setdefault(in_place, []).append(seated)
        for group in groups.values():
            steps += self._together(group, group[0].session.mount)
        return steps

    def _prefill(self) -> list[Step]:
        """Run a chunk of the oldest prompt that waits; the prompts behind it too where they take no pass."""
        for seated in list(self._seated):
            if seated.prefilling is None:
                continue
            try:
                next(seated.prefilling)
                return []
            except StopIteration:
                seated.prefilling, seated.begin = None, seated.first
            except Exception as error:
                self._leave(seated)
                return [Step(seated.session, error=error, ended=True)]
        return []

    def _leave(self, seated: Seated) -> None:
        if self._alone is seated and self._passes is not None:
            self._passes.close()
            self._alone = self._passes = None
        if seated.prefilling is not None:
            seated.prefilling.close()
        self._seated.remove(seated)
        seated.session.sampler.finish()

    def _single(self, seated: Seated) -> Step:
        """A pass of a sequence that is alone."""
        if self._passes is None:
            assert seated.begin is not None
            seated.session.choose()
            self._passes = passes_from(seated.session, seated.begin, gives_up=lambda: len(self._seated) > 1)
            self._alone, seated.begin = seated, None
        return self._next(seated)

    def _next(self, seated: Seated) -> Step:
        session = seated.session
        assert self._passes is not None
        try:
            outcome = next(self._passes)
        except StopIteration as stop:
            self._alone = self._passes = None
            seated.begin = stop.value
            return Step(session)
        except Exception as error:
            self._leave(seated)
            return Step(session, error=error, ended=True)
        self.counts.passes += 1
        self._count(1, outcome.tree.size)
        ended = session.ended(outcome)
        if ended:
            self._leave(seated)
        return Step(session, outcome, ended=ended)

    def _settle(self) -> list[Step]:
        """Let a sequence that was alone come to the end of its passes; their steps."""
        steps = []
        while (seated := self._alone) is not None:
            step = self._next(seated)
            if step.outcome is not None or step.error is not None:
                steps.append(step)
        return steps

    def _together(self, group: Sequence[Seated], mount: Mount | None) -> list[Step]:
        """One pass over the drafts of a group, whose sequences have the same layers in place."""
        steps: list[Step] = []
        started = time.perf_counter()
        self._share(group)
        with mx.stream(generation_stream):
            self._ride(group, mount)
            drafts: list[tuple[Seated, Draft]] = []
            for seated in group:
                try:
                    drafts.append((seated, self._propose(seated)))
                except Exception as error:
                    steps.append(self._failed(seated, error))
            if not drafts:
                return steps
            starts = [seated.session.caches[0].offset for seated, _ in drafts]
            try:
                with self.target.building(mount):
                    parts = [seated.session.part(draft, seated.session.remaining) for seated, draft in drafts]
                    every = self.target.verify_together(parts)
                mx.eval([passed.logits for passed in every], [passed.arrays for passed in every])
            except Exception:
                for (seated, _), start in zip(drafts, starts, strict=True):
                    if not is_full(seated.session.caches):  # what it overwrote is lost
                        for cache in seated.session.caches:
                            drop_rows(cache, min(start, cache.offset))
                raise
            drawn = {}
            in_order = [seated.session.sampler.in_order for seated, _ in drafts]
            for last in (False, True):  # those that read back in mid-draw come last
                for index, (seated, _) in enumerate(drafts):
                    if in_order[index] is last:
                        try:
                            drawn[index] = seated.session.draw(every[index])
                        except Exception as error:
                            steps.append(self._failed(seated, error))
                if not last:
                    mx.eval([found.tokens for found in drawn.values()])
            mx.eval([found.tokens for found in drawn.values()])
        finished = []
        for index, found in drawn.items():
            seated, draft = drafts[index]
            session, passed = seated.session, every[index]
            try:
                outcome = session.outcome(passed, found)
                with mx.stream(generation_stream):
                    session.commit(passed, outcome.accepted.nodes, outcome.tokens)
                session.record(outcome, drafted=draft.tree.size > 1)
                ended = session.ended(outcome)
                if ended:
                    session.finish(outcome.tokens[-1])
            except Exception as error:
                steps.append(self._failed(seated, error))
                continue
            seated.begin = passed, outcome
            finished.append(Step(session, outcome, ended=ended))
            if ended:
                self._leave(seated)
        rows = sum(passed.draft.tree.size for passed in every)
        self.counts.passes += 1
        self._count(len(every), rows)
        self.costs.observe(sum(_rows(self.target, passed) for passed in every), time.perf_counter() - started)
        return steps + finished

    def _failed(self, seated: Seated, error: Exception) -> Step:
        self._leave(seated)
        return Step(seated.session, error=error, ended=True)

    def _count(self, sequences: int, rows: int) -> None:
        self.counts.rows += rows
        self.counts.sequences += sequences
        self.counts.history[sequences] = self.counts.history.get(sequences, 0) + 1

    def _propose(self, seated: Seated) -> Draft:
        """The draft of its next pass, from after its last one."""
        if isinstance(seated.begin, Draft):
            return seated.begin
        assert seated.begin is not None
        passed, outcome = seated.begin
        root = mx.array(outcome.tokens[-1:])
        return seated.session.propose(passed, outcome.accepted.nodes[-1], root, seated.session.remaining)

    def _share(self, group: Sequence[Seated]) -> None:
        """Choose how each sequence drafts its next tree, those in mode "auto" from one budget of rows."""
        sharing: list[tuple[Session, Asking]] = []
        for seated in group:
            session = seated.session
            rates = session.rates
            if session.plan.mode != "auto" or rates is None or not session.may_draft:
                session.choose()
                continue
            left = session.remaining
            depth = session.plan.gamma if left is None else min(session.plan.gamma, left - 1)
            sharing.append((session, Asking(rates.tolist(), max(depth, 0), _beside(self.target, session))))
        if self.costs.wants_variety:  # nothing can be weighed yet: the plan's trees, and now and then none
            plain = DraftTree.chain(0)
            trees = [
                plain
                if self.counts.rounds % _PLAIN_EVERY == 0
                else (session.plan.tree or plain).truncate(asking.max_depth)
                for session, asking in sharing
            ]
        else:
            trees = share_rows(self.costs.seconds, len(group), [asking for _, asking in sharing])
        for (session, _), tree in zip(sharing, trees, strict=True):
            session.choice = (tree, session.plan.way) if tree.size > 1 else None

    def _ride(self, group: Sequence[Seated], mount: Mount | None) -> None:
        """Run the riders that were not beside their trees, those of all sequences in one pass."""
        found: dict[int, list[tuple[Seated, Anchor, Riders]]] = {}
        for seated in group:
            session = seated.session
            if seated.begin is None or isinstance(seated.begin, Draft):
                continue
            wish = session.wish(session.remaining, session.caches[0].offset)
            passed, outcome = seated.begin
            node = outcome.accepted.nodes[-1]
            riders = None if wish is None else session.state.missing(passed, node, wish)
            if riders is not None:
                anchor = Anchor(passed, node, passed.draft.tokens, session.caches)
                found.setdefault(riders.layer, []).append((seated, anchor, riders))
        for rides in found.values():
            asked = [(anchor.passed, anchor.node, riders, anchor.caches) for _, anchor, riders in rides]
            with self.target.building(mount):
                every = self.target.ride_together(asked)
            for (seated, anchor, riders), logits in zip(rides, every, strict=True):
                assert isinstance(seated.begin, tuple)
                seated.session.state.own_passes += 1
                carried = replace(anchor.passed, riders=riders, anchors=(anchor.node,), rider_logits=logits)
                seated.begin = carried, seated.begin[1]


def _beside(target: Target, session: Session) -> float:
    """What one guess further ahead costs beside the tree, in rows."""
    taps = session.drafter.taps if session.drafter is not None else ()
    return 1 - max(taps) / len(target.layers) if taps else 0.0


def _rows(target: Target, passed: Passed) -> float:
    """What a sequence's part of a pass counts for, in rows."""
    rows = float(passed.draft.tree.size)
    if passed.riders is not None and passed.anchors:
        rows += passed.riders.count * len(passed.anchors) * (1 - passed.riders.layer / len(target.layers))
    return rows
