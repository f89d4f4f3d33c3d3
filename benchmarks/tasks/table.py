"""Writes `docs/paper_tables.md` from the figures under `benchmarks/tasks/<task>/results`.

    python -m benchmarks.tasks.table

Every figure comes from a JSON file that `run`, `checkpoint` or `ablation` wrote; a task without figures is left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .paper import paper_rows
from .task import Task, find_task

TASKS = ("sql", "e2e_nlg", "dialogsum")
DEFAULT_OUT = Path(__file__).parents[2] / "docs" / "paper_tables.md"
MODEL = "SmolLM2-135M-Instruct"

HEADER = """# The paper's table, for a real model

SmolLM2-135M-Instruct (30 layers, D 576, V 49,152), fine-tuned on the paper's three tasks with LoRA alone and with LoRA
and four streams (shared mode), both on the same rows and steps, and measured on each task's test file. The paper's own
rows stand below ours: theirs are models of 3.8 to 7 billion parameters in float16 on an A100.

Tokens per pass is the paper's call reduction ratio: generated tokens over passes of the target, the prompt's pass
included. Every text of ours equals plain decoding by mlx-lm on the same merged weights. The error is the standard
error of the mean over the test rows.
"""


def read_results(task: Task) -> dict[str, dict[str, Any]]:
    """The figures of a task by file name."""
    folder = task.folder / "results"
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first two columns hold words."""
    rule = ["---" if index < 2 else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)) + "\n"


def metric_cell(figures: dict[str, Any]) -> str:
    """The means with their errors, in the order of the metric's names."""
    metric = figures["metric"]
    if metric and isinstance(next(iter(metric.values())), dict):  # as `checkpoint` writes it
        return " / ".join(f"{value['mean']:.2f} ± {value['standard_error']:.2f}" for value in metric.values())
    errors = figures["standard_error"]
    return " / ".join(f"{value:.2f} ± {errors[name]:.2f}" for name, value in metric.items())


def number(value: Any, digits: int = 2) -> str:
    """A figure, or nothing where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def task_section(task: Task, results: dict[str, dict[str, Any]]) -> str:
    """One task: our rows, the paper's, what other weights give, the curve."""
    names = " / ".join(next(iter(results.values()))["metric"]) if results else ""
    rows = []
    if "lora" in results:
        rows.append([MODEL, "LoRA alone", "1.00", "1.00", metric_cell(results["lora"]), "0"])
    if "shared" in results:
        figures = results["shared"]
        speed = number(figures.get("speedup") or results.get("speed", {}).get("speedup"))
        rows.append(
            [
                MODEL,
                "Speculative Streaming",
                speed,
                number(figures["tokens_per_pass"]),
                metric_cell(figures),
                f"{figures['extra_parameters']:.1e}".replace("e+0", "e"),
            ]
        )
    for row in paper_rows(task.name):
        rows.append(
            [
                f"*paper: {row.model}*",
                row.method,
                number(row.speedup),
                number(row.tokens_per_pass),
                row.metric,
                row.extra_parameters,
            ]
        )
    parts = [f"## {task.title}\n", f"Data: {task.source}.\n"]
    parts.append(table(["model", "method", "speed-up", "tokens per pass", names, "extra parameters"], rows))
    if "shared" in results:
        parts.append(_sentence(results["shared"], results.get("speed")))
    others = [(name, results[name]) for name in ("bfloat16", "4bit") if name in results]
    if others:
        cells = [
            [
                name,
                f"{f['prompts']} prompts",
                number(f["tokens_per_pass"]),
                f"{f['prompts_with_equal_text']} of {f['prompts']}",
                str(f["ties"]),
            ]
            for name, f in others
        ]
        parts.append("Other weights, the same adapter:\n")
        parts.append(table(["weights", "on", "tokens per pass", "texts equal to plain decoding", "ties"], cells))
    if "curve" in results:
        cells = [
            [str(point["steps"]), f"{point['answer_tokens']:,}", number(point["tokens_per_pass"])]
            for point in results["curve"]["points"]
        ]
        parts.append(f"Tokens per pass over the training, {results['curve']['note']}:\n")
        parts.append(table(["steps", "answer tokens seen", "tokens per pass"], cells))
    return "\n".join(parts)


def _sentence(shared: dict[str, Any], speed: dict[str, Any] | None) -> str:
    accepted = ", ".join(
        f"{a / d:.2f}" for a, d in zip(shared["accepted_by_depth"], shared["drafted_by_depth"], strict=True) if d
    )
    text = (
        f"{shared['prompts']} prompts, {shared['tokens']:,} tokens, draft `{shared['draft']}`; accepted by depth "
        f"{accepted}; texts equal to plain decoding on {shared['prompts_with_equal_text']} of {shared['prompts']}."
    )
    if speed is not None:
        text += (
            f" The speed-up is the median over {speed['prompts']} prompts, decoding alone, interleaved with mlx-lm in "
            f"float32; with the prompt's pass {speed['speedup_total']:.2f}."
        )
    return text + "\n"


def ablation_section(path: Path) -> str:
    """The ablation's tables, where they were made."""
    if not path.exists():
        return ""
    rows = json.loads(path.read_text(encoding="utf-8"))
    cells = [
        [row["group"], row["setting"], number(row.get("tokens_per_pass")), number(row.get("relative_cost"))]
        for row in rows["rows"]
    ]
    return f"## The paper's choices, on this model\n\n{rows['note']}\n\n" + table(
        ["what", "setting", "tokens per pass", "training cost per step"], cells
    )


COMMANDS = """## How to make these figures
```bash
pip install 'specstream-mlx[torch,tasks]'
python -m benchmarks.tasks.base --out runs/smollm2
python -m benchmarks.tasks.run --task sql --base runs/smollm2/mlx --data sql/test.jsonl --json
python -m benchmarks.tasks.run --task e2e_nlg --base runs/smollm2/mlx --data e2e_nlg/test.jsonl --json
python -m benchmarks.tasks.run --task dialogsum --base runs/smollm2/mlx --data dialogsum/test.jsonl --json
```
The adapters lie under `benchmarks/tasks/<task>/adapter`, so nothing is trained. Without `--data` the published sets are
loaded by name (`pip install 'specstream-mlx[datasets]'`); their test rows are others than those measured here. On Linux
put `scripts/with-openblas` before each command. The trainings, LoRA alone included, are

```bash
python -m benchmarks.tasks.recipe --out runs/tasks --base runs/smollm2/hf --data-dir data
```
with `data/<task>/train.jsonl`; on a machine with CUDA `scripts/train-tasks-cuda` trains and evaluates all of them.
`python -m benchmarks.tasks.table` writes this page.
"""


def page() -> str:
    """The whole page."""
    parts = [HEADER]
    for name in TASKS:
        task = find_task(name)
        results = read_results(task)
        if results:
            parts.append(task_section(task, results))
    parts.append(ablation_section(Path(__file__).parent / "ablation.json"))
    parts.append(COMMANDS)
    return "\n".join(part for part in parts if part)


def main(arguments: list[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="benchmarks.tasks.table", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    namespace = parser.parse_args(arguments)
    namespace.out.write_text(page(), encoding="utf-8")
    print(namespace.out)


if __name__ == "__main__":
    main()
