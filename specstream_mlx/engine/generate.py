"""Text from a prompt, in mlx-lm's manner: the engine's tokens decoded, stopped and counted."""

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START
from mlx_lm.tokenizer_utils import TokenizerWrapper

from specstream_mlx.drafters.choice import choose_drafter
from specstream_mlx.drafters.protocol import Drafter, with_pruning
from specstream_mlx.engine import arguments
from specstream_mlx.engine.sampling import LogitsProcessor, Sampler, TargetSampler
from specstream_mlx.engine.session import Outcome, Session, prefill
from specstream_mlx.engine.single import passes
from specstream_mlx.engine.steering import steer
from specstream_mlx.engine.text import Text
from specstream_mlx.engine.wired import wired
from specstream_mlx.errors import InvalidInputError
from specstream_mlx.formats.prompts import prompt_ids
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.options import DraftMode, DraftOptions, DraftReport
from specstream_mlx.target.caches import CacheGrowth, check_caches
from specstream_mlx.target.target import Target


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
        outcome: the pass itself: what was drafted and what of it was accepted.
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
    outcome: Outcome

    @property
    def token(self) -> int:
        """The last id."""
        return self.tokens[-1]

    @property
    def logprobs(self) -> mx.array:
        """(V,) log-probabilities that the last id was drawn from, computed when asked for."""
        return self.outcome.drawn.logprobs(self.outcome.accepted.nodes[len(self.tokens) - 1])

    @property
    def from_draft(self) -> bool:
        """Whether the last id was drafted. A pass ends with a token of the target's own, unless the text ends first."""
        return len(self.tokens) < len(self.outcome.tokens)

    @property
    def drafted(self) -> list[list[int]]:
        """The ids of each path that was drafted, from below the root to a leaf."""
        return self.outcome.drafted_paths

    @property
    def accepted(self) -> list[int]:
        """The drafted ids that were accepted and count."""
        return self.tokens[: self.outcome.accepted.num_drafts]


def stream_generate(
    model: SpecStreamModel,
    tokenizer: Any,
    prompt: str | Sequence[int] | mx.array,
    max_tokens: int = 256,
    *,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    draft: DraftMode = "auto",
    seed: int | None = None,
    prompt_cache: list[Any] | None = None,
    drafter: str | Drafter | None = None,
    draft_model: Target | None = None,
    num_draft_tokens: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START,
    max_kv_size: int | None = None,
    draft_options: DraftOptions | None = None,
    stop: str | Sequence[str] | None = None,
    continues_text: bool = False,
    prefill_step_size: int = 2048,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
) -> Generator[GenerationResponse, None, None]:
    """Generate text, one response per pass; the tokens are those of plain decoding whatever is drafted.

    One model may serve several generators at once, in one thread or in several, and a generator may be asked for its
    next response in another thread than before, one thread at a time. A generation keeps the adapter that was in use
    when it began.

    Args:
        model: from ``load``.
        tokenizer: from ``load``.
        prompt: text, ids, an array of ids, or what a tokenizer of transformers returns for one text.
        max_tokens: most tokens to generate; -1 for no limit.
        sampler: from (1, V) log-probabilities to ids, as ``mlx_lm.sample_utils.make_sampler`` makes; None: greedy.
        logits_processors: as in mlx-lm, called with all ids so far and (1, V) logits. They and a ``sampler`` of one's
            own may remember things: all but mlx-lm's own are called once per token, in order.
        draft: "auto", "tree", "chain" or "off".
        seed: makes sampled text repeatable; equal to mlx-lm's text after ``mx.random.seed(seed)``.
        prompt_cache: caches of an earlier call, changed in place; ``prompt`` then holds the new tokens only, and a
            text gets no beginning-of-text token.
        drafter: who drafts: "streams", "two-model", "prompt-lookup" or "none", or a drafter of one's own; None:
            "two-model" where a draft model is given, else the streams of the model, if it has any.
        draft_model: the second model of "two-model", from ``load``.
        num_draft_tokens: how far ahead "two-model" (4) and "prompt-lookup" (10) guess.
        kv_bits, kv_group_size, quantized_kv_start: quantise the cache from so many tokens on, as mlx-lm does.
        max_kv_size: most tokens that the cache holds; longer texts forget, and decode plainly from there.
        draft_options: a tree, a way to draft or a pruning threshold of one's own.
        stop: a string, or strings, that end the text; the text stops before them.
        continues_text: the new text follows the prompt's in one text, so a space at its beginning stays, which mlx-lm
            drops.
        prefill_step_size: prompt tokens per prefill pass.
        prompt_progress_callback: called with (tokens done, tokens in all).

    Raises:
        InvalidInputError: empty or over-long prompt, ids outside the vocabulary.
        UsageError: a value that no argument takes, contradicting options, or drafting asked of a model without
            streams.
        UnsupportedError: caches that cannot take back rows, or that this model cannot have.
    """
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    max_tokens = arguments.max_tokens(max_tokens)
    prefill_step_size = arguments.at_least_one("prefill_step_size", prefill_step_size)
    sampler, logits_processors = arguments.sampler(sampler), arguments.logits_processors(logits_processors)
    seed, stop = arguments.seed(seed), arguments.stop(stop)
    arguments.callback("prompt_progress_callback", prompt_progress_callback)
    options = draft_options or DraftOptions()
    with model.building():  # no other thread changes the adapter meanwhile
        mount = model.mounted
        if drafter is None or isinstance(drafter, str):
            drafter = choose_drafter(drafter, model.drafter, draft_model, num_draft_tokens)
        plan, control = steer(draft, model, drafter, options)
    if plan.drafts and options.prune_threshold is not None:
        drafter = with_pruning(drafter, options.prune_threshold, plan.way)
    growth = CacheGrowth(kv_bits, kv_group_size, quantized_kv_start, max_kv_size)
    if prompt_cache is not None:
        check_caches(prompt_cache)
    begins = prompt_cache is None or prompt_cache[0].offset == 0
    ids = prompt_ids(tokenizer, prompt, model.args.vocab_size, begins=begins)
    caches = growth.make_caches(model, len(ids) - 1) if prompt_cache is None else prompt_cache
    check_context(model, caches[0].offset, len(ids))
    max_tokens = model.tokens_within_context(max_tokens, caches[0].offset + len(ids))
    growth.check(model, prompt_cache, len(ids) + max_tokens if max_tokens > 0 else None)
    stop_tokens = set(tokenizer.eos_token_ids)
    session = Session(
        model,
        drafter,
        caches,
        plan,
        control,
        TargetSampler(
            sampler, logits_processors, model.args.vocab_size, seed, max_tokens=max_tokens, stop_tokens=stop_tokens
        ),
        max_tokens=max_tokens,
        stop_tokens=stop_tokens,
        growth=growth,
        mount=mount,
        keeps_cache=prompt_cache is not None,
        keeps_history=bool(logits_processors),
    )
    report = plan.report(drafter.name if drafter is not None else "none")
    with wired(model):
        outcomes = passes(session, ids, prefill_step_size, prompt_progress_callback)
        try:
            text = Text(tokenizer, stop, max_tokens, behind=ids[-1] if continues_text else None)
            yield from _responses(session, outcomes, text, len(ids), report)
        finally:
            outcomes.close()


def _responses(
    session: Session, outcomes: Iterable[Outcome], text: Text, prompt_tokens: int, report: DraftReport
) -> Generator[GenerationResponse, None, None]:
    """What users are told of each pass."""
    started = time.perf_counter()
    prompt_seconds = 0.0
    for outcome in outcomes:
        if not prompt_seconds:
            prompt_seconds = time.perf_counter() - started
            started = time.perf_counter()
        tokens, segment = text.take(outcome.tokens)
        statistics = session.statistics
        yield GenerationResponse(
            text=segment,
            tokens=tokens,
            finish_reason=text.finish_reason,
            prompt_tokens=prompt_tokens,
            prompt_tps=prompt_tokens / prompt_seconds,
            generation_tokens=text.num_tokens,
            generation_tps=text.num_tokens / max(time.perf_counter() - started, 1e-9),
            target_passes=statistics.target_passes,
            stream_passes=session.state.own_passes,
            tokens_per_pass=text.num_tokens / statistics.target_passes,
            drafted_by_depth=list(statistics.drafted_by_depth),
            accepted_by_depth=list(statistics.accepted_by_depth),
            peak_memory=mx.get_peak_memory() / 1e9,
            draft=report,
            outcome=outcome,
        )
        if text.finish_reason is not None:
            return


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


def cache_tokens(
    model: Target,
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


def check_context(model: SpecStreamModel, cached: int, new: int) -> None:
    """Raise InvalidInputError when the prompt leaves no room for a token in the model's context."""
    context = model.context_length
    if context is not None and cached + new >= context:
        before = f" after {cached} cached ones" if cached else ""
        raise InvalidInputError(
            f"prompt has {new} tokens{before}, the model's context holds {context}; shorten the prompt"
        )
