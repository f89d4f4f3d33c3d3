"""Fine-tunes a base on a task with the PyTorch trainer: LoRA with streams, or LoRA alone.

    python -m benchmarks.tasks.finetune --task sql --base runs/smollm2/hf --data train.jsonl --out runs/sql --hours 0.4
    python -m benchmarks.tasks.finetune --task sql --base ... --data ... --out runs/sql-lora --lora-only --like runs/sql

The second takes the rows and the number of steps of the first. Output: `adapter` under --out, a PEFT checkpoint of
form A (LoRA alone: PEFT's own). Given again, the command goes on from its newest restart point.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from specstream_torch.finetune import encode_example
from specstream_torch.loss import Example
from specstream_torch.packed.trainer import PackedConfig, train_packed

from .base import BASE_NAME
from .task import Task, find_task, read_rows, references, task_names
from .text_to_sql.pretrain import keep_freed_memory


def encode_rows(task: Task, rows: list[dict[str, Any]], base: Path) -> list[Example]:
    """Tokenise rows as the task's prompts; a row with several references gives one example each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(base))
    return [encode_example(tokenizer, task.prompt(row), f" {text}") for row in rows for text in references(row)]


def steps_of(checkpoint: Path) -> int:
    """How many steps made a checkpoint."""
    config = json.loads((checkpoint / "adapter" / "specstream_config.json").read_text(encoding="utf-8"))
    return int(config["training"]["steps"])


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and fine-tune."""
    parser = argparse.ArgumentParser(prog="benchmarks.tasks.finetune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--task", required=True, choices=task_names())
    parser.add_argument("--base", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--data", type=Path, action="append", help="JSON lines; default: the published set by name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lora-only", action="store_true", help="the paper's baseline: no streams")
    parser.add_argument("--start", type=Path, metavar="DIR", help="go on from this checkpoint instead of from nothing")
    parser.add_argument("--like", type=Path, metavar="DIR", help="take the number of steps of this output")
    parser.add_argument("--base-name", default=BASE_NAME, help="name to record for the base")
    parser.add_argument("--device", help="default: cuda when there is one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-minutes", type=float, default=4.0, help="between restart points")
    parser.add_argument("--keep-every", type=int, default=0, help="steps between adapters kept for a curve")
    parser.add_argument("--stop-step", type=int, help="end there, before the budget is used")
    for field in fields(PackedConfig):
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
            continue
        kind: Any = {"num_steps": int, "hours": float}.get(field.name, type(field.default))
        parser.add_argument(flag, type=kind)
    namespace = parser.parse_args(arguments)
    task = find_task(namespace.task)
    chosen = dict(task.training)
    chosen |= {f.name: v for f in fields(PackedConfig) if (v := getattr(namespace, f.name)) is not None}
    if namespace.like is not None:
        chosen |= {"num_steps": steps_of(namespace.like), "hours": None}
    if namespace.lora_only:
        chosen["num_stream_layers"] = 0
    if namespace.data:
        rows = [row for path in namespace.data for row in read_rows(task, path)]
    elif task.published is not None:
        rows = task.published("train")
    else:
        parser.error(f"task {task.name} has no published set; give --data FILE")
    keep_freed_memory()
    torch.set_num_threads(namespace.threads)
    adapter = train_packed(
        namespace.base,
        encode_rows(task, rows, namespace.base),
        namespace.out,
        replace(PackedConfig(num_steps=1), **({"num_steps": None} | chosen)),
        start=namespace.start,
        base_name=namespace.base_name,
        device=namespace.device,
        save_minutes=namespace.save_minutes,
        keep_every=namespace.keep_every,
        stop_step=namespace.stop_step,
        report=lambda line: print(line, flush=True),
    )
    print(adapter)


if __name__ == "__main__":
    main()
