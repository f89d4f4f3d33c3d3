"""Counts of a server, as Prometheus reads them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Metrics:
    """Written by the model's thread and read by others; every value is a number of its own."""

    requests: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    target_passes: int = 0
    rounds: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    running: int = 0
    waiting: int = 0
    prefix_entries: int = 0
    prefix_bytes: int = 0

    def count_depths(self, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """Add what one answer drafted and what of it was accepted, by depth."""
        for kept, new in ((self.drafted, drafted), (self.accepted, accepted)):
            kept.extend([0] * (len(new) - len(kept)))
            for depth, count in enumerate(new):
                kept[depth] += count

    def text(self) -> str:
        """The text format of Prometheus, version 0.0.4."""
        lines: list[str] = []

        def add(name: str, kind: str, what: str, values: Sequence[tuple[str, float]]) -> None:
            lines.extend([f"# HELP specstream_{name} {what}", f"# TYPE specstream_{name} {kind}"])
            lines.extend(f"specstream_{name}{labels} {value:g}" for labels, value in values)

        by_outcome = [(f'{{outcome="{name}"}}', count) for name, count in sorted(self.requests.items())]
        add("requests_total", "counter", "Answers by how they ended.", by_outcome)
        add("prompt_tokens_total", "counter", "Prompt tokens.", [("", self.prompt_tokens)])
        add(
            "cached_prompt_tokens_total",
            "counter",
            "Prompt tokens that were not run again.",
            [("", self.cached_tokens)],
        )
        add("generated_tokens_total", "counter", "Generated tokens.", [("", self.generated_tokens)])
        add("target_passes_total", "counter", "Passes that gave an answer tokens.", [("", self.target_passes)])
        add("rounds_total", "counter", "Passes of the target, for one answer or several.", [("", self.rounds)])
        rate = self.generated_tokens / self.target_passes if self.target_passes else 0.0
        add("tokens_per_pass", "gauge", "Generated tokens per pass since the start.", [("", rate)])
        for name, counts in (("drafted", self.drafted), ("accepted", self.accepted)):
            by_depth = [(f'{{depth="{depth + 1}"}}', float(count)) for depth, count in enumerate(counts)]
            add(f"{name}_passes_total", "counter", f"Passes in which a token of this depth was {name}.", by_depth)
        add("running_requests", "gauge", "Answers being made.", [("", self.running)])
        add("waiting_requests", "gauge", "Requests that wait for a place.", [("", self.waiting)])
        add("prompt_cache_entries", "gauge", "Prompts whose caches are kept.", [("", self.prefix_entries)])
        add("prompt_cache_bytes", "gauge", "Bytes of kept caches.", [("", self.prefix_bytes)])
        return "\n".join(lines) + "\n"
