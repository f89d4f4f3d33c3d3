"""What a task is: how its rows become prompts, and what an answer is worth.

Each task is a package beside this file whose module `benchmark` has a `TASK`; a new one needs no list to be changed.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent

Row = Mapping[str, Any]
Metric = Callable[[Sequence[Row], Sequence[str]], dict[str, list[float]]]


@dataclass(frozen=True)
class Task:
    """A task's rows, prompts and metric.

    Attributes:
        name: of the package.
        title: for tables.
        prompt: a row to the text that the model goes on with; the answer begins with a space.
        metric: rows and answers to one value per row under each name, as a part of one.
        fields: what a row must have besides `prompt` and a reference.
        training: settings of `specstream_torch.packed.PackedConfig` that the task's fine-tune takes.
        published: loads the set that others published, by name, through `datasets`: split to rows.
        source: data, licence, where from; for cards.
        max_tokens: longest answer.
        draft, tree: how drafts are made unless the command says otherwise; `tree` None is the engine's own.
    """

    name: str
    title: str
    prompt: Callable[[Row], str]
    metric: Metric
    fields: tuple[str, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    published: Callable[[str], list[dict[str, Any]]] | None = None
    source: str = ""
    max_tokens: int = 128
    draft: str = "tree"
    tree: str | None = None

    @property
    def folder(self) -> Path:
        """Where the task's card and adapter are."""
        return FOLDER / self.name

    @property
    def adapter(self) -> Path:
        """The adapter that ships with the task."""
        return self.folder / "adapter"


def task_names() -> list[str]:
    """The tasks that there are."""
    return sorted(path.parent.name for path in FOLDER.glob("*/benchmark.py"))


def find_task(name: str) -> Task:
    """Return the task of this name.

    Raises:
        SystemExit: there is none.
    """
    if name not in task_names():
        raise SystemExit(f"task {name!r} is not known; the tasks are {', '.join(task_names())}")
    task: Task = importlib.import_module(f"benchmarks.tasks.{name}.benchmark").TASK
    return task


def read_rows(task: Task, path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Read a file of JSON lines with `prompt`, the task's own fields, and `answer` or `references`.

    Raises:
        SystemExit: the file cannot be read, or a row lacks a field.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; give a file of JSON lines") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if limit is not None and len(rows) == limit:
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SystemExit(f"{path}:{number}: not JSON ({error})") from None
        missing = [name for name in ("prompt", *task.fields) if not isinstance(row.get(name), str)]
        if missing:
            raise SystemExit(f"{path}:{number}: the text field {missing[0]!r} is missing, task {task.name} needs it")
        if not references(row):
            raise SystemExit(f"{path}:{number}: neither 'answer' nor 'references' is there")
        rows.append(row)
    if not rows:
        raise SystemExit(f"{path}: no rows")
    return rows


def references(row: Row) -> list[str]:
    """The right answers of a row."""
    if isinstance(row.get("references"), list):
        return [str(text) for text in row["references"]]
    return [str(row["answer"])] if isinstance(row.get("answer"), str) else []


def default_rows(task: Task) -> list[dict[str, Any]]:
    """The task's own test rows, or the published set's."""
    own = task.folder / "heldout.jsonl"
    if own.exists():
        return read_rows(task, own)
    if task.published is None:
        raise SystemExit(f"task {task.name} has no test rows of its own; give --data FILE")
    return task.published("test")
