"""Trains the base: a tiny Llama on whole text-to-SQL documents, answers weighing most.

    python -m benchmarks.tasks.text_to_sql.pretrain --out runs/text_to_sql

Every checkpoint holds the optimizers and the step, and batches depend on seed and step alone, so an
interrupted run goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from .batches import Batch, collate, stream
from .stamps import digest
from .task import examples
from .tokenizer import ExampleEncoder, save_tokenizer, train_sentencepiece
from .words import Split

ATTENTION = "eager"  # faster than the fused kernel when trained on a CPU


@dataclass(frozen=True)
class PretrainSettings:
    """What decides the base; a checkpoint made with other settings is not continued."""

    seed: int = 0
    vocab_size: int = 2048
    tokenizer_examples: int = 20000
    hidden_size: int = 192
    num_layers: int = 6
    num_heads: int = 6
    intermediate_size: int = 512
    context_length: int = 1024
    num_steps: int = 2900
    cooldown_steps: int = 1000
    slow_decay_steps: int = 4600
    batch_size: int = 32
    warmup_steps: int = 100
    muon_learning_rate: float = 0.02
    adam_learning_rate: float = 3e-3
    weight_decay: float = 0.01
    prompt_weight: float = 0.2


def make_model(settings: PretrainSettings) -> LlamaForCausalLM:
    """A freshly initialised Llama with tied embeddings, float32."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        max_position_embeddings=settings.context_length,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        initializer_range=0.02,
        attn_implementation=ATTENTION,
    )
    return LlamaForCausalLM(config)


def make_optimizers(model: LlamaForCausalLM, settings: PretrainSettings) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    adam = torch.optim.AdamW(others, lr=settings.adam_learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    if settings.muon_learning_rate == 0:
        adam.add_param_group({"params": matrices, "weight_decay": settings.weight_decay})
        return [adam]
    muon = torch.optim.Muon(
        matrices,
        lr=settings.muon_learning_rate,
        momentum=0.95,
        weight_decay=settings.weight_decay,
        adjust_lr_fn="original",
    )
    return [muon, adam]


def schedule(step: int, settings: PretrainSettings) -> float:
    """The factor on the learning rates: linear warm-up, slow linear decay, and a cooldown to nearly zero.

    The slow decay would reach zero at `slow_decay_steps`; the cooldown takes the last `cooldown_steps`.
    """
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    knee = settings.num_steps - settings.cooldown_steps
    slow_length = settings.slow_decay_steps - settings.warmup_steps
    factor = (settings.slow_decay_steps - min(step, knee)) / slow_length
    if step > knee:
        factor *= (settings.num_steps - step) / settings.cooldown_steps
    return max(0.005, factor)


def document_loss(model: LlamaForCausalLM, batch: Batch, prompt_weight: float) -> tuple[torch.Tensor, float]:
    """The weighted next-token loss to descend, and the mean loss on answer tokens to read."""
    with torch.autocast("cpu", torch.bfloat16):
        # Padding stands on the right, so causal attention alone keeps it out of the loss.
        hidden = model.model(input_ids=batch.tokens[:, :-1]).last_hidden_state
        logits = model.lm_head(hidden)
    losses = functional.cross_entropy(logits.float().flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
    answer = batch.answer_targets().flatten()
    weights = torch.where(answer, 1.0, prompt_weight) * batch.targets().flatten()
    return (losses * weights).sum() / weights.sum(), losses.detach()[answer].mean().item()


@torch.no_grad()  # type: ignore[untyped-decorator]
def exact_match(model: LlamaForCausalLM, encoder: ExampleEncoder, split: Split, count: int) -> float:
    """The share of answers that greedy decoding gives exactly.

    Greedy decoding gives an answer exactly when, with the answer fed, every next token of it is the most
    likely one; so one forward pass tells.
    """
    encoded = [encoder.whole(e) for e in itertools.islice(examples(split, 1), count)]
    encoded.sort(key=lambda pair: len(pair[0]))
    right = 0
    for start in range(0, count, 25):
        batch = collate(encoded[start : start + 25], encoder.eos_id)
        predicted = model(input_ids=batch.tokens[:, :-1]).logits.argmax(-1)
        wrong = (predicted != batch.tokens[:, 1:]) & batch.answer_targets()
        right += int((~wrong.any(1)).sum())
    return right / count


def write_atomically(path: Path, state: dict[str, Any]) -> None:
    """Save a checkpoint so that an interruption leaves the old one or the new one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def prepare_tokenizer(settings: PretrainSettings, directory: Path) -> ExampleEncoder:
    """Train the tokenizer unless it is there, and load it."""
    if not (directory / "tokenizer_config.json").exists():
        pieces = train_sentencepiece(settings.vocab_size, settings.tokenizer_examples, settings.seed)
        save_tokenizer(pieces, directory, settings.context_length)
    return ExampleEncoder(directory)


def pretrain(
    settings: PretrainSettings,
    out: Path,
    report_seconds: float = 60,
    save_seconds: float = 240,
    stop: int = 0,
    start: Path | None = None,
    report_count: int = 100,
) -> Path:
    """Train the base and return its directory; `stop` breaks the run off before that step, for measurements.

    With `start`, a model directory with its tokenizer, the training goes on from that model. Every report tells the
    exact match on `report_count` held-out examples.
    """
    base, checkpoint, log = out / "base", out / "pretrain.pt", out / "pretrain.jsonl"
    done = base / "pretrain_settings.json"
    made_from: dict[str, Any] = asdict(settings)
    if start is not None:
        made_from["start"] = digest(start)
    if done.exists() and json.loads(done.read_text()) == made_from:
        return base
    out.mkdir(parents=True, exist_ok=True)
    if start is None:
        tokenizer, model = out / "tokenizer", make_model(settings)
        encoder = prepare_tokenizer(settings, tokenizer)
    else:
        tokenizer, model = start, LlamaForCausalLM.from_pretrained(start, attn_implementation=ATTENTION)
        encoder = ExampleEncoder(tokenizer)
    model.train()
    optimizers = make_optimizers(model, settings)
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] != made_from:
            raise SystemExit(f"{checkpoint} was made with other settings; delete it or choose another --out")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = state["step"]

    last_report = last_save = started = time.monotonic()
    tokens, answer_losses = 0, []
    batches = stream(encoder, "train", settings.seed, settings.batch_size, first)
    for step, batch in zip(range(first, settings.num_steps), batches, strict=False):
        if stop and step >= stop:
            return base
        factor = schedule(step, settings)
        for optimizer, rates in zip(optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss, answer_loss = document_loss(model, batch, settings.prompt_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += int(batch.lengths.sum())
        answer_losses.append(answer_loss)
        now = time.monotonic()
        if now - last_report >= report_seconds or step + 1 == settings.num_steps:
            record = {
                "step": step + 1,
                "seconds": round(now - started),
                "tokens_per_second": round(tokens / (now - last_report)),
                "loss": round(loss.item(), 4),
                "answer_loss": round(sum(answer_losses) / len(answer_losses), 4),
                "heldout_exact_match": exact_match(model, encoder, "heldout", report_count),
            }
            print(json.dumps(record), flush=True)
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            tokens, answer_losses, last_report = 0, [], time.monotonic()
        if now - last_save >= save_seconds or step + 1 == settings.num_steps:
            state = {
                "settings": made_from,
                "step": step + 1,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            write_atomically(checkpoint, state)
            last_save = time.monotonic()
    model.save_pretrained(base)
    save_tokenizer((tokenizer / "tokenizer.model").read_bytes(), base, settings.context_length)
    done.write_text(json.dumps(made_from, indent=2) + "\n", encoding="utf-8")
    return base


def parse_settings(parser: argparse.ArgumentParser, arguments: list[str] | None) -> tuple[argparse.Namespace, Any]:
    """Add one option per field of the settings and read the command line."""
    for field in fields(PretrainSettings):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default)
    namespace = parser.parse_args(arguments)
    chosen = {field.name: getattr(namespace, field.name) for field in fields(PretrainSettings)}
    return namespace, PretrainSettings(**chosen)


def keep_freed_memory() -> None:
    """Ask glibc to reuse freed blocks; fresh pages for every large tensor cost a third of a training step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            trim_threshold, top_pad, mmap_max = -1, -2, -4
            libc.mallopt(mmap_max, 0)
            libc.mallopt(trim_threshold, 2**31 - 1)
            libc.mallopt(top_pad, 2**28)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/text_to_sql"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report-seconds", type=float, default=60)
    parser.add_argument("--stop", type=int, default=0, help="end after this many steps, for measurements")
    parser.add_argument("--start", type=Path, help="go on from the model in this directory")
    namespace, settings = parse_settings(parser, arguments)
    keep_freed_memory()
    torch.set_num_threads(namespace.threads)
    pretrain(settings, namespace.out, namespace.report_seconds, stop=namespace.stop, start=namespace.start)


if __name__ == "__main__":
    main()
