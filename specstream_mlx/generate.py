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
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START, generation_stream, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from specstream_mlx.caches import CacheGrowth, check_caches, is_full
from specstream_mlx.control import Control, steer
from specstream_mlx.drafting import DraftMode, DraftOptions, DraftPlan, DraftReport, Insertion
from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.model import SpecStreamModel, VerificationPass
from specstream_mlx.sampling import LogitsProcessor, Sampler, TargetSampler
from specstream_mlx.tree import DraftTree
from specstream_mlx.verification import accept

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


@dataclass(frozen=True)
class GenerationResponse:
    """What one pass added, with running totals.

    Attributes:
        text: newly decoded text; several tokens may arrive in one response.
        tokens: the new ids; end-of-text is among them when generated.
        finish_reason: None while going on, "stop" (end-of-text or a stop string) or "length".
        prompt_tps, generation_tps: tokens per second.
        tokens_per_pass: the paper's call reduction ratio.
        peak_memory: GB.
    """

    text: str
    tokens: list[int]
    finish_reason: str | None
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    target_passes: int
    stream_passes: int
    tokens_per_pass: float
    drafted_by_depth: list[int]
    accepted_by_depth: list[int]
    peak_memory: float
    draft: DraftReport


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


def cache_tokens(
    model: SpecStreamModel,
    tokens: list[int],
    growth: CacheGrowth,
    *,
    prefill_step_size: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> list[Any]:
    """Caches that hold ``tokens``, as mlx-lm leaves them when it is asked for no further one.

    Raises:
        InvalidInputError: more tokens than the model's context holds.
        UsageError, UnsupportedError: as ``CacheGrowth.check``.
    """
    growth.check(model, None, len(tokens))
    check_context(model, 0, len(tokens))
    caches = growth.make_caches(model, len(tokens))
    for part in (tokens[:-1], tokens[-1:]):
        prefill(model, part, caches, prefill_step_size, progress, len(tokens), growth)
        progress = None
    return caches


def stream_generate(
    model: SpecStreamModel,
    tokenizer: Any,
    prompt: str | Sequence[int] | mx.array,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    draft: DraftMode = "auto",
    seed: int | None = None,
    prompt_cache: list[Any] | None = None,
    *,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START,
    max_kv_size: int | None = None,
    draft_options: DraftOptions | None = None,
    stop: Sequence[str] = (),
    prefill_step_size: int = 2048,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
) -> Generator[GenerationResponse, None, None]:
    """Generate text, one response per pass; the tokens are those of plain decoding whatever ``draft`` says.

    Args:
        model: from ``load``.
        tokenizer: from ``load``.
        prompt: text, ids or an array of ids.
        max_tokens: most tokens to generate; -1 for no limit.
        sampler: from (1, V) log-probabilities to ids, as ``mlx_lm.sample_utils.make_sampler`` makes; None: greedy.
        logits_processors: as in mlx-lm, called with all ids so far and (1, V) logits. They and a ``sampler`` of one's
            own may remember things: all but mlx-lm's own are called once per token, in order.
        draft: "auto", "tree", "chain" or "off".
        seed: makes sampled text repeatable; equal to mlx-lm's text after ``mx.random.seed(seed)``.
        prompt_cache: caches of an earlier call, changed in place; ``prompt`` then holds the new tokens only.
        kv_bits, kv_group_size, quantized_kv_start: quantise the cache from so many tokens on, as mlx-lm does.
        max_kv_size: most tokens that the cache holds; longer texts forget, and decode plainly from there.
        draft_options: a tree, an insertion or a pruning threshold of one's own.
        stop: strings that end the text; the text stops before them.
        prefill_step_size: prompt tokens per prefill pass.
        prompt_progress_callback: called with (tokens done, tokens in all).

    Raises:
        InvalidInputError: empty or over-long prompt, ids outside the vocabulary.
        UsageError: contradicting options, or drafting asked of a model without streams.
        UnsupportedError: caches that cannot take back rows, or that this model cannot have.
    """
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    if max_tokens == 0 or max_tokens < -1:
        raise UsageError(f"max_tokens is {max_tokens}, expected at least 1, or -1 for no limit")
    if prefill_step_size < 1:
        raise UsageError(f"prefill_step_size is {prefill_step_size}, expected at least 1")
    if any(not text for text in stop):
        raise UsageError("stop holds an empty string, which would stop at once; remove it")
    vocab_size = model.args.vocab_size
    plan, control = steer(draft, model, draft_options or DraftOptions())
    if plan.prune_threshold is not None:
        model.check_pruning(plan.insertion)
    ids = prompt_ids(tokenizer, prompt, vocab_size)
    growth = CacheGrowth(kv_bits, kv_group_size, quantized_kv_start, max_kv_size)
    if prompt_cache is not None:
        check_caches(prompt_cache)
    caches = growth.make_caches(model, len(ids) - 1) if prompt_cache is None else prompt_cache
    check_context(model, caches[0].offset, len(ids))
    max_tokens = model.tokens_within_context(max_tokens, caches[0].offset + len(ids))
    growth.check(model, prompt_cache, len(ids) + max_tokens if max_tokens > 0 else None)
    loop = Loop(
        model,
        caches,
        plan,
        control,
        TargetSampler(
            sampler, logits_processors, vocab_size, seed, max_tokens=max_tokens, stop_tokens=tokenizer.eos_token_ids
        ),
        history=[] if logits_processors else None,
        keeps_cache=prompt_cache is not None,
        growth=growth,
    )
    stop_tokens = set(tokenizer.eos_token_ids)
    detokenizer = tokenizer.detokenizer
    text = _StopText(stop)
    with wired_limit(model, [generation_stream]):
        started = time.perf_counter()
        passes = generate_tokens(
            ids,
            loop,
            max_tokens=max_tokens,
            stop_tokens=stop_tokens,
            prefill_step_size=prefill_step_size,
            progress=prompt_progress_callback,
        )
        prompt_seconds = 0.0
        num_tokens = 0
        try:
            for tokens in passes:
                if not prompt_seconds:
                    prompt_seconds = time.perf_counter() - started
                    started = time.perf_counter()
                finish_reason = None
                kept = []
                for token in tokens:
                    kept.append(token)
                    num_tokens += 1
                    if token in stop_tokens:
                        finish_reason = "stop"
                        break
                    detokenizer.add_token(token)
                    if text.feed(detokenizer.last_segment):
                        finish_reason = "stop"
                        break
                    if num_tokens == max_tokens:
                        finish_reason = "length"
                if finish_reason is not None:
                    detokenizer.finalize()
                    text.feed(detokenizer.last_segment)
                statistics = loop.statistics
                yield GenerationResponse(
                    text=text.take(final=finish_reason is not None),
                    tokens=kept,
                    finish_reason=finish_reason,
                    prompt_tokens=len(ids),
                    prompt_tps=len(ids) / prompt_seconds,
                    generation_tokens=num_tokens,
                    generation_tps=num_tokens / max(time.perf_counter() - started, 1e-9),
                    target_passes=statistics.target_passes,
                    stream_passes=statistics.stream_passes,
                    tokens_per_pass=num_tokens / statistics.target_passes,
                    drafted_by_depth=list(statistics.drafted_by_depth),
                    accepted_by_depth=list(statistics.accepted_by_depth),
                    peak_memory=mx.get_peak_memory() / 1e9,
                    draft=plan.report(),
                )
                if finish_reason is not None:
                    return
        finally:
            passes.close()


def generate(
    model: SpecStreamModel,
    tokenizer: Any,
    prompt: str | Sequence[int] | mx.array,
    max_tokens: int = 256,
    verbose: bool = False,
    **kwargs: Any,
) -> str:
    """Generate a complete text; keyword arguments go to ``stream_generate``, ``verbose`` prints as it goes."""
    text = ""
    for response in stream_generate(model, tokenizer, prompt, max_tokens, **kwargs):
        text += response.text
        if verbose:
            print(response.text, end="", flush=True)
    if verbose:
        print()
    return text


class _StopText:
    """Text on its way out, holding back what may be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self._stopped = False

    def feed(self, segment: str) -> bool:
        """Add decoded text; True once a stop string is complete, after which more text is ignored."""
        if self._stopped:
            return True
        self._held += segment
        found = [self._held.find(text) for text in self._stop]
        hits = [index for index in found if index >= 0]
        if hits:
            self._held = self._held[: min(hits)]
            self._stopped = True
        return self._stopped

    def take(self, final: bool) -> str:
        """The text that is certain by now; all that is held when ``final``."""
        keep = 0
        if not final:
            keep = max(
                (n for text in self._stop for n in range(1, len(text)) if self._held.endswith(text[:n])), default=0
            )
        cut = len(self._held) - keep
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready


def to_list(ids: mx.array) -> list[int]:
    """Read (T,) ids back from the device."""
    return ids.tolist()  # type: ignore[return-value]


def prompt_ids(tokenizer: TokenizerWrapper, prompt: str | Sequence[int] | mx.array, vocab_size: int) -> list[int]:
    """Ids of a prompt, with special tokens as mlx-lm adds them.

    Raises:
        InvalidInputError: nothing in it, or ids that the model has no embedding for.
    """
    if isinstance(prompt, str):
        special = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
        ids = tokenizer.encode(prompt, add_special_tokens=special) if prompt else []
    else:
        ids = to_list(prompt) if isinstance(prompt, mx.array) else list(prompt)
    if not ids:
        raise InvalidInputError("prompt is empty; give at least one token")
    outside = next((token for token in ids if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise InvalidInputError(f"prompt: token id {outside} is outside the model's vocabulary 0..{vocab_size - 1}")
    return ids


def check_context(model: SpecStreamModel, cached: int, new: int) -> None:
    """Raise InvalidInputError when the prompt leaves no room for a token in the model's context."""
    context = model.context_length
    if context is not None and cached + new >= context:
        before = f" after {cached} cached ones" if cached else ""
        raise InvalidInputError(
            f"prompt has {new} tokens{before}, the model's context holds {context}; shorten the prompt"
        )
