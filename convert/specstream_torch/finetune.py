"""Fine-tune LoRA and streams on prompt/answer pairs and write a checkpoint of form A.

    python -m specstream_torch.finetune --model BASE --data train.jsonl --output OUT

Each JSONL row has ``prompt`` and ``answer`` (or ``completion``). The loss is on the answer and its end-of-text
token. Every run is deterministic per seed on one machine, and ``--resume`` continues where the newest checkpoint
under ``OUT.checkpoints`` stopped with the same numbers as an uninterrupted run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from specstream_mlx.formats.atomic import replaced_directory
from specstream_mlx.formats.jsonl import read_jsonl
from specstream_mlx.training.batches import iterate_batches, mixed_seed

from .checkpoint import (
    add_lora,
    load_base,
    load_checkpoint,
    read_stream_config,
    save_checkpoint,
    write_checkpoint,
)
from .loss import Example, LossReport, make_batch, streaming_loss
from .modeling import stream_module
from .self_targets import greedy_answers
from .streams import MODES, STREAM_IDS, STREAM_POSITIONS, StreamConfig

STATE_FILE = "trainer_state.pt"


@dataclass(frozen=True)
class FinetuneConfig:
    """Every setting of a run; `streams` gives the part that the checkpoint records as its contract."""

    model: str
    output: str
    data: str | None = None
    start: str | None = None
    mode: str = "shared"
    gamma: int = 4
    num_stream_layers: int = 2
    stream_id: str = "embedding"
    epsilon: float = 0.1
    stream_init_rank: int | None = None
    stream_position: str = "anchor_plus_j"
    prune_rank: int | None = None
    rank: int = 32
    alpha: float | None = None
    dropout: float = 0.0
    stream_weight: float = 0.1
    learning_rate: float = 5e-4
    stream_lr_scale: float = 1.0
    warmup: int = 0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    batch_size: int = 8
    accumulate: int = 1
    epochs: float = 5.0
    iters: int | None = None
    max_length: int = 2048
    max_anchors: int | None = None
    bf16: bool = False
    base_dtype: str = "float32"
    device: str | None = None
    seed: int = 0
    log_every: int = 10
    save_every: int = 0
    keep_checkpoints: int = 2
    resume: bool = False
    form: str = "A"
    base_name: str | None = None
    chat_template: bool = False
    self_targets: int | None = None

    @property
    def streams(self) -> StreamConfig:
        """The settings that trainer and runtime share."""
        return StreamConfig(
            gamma=self.gamma,
            num_stream_layers=self.num_stream_layers,
            mode=self.mode,
            stream_id=self.stream_id,
            epsilon=self.epsilon,
            stream_init="identity" if self.stream_init_rank is None else "low_rank",
            init_rank=self.stream_init_rank,
            stream_position=self.stream_position,
            prune_rank=self.prune_rank,
        )


def finetune(
    config: FinetuneConfig,
    examples: Sequence[Example] | None = None,
    *,
    report: Callable[[str], None] = print,
    after_save: Callable[[Any, int], None] | None = None,
) -> Path:
    """Run the recipe and return the checkpoint directory.

    ``examples`` replaces ``config.data`` and the base's tokenizer. ``after_save`` is called with the model and the
    iteration after every intermediate checkpoint, for evaluation.
    """
    torch.manual_seed(config.seed)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if examples is None:
        examples = read_examples(config)
    base = load_base(config.model, dtype=getattr(torch, config.base_dtype)).to(device)
    if config.self_targets is not None:
        eos_id = base.generation_config.eos_token_id
        examples = greedy_answers(
            base,
            examples,
            max_new_tokens=config.self_targets,
            eos_id=eos_id[0] if isinstance(eos_id, list) else eos_id,
            batch_size=config.batch_size,
        )
    examples, dropped = _within(examples, config.max_length)
    batches_per_epoch = math.ceil(len(examples) / config.batch_size)
    total = config.iters if config.iters is not None else math.ceil(config.epochs * batches_per_epoch)
    if total < 1:
        raise ValueError(f"{total} iterations asked for, expected at least 1")

    checkpoints = Path(f"{config.output}.checkpoints")
    newest = _newest_checkpoint(checkpoints) if config.resume else None
    if newest is None and config.start is not None:
        found = read_stream_config(config.start)
        if found != config.streams:
            raise ValueError(f"{config.start}: has {found}, the settings ask for {config.streams}")
        model = load_checkpoint(base, config.start, trainable=True)
    elif newest is None:
        model = add_lora(base, config.streams, rank=config.rank, alpha=config.alpha, dropout=config.dropout)
    else:
        model = load_checkpoint(base, newest, trainable=True)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    pruner = list(stream_module(model).prune.parameters()) if config.prune_rank is not None else []
    others = [parameter for parameter in parameters if not any(parameter is own for own in pruner)]
    optimizer = torch.optim.AdamW(_parameter_groups(model, config), weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / (config.warmup + 1), (total - i) / max(1, total - config.warmup))
    )
    done = _load_state(newest, config, optimizer, schedule) if newest is not None else 0
    report(
        f"{config.mode} mode on {device}: {sum(p.numel() for p in parameters):,} trainable parameters, "
        f"{len(examples):,} examples ({dropped} dropped as longer than {config.max_length} tokens), "
        f"{total:,} iterations of {config.batch_size} x {config.accumulate}, from iteration {done}"
    )

    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=config.bf16)
    source = iterate_batches(examples, config.batch_size, config.seed)
    for _ in range(done * config.accumulate):
        next(source)
    progress = _Progress(total, report)
    for iteration in range(done + 1, total + 1):
        optimizer.zero_grad(set_to_none=True)
        for _ in range(config.accumulate):
            rows = next(source)
            generator = torch.Generator().manual_seed(mixed_seed(config.seed, iteration))
            batch = make_batch(
                [examples[row] for row in rows],
                config.gamma,
                max_anchors=config.max_anchors,
                generator=generator,
            ).to(device)
            with autocast:
                result = streaming_loss(model, batch, stream_weight=config.stream_weight)
            (result.loss / config.accumulate).backward()
            progress.add(result, sum(len(examples[row]) for row in rows))
        # Each by its own norm: the pruner shares no gradient with the rest and must not shorten the rest's steps.
        for group in (pruner, others):
            torch.nn.utils.clip_grad_norm_(group, config.clip_norm)
        optimizer.step()
        schedule.step()
        if iteration % config.log_every == 0 or iteration == total:
            progress.line(iteration, optimizer.param_groups[0]["lr"])
        if config.save_every and iteration % config.save_every == 0 and iteration < total:
            _save_state(checkpoints, iteration, model, config, optimizer, schedule)
            if after_save is not None:
                after_save(model, iteration)
                model.train()

    training = {key: value for key, value in asdict(config).items() if key not in _NOT_RECORDED} | {"iters": total}
    return save_checkpoint(model, config.output, form=config.form, training=training, base_name=config.base_name)


_NOT_RECORDED = (
    "model",
    "output",
    "data",
    "start",
    "device",
    "resume",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "form",
)


def read_examples(config: FinetuneConfig) -> list[Example]:
    """Read and tokenise ``config.data`` with the base model's tokenizer."""
    from transformers import AutoTokenizer

    if config.data is None:
        raise ValueError("data is missing: give a JSONL file or examples")
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    examples = []
    for number, row in read_jsonl(Path(config.data)):
        answer = row.get("answer", row.get("completion"))
        if not isinstance(row.get("prompt"), str) or not isinstance(answer, str):
            raise ValueError(f"{config.data}:{number}: expected the text fields 'prompt' and 'answer'")
        examples.append(encode_example(tokenizer, row["prompt"], answer, chat_template=config.chat_template))
    return examples


def encode_example(tokenizer: Any, prompt: str, answer: str, *, chat_template: bool = False) -> Example:
    """Tokenise prompt and answer apart, as generation meets them, and end the answer with end-of-text."""
    if chat_template:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        prompt_ids = tokenizer(prompt)["input_ids"]
        if prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id:
            prompt_ids = prompt_ids[:-1]
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return Example(tuple(prompt_ids), (*answer_ids, tokenizer.eos_token_id))


def _parameter_groups(model: Any, config: FinetuneConfig) -> list[dict[str, Any]]:
    """LoRA first, then the stream tensors: a vector per stream moves further than a weight in a product."""
    streams = list(stream_module(model).parameters())
    lora = [p for p in model.parameters() if p.requires_grad and not any(p is s for s in streams)]
    groups = [
        {"params": lora, "lr": config.learning_rate},
        {"params": streams, "lr": config.learning_rate * config.stream_lr_scale},
    ]
    return [group for group in groups if group["params"]]


class _Progress:
    """Averages the reports of a logging interval into one line."""

    def __init__(self, total: int, report: Callable[[str], None]) -> None:
        self.total = total
        self.report = report
        self.results: list[LossReport] = []
        self.losses: list[torch.Tensor] = []
        self.tokens = 0
        self.since = time.perf_counter()

    def add(self, result: LossReport, tokens: int) -> None:
        self.losses.append(result.loss.detach())
        self.results.append(result)
        self.tokens += tokens

    def line(self, iteration: int, learning_rate: float) -> None:
        seconds = time.perf_counter() - self.since
        accuracies = [sum(column) / len(column) for column in zip(*(r.accuracies for r in self.results), strict=True)]
        chain = sum(r.chain_tokens for r in self.results) / len(self.results)
        parts = [
            f"iter {iteration}/{self.total}",
            f"loss {float(torch.stack(self.losses).mean()):.4f}",
            "acc " + " ".join("-" if math.isnan(a) else f"{a:.3f}" for a in accuracies),
            f"chain {chain:.2f}",
        ]
        pruners = [r.prune_loss for r in self.results if r.prune_loss is not None]
        if pruners:
            parts.append(f"prune {sum(pruners) / len(pruners):.3f}")
        parts += [f"lr {learning_rate:.2e}", f"{self.tokens / seconds:.0f} tok/s"]
        self.report("  ".join(parts))
        self.__init__(self.total, self.report)  # type: ignore[misc]


def _within(examples: Sequence[Example], max_length: int) -> tuple[list[Example], int]:
    kept = [example for example in examples if len(example) <= max_length]
    if not kept:
        raise ValueError(f"no example of {len(examples)} has at most {max_length} tokens")
    return kept, len(examples) - len(kept)


def _newest_checkpoint(directory: Path) -> Path | None:
    found = sorted(path for path in directory.glob("step-*") if (path / STATE_FILE).exists())
    return found[-1] if found else None


def _save_state(
    directory: Path, iteration: int, model: Any, config: FinetuneConfig, optimizer: Any, schedule: Any
) -> None:
    """Write a checkpoint of form A that `_load_state` can continue from, and drop the oldest ones."""
    with replaced_directory(directory / f"step-{iteration:07d}") as temporary:
        write_checkpoint(model, temporary, base_name=config.base_name)
        state = {
            "iteration": iteration,
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "config": json.dumps(asdict(config)),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        torch.save(state, temporary / STATE_FILE)
    for old in sorted(directory.glob("step-*"))[: -config.keep_checkpoints]:
        shutil.rmtree(old)


def _load_state(directory: Path, config: FinetuneConfig, optimizer: Any, schedule: Any) -> int:
    state = torch.load(directory / STATE_FILE, weights_only=True)
    before, now = json.loads(state["config"]), asdict(config)
    free = {*_NOT_RECORDED, "base_name"}
    changed = [f"{key}: {before[key]!r} -> {now[key]!r}" for key in now if key not in free and before[key] != now[key]]
    if changed:
        raise ValueError(f"cannot resume {directory} with other settings: " + "; ".join(changed))
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["torch_rng"])
    if state["cuda_rng"]:
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return int(state["iteration"])


def parse_arguments(arguments: Sequence[str] | None = None) -> FinetuneConfig:
    """Read the command line into a `FinetuneConfig`."""
    parser = argparse.ArgumentParser(prog="finetune", description="Fine-tune LoRA and speculative streams.")
    d = FinetuneConfig(model="", output="")
    add = parser.add_argument
    add("--model", required=True, help="base model: a Hugging Face directory or repository")
    add("--data", required=True, help="JSONL with 'prompt' and 'answer' (or 'completion')")
    add("--output", required=True, help="checkpoint directory to write")
    add(
        "--start",
        metavar="DIR",
        help="checkpoint to start from (default: fresh LoRA and streams)",
    )
    add(
        "--mode",
        choices=MODES,
        default=d.mode,
        help="shared: LoRA on all rows; lossless: on stream rows only",
    )
    add("--gamma", type=int, default=d.gamma, help="number of streams")
    add(
        "--num-stream-layers",
        type=int,
        default=d.num_stream_layers,
        help="N_s, the top layers that run streams",
    )
    add("--stream-id", choices=STREAM_IDS, default=d.stream_id, help="what tells one stream from another")
    add("--epsilon", type=float, default=d.epsilon, help="angle per stream with --stream-id value_rotation")
    add("--stream-init-rank", type=int, help="rank of f_eta (default: identity)")
    add(
        "--stream-position",
        choices=STREAM_POSITIONS,
        default=d.stream_position,
        help="rotary position of a stream",
    )
    add("--prune-rank", type=int, help="train the early-exit pruner with this rank (the paper: 8)")
    add("--rank", type=int, default=d.rank, help="LoRA rank")
    add("--alpha", type=float, help="LoRA alpha (default: twice the rank)")
    add("--dropout", type=float, default=d.dropout, help="LoRA dropout")
    add(
        "--stream-weight",
        type=float,
        default=d.stream_weight,
        help="alpha_j, the weight of each stream's loss",
    )
    add("--learning-rate", type=float, default=d.learning_rate, help="peak, decays linearly to zero")
    add("--stream-lr-scale", type=float, default=d.stream_lr_scale, help="learning rate of P_j, f_eta, o: times this")
    add("--warmup", type=int, default=d.warmup, help="iterations of linear warm-up")
    add("--weight-decay", type=float, default=d.weight_decay)
    add("--clip-norm", type=float, default=d.clip_norm, help="largest gradient norm")
    add("--batch-size", type=int, default=d.batch_size)
    add("--accumulate", type=int, default=d.accumulate, help="batches per optimiser step")
    add("--epochs", type=float, default=d.epochs)
    add("--iters", type=int, help="optimiser steps, instead of --epochs")
    add("--max-length", type=int, default=d.max_length, help="drop longer examples")
    add("--max-anchors", type=int, help="random anchors per example (default: all)")
    add("--bf16", action="store_true", help="run matrix products in bfloat16 (autocast)")
    add(
        "--base-dtype",
        choices=("float32", "bfloat16", "float16"),
        default=d.base_dtype,
        help="frozen weights",
    )
    add("--device", help="default: cuda when there is one")
    add("--seed", type=int, default=d.seed)
    add("--log-every", type=int, default=d.log_every)
    add("--save-every", type=int, default=d.save_every, help="iterations between restart points (0: none)")
    add("--keep-checkpoints", type=int, default=d.keep_checkpoints, help="restart points to keep")
    add("--resume", action="store_true", help="continue from the newest restart point")
    add("--form", choices=("A", "B"), default=d.form, help="where the stream tensors go")
    add("--base-name", help="name to record for the base model instead of --model")
    add("--self-targets", type=int, metavar="N", help="learn the base's own greedy answers of up to N tokens instead")
    add("--chat-template", action="store_true", help="wrap prompts in the tokenizer's chat template")
    return FinetuneConfig(**vars(parser.parse_args(arguments)))


def main() -> None:
    """Run the command line; Ctrl-C leaves the restart points."""
    with contextlib.suppress(BrokenPipeError):
        finetune(parse_arguments(), report=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
