"""Trains a draft head on packed rows within a budget of time or of steps, and writes it as an adapter directory.

The base is frozen: a Hugging Face directory, with a fine-tune's LoRA over it where there is one. Medusa-2 trains a LoRA
of the base along with the heads. The learning rate warms up and falls linearly with the part of the budget that is
used; a run leaves restart points and goes on from the newest when it is started again with the same settings. What the
base's own forward passes cost is counted in floating-point operations, so that heads of all kinds can be given equal
budgets.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from specstream_mlx.formats.atomic import replaced_directory
from specstream_mlx.formats.config import BASE_FIELDS
from specstream_mlx.formats.drafter_config import DRAFTER_CONFIG, DRAFTER_WEIGHTS, DrafterConfig

from ..checkpoint import load_base, load_checkpoint
from ..loss import Example
from ..modeling import causal_lm
from ..packed.answers import own_answers
from ..packed.llama import PROJECTIONS, PackedLlama
from ..packed.loss import head_rows, packed_loss
from ..packed.packing import PackedBatch, frequent_tokens, iterate_steps, pack
from ..packed.trainer import fastest_dtype
from .kind import HeadKind, HeadShape
from .kinds import KINDS
from .reading import HeadLoss, Reading

STATE_FILE = "trainer_state.pt"


@dataclass(frozen=True)
class HeadConfig:
    """Every setting that decides the run. ``num_steps``, ``hours`` (of the clock) or ``base_tflops`` is the budget.

    Attributes:
        depth: heads of Medusa and Hydra; steps of its own that EAGLE-3 is trained on.
        num_layers: residual blocks of Medusa's and Hydra's heads.
        draft_vocab_size: of EAGLE-3: the tokens that the answers use most; 0: all.
        lora_rank: of Medusa-2's LoRA of the base; 0: the base is frozen.
        head_weight: of the heads' loss beside the base's own in Medusa-2.
        own_prompts: train on the base's own greedy answers to so many prompts instead of the examples' answers.
    """

    kind: str
    num_steps: int | None = None
    hours: float | None = None
    base_tflops: float | None = None
    depth: int = 4
    num_layers: int = 1
    draft_vocab_size: int = 8192
    lora_rank: int = 0
    lora_learning_rate: float = 1e-3
    head_weight: float = 0.2
    learning_rate: float = 1e-3
    warmup: float = 0.04
    clip_norm: float = 1.0
    max_branches: int = 4
    row_tokens: int = 256
    step_tokens: int = 1536
    max_length: int = 640
    vocab_frequent: int = 4096
    vocab_random: int = 1024
    own_prompts: int = 0
    own_max_tokens: int = 96
    save_dtype: str = "float16"
    seed: int = 0

    def __post_init__(self) -> None:
        if sum(budget is not None for budget in (self.num_steps, self.hours, self.base_tflops)) != 1:
            raise ValueError("give one budget: num_steps, hours or base_tflops")
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}, expected one of {', '.join(KINDS)}")
        if self.lora_rank and KINDS[self.kind].whole_rows:
            raise ValueError("lora_rank goes with medusa and hydra; EAGLE learns the features of a frozen base")


def train_head(
    base_directory: Path,
    examples: Sequence[Example],
    out: Path,
    config: HeadConfig,
    *,
    fine_tune: Path | None = None,
    base_name: str | None = None,
    device: str | None = None,
    save_minutes: float = 4.0,
    log_steps: int = 10,
    report: Callable[[str], None] = print,
) -> Path:
    """Train and return ``out``/head, an adapter directory; Medusa-2's LoRA is written as ``out``/adapter (PEFT).

    Args:
        base_directory: of Hugging Face.
        examples: rows of the task.
        out: the run's directory; started again, the run goes on from its newest restart point.
        config: of the run.
        fine_tune: a PEFT checkpoint, with streams or without; its LoRA belongs to the base.
        base_name: recorded in place of the directory's name.
        device: default: cuda where there is one.
        save_minutes: between restart points.
        log_steps: between lines of the log.
        report: is told of the progress.
    """
    target, restart = out / "head", out / "restart"
    if (target / DRAFTER_CONFIG).exists():
        report(f"{target} is there already")
        return target
    out.mkdir(parents=True, exist_ok=True)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    kind = KINDS[config.kind]
    model = _prepare(base_directory, fine_tune, config).to(device)
    base = causal_lm(model)
    fast = PackedLlama(model, fastest_dtype(device, base.config.hidden_size))
    kept = [example for example in examples if len(example) <= config.max_length]
    if config.own_prompts:
        kept = _own_examples(out / "own.json", fast, base.config.eos_token_id, kept, config)
        report(f"{len(kept):,} own answers, {sum(len(example.answer) for example in kept):,} tokens")
    shape = HeadShape(base.config, config.depth, config.num_layers, _draft_vocab(kept, config, base.config))
    head = kind.make(shape, fast.head.float()).to(device)
    lora = [p for name, p in model.named_parameters() if "lora_" in name and config.lora_rank]
    groups: list[dict[str, Any]] = [{"params": list(head.parameters()), "peak": config.learning_rate}]
    if lora:
        groups.append({"params": lora, "peak": config.lora_learning_rate})
    for parameter in (p for group in groups for p in group["params"]):
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, betas=(0.9, 0.95))
    done = {"steps": 0, "seconds": 0.0, "base_tflops": 0.0, "tokens": 0, "examples": 0}
    state = _load_state(restart, config)
    if state is not None:
        head.load_state_dict(state["head"])
        for parameter, value in zip(lora, state["lora"], strict=True):
            parameter.data.copy_(value)
        fast.refresh()
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]
    source = iterate_steps(
        kept,
        seed=config.seed,
        max_branches=1 if kind.whole_rows else config.max_branches,
        row_tokens=config.row_tokens,
        step_tokens=config.step_tokens,
    )
    for _ in range(int(done["steps"])):
        next(source)
    frequent = frequent_tokens(kept, config.vocab_frequent)
    operations = 2 * sum(p.numel() for layer in base.model.layers for p in layer.parameters()) / 1e12
    trained = sum(p.numel() for group in groups for p in group["params"])
    report(
        f"{config.kind}: {trained:,} parameters, {len(kept):,} of {len(examples):,} examples, "
        f"{str(fast.dtype).removeprefix('torch.')} on {device}, from step {done['steps']}"
    )
    lines: list[HeadLoss] = []
    started = saved = time.monotonic()
    before = done["seconds"]
    while True:
        done["seconds"] = before + time.monotonic() - started
        progress = _progress(config, done)
        if progress >= 1:
            break
        rate = min((progress + 1e-3) / config.warmup, (1 - progress) / (1 - config.warmup))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * max(rate, 1e-3)
        step = int(done["steps"])
        batch = pack(next(source), 1, random.Random(f"{config.seed}/{step}"))
        result = _step(kind, head, fast, batch, frequent, config, shape, device, step)
        for group in groups:
            torch.nn.utils.clip_grad_norm_(group["params"], config.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if lora:
            fast.refresh()
        done["steps"] += 1
        done["tokens"] += len(batch.main_targets)
        done["examples"] += batch.num_examples
        done["base_tflops"] += operations * int((batch.visible.diagonal(dim1=1, dim2=2)).sum())
        lines.append(result)
        if done["steps"] % log_steps == 0:
            line = _summary(lines) | {"progress": round(progress, 4)} | {k: round(v, 1) for k, v in done.items()}
            with (out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            report(json.dumps(line))
            lines = []
        if time.monotonic() - saved > 60 * save_minutes:
            with replaced_directory(restart) as temporary:
                state = {"head": head.state_dict(), "lora": [p.data for p in lora], "done": done}
                state |= {"optimizer": optimizer.state_dict(), "config": json.dumps(asdict(config))}
                torch.save(state, temporary / STATE_FILE)
            saved = time.monotonic()
    done["seconds"] = round(done["seconds"], 1)
    if lora:
        assert isinstance(model, PeftModel)
        model.save_pretrained(str(out / "adapter"), save_embedding_layers=False)
    with replaced_directory(target) as temporary:
        training = asdict(config) | done | {"parameters": trained, "fine_tuned_base": fine_tune is not None}
        write_head(temporary, kind, head, shape, training, base_name or base_directory.name)
    shutil.rmtree(restart, ignore_errors=True)
    return target


def write_head(
    directory: Path, kind: HeadKind, head: nn.Module, shape: HeadShape, training: dict[str, Any], base_name: str
) -> None:
    """Write an adapter directory."""
    dtype = getattr(torch, training["save_dtype"])
    tensors = {
        name: (value.to(dtype) if value.is_floating_point() else value).contiguous().cpu()
        for name, value in head.state_dict().items()
    }
    save_file(tensors, str(directory / DRAFTER_WEIGHTS), metadata={"format": "pt"})
    sizes = {name: getattr(shape.config, name) for name in BASE_FIELDS if hasattr(shape.config, name)}
    config = DrafterConfig(kind.name, kind.settings(shape), {"name_or_path": base_name} | sizes, training)
    text = json.dumps(config.to_dict(), indent=2, ensure_ascii=False)
    (directory / DRAFTER_CONFIG).write_text(text + "\n", encoding="utf-8")


def _step(
    kind: HeadKind,
    head: nn.Module,
    fast: PackedLlama,
    batch: PackedBatch,
    frequent: torch.Tensor,
    config: HeadConfig,
    shape: HeadShape,
    device: str,
    step: int,
) -> HeadLoss:
    """One backward pass."""
    noise = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    vocabulary = head_rows(frequent, batch, config.vocab_random, fast.head.shape[0], noise).to(device)
    batch = batch.to(device)
    states: dict[int, torch.Tensor] = {}
    with torch.set_grad_enabled(config.lora_rank > 0):
        if kind.whole_rows:
            states = fast.hidden_states(batch, tuple(dict.fromkeys(kind.taps(shape))))
            raw = states[max(states)].flatten(0, 1)[batch.main_rows]
        else:
            raw, _ = fast(batch, None, 0)
    result = kind.loss(head, Reading(batch, raw.float(), states, fast.embedding, fast.head, vocabulary), noise)
    loss = result.loss
    if config.lora_rank:
        own = packed_loss(raw, None, fast.head, batch, vocabulary, stream_weight=0.0, distill=0.0)
        loss = own.loss + config.head_weight * loss
    loss.backward()
    result.loss = loss.detach()
    return result


def _prepare(base_directory: Path, fine_tune: Path | None, config: HeadConfig) -> nn.Module:
    base = load_base(base_directory)
    base.requires_grad_(False)
    if fine_tune is not None:
        if config.lora_rank:
            raise ValueError("fine_tune and lora_rank are two LoRAs of one base; leave one out")
        with_streams = (fine_tune / "specstream_config.json").exists()
        model = load_checkpoint(base, fine_tune) if with_streams else PeftModel.from_pretrained(base, str(fine_tune))
        model.requires_grad_(False)
        return model
    if not config.lora_rank:
        return base
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank,
        target_modules=list(PROJECTIONS),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, settings)


def _draft_vocab(examples: Sequence[Example], config: HeadConfig, base: Any) -> torch.Tensor:
    """The ids that the answers use most, filled up with those that the prompts use and then with the first ones."""
    if not 0 < config.draft_vocab_size < base.vocab_size:
        return torch.arange(base.vocab_size)
    answers = Counter(token for example in examples for token in example.answer)
    prompts = Counter(token for example in examples for token in example.prompt)
    ranked = [token for counts in (answers, prompts) for token, _ in counts.most_common()]
    chosen = dict.fromkeys((*ranked, *range(base.vocab_size)))
    return torch.tensor(sorted(list(chosen)[: config.draft_vocab_size]))


def _own_examples(
    path: Path, fast: PackedLlama, eos_id: int, examples: Sequence[Example], config: HeadConfig
) -> list[Example]:
    """The base's own answers to prompts of the examples, kept in a file so that a restart has them too."""
    if path.exists():
        return [Example(tuple(prompt), tuple(answer)) for prompt, answer in json.loads(path.read_text())]
    prompts = sorted({example.prompt for example in examples})
    random.Random(config.seed).shuffle(prompts)
    chosen = prompts[: config.own_prompts]
    found = own_answers(fast, chosen, max_tokens=config.own_max_tokens, eos_id=eos_id, cut_off=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([[example.prompt, example.answer] for example in found]))
    partial.rename(path)
    return found


def _progress(config: HeadConfig, done: dict[str, Any]) -> float:
    if config.num_steps is not None:
        return float(done["steps"]) / config.num_steps
    if config.hours is not None:
        return float(done["seconds"]) / (3600 * config.hours)
    assert config.base_tflops is not None
    return float(done["base_tflops"]) / config.base_tflops


def _summary(done: Sequence[HeadLoss]) -> dict[str, Any]:
    def mean(rows: Sequence[Sequence[float]]) -> list[float]:
        columns = min(map(len, rows))
        return [round(sum(row[column] for row in rows) / len(rows), 4) for column in range(columns)]

    return {
        "loss": round(sum(float(result.loss) for result in done) / len(done), 4),
        "losses": mean([result.losses for result in done]),
        "agreement": mean([result.agreement for result in done]),
    }


def _load_state(restart: Path, config: HeadConfig) -> dict[str, Any] | None:
    if not (restart / STATE_FILE).exists():
        return None
    state: dict[str, Any] = torch.load(restart / STATE_FILE, weights_only=True)
    before, now = json.loads(state["config"]), asdict(config)
    changed = [f"{key}: {before.get(key)!r} -> {now[key]!r}" for key in now if before.get(key) != now[key]]
    if changed:
        raise ValueError(f"cannot go on from {restart} with other settings: " + "; ".join(changed))
    return state
