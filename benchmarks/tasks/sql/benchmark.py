"""Text to SQL: a schema and a question to a query (Spider, in the form of SqlContext)."""

from __future__ import annotations

from typing import Any

from ..published import load_published
from ..task import Row, Task
from .metric import sql_metric

NUM_PUBLISHED_TEST = 500


def prompt(row: Row) -> str:
    """The CREATE TABLE statements, the question, and what is asked for."""
    return f"{row['context']}\nQuestion: {row['prompt']}\nSQL:"


def published(split: str) -> list[dict[str, Any]]:
    """b-mc2/sql-create-context, which has one split; its last rows are the test."""
    rows = [
        {"prompt": row["question"], "context": row["context"], "answer": row["answer"]}
        for row in load_published("b-mc2/sql-create-context", "train")
    ]
    return rows[:-NUM_PUBLISHED_TEST] if split == "train" else rows[-NUM_PUBLISHED_TEST:]


TASK = Task(
    name="sql",
    title="SQL",
    prompt=prompt,
    metric=sql_metric,
    fields=("context",),
    training={"num_stream_layers": 8, "row_tokens": 288, "step_tokens": 1000, "max_length": 448},
    published=published,
    source="Spider (taoyds/spider), CC BY-SA 4.0",
    max_tokens=192,
    tree="best-first:15",
)
