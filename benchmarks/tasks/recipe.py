"""All trainings of the table, one after another: for each task LoRA with streams and LoRA alone, same rows and steps.

    python -m benchmarks.tasks.recipe --out runs/tasks --base runs/smollm2/hf --data-dir data

`data/<task>/train.jsonl` and `test.jsonl` are the files; without --data-dir the published sets are loaded by name.
A stage that is done is left out and one that was broken off goes on, so the same command continues. With --minutes
the stages share that much time instead of taking their steps, and --batch multiplies the rows of a step: what a GPU
wants. Output: `shared/<stage>/adapter` and `lora/<stage>/adapter`, PEFT checkpoints, and `figures.json`, what
`checkpoint` says of each.

Streams are slow to learn from nothing, and what they learn on one task serves the next: the later tasks start from
the first one's checkpoint. In the later stages of a task the streams learn the model's own answers. The baseline goes
the same way, from LoRA alone to LoRA alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from specstream_torch.packed.trainer import PackedConfig, train_packed

from .base import BASE_NAME
from .checkpoint import checkpoint_figures
from .finetune import encode_rows, steps_of
from .task import Task, find_task, read_rows
from .text_to_sql.pretrain import keep_freed_memory

BASELINE_SHARE = 0.3  # of the time: what LoRA alone takes for the steps that streams take in the rest


@dataclass(frozen=True)
class Stage:
    """One training. `settings` goes over the task's own; `share` is the part of --minutes that it gets."""

    name: str
    task: str
    start: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    stop_step: int | None = None
    share: float = 0.25


_WARM = {"stream_learning_rate": 0.01}  # of streams that have learned already
_OWN = _WARM | {"stream_weight": 0.5}

STAGES = (
    Stage("e2e_first", "e2e_nlg", None, {"num_steps": 280}, stop_step=87, share=0.15),
    Stage(
        "e2e_nlg",
        "e2e_nlg",
        "e2e_first",
        _OWN | {"num_steps": 122, "seed": 1, "own_prompts": 1000, "own_step_tokens": 800, "step_tokens": 400},
        stop_step=92,
        share=0.25,
    ),
    Stage("sql_first", "sql", "e2e_nlg", _WARM | {"num_steps": 107, "stream_weight": 0.4}, stop_step=62, share=0.1),
    Stage(
        "sql_second",
        "sql",
        "sql_first",
        _OWN
        | {
            "num_steps": 84,
            "seed": 1,
            "own_prompts": 600,
            "own_runs": 4,
            "own_max_tokens": 128,
            "own_step_tokens": 800,
            "step_tokens": 400,
        },
        share=0.1,
    ),
    Stage(
        "sql",
        "sql",
        "sql_second",
        _OWN
        | {
            "num_steps": 57,
            "seed": 2,
            "own_prompts": 600,
            "own_runs": 4,
            "own_max_tokens": 128,
            "own_step_tokens": 600,
            "step_tokens": 700,
            "own_alone": False,
        },
        share=0.15,
    ),
    Stage("dialogsum_first", "dialogsum", "e2e_nlg", _WARM | {"num_steps": 44, "stream_weight": 0.4}, share=0.1),
    Stage(
        "dialogsum",
        "dialogsum",
        "dialogsum_first",
        _OWN
        | {
            "num_steps": 57,
            "seed": 1,
            "own_prompts": 300,
            "own_runs": 4,
            "own_max_tokens": 128,
            "own_step_tokens": 1200,
            "step_tokens": 600,
        },
        share=0.15,
    ),
)


def stage_config(stage: Stage, task: Task, *, minutes: float | None, batch: int) -> PackedConfig:
    """The settings of a stage with streams."""
    settings = dict(task.training) | dict(stage.settings)
    for name in ("step_tokens", "own_step_tokens", "own_prompts"):
        if name in settings:
            settings[name] *= batch
    if minutes is not None:
        settings |= {"num_steps": None, "hours": minutes / 60 * stage.share * (1 - BASELINE_SHARE)}
    return PackedConfig(**settings)


def run_recipe(
    base: Path, out: Path, data_dir: Path | None, *, minutes: float | None, batch: int, device: str | None
) -> None:
    """Train everything, shared first, since the baseline takes its numbers of steps."""
    for kind in ("shared", "lora"):
        for stage in STAGES:
            task = find_task(stage.task)
            config = stage_config(stage, task, minutes=minutes, batch=batch)
            stop_step = stage.stop_step if minutes is None else None
            if kind == "lora":
                steps = steps_of(out / "shared" / stage.name)
                total = config.num_steps if stop_step is not None else steps
                config = replace(config, num_steps=total, hours=None, num_stream_layers=0)
            print(f"{kind} {stage.name}", flush=True)
            train_packed(
                base,
                encode_rows(task, _rows(task, data_dir, "train"), base),
                out / kind / stage.name,
                config,
                start=out / kind / stage.start / "adapter" if stage.start is not None else None,
                base_name=BASE_NAME,
                device=device,
                stop_step=stop_step,
                report=lambda line: print(line, flush=True),
            )


def figures(base: Path, out: Path, data_dir: Path | None, device: str, limit: int | None) -> dict[str, Any]:
    """The figures of every finished task, both ways."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        if stage.name != stage.task:
            continue
        task = find_task(stage.task)
        rows = _rows(task, data_dir, "test")[:limit]
        for kind in ("lora", "shared"):
            checkpoint = out / kind / stage.name / "adapter"
            name = f"{task.name} {kind}"
            found[name], _ = checkpoint_figures(
                task, rows, base, checkpoint, device=device, batch_size=128, dtype="bfloat16"
            )
            print(json.dumps({name: found[name]}), flush=True)
    return found


def _rows(task: Task, data_dir: Path | None, split: str) -> list[dict[str, Any]]:
    if data_dir is not None:
        return read_rows(task, data_dir / task.name / f"{split}.jsonl")
    if task.published is None:
        raise SystemExit(f"task {task.name} has no published set; give --data-dir")
    return task.published(split)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, train and measure."""
    parser = argparse.ArgumentParser(prog="benchmarks.tasks.recipe", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--data-dir", type=Path, help="holds <task>/train.jsonl and test.jsonl")
    parser.add_argument("--minutes", type=float, help="share this much time instead of taking the recorded steps")
    parser.add_argument("--batch", type=int, default=1, help="multiplies the tokens of a step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, help="test rows per task")
    namespace = parser.parse_args(arguments)
    keep_freed_memory()
    torch.set_num_threads(namespace.threads)
    run_recipe(
        namespace.base,
        namespace.out,
        namespace.data_dir,
        minutes=namespace.minutes,
        batch=namespace.batch,
        device=namespace.device,
    )
    found = figures(namespace.base, namespace.out, namespace.data_dir, namespace.device, namespace.limit)
    (namespace.out / "figures.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
