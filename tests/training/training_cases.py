"""A tiny base on disk, prompts for it, and settings that run in a second."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.training.batches import Example
from specstream_mlx.training.run import TrainRun
from specstream_mlx.training.trainable import attach, set_trained_tensors, trained_tensors
from tests.tiny import END_OF_TEXT, make_model, random_prompt, save_directory

QUICK: dict[str, Any] = {
    "gamma": 3,
    "num_stream_layers": 2,
    "rank": 2,
    "iters": 7,
    "batch_size": 3,
    "learning_rate": 5e-3,
    "warmup": 2,
    "steps_per_report": 1,
    "steps_per_eval": 4,
    "save_every": 2,
    "max_anchors": 4,
    "seed": 3,
}


def save_base(path: Path, family: str = "llama", **changes: Any) -> Path:
    """A tiny plain model with a tokenizer whose words are ``w<id>``."""
    save_directory(make_model(family, seed=2, base_changes=changes), path)
    for name in ("specstream_config.json", "specstream.safetensors"):
        (path / name).unlink()
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    return path


def with_lora(model: SpecStreamModel) -> SpecStreamModel:
    """Streams and LoRA attached, and every trained tensor moved away from its neutral start."""
    assert model.stream_config is not None
    attach(model, model.stream_config, rank=3, scale=1.5)
    noise = {
        name: value + 0.2 * mx.random.normal(value.shape, key=mx.random.key(index))
        for index, (name, value) in enumerate(trained_tensors(model).items())
    }
    set_trained_tensors(model, noise)
    return model


def rows(count: int = 11) -> list[Example]:
    """Prompts and answers of several lengths."""
    return [Example(_ids(2 + i % 4, seed=i), (*_ids(1 + (5 * i) % 9, seed=100 + i), END_OF_TEXT)) for i in range(count)]


def _ids(length: int, seed: int) -> tuple[int, ...]:
    """Random ids whose words do not begin like that of end-of-text, which the tokenizer would find in them."""
    return tuple(
        token + 10 if str(token).startswith(str(END_OF_TEXT)) else token for token in random_prompt(length, seed)
    )


def write_rows(path: Path, count: int = 24) -> Path:
    """The same as completions of ``w<id>`` words."""
    lines = [
        json.dumps({"prompt": words(example.prompt), "completion": words(example.answer[:-1])})
        for example in rows(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def words(tokens: tuple[int, ...]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def prepared(base: Path, target: Path, adapter: Path | None = None, **changes: Any) -> TrainRun:
    return TrainRun.prepare(str(base), target, QUICK | changes, adapter=adapter)


def same(one: dict[str, mx.array], other: dict[str, mx.array]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(mx.array_equal(one[name], other[name]).item() for name in one)


def parameters(module: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))
