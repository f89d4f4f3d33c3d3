"""Tokens per pass over the training: what each kept checkpoint of a run would take for its own answers.

    python -m benchmarks.tasks.curve --task sql --base runs/smollm2/hf --run runs/tasks/shared/sql --data test.jsonl

`finetune --keep-every N` keeps the checkpoints; --run may be repeated, in the order of the stages. The passes are
counted, as `checkpoint` does it. The points go to the task's `results/curve.json`, which the table reads.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from .checkpoint import checkpoint_figures
from .task import Task, default_rows, find_task, read_rows, task_names
from .text_to_sql.pretrain import keep_freed_memory

TREE = 15


def checkpoints_of(runs: list[Path]) -> list[tuple[Path, int, int]]:
    """The kept checkpoints in order, each with its steps and the answer tokens that main has seen, over all runs."""
    found = []
    before_steps = before_tokens = 0
    for run in runs:
        steps = tokens = 0
        for path in [*sorted((run / "curve").glob("step-*")), run / "adapter"]:
            training = json.loads((path / "specstream_config.json").read_text(encoding="utf-8"))["training"]
            steps, tokens = int(training["steps"]), int(training["tokens"])
            found.append((path, before_steps + steps, before_tokens + tokens))
        before_steps += steps
        before_tokens += tokens
    return found


def curve(task: Task, rows: list[dict[str, Any]], base: Path, runs: list[Path], dtype: str | None) -> dict[str, Any]:
    """The points of a task."""
    points = []
    for path, steps, tokens in checkpoints_of(runs):
        figures, _ = checkpoint_figures(task, rows, base, path, dtype=dtype, trees=(0, TREE))
        counted = figures["counted_tokens_per_pass"]
        points.append(
            {
                "steps": steps,
                "answer_tokens": tokens,
                "chain": counted["chain"],
                "tokens_per_pass": counted[f"best-first:{TREE}"],
            }
        )
        print(json.dumps(points[-1]), flush=True)
    return {"note": f"counted on {len(rows)} test prompts with trees of {TREE} nodes", "points": points}


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, measure and write."""
    parser = argparse.ArgumentParser(prog="benchmarks.tasks.curve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--task", required=True, choices=task_names())
    parser.add_argument("--base", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--run", type=Path, action="append", required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="default: results/curve.json of the task")
    namespace = parser.parse_args(arguments)
    keep_freed_memory()
    torch.set_num_threads(namespace.threads)
    task = find_task(namespace.task)
    rows = read_rows(task, namespace.data, namespace.limit) if namespace.data else default_rows(task)
    found = curve(task, rows[: namespace.limit], namespace.base, namespace.run, namespace.dtype)
    out = namespace.out or task.folder / "results" / "curve.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
