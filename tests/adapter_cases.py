"""A tiny base on disk and an adapter for it of every kind."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from specstream_mlx.drafters.streams.parameters import Streams
from specstream_mlx.families import FAMILIES
from specstream_mlx.formats.config import CONFIG_NAME, WEIGHTS_NAME
from specstream_mlx.formats.fingerprint import fingerprint
from tests.tiny import make_model, randomise, save_directory, stream_config

LORA_RANK = 4


def save_base(path: Path, family: str = "llama", seed: int = 21, **changes: Any) -> Path:
    """A tiny model without streams."""
    save_directory(make_model(family, seed=seed, base_changes=changes), path)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (path / name).unlink()
    return path


def lora_tensors(base: Any, layers: range, seed: int) -> dict[str, mx.array]:
    """A random LoRA on every linear layer of some blocks, by module and part."""
    layers_path = FAMILIES[base.model_type].LAYERS
    modules = dict(base.named_modules())
    tensors = {}
    for index, (name, value) in enumerate(tree_flatten(base.parameters())):
        module, _, part = name.rpartition(".")
        block = module.removeprefix(f"{layers_path}.").partition(".")[0]
        if part == "weight" and isinstance(modules[module], nn.Linear) and block.isdecimal() and int(block) in layers:
            rows, columns = value.shape
            key = mx.random.key(1000 * seed + index)
            tensors[f"{module}.lora_a"] = mx.random.normal((columns, LORA_RANK), key=key)
            tensors[f"{module}.lora_b"] = 0.3 * mx.random.normal((LORA_RANK, rows), key=key)
    return tensors


def save_live_lora(path: Path, base: Any, seed: int) -> Path:
    """A LoRA in mlx-lm's format, on all rows of the top three blocks."""
    path.mkdir(parents=True)
    tensors = lora_tensors(base, range(1, 4), seed)
    keys = sorted({name.rpartition(".")[0] for name in tensors})
    parameters = {"rank": LORA_RANK, "scale": 0.5, "dropout": 0.1, "keys": keys}
    config = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": parameters}
    (path / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(path / "adapters.safetensors"), tensors)
    return path


def save_adapter(path: Path, base: Any, seed: int, **changes: Any) -> Path:
    """A stream adapter for ``base``; in lossless mode with a LoRA in its stream layers, which then are all or two."""
    config = stream_config(
        base_model={"fingerprint": mark_of(base), "name_or_path": "org/base"},
        **({"lora": {"rank": LORA_RANK, "scale": 2.0}} if changes.get("mode") == "lossless" else {}),
        **changes,
    )
    streams = Streams(config, FAMILIES[base.model_type].size(vars(base.args), "hidden_size"))
    randomise(streams, seed)
    tensors = {f"specstream.{name}": value for name, value in tree_flatten(streams.parameters())}
    if config.mode == "lossless":
        lora = lora_tensors(base, range(4 - config.num_stream_layers, 4), seed)
        tensors |= {f"lora.{name}": value for name, value in lora.items()}
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG_NAME).write_text(json.dumps(config.to_dict()))
    mx.save_safetensors(str(path / WEIGHTS_NAME), tensors)
    return path


def save_every_kind(path: Path, base: Any) -> dict[str, Path]:
    """Adapters that differ in all that an adapter can differ in."""
    rotation = {"type": "value_rotation", "epsilon": 0.3}
    kinds = {
        "lossless": save_adapter(path / "lossless", base, 31, mode="lossless"),
        "shared": save_adapter(path / "shared", base, 32, gamma=3, prune=None),
        "streams": save_adapter(
            path / "streams", base, 33, gamma=2, num_stream_layers=3, stream_id=rotation, prune=None
        ),
        "at-anchor": save_adapter(
            path / "at-anchor", base, 34, mode="lossless", gamma=5, num_stream_layers=1, stream_position="anchor"
        ),
        "plain": save_live_lora(path / "plain", base, 35),
    }
    save_live_lora(kinds["shared"] / "adapters", base, 36)
    return kinds


def mark_of(base: Any) -> dict[str, str] | None:
    """The fingerprint of a base."""
    name = FAMILIES[base.model_type].fingerprint_tensor(vars(base.args))
    return None if name is None else fingerprint(name, dict(tree_flatten(base.parameters()))[name])
