"""Trains LoRA, and streams unless asked for LoRA alone, on packed rows within a budget of time or of steps.

The learning rate warms up and then falls linearly to zero with the part of the budget that is used. A run leaves
restart points and goes on from the newest when it is started again with the same settings.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from specstream_mlx.formats.atomic import replaced_directory

from ..checkpoint import add_lora, load_base, load_checkpoint, upstream_deprecation_ignored, write_checkpoint
from ..loss import Example
from ..modeling import causal_lm, stream_module
from ..streams import StreamConfig
from .answers import own_answers
from .llama import PROJECTIONS, PackedLlama
from .loss import PackedLoss, head_rows, packed_loss
from .packing import PackedBatch, frequent_tokens, iterate_steps, pack

STATE_FILE = "trainer_state.pt"


@dataclass(frozen=True)
class PackedConfig:
    """Every setting that decides the run. `num_steps` or `hours` is the budget; `hours` counts processor time.

    `num_stream_layers` 0 trains LoRA alone. `lora_layers` counts from the top. `stream_scale` is the size of the
    first stream embeddings and `stream_learning_rate` the size of their steps, both relative to the residual stream
    that they are added to. With `own_prompts` the model first answers so many of the prompts itself, and the streams
    learn those answers, `own_step_tokens` of rows per step, while main goes on learning the examples: what streams
    have to foresee is what the model says. The prompts are drawn in runs of `own_runs` that follow one another in
    sorted order, so that they share a beginning where the task's prompts do. Without `own_alone` the streams learn the
    examples' answers beside the model's own.
    """

    num_steps: int | None = None
    hours: float | None = None
    gamma: int = 4
    num_stream_layers: int = 10
    rank: int = 12
    lora_layers: int = 20
    learning_rate: float = 1e-3
    stream_learning_rate: float = 0.02
    stream_scale: float = 0.1
    stream_weight: float = 0.2
    distill: float = 0.5
    warmup: float = 0.04
    clip_norm: float = 1.0
    max_branches: int = 4
    row_tokens: int = 256
    step_tokens: int = 1536
    max_length: int = 640
    vocab_frequent: int = 4096
    vocab_random: int = 1024
    own_prompts: int = 0
    own_runs: int = 1
    own_step_tokens: int = 0
    own_max_tokens: int = 96
    own_alone: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.num_steps is None) == (self.hours is None):
            raise ValueError("give either num_steps or hours")


def train_packed(
    base_directory: Path,
    examples: Sequence[Example],
    out: Path,
    config: PackedConfig,
    *,
    start: Path | None = None,
    base_name: str | None = None,
    device: str | None = None,
    save_minutes: float = 4.0,
    keep_every: int = 0,
    stop_step: int | None = None,
    log_steps: int = 10,
    report: Callable[[str], None] = print,
) -> Path:
    """Train and return the checkpoint `out`/adapter: form A, or PEFT's own for LoRA alone.

    `start` is a checkpoint of the same kind to go on from. With `keep_every` the adapters of every so many steps are
    kept under `out`/curve.
    `stop_step` ends the run there, before its budget is used.
    """
    adapter, restart = out / "adapter", out / "restart"
    if (adapter / "adapter_config.json").exists():
        report(f"{adapter} is there already")
        return adapter
    out.mkdir(parents=True, exist_ok=True)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    kept_examples = [example for example in examples if len(example) <= config.max_length]
    state = _load_state(restart, config)
    model = _prepare(base_directory, config, restart if state else start).to(device)
    dtype = fastest_dtype(device, causal_lm(model).config.hidden_size)
    fast = PackedLlama(model, dtype)
    streams = stream_module(model) if config.num_stream_layers else None
    lora = [p for name, p in model.named_parameters() if "lora_" in name]
    if streams is not None and state is None:
        with torch.no_grad():
            scale = _residual_scale(fast, kept_examples, config, device)
            if start is None:
                streams.stream_embeddings.mul_(scale * config.stream_scale / streams.stream_embeddings.std())
        report(f"the residual stream below the stream layers is {scale:.2f} per coordinate")
    else:
        scale = state["scale"] if state else 1.0
    groups: list[dict[str, Any]] = [{"params": lora, "peak": config.learning_rate}]
    if streams is not None:
        groups.append({"params": list(streams.parameters()), "peak": config.stream_learning_rate * scale})
    for parameter in (p for group in groups for p in group["params"]):
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, betas=(0.9, 0.98))
    step, used, seen, counts = 0, 0.0, 0, {"tokens": 0, "examples": 0}
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        step, used, counts = state["step"], state["used"], state["counts"]
    frequent = frequent_tokens(kept_examples, config.vocab_frequent)
    source = iterate_steps(
        kept_examples,
        seed=config.seed,
        max_branches=config.max_branches,
        row_tokens=config.row_tokens,
        step_tokens=config.step_tokens,
    )
    own_source = None
    if streams is not None and config.own_prompts:
        own = _own_examples(out / "own.json", fast, causal_lm(model).config.eos_token_id, kept_examples, config, report)
        own_source = iterate_steps(
            own,
            seed=config.seed,
            max_branches=config.max_branches,
            row_tokens=config.row_tokens,
            step_tokens=config.own_step_tokens,
        )
    for _ in range(step):
        next(source)
        if own_source is not None:
            next(own_source)
    report(
        f"{sum(p.numel() for group in groups for p in group['params']):,} parameters, {len(kept_examples):,} of "
        f"{len(examples):,} examples, {str(dtype).removeprefix('torch.')} on {device}, from step {step}"
    )
    done: list[PackedLoss] = []
    saved, clock = time.monotonic(), _Clock(device)
    clock_start, interval = clock() - used, (clock(), 0)
    while True:
        used = clock() - clock_start
        progress = step / config.num_steps if config.num_steps is not None else used / (3600 * (config.hours or 1))
        if progress >= 1 or step == stop_step:
            break
        rate = min((progress + 1e-3) / config.warmup, (1 - progress) / (1 - config.warmup))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * max(rate, 1e-3)
        batch = pack(next(source), config.gamma, random.Random(f"{config.seed}/{step}"))
        if own_source is None:
            done.append(_step(fast, streams, batch, frequent, config, device, step))
        else:
            result = _step(fast, None if config.own_alone else streams, batch, frequent, config, device, step)
            shuffler = random.Random(f"{config.seed}/{step}/own")
            own_batch = pack(next(own_source), config.gamma, shuffler, main_counts=False)
            ahead = _step(fast, streams, own_batch, frequent, config, device, step)
            done.append(replace(ahead, main_loss=result.main_loss, main_accuracy=result.main_accuracy))
        torch.nn.utils.clip_grad_norm_(lora, config.clip_norm)
        if streams is not None:
            torch.nn.utils.clip_grad_norm_(list(streams.parameters()), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        fast.refresh()
        step += 1
        seen += len(batch.main_targets)
        counts["tokens"] += len(batch.main_targets)
        counts["examples"] += batch.num_examples
        if step % log_steps == 0:
            now = clock()
            line = _summary(done) | {"step": step, "progress": round(progress, 4), **counts}
            line["tokens_per_second"] = round((seen - interval[1]) / (now - interval[0]), 1)
            with (out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            report(json.dumps(line))
            done, interval = [], (now, seen)
        if keep_every and step % keep_every == 0:
            with replaced_directory(out / "curve" / f"step-{step:05d}") as temporary:
                _write(model, temporary, config, base_name, counts | {"steps": step})
        if time.monotonic() - saved > 60 * save_minutes:
            with replaced_directory(restart) as temporary:
                _write(model, temporary, config, base_name, counts | {"steps": step})
                state = {"step": step, "used": clock() - clock_start, "optimizer": optimizer.state_dict()}
                state |= {"scale": scale, "config": json.dumps(asdict(config)), "counts": counts}
                torch.save(state, temporary / STATE_FILE)
            saved = time.monotonic()
    with torch.no_grad():  # what is shipped in float16 is what was converted and verified
        for parameter in lora:
            parameter.copy_(parameter.half().float())
    with replaced_directory(adapter) as temporary:
        _write(model, temporary, config, base_name, counts | {"steps": step, "processor_seconds": round(used)})
    shutil.rmtree(restart, ignore_errors=True)
    return adapter


def fastest_dtype(device: str, hidden_size: int) -> torch.dtype:
    """bfloat16 where this machine multiplies it faster than float32, which is timed; always on a GPU."""
    if device != "cpu":
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(512, hidden_size).to(dtype)
        weight = torch.randn(4 * hidden_size, hidden_size).to(dtype)
        x @ weight.t()
        start = time.perf_counter()
        for _ in range(8):
            x @ weight.t()
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=lambda dtype: seconds[dtype])


class _Clock:
    """Processor time on a CPU, which other work does not stretch; the wall clock on a GPU, after its work is done."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.monotonic()


def _step(
    fast: PackedLlama,
    streams: Any,
    batch: PackedBatch,
    frequent: torch.Tensor,
    config: PackedConfig,
    device: str,
    step: int,
) -> PackedLoss:
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    vocabulary = head_rows(frequent, batch, config.vocab_random, fast.head.shape[0], generator).to(device)
    batch = batch.to(device)
    embeddings = streams.stream_embeddings if streams is not None else None
    main, stream_hidden = fast(batch, embeddings, config.num_stream_layers)
    result = packed_loss(
        main,
        stream_hidden,
        fast.head,
        batch,
        vocabulary,
        stream_weight=config.stream_weight,
        distill=config.distill,
    )
    result.loss.backward()
    result.loss = result.loss.detach()
    return result


def _own_examples(
    path: Path,
    fast: PackedLlama,
    eos_id: int,
    examples: Sequence[Example],
    config: PackedConfig,
    report: Callable[[str], None],
) -> list[Example]:
    """The model's own answers to prompts drawn from the examples, kept in a file so that a restart has them too."""
    if path.exists():
        return [Example(tuple(prompt), tuple(answer)) for prompt, answer in json.loads(path.read_text())]
    distinct = sorted({example.prompt for example in examples})
    runs = [distinct[start : start + config.own_runs] for start in range(0, len(distinct), config.own_runs)]
    random.Random(config.seed).shuffle(runs)
    prompts = [prompt for run in runs for prompt in run]
    started = time.process_time()
    found = own_answers(fast, prompts[: config.own_prompts], max_tokens=config.own_max_tokens, eos_id=eos_id)
    report(
        f"{len(found):,} of {config.own_prompts:,} prompts answered to the end, {sum(len(e.answer) for e in found):,} "
        f"tokens, {time.process_time() - started:.0f} s"
    )
    if not found:
        raise ValueError(f"no answer of the model ended within {config.own_max_tokens} tokens; train main first")
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([[example.prompt, example.answer] for example in found]))
    partial.rename(path)
    return found


def _prepare(base_directory: Path, config: PackedConfig, restart: Path | None) -> PeftModel:
    base = load_base(base_directory)
    if restart is not None:
        if config.num_stream_layers:
            model = load_checkpoint(base, restart, trainable=True)
            streams = stream_module(model)
            if streams.config.gamma != config.gamma:
                raise ValueError(f"{restart} has {streams.config.gamma} streams, {config.gamma} are asked for")
            # Streams of another depth go on from what they were for this one.
            streams.config = replace(streams.config, num_stream_layers=config.num_stream_layers)
            return model
        with upstream_deprecation_ignored():
            return PeftModel.from_pretrained(base, str(restart), is_trainable=True)
    num_layers = base.config.num_hidden_layers
    layers = list(range(max(0, num_layers - config.lora_layers), num_layers))
    if config.num_stream_layers:
        settings = StreamConfig(gamma=config.gamma, num_stream_layers=config.num_stream_layers)
        return add_lora(base, settings, rank=config.rank, target_modules=PROJECTIONS, layers=layers)
    alone = LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank,
        target_modules=list(PROJECTIONS),
        layers_to_transform=layers,
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )
    with upstream_deprecation_ignored():
        return get_peft_model(base, alone)


def _residual_scale(fast: PackedLlama, examples: Sequence[Example], config: PackedConfig, device: str) -> float:
    """The median size of a coordinate of ``M_t^{N-N_s}`` on a few rows; the mean would follow a few outliers."""
    rows = next(
        iterate_steps(
            examples[:64],
            seed=0,
            max_branches=config.max_branches,
            row_tokens=config.row_tokens,
            step_tokens=config.row_tokens,
        )
    )
    batch = pack(rows, config.gamma, random.Random(0)).to(device)
    trunk = fast.trunk(batch, config.num_stream_layers).flatten(0, 1)[batch.main_rows]
    return float(trunk.square().mean(-1).sqrt().median())


def _summary(done: Sequence[PackedLoss]) -> dict[str, Any]:
    def mean(values: Sequence[float]) -> float:
        return round(sum(values) / len(values), 4)

    line: dict[str, Any] = {
        "main_loss": mean([result.main_loss for result in done]),
        "main_accuracy": mean([result.main_accuracy for result in done]),
    }
    if done[0].agreement:
        line["stream_losses"] = [mean(column) for column in zip(*(r.stream_losses for r in done), strict=True)]
        line["agreement"] = [mean(column) for column in zip(*(r.agreement for r in done), strict=True)]
        line["chain"] = mean([result.chain for result in done])
    return line


def _write(
    model: PeftModel, directory: Path, config: PackedConfig, base_name: str | None, done: dict[str, Any]
) -> None:
    training = asdict(config) | done
    if config.num_stream_layers:
        write_checkpoint(model, directory, training=training, base_name=base_name)
        return
    model.save_pretrained(str(directory), save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if base_name is not None:
        settings["base_model_name_or_path"] = base_name
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (directory / "training.json").write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")


def _load_state(restart: Path, config: PackedConfig) -> dict[str, Any] | None:
    if not (restart / STATE_FILE).exists():
        return None
    state: dict[str, Any] = torch.load(restart / STATE_FILE, weights_only=True)
    before, now = json.loads(state["config"]), asdict(config)
    changed = [f"{key}: {before[key]!r} -> {now[key]!r}" for key in now if before[key] != now[key]]
    if changed:
        raise ValueError(f"cannot go on from {restart} with other settings: " + "; ".join(changed))
    return state
