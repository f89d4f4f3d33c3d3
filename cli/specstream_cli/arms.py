"""The ways to generate that ``benchmark`` compares, and the clock. The protocol is in benchmarks/README.md."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

BASELINE = "mlx-lm"
TWO_MODEL = "mlx-lm two-model"


@dataclass(frozen=True)
class Step:
    """What one response added, with running totals."""

    tokens: Sequence[int]
    text: str
    passes: int
    drafted: Sequence[int] = ()  # by depth
    accepted: Sequence[int] = ()
    response: Any = None  # of ours


@dataclass(frozen=True)
class Run:
    """One arm's answer to one prompt, with its clock."""

    tokens: list[int]
    text: str
    passes: int
    drafted: list[int]
    accepted: list[int]
    first_seconds: float  # from the call to the first response: the prefill, and the launch of the next pass
    decode_seconds: float  # from the first response to the end
    memory: int  # most bytes in use beyond what was in use before

    @property
    def total_seconds(self) -> float:
        """From the call to the end."""
        return self.first_seconds + self.decode_seconds


@dataclass
class Arm:
    """One way to generate; ``runs[repeat][prompt]``.

    Attributes:
        model: mlx-lm's, where it generates.
        drafter, draft: who drafts and how, where ours does.
    """

    name: str
    start: Callable[[list[int]], Iterator[Step]]
    weight_bytes: int = 0
    model: Any = None
    drafter: str | None = None
    draft: str | None = None
    runs: list[list[Run]] = field(default_factory=list)

    def seconds(self, kind: str) -> list[float]:
        """Per repeat, the seconds of all prompts together."""
        return [sum(getattr(run, kind) for run in runs) for runs in self.runs]


@dataclass
class Workload:
    """Prompts that are measured together: a task file, or one at some length of context."""

    name: str
    prompts: list[list[int]]
    texts: list[str]
    references: list[str] | None = None
    context: int | None = None


def generate_once(arm: Arm, prompt: list[int]) -> Run:
    """One answer. Every response holds ids on the host, so nothing is pending when the clock is read."""
    import mlx.core as mx

    mx.reset_peak_memory()
    before = mx.get_active_memory()
    tokens: list[int] = []
    text, first, last = "", 0.0, Step((), "", 0)
    started = time.perf_counter()
    for last in arm.start(prompt):
        first = first or time.perf_counter()
        tokens += last.tokens
        text += last.text
    ended = time.perf_counter()
    memory = max(mx.get_peak_memory() - before, 0)
    return Run(
        tokens, text, last.passes, list(last.drafted), list(last.accepted), first - started, ended - first, memory
    )


def warm_up(arms: Sequence[Arm], prompts: Sequence[list[int]], tick: Callable[[], None] = lambda: None) -> None:
    """Every arm once over every prompt: compiles, fills caches, and gives the tokens to compare."""
    for arm in arms:
        arm.runs.clear()
        arm.runs.append([])
        for prompt in prompts:
            arm.runs[0].append(generate_once(arm, prompt))
            tick()


def differences(arms: Sequence[Arm]) -> dict[str, list[int]]:
    """Per arm, the prompts on which its tokens or its text are not the baseline's."""
    reference = [(run.tokens, run.text) for run in arms[0].runs[0]]
    return {
        arm.name: [i for i, run in enumerate(arm.runs[0]) if (run.tokens, run.text) != reference[i]] for arm in arms[1:]
    }


def judge(stock: Any, prompt: Sequence[int], run: Run) -> tuple[str, bool]:
    """What is to be said about an answer that is not the baseline's, and whether rounding explains it."""
    from specstream_mlx.engine.exactness import check_exact

    difference = check_exact(stock, prompt, run.tokens)
    if difference is None:
        return "equal tokens as far as it goes, and another end or text", False
    return str(difference), difference.is_tie


def measure(
    arms: Sequence[Arm], prompts: Sequence[list[int]], repeat: int, tick: Callable[[], None] = lambda: None
) -> None:
    """One round: prompt after prompt, all arms in turn, another arm first each time."""
    for arm in arms:
        arm.runs.append([])
    for index, prompt in enumerate(prompts):
        shift = (index + repeat) % len(arms)
        for arm in [*arms[shift:], *arms[:shift]]:
            arm.runs[-1].append(generate_once(arm, prompt))
            tick()


def row(arm: Arm, baseline: Arm, num_different: int) -> dict[str, Any]:
    """The figures of one arm: medians over rounds with least and most."""
    runs = arm.runs[0]
    tokens = sum(len(run.tokens) for run in runs)
    passes = sum(run.passes for run in runs)
    first = [1000 * run.first_seconds for round_ in arm.runs for run in round_]
    found: dict[str, Any] = {
        "arm": arm.name,
        "drafter": arm.drafter,
        "draft": arm.draft,
        "prompts": len(runs),
        "prompts_with_equal_tokens": len(runs) - num_different,
        "tokens": tokens,
        "passes": passes,
        "tokens_per_pass": tokens / max(passes, 1),
        "drafted_by_depth": _sum_by_depth([run.drafted for run in runs]),
        "accepted_by_depth": _sum_by_depth([run.accepted for run in runs]),
        "time_to_first_token_ms": {"median": statistics.median(first), "min": min(first), "max": max(first)},
        "peak_memory_gb": (arm.weight_bytes + max(run.memory for run in runs)) / 1e9,
    }
    for kind in ("first_seconds", "decode_seconds", "total_seconds"):
        own, base = arm.seconds(kind), baseline.seconds(kind)
        ratios = [b / max(a, 1e-9) for a, b in zip(own, base, strict=True)]
        found[kind] = {"median": statistics.median(own), "min": min(own), "max": max(own), "all": own}
        found[kind.replace("seconds", "speedup")] = {
            "of_medians": statistics.median(base) / max(statistics.median(own), 1e-9),
            "min": min(ratios),
            "max": max(ratios),
        }
    found["decode_tokens_per_second"] = (tokens - len(runs)) / max(found["decode_seconds"]["median"], 1e-9)
    found["efficiency"] = found["decode_speedup"]["of_medians"] / found["tokens_per_pass"]
    return found


def _sum_by_depth(counts: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*(row for row in counts if row), strict=True)]


def stock_arm(name: str, stock: Any, tokenizer: Any, weight_bytes: int, max_tokens: int, **more: Any) -> Arm:
    """mlx-lm's own generation; with ``draft_model`` its two-model speculative decoding."""
    import mlx_lm

    def start(prompt: list[int]) -> Iterator[Step]:
        passes, pending = 0, False
        for response in mlx_lm.stream_generate(stock, tokenizer, prompt, max_tokens=max_tokens, **more):
            # A pass ends with the target's own token; the last one may end before it.
            pending = bool(response.from_draft)
            passes += not pending
            yield Step([response.token], response.text, passes + pending)

    return Arm(name, start, weight_bytes, stock)


def our_arm(
    name: str, model: Any, tokenizer: Any, weight_bytes: int, max_tokens: int, *, drafter: Any, draft: str, **more: Any
) -> Arm:
    """Our generation; ``drafter`` is a drafter, or None for plain decoding."""
    from specstream_mlx import stream_generate

    more |= {"max_tokens": max_tokens, "drafter": "none" if drafter is None else drafter, "draft": draft}

    def start(prompt: list[int]) -> Iterator[Step]:
        for response in stream_generate(model, tokenizer, prompt, **more):
            yield Step(
                response.tokens,
                response.text,
                response.target_passes,
                response.drafted_by_depth,
                response.accepted_by_depth,
                response,
            )

    who = "none" if drafter is None or draft == "off" else drafter.name
    return Arm(name, start, weight_bytes, drafter=who, draft=draft)
