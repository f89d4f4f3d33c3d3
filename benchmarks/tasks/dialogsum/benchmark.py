"""Summaries of dialogues (DialogSum)."""

from __future__ import annotations

from typing import Any

from ..published import load_published
from ..rouge import rouge
from ..task import Row, Task


def prompt(row: Row) -> str:
    """The dialogue, and what is asked for."""
    return f"{row['prompt']}\nSummary:"


def published(split: str) -> list[dict[str, Any]]:
    """knkarthick/dialogsum; the three references of a test dialogue are three rows there."""
    texts: dict[str, list[str]] = {}
    for row in load_published("knkarthick/dialogsum", split):
        texts.setdefault(row["dialogue"], []).append(row["summary"])
    if split == "test":
        return [{"prompt": dialogue, "references": summaries} for dialogue, summaries in texts.items()]
    return [{"prompt": dialogue, "answer": text} for dialogue, summaries in texts.items() for text in summaries]


TASK = Task(
    name="dialogsum",
    title="DialogSum",
    prompt=prompt,
    metric=rouge,
    training={"num_stream_layers": 8, "row_tokens": 320, "step_tokens": 1600, "max_length": 400},
    published=published,
    source="DialogSum (cylnlp/dialogsum), CC BY-NC-SA 4.0: not for commercial use",
    max_tokens=128,
    tree="best-first:15",
)
