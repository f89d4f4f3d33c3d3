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
included. The error is the standard error of the mean over the test rows. Each task says on how many rows a figure was
measured, and by which command.
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
    """The means with their errors, in the order of the metric's names; `run` and `checkpoint` write them apart."""
    metric = figures["metric"]
    pairs = [
        (value["mean"], value["standard_error"])
        if isinstance(value, dict)
        else (value, figures["standard_error"][name])
        for name, value in metric.items()
    ]
    return " / ".join(f"{mean:.2f} ± {error:.2f}" for mean, error in pairs)


def number(value: Any, digits: int = 2) -> str:
    """A figure, or nothing where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def task_section(task: Task, results: dict[str, dict[str, Any]]) -> str:
    """One task: our rows, the paper's, what other weights give, the curve."""
    measured = results.get("run")
    shared = results.get("shared", measured)
    rows = []
    if "lora" in results:
        rows.append([MODEL, "LoRA alone", "1.00", "1.00", metric_cell(results["lora"]), "0"])
    if shared is not None:
        found = measured or {}
        extra = found.get("extra_parameters")
        rows.append(
            [
                MODEL,
                "Speculative Streaming",
                number(found.get("speedup")),
                number(found.get("tokens_per_pass")),
                metric_cell(shared),
                "" if extra is None else f"{extra:.1e}".replace("e+0", "e"),
            ]
        )
    for row in paper_rows(task.name):
        cells = [number(row.speedup), number(row.tokens_per_pass), row.metric, row.extra_parameters]
        rows.append([f"*paper: {row.model}*", row.method, *cells])
    names = " / ".join(next((f["metric"] for f in (shared, results.get("lora")) if f is not None), ()))
    parts = [f"## {task.title}\n", f"Data: {task.source}.\n"]
    parts.append(table(["model", "method", "speed-up", "tokens per pass", names, "extra parameters"], rows))
    parts.append(_sentences(results))
    others = [(name, results[name]) for name in ("bfloat16", "4bit") if name in results]
    if others:
        cells_of = [
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
        parts.append(table(["weights", "on", "tokens per pass", "texts equal to plain decoding", "ties"], cells_of))
    if "curve" in results:
        points = [
            [
                str(point["steps"]),
                f"{point['answer_tokens']:,}",
                number(point["chain"]),
                number(point["tokens_per_pass"]),
            ]
            for point in results["curve"]["points"]
        ]
        parts.append(f"Tokens per pass over the training, {results['curve']['note']}:\n")
        parts.append(table(["steps", "answer tokens of main", "chain", "tree"], points))
    return "\n".join(part for part in parts if part)


def _sentences(results: dict[str, dict[str, Any]]) -> str:
    """How many prompts each figure is of, and by what it was made."""
    text = []
    if "run" in results:
        run = results["run"]
        accepted = ", ".join(
            f"{a / d:.2f}" for a, d in zip(run["accepted_by_depth"], run["drafted_by_depth"], strict=True) if d
        )
        text.append(
            f"Tokens per pass: `run`, {run['prompts']} prompts, {run['tokens']:,} tokens, draft `{run['draft']}`, "
            f"accepted by depth {accepted}; texts equal to mlx-lm's on {run['prompts_with_equal_text']} of "
            f"{run['prompts']}."
        )
        if "speedup" in run:
            text.append(
                f"Speed-up: the median over the same prompts of mlx-lm's seconds over ours, decoding alone, in turn, "
                f"float32, one BLAS thread, beside other programs; with the prompt's pass {run['speedup_total']:.2f}."
            )
    for name, words in (("shared", "with streams"), ("lora", "LoRA alone")):
        if name in results:
            figures = results[name]
            counted = figures.get("counted_tokens_per_pass")
            more = ""
            if counted is not None:
                more = "; passes counted on all of them: " + ", ".join(f"{k} {v:.2f}" for k, v in counted.items())
            text.append(
                f"Metric {words}: `checkpoint`, {figures['prompts']} prompts, {figures['products']} products{more}."
            )
    return " ".join(text) + "\n" if text else ""


def ablation_section(path: Path) -> str:
    """The ablation's tables, where they were made."""
    if not path.exists():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    cells = [
        [row["group"], row["setting"], number(row["chain"]), number(row["tree"]), number(row["seconds_per_step"], 1)]
        for row in found["rows"]
    ]
    return f"## The paper's choices, on this model\n\n{found['note']}\n\n" + table(
        ["what", "setting", "chain", "tree", "processor seconds per training step"], cells
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


NEEDED = {"run": "tokens per pass by drafting", "shared": "the metric on the whole test file", "lora": "LoRA alone"}


def missing(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """What has not been measured yet, by task; nothing where all is there."""
    lines = [
        f"- {name}: {', '.join(words for kind, words in NEEDED.items() if kind not in found)}"
        for name, found in results.items()
        if NEEDED.keys() - found.keys()
    ]
    return "Not measured yet:\n\n" + "\n".join(lines) + "\n" if lines else ""


def page() -> str:
    """The whole page."""
    parts = [HEADER, missing({name: read_results(find_task(name)) for name in TASKS})]
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
