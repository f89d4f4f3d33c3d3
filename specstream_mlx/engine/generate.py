"""Text from a prompt, in mlx-lm's manner: the loop's tokens decoded, stopped and counted."""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START, generation_stream, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from specstream_mlx.engine import arguments
from specstream_mlx.engine.sampling import LogitsProcessor, Sampler, TargetSampler
from specstream_mlx.engine.single import Loop, generate_tokens, prefill
from specstream_mlx.errors import InvalidInputError
from specstream_mlx.formats.prompts import prompt_ids
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.options import DraftMode, DraftOptions, DraftReport
from specstream_mlx.planning.control import steer
from specstream_mlx.target.caches import CacheGrowth, check_caches


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
    """Generate text, one response per pass; the tokens are those of plain decoding whatever ``draft`` says.

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
        kv_bits, kv_group_size, quantized_kv_start: quantise the cache from so many tokens on, as mlx-lm does.
        max_kv_size: most tokens that the cache holds; longer texts forget, and decode plainly from there.
        draft_options: a tree, an insertion or a pruning threshold of one's own.
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
    vocab_size = model.args.vocab_size
    plan, control = steer(draft, model, draft_options or DraftOptions())
    if plan.prune_threshold is not None:
        model.check_pruning(plan.insertion)
    growth = CacheGrowth(kv_bits, kv_group_size, quantized_kv_start, max_kv_size)
    if prompt_cache is not None:
        check_caches(prompt_cache)
    begins = prompt_cache is None or prompt_cache[0].offset == 0
    ids = prompt_ids(tokenizer, prompt, vocab_size, begins=begins)
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
    if continues_text:  # behind a token, a space is not the beginning of a text
        detokenizer.add_token(ids[-1])
        _ = detokenizer.last_segment
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


def check_context(model: SpecStreamModel, cached: int, new: int) -> None:
    """Raise InvalidInputError when the prompt leaves no room for a token in the model's context."""
    context = model.context_length
    if context is not None and cached + new >= context:
        before = f" after {cached} cached ones" if cached else ""
        raise InvalidInputError(
            f"prompt has {new} tokens{before}, the model's context holds {context}; shorten the prompt"
        )
