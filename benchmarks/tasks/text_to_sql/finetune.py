"""Fine-tunes LoRA, streams and pruner on the base, on examples that pretraining has not seen.

    python -m benchmarks.tasks.text_to_sql.finetune --out runs/text_to_sql

The training is the PyTorch twin's (`specstream_torch.finetune`), so the checkpoint is what any
user of it gets. An interrupted run goes on from its newest restart point when the same command is given again.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from specstream_torch.finetune import FinetuneConfig
from specstream_torch.finetune import finetune as train
from specstream_torch.loss import Example

from .pretrain import keep_freed_memory
from .stamps import digest, is_current, write_stamp
from .task import examples
from .tokenizer import ExampleEncoder

BASE_NAME = "specstream/text-to-sql-base"


@dataclass(frozen=True)
class FinetuneSettings:
    """What decides the fine-tune; restart points made with other settings are not continued.

    `max_anchors` is the number of random anchors per example, 0 for all. README.md says why the stream tensors
    learn so much faster than LoRA.
    """

    seed: int = 1
    num_steps: int = 2400
    batch_size: int = 16
    gamma: int = 4
    num_stream_layers: int = 2
    rank: int = 32
    prune_rank: int = 8
    stream_weight: float = 0.1
    learning_rate: float = 1.5e-3
    stream_lr_scale: float = 60.0
    warmup_steps: int = 60
    max_anchors: int = 16


def fresh_examples(encoder: ExampleEncoder, settings: FinetuneSettings) -> list[Example]:
    """As many training examples as the run has places for, each seen once."""
    seed = random.Random(f"finetune/{settings.seed}").getrandbits(48)
    drawn = itertools.islice(examples("train", seed), settings.num_steps * settings.batch_size)
    encoded = (encoder.whole(example) for example in drawn)
    return [Example(tuple(ids[:length]), tuple(ids[length:])) for ids, length in encoded]


def finetune(
    settings: FinetuneSettings,
    base: Path,
    out: Path,
    *,
    save_steps: int = 100,
    log_steps: int = 20,
    base_name: str = BASE_NAME,
    report: Callable[[str], None] = print,
) -> Path:
    """Fine-tune and return the PEFT checkpoint's directory, `adapter` under `out`."""
    adapter, restart = out / "adapter", out / "adapter.checkpoints"
    made_from = asdict(settings) | {"base": digest(base / "model.safetensors", base / "tokenizer.json")}
    if is_current(adapter, made_from):
        return adapter
    if restart.exists() and not is_current(restart, made_from):
        raise SystemExit(f"{restart} was made with other settings or another base; delete it or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_stamp(restart, made_from)
    config = FinetuneConfig(
        model=str(base),
        output=str(adapter),
        mode="shared",
        gamma=settings.gamma,
        num_stream_layers=settings.num_stream_layers,
        prune_rank=settings.prune_rank,
        rank=settings.rank,
        stream_weight=settings.stream_weight,
        learning_rate=settings.learning_rate,
        stream_lr_scale=settings.stream_lr_scale,
        warmup=settings.warmup_steps,
        batch_size=settings.batch_size,
        iters=settings.num_steps,
        max_anchors=settings.max_anchors or None,
        bf16=True,
        seed=settings.seed,
        log_every=log_steps,
        save_every=save_steps,
        resume=True,
        base_name=base_name,
    )
    train(config, fresh_examples(ExampleEncoder(base), settings), report=report)
    write_stamp(adapter, made_from)
    shutil.rmtree(restart, ignore_errors=True)
    return adapter


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add one option per field of the settings."""
    for field in fields(FinetuneSettings):
        default: Any = field.default
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(default), default=default)


def chosen_settings(namespace: argparse.Namespace) -> FinetuneSettings:
    """The settings that the command line asks for."""
    return FinetuneSettings(**{field.name: getattr(namespace, field.name) for field in fields(FinetuneSettings)})


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and fine-tune."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/text_to_sql"))
    parser.add_argument("--base", type=Path, help="default: base under --out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-steps", type=int, default=100, help="steps between restart points")
    parser.add_argument("--log-steps", type=int, default=20)
    add_options(parser)
    namespace = parser.parse_args(arguments)
    keep_freed_memory()
    torch.set_num_threads(namespace.threads)
    finetune(
        chosen_settings(namespace),
        namespace.base or namespace.out / "base",
        namespace.out,
        save_steps=namespace.save_steps,
        log_steps=namespace.log_steps,
        report=lambda line: print(line, flush=True),
    )


if __name__ == "__main__":
    main()
