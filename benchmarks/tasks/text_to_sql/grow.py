"""Grows the bundled model to 65 million parameters and gives it streams, for figures where weights dominate.

    python -m benchmarks.tasks.text_to_sql.grow --out runs/grown

A base of that size is hours of training from nothing. Grown from the small one (Net2Net) it computes the same
function before its first step: a copy of every unit in `width` places, read at a `width`-th of the weight, and added
layers that write nothing yet. Training then goes on at full size: the whole model, then LoRA and fresh streams with
the PyTorch twin. A step whose output is up to date is left out, as in `build`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .build import BUNDLE, convert_model, evaluate_model
from .finetune import FinetuneSettings, finetune
from .heldout import write_heldout
from .pretrain import PretrainSettings, keep_freed_memory, pretrain
from .stamps import digest, is_current, write_stamp

BASE_NAME = "specstream/text-to-sql-grown-base"


@dataclass(frozen=True)
class GrowSettings:
    """What decides the grown base.

    `width` multiplies hidden size, heads and intermediate size. Added layers stand below the `num_top` topmost ones,
    each above the layer that it copies. `noise` is what tells copies of a unit apart, in standard deviations of the
    matrix; among the weights that read the copies of one unit it adds up to zero, so it changes no output.
    """

    width: int = 4
    num_layers: int = 9
    num_top: int = 2
    noise: float = 0.1
    seed: int = 0


GROW = GrowSettings()
PRETRAIN = PretrainSettings(
    seed=1,
    hidden_size=768,
    num_layers=9,
    num_heads=24,
    intermediate_size=2048,
    num_steps=24,
    cooldown_steps=20,
    batch_size=8,
    warmup_steps=4,
    muon_learning_rate=0.0,
    adam_learning_rate=3e-5,
)
FINETUNE = FinetuneSettings(
    seed=2,
    num_steps=110,
    batch_size=4,
    num_stream_layers=3,
    learning_rate=2.5e-4,
    stream_lr_scale=360.0,
    warmup_steps=5,
    max_anchors=32,
)
NUM_HELDOUT = 40


def widen(matrix: torch.Tensor, width: int, noise: float, generator: torch.Generator) -> torch.Tensor:
    """Repeat an (out, in) matrix to (width * out, width * in) so that repeated inputs give repeated outputs."""
    outputs, inputs = matrix.shape
    drawn = torch.randn(width * outputs, width, inputs, generator=generator) * matrix.std() * noise
    cancelling = drawn - drawn.mean(dim=1, keepdim=True)
    return (matrix.repeat(width, width) + cancelling.flatten(1)) / width


def layer_sources(num_layers: int, settings: GrowSettings) -> list[tuple[int, bool]]:
    """For every layer of the grown model the layer that it comes from, and whether it is an added copy of it."""
    added, below_top = settings.num_layers - num_layers, num_layers - settings.num_top
    if not 0 <= added <= below_top:
        raise ValueError(f"{settings.num_layers} layers, expected {num_layers} to {num_layers + below_top}")
    sources = []
    for index in range(num_layers):
        sources.append((index, False))
        if below_top - added <= index < below_top:
            sources.append((index, True))
    return sources


@torch.no_grad()  # type: ignore[untyped-decorator]
def grown_model(small: LlamaForCausalLM, settings: GrowSettings) -> LlamaForCausalLM:
    """A wider and deeper Llama that computes what `small` computes."""
    if not small.config.tie_word_embeddings:
        raise ValueError("expected tied embeddings")
    config = LlamaConfig.from_dict(small.config.to_dict())
    for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"):
        setattr(config, name, settings.width * getattr(config, name))
    config.num_hidden_layers = settings.num_layers
    grown = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(settings.seed)
    grown.model.embed_tokens.weight.copy_(small.model.embed_tokens.weight.repeat(1, settings.width))
    # The output layer shares the embedding, so the final norm makes up for its sums over repeated units.
    grown.model.norm.weight.copy_(small.model.norm.weight.repeat(settings.width) / settings.width)
    sources = layer_sources(len(small.model.layers), settings)
    for layer, (source, is_added) in zip(grown.model.layers, sources, strict=True):
        weights = small.model.layers[source].state_dict()
        for name, target in layer.state_dict().items():
            if target.ndim == 1:
                target.copy_(weights[name].repeat(settings.width))
            else:
                target.copy_(widen(weights[name], settings.width, settings.noise, generator))
        if is_added:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return grown


def grow(small: Path, out: Path, settings: GrowSettings) -> Path:
    """Write the grown model of a directory with its tokenizer, unless it is there, and return it."""
    made_from = asdict(settings) | {"small": digest(small / "model.safetensors", small / "config.json")}
    if is_current(out, made_from):
        return out
    model = grown_model(LlamaForCausalLM.from_pretrained(small, dtype=torch.float32), settings)
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(small / name, out / name)
    write_stamp(out, made_from)
    return out


def build_grown(
    out: Path,
    small: Path = BUNDLE,
    *,
    growth: GrowSettings = GROW,
    continued: PretrainSettings = PRETRAIN,
    streams: FinetuneSettings = FINETUNE,
    num_heldout: int = NUM_HELDOUT,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run all steps that are not up to date and return the evaluation's figures."""
    start = grow(small, out / "start", growth)
    report(f"grown: {start}")
    base = pretrain(continued, out, report_seconds=600, start=start, report_count=25)
    report(f"trained on: {base}")
    adapter = finetune(streams, base, out, save_steps=20, log_steps=5, base_name=BASE_NAME, report=report)
    report(f"fine-tune: {adapter}")
    model = convert_model(base, adapter, out / "model")
    report(f"MLX directory: {model}")
    write_heldout(out / "heldout.jsonl", num_heldout)
    figures = evaluate_model(model, out / "heldout.jsonl", out / "evaluation.json")
    report(json.dumps({key: value for key, value in figures.items() if key != "drafts"}))
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/grown"))
    parser.add_argument("--small", type=Path, default=BUNDLE, help="the model to grow")
    parser.add_argument("--threads", type=int, default=1, help="of the trainings; the figures are made with 1")
    namespace = parser.parse_args(arguments)
    keep_freed_memory()
    torch.set_num_threads(namespace.threads)
    build_grown(namespace.out, namespace.small, report=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
