"""Data to text: a restaurant's attributes to a sentence or two (E2E NLG challenge)."""

from __future__ import annotations

from typing import Any

from ..published import load_published
from ..rouge import rouge
from ..task import Row, Task


def prompt(row: Row) -> str:
    """The meaning representation as it was published, and what is asked for."""
    return f"{row['prompt']}\nDescription:"


def published(split: str) -> list[dict[str, Any]]:
    """GEM/e2e_nlg; its test rows are grouped by meaning representation already."""
    rows = []
    for row in load_published("GEM/e2e_nlg", split):
        answers = list(row.get("references") or []) or [row["target"]]
        key = {"references": answers} if split == "test" else {"answer": row["target"]}
        rows.append({"prompt": row["meaning_representation"], **key})
    return rows


TASK = Task(
    name="e2e_nlg",
    title="E2E-NLG",
    prompt=prompt,
    metric=rouge,
    training={"num_stream_layers": 8, "row_tokens": 160, "step_tokens": 800},
    published=published,
    source="the E2E NLG challenge (tuetschek/e2e-dataset), CC BY-SA 4.0",
    max_tokens=96,
    tree="best-first:15",
)
