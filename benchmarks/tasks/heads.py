"""Trains a draft head of another method on a task: Medusa, Hydra, EAGLE, EAGLE-3.

    python -m benchmarks.tasks.heads --task e2e_nlg --kind medusa --base runs/smollm2/hf --data train.jsonl \\
        --fine-tune runs/e2e/adapter --out runs/e2e-medusa --hours 0.4

Output: ``head`` under --out, an adapter directory that ``--adapter`` takes over the base with the fine-tune's LoRA; of
Medusa-2 (``--lora-rank``) also ``adapter``, its LoRA in PEFT's form. Given again, the command goes on from its newest
restart point.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from specstream_torch.heads import KINDS, HeadConfig, train_head

from .base import BASE_NAME
from .finetune import encode_rows
from .task import find_task, read_rows, task_names
from .text_to_sql.pretrain import keep_freed_memory

BUDGETS = {"num_steps": int, "hours": float, "base_tflops": float}


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="benchmarks.tasks.heads", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--task", required=True, choices=task_names())
    parser.add_argument("--kind", required=True, choices=sorted(KINDS))
    parser.add_argument("--base", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--fine-tune", type=Path, metavar="DIR", help="PEFT checkpoint whose LoRA belongs to the base")
    parser.add_argument("--data", type=Path, action="append", help="JSON lines; default: the published set by name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base-name", default=BASE_NAME, help="name to record for the base")
    parser.add_argument("--device", help="default: cuda when there is one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-minutes", type=float, default=4.0, help="between restart points")
    for field in fields(HeadConfig):
        if field.name == "kind":
            continue
        kind: Any = BUDGETS.get(field.name, type(field.default))
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind)
    namespace = parser.parse_args(arguments)
    task = find_task(namespace.task)
    chosen = {f.name: v for f in fields(HeadConfig) if (v := getattr(namespace, f.name)) is not None}
    try:
        config = HeadConfig(**chosen)
    except ValueError as error:
        parser.error(str(error))
    if namespace.data:
        rows = [row for path in namespace.data for row in read_rows(task, path)]
    elif task.published is not None:
        rows = task.published("train")
    else:
        parser.error(f"task {task.name} has no published set; give --data FILE")
    keep_freed_memory()
    torch.set_num_threads(namespace.threads)
    head = train_head(
        namespace.base,
        encode_rows(task, rows, namespace.base),
        namespace.out,
        config,
        fine_tune=namespace.fine_tune,
        base_name=namespace.base_name,
        device=namespace.device,
        save_minutes=namespace.save_minutes,
        report=lambda line: print(line, flush=True),
    )
    print(head)


if __name__ == "__main__":
    main()
