"""Answers to several prompts at once, in mlx-lm's manner."""

import time
from collections.abc import Generator, Sequence
from copy import deepcopy
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchResponse, BatchStats
from mlx_lm.tokenizer_utils import TokenizerWrapper

from specstream_mlx.engine import arguments
from specstream_mlx.engine.batch import Batch
from specstream_mlx.engine.generate import GenerationResponse, Narrator, new_session
from specstream_mlx.engine.session import Session
from specstream_mlx.engine.text import Text
from specstream_mlx.engine.wired import wired
from specstream_mlx.errors import UsageError
from specstream_mlx.models.model import SpecStreamModel

BATCH_SIZE = 32  # most sequences at once, as in mlx-lm


def stream_batch(
    model: SpecStreamModel,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    max_tokens: int | Sequence[int] = 128,
    *,
    prompt_caches: Sequence[list[Any]] | None = None,
    completion_batch_size: int = BATCH_SIZE,
    prefill_step_size: int = 2048,
    stop: str | Sequence[str] | None = None,
    continues_text: bool = False,
    sessions: list[Session] | None = None,
    **how: Any,
) -> Generator[tuple[int, GenerationResponse], None, None]:
    """Generate the answers to all prompts, one response per answer and pass; each is what it would be alone.

    Args:
        prompts: text or ids.
        max_tokens: of every answer, or of each.
        prompt_caches: what comes before each prompt, changed in place.
        completion_batch_size: most answers that are made at once; the others follow.
        prefill_step_size: prompt tokens that are run between two passes.
        stop: a string, or strings, that end an answer.
        continues_text: as for ``stream_generate``.
        sessions: a list that receives the sequences, in the order of the prompts.
        how: further arguments of ``stream_generate``, for every answer.

    Yields:
        The index of the prompt, and the response.

    Raises:
        UsageError, InvalidInputError, UnsupportedError: as ``stream_generate``, before anything is generated.
    """
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    stop = arguments.stop(stop)
    completion_batch_size = arguments.at_least_one("completion_batch_size", completion_batch_size)
    prefill_step_size = arguments.at_least_one("prefill_step_size", prefill_step_size)
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    if len(limits) != len(prompts) or (prompt_caches is not None and len(prompt_caches) != len(prompts)):
        raise UsageError(f"{len(prompts)} prompts, but not as many of max_tokens or prompt_caches; give one for each")
    made = [
        new_session(
            model,
            tokenizer,
            prompt,
            max_tokens=limits[index],
            prompt_cache=None if prompt_caches is None else prompt_caches[index],
            keeps_cache=prompt_caches is not None or sessions is not None,
            **how,
        )
        for index, prompt in enumerate(prompts)
    ]
    if sessions is not None:
        sessions += [session for session, _ in made]
    batch = Batch(model, prefill_step_size=prefill_step_size)
    tellers: dict[int, tuple[int, Narrator]] = {}
    waiting = list(enumerate(made))[::-1]
    with wired(model):
        try:
            while waiting or len(batch):
                while waiting and len(batch) < completion_batch_size:
                    index, (session, ids) = waiting.pop()
                    batch.add(session, ids)
                    text = Text(tokenizer, stop, session.max_tokens, behind=ids[-1] if continues_text else None)
                    tellers[id(session)] = index, Narrator(session, text, len(ids))
                for step in batch.step():
                    if step.error is not None:
                        raise step.error
                    if step.outcome is None:
                        continue
                    index, teller = tellers[id(step.session)]
                    response = teller.tell(step.outcome)
                    if response.finish_reason is not None and not step.ended:
                        batch.remove(step.session)
                    yield index, response
        finally:
            batch.close()


def batch_generate(
    model: SpecStreamModel,
    tokenizer: Any,
    prompts: list[list[int]],
    prompt_caches: list[list[Any]] | None = None,
    max_tokens: int | list[int] = 128,
    verbose: bool = False,
    return_prompt_caches: bool = False,
    return_token_ids: bool = False,
    return_logprobs: bool = False,
    **kwargs: Any,
) -> BatchResponse:
    """Generate the answers to several prompts, as mlx-lm's function of this name, drafting for all of them.

    Args:
        prompts: ids, or texts.
        prompt_caches: what comes before each prompt; they are left as they are.
        max_tokens: of every answer, or of each.
        verbose: print how many are done, and how fast it was.
        return_prompt_caches: give back the caches, which then hold prompt and answer.
        return_token_ids: give back the ids, without end-of-text.
        return_logprobs: give back the log-probability of every id.
        kwargs: as for ``stream_batch``.

    Raises:
        UsageError, InvalidInputError, UnsupportedError: as ``stream_generate``, before anything is generated.
    """
    caches = None if prompt_caches is None else [_copies(caches) for caches in prompt_caches]
    ids: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    sessions: list[Session] = []
    stats = BatchStats()
    done, started, first = 0, time.perf_counter(), 0.0
    if return_prompt_caches:
        kwargs["sessions"] = sessions
    for index, response in stream_batch(model, tokenizer, prompts, max_tokens, prompt_caches=caches, **kwargs):
        first = first or time.perf_counter()
        ended = response.finish_reason == "stop" and response.tokens[-1] in tokenizer.eos_token_ids
        kept = response.tokens[:-1] if ended else response.tokens
        ids[index] += kept
        if return_logprobs:
            nodes = response.outcome.accepted.nodes
            rows = [response.outcome.drawn.logprobs(node)[token] for token, node in zip(kept, nodes, strict=False)]
            logprobs[index] += [float(row.item()) for row in rows]  # type: ignore[arg-type]
        if response.generation_tokens == len(response.tokens):
            stats.prompt_tokens += response.prompt_tokens
        stats.generation_tokens += len(response.tokens)
        if response.finish_reason is not None:
            done += 1
            if verbose:
                print(f"[batch_generate] Finished processing {done}/{len(prompts)} ...", end="\r")
    end = time.perf_counter()
    first = first or end
    stats.prompt_time, stats.decode_time, stats.wall_time = first - started, end - first, end - started
    stats.peak_memory = mx.get_peak_memory() / 1e9
    if verbose:
        print(f"[batch_generate] Finished processing {done}/{len(prompts)}")
        print(f"[batch_generate] Prompt: {stats.prompt_tokens} tokens, {stats.prompt_tps:.3f} tokens-per-sec")
        print(
            f"[batch_generate] Generation: {stats.generation_tokens} tokens, {stats.generation_tps:.3f} tokens-per-sec"
        )
        print(f"[batch_generate] Peak memory: {stats.peak_memory:.3f} GB")
    return BatchResponse(
        [tokenizer.decode(found) for found in ids],
        stats,
        [session.caches for session in sessions] if return_prompt_caches else None,
        ids if return_token_ids else None,
        logprobs if return_logprobs else None,
    )


def _copies(caches: list[Any]) -> list[Any]:
    """Caches with the same rows, which may be changed."""
    return [deepcopy(cache) for cache in caches]
