"""Answers prompts with a drafter and plainly, and says what it took and what the answers are worth.

Plain decoding is stock mlx-lm's, on the same weights. Every answer is compared with it, token by token; in another
type than float32 a difference may be a tie, which is counted and not hidden.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate as plain_stream
from mlx_lm.sample_utils import make_sampler

from specstream_mlx import stream_generate
from specstream_mlx.engine.exactness import check_exact

from .figures import summary
from .task import Row, Task


@dataclass
class Answer:
    """One answer with its counts and its seconds, the prefill's apart."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    passes: int = 0
    stream_passes: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    first_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class Decoding:
    """How answers are made: the drafter and its options, the sampler's settings, the most tokens."""

    draft: str = "tree"
    drafter: str | None = None
    temp: float = 0.0
    seed: int = 0
    max_tokens: int = 128
    options: Any = None


def answer(model: Any, tokenizer: Any, prompt: Sequence[int], decoding: Decoding) -> Answer:
    """Answer one prompt with our engine."""
    more: dict[str, Any] = {"drafter": decoding.drafter} if decoding.drafter is not None else {}
    if decoding.options is not None:
        more["draft_options"] = decoding.options
    sampler = make_sampler(decoding.temp) if decoding.temp else None
    responses = stream_generate(
        model,
        tokenizer,
        list(prompt),
        max_tokens=decoding.max_tokens,
        sampler=sampler,
        draft=decoding.draft,  # type: ignore[arg-type]
        seed=decoding.seed if decoding.temp else None,
        **more,
    )
    return _collect(responses, ours=True)


def plain_answer(plain: Any, tokenizer: Any, prompt: Sequence[int], decoding: Decoding) -> Answer:
    """Answer one prompt with mlx-lm."""
    more: dict[str, Any] = {}
    if decoding.temp:
        mx.random.seed(decoding.seed)
        more["sampler"] = make_sampler(decoding.temp)
    return _collect(plain_stream(plain, tokenizer, list(prompt), max_tokens=decoding.max_tokens, **more), ours=False)


def _collect(responses: Iterator[Any], *, ours: bool) -> Answer:
    found = Answer()
    start = time.perf_counter()
    for number, response in enumerate(responses):
        found.text += response.text
        found.tokens += response.tokens if ours else [response.token]
        if number == 0:
            found.first_seconds = time.perf_counter() - start
    found.decode_seconds = time.perf_counter() - start - found.first_seconds
    found.passes = response.target_passes if ours else len(found.tokens)
    if ours:
        found.stream_passes = response.stream_passes
        found.drafted, found.accepted = list(response.drafted_by_depth), list(response.accepted_by_depth)
    return found


@dataclass
class Evaluation:
    """The answers to a file of prompts, ours and mlx-lm's, in the same order."""

    task: Task
    rows: list[Row]
    prompts: list[list[int]]
    ours: list[Answer] = field(default_factory=list)
    plain: list[Answer] = field(default_factory=list)
    ties: int = 0
    problems: list[str] = field(default_factory=list)

    def tokens_per_pass(self) -> float:
        """The call reduction ratio over all prompts together."""
        return sum(len(a.tokens) for a in self.ours) / max(1, sum(a.passes for a in self.ours))

    def metric(self) -> dict[str, dict[str, float]]:
        """Mean in percent, standard error of the mean, and the number of rows that count, by name."""
        texts = [a.text.strip() for a in self.ours]
        return {name: summary(values) for name, values in self.task.metric(self.rows, texts).items()}

    def speedup(self) -> dict[str, float]:
        """mlx-lm's seconds over ours: decoding alone, and the prompt's pass with it; medians over prompts."""
        pairs = [(p, o) for p, o in zip(self.plain, self.ours, strict=True) if len(o.tokens) > 1]
        decode = [p.decode_seconds / o.decode_seconds for p, o in pairs if o.decode_seconds > 0]
        total = [
            (p.first_seconds + p.decode_seconds) / (o.first_seconds + o.decode_seconds)
            for p, o in zip(self.plain, self.ours, strict=True)
        ]
        all_decode = sum(p.decode_seconds for p, _ in pairs) / max(1e-9, sum(o.decode_seconds for _, o in pairs))
        return {
            "decode": round(statistics.median(decode), 3) if decode else float("nan"),
            "decode_of_sums": round(all_decode, 3),
            "total": round(statistics.median(total), 3),
        }


def evaluate(
    model: Any, plain: Any, tokenizer: Any, task: Task, rows: Sequence[Row], decoding: Decoding, tick: Any = None
) -> Evaluation:
    """Answer every row with our engine and with mlx-lm, in turn, another one first each time."""
    prompts = [list(tokenizer.encode(task.prompt(row))) for row in rows]
    found = Evaluation(task, list(rows), prompts)
    answer(model, tokenizer, prompts[0], decoding)
    plain_answer(plain, tokenizer, prompts[0], decoding)
    for number, prompt in enumerate(prompts):
        if number % 2:
            other = plain_answer(plain, tokenizer, prompt, decoding)
            own = answer(model, tokenizer, prompt, decoding)
        else:
            own = answer(model, tokenizer, prompt, decoding)
            other = plain_answer(plain, tokenizer, prompt, decoding)
        found.ours.append(own)
        found.plain.append(other)
        if (own.tokens, own.text) != (other.tokens, other.text):
            _judge(found, plain, prompt, own, number, decoding)
        if tick is not None:
            tick(number + 1, found)
    return found


def _judge(found: Evaluation, plain: Any, prompt: list[int], own: Answer, number: int, decoding: Decoding) -> None:
    sampler = make_sampler(decoding.temp) if decoding.temp else None
    difference = check_exact(plain, prompt, own.tokens, sampler=sampler, seed=decoding.seed if decoding.temp else None)
    if difference is not None and difference.is_tie:
        found.ties += 1
    else:
        found.problems.append(f"row {number + 1}: {difference or 'equal tokens, another end or text'}")


def sum_by_depth(lists: Sequence[Sequence[int]]) -> list[int]:
    """Add counts by depth; lists may differ in length."""
    width = max((len(counts) for counts in lists), default=0)
    return [sum(counts[depth] for counts in lists if depth < len(counts)) for depth in range(width)]
