"""Tiny checkpoints written without PyTorch, and the means to damage them.

A case is a directory with ``base`` (a Hugging Face llama, transformers 5 style configuration) and ``adapter``
(PEFT, form A). Every tensor is random and non-zero.
"""

import json
import math
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from specstream_convert import ConvertOptions

LAYERS, D, KV, INNER, V, GAMMA, RANK = 2, 32, 16, 48, 61, 3, 4
LINEAR = {
    "self_attn.q_proj": (D, D),
    "self_attn.k_proj": (KV, D),
    "self_attn.v_proj": (KV, D),
    "self_attn.o_proj": (D, D),
    "mlp.gate_proj": (INNER, D),
    "mlp.up_proj": (INNER, D),
    "mlp.down_proj": (D, INNER),
}
PREFIX = "base_model.model."
STREAMS = PREFIX + "specstream.stream_embeddings"
Q = PREFIX + "model.layers.0.self_attn.q_proj"
ADAPTER, CONFIG, STREAM_CONFIG = "adapter_model.safetensors", "adapter_config.json", "specstream_config.json"


@dataclass(frozen=True)
class Case:
    """A base and an adapter that belong together, and where their conversion goes."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def out(self) -> Path:
        return self.root / "out"

    def options(self, **changes: Any) -> ConvertOptions:
        """Convert this case, with its own base."""
        settings: dict[str, Any] = {"adapter_path": self.adapter, "mlx_path": self.out, "hf_path": str(self.base)}
        return ConvertOptions(**(settings | changes))

    def json(self, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change a JSON file; ``name`` is relative to the case."""
        path = self.root / name
        raw = json.loads(path.read_text(encoding="utf-8"))
        change(raw)
        path.write_text(json.dumps(raw), encoding="utf-8")

    def tensors(self, name: str, change: Callable[[dict[str, mx.array]], Any]) -> None:
        """Change the tensors of a safetensors file; ``name`` is relative to the case."""
        path = self.root / name
        held = {key: mx.array(value) for key, value in mx.load(str(path)).items()}
        mx.eval(held)
        change(held)
        path.unlink()
        mx.save_safetensors(str(path), held, {"format": "pt"})

    def copy(self, root: Path) -> "Case":
        shutil.copytree(self.root, root)
        return Case(root)


def random_tensor(rng: np.random.Generator, shape: tuple[int, ...], std: float | None = None) -> mx.array:
    scale = std if std is not None else 1 / math.sqrt(shape[-1])
    return mx.array((scale * rng.standard_normal(shape)).astype(np.float32))


def make_case(
    root: Path, *, mode: str = "shared", tie: bool = False, dtype: mx.Dtype = mx.float32, shards: int = 1
) -> Case:
    """Write a case; in lossless mode the LoRA covers the last layer only."""
    rng = np.random.default_rng(7)
    case = Case(root)
    case.base.mkdir(parents=True)
    case.adapter.mkdir()
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": D,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": V,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "tie_word_embeddings": tie,
        "rope_parameters": {"rope_type": "default", "rope_theta": 30000.0},
        "dtype": "float32",
    }
    (case.base / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": random_tensor(rng, (V, D), 0.5)}
    for i in range(LAYERS):
        for name, shape in LINEAR.items():
            tensors[f"model.layers.{i}.{name}.weight"] = random_tensor(rng, shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = 1 + random_tensor(rng, (D,), 0.1)
    tensors["model.norm.weight"] = 1 + random_tensor(rng, (D,), 0.1)
    if not tie:
        tensors["lm_head.weight"] = random_tensor(rng, (V, D))
    write_base(case.base, {name: value.astype(dtype) for name, value in tensors.items()}, shards)
    layers = range(LAYERS - 1, LAYERS) if mode == "lossless" else range(LAYERS)
    lora: dict[str, mx.array] = {STREAMS: random_tensor(rng, (GAMMA, D), 0.5)}
    for i in layers:
        for name, (rows, columns) in LINEAR.items():
            lora[f"{PREFIX}model.layers.{i}.{name}.lora_A.weight"] = random_tensor(rng, (RANK, columns))
            lora[f"{PREFIX}model.layers.{i}.{name}.lora_B.weight"] = random_tensor(rng, (rows, RANK), 0.1)
    mx.save_safetensors(str(case.adapter / ADAPTER), lora, {"format": "pt"})
    (case.adapter / CONFIG).write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "base_model_name_or_path": "org/tiny",
                "r": RANK,
                "lora_alpha": 8,
                "target_modules": sorted({name.split(".")[1] for name in LINEAR}),
                "layers_to_transform": [LAYERS - 1] if mode == "lossless" else None,
                "modules_to_save": ["specstream"],
                "bias": "none",
                "init_lora_weights": True,
            }
        )
    )
    (case.adapter / STREAM_CONFIG).write_text(
        json.dumps(
            {
                "format": "specstream",
                "format_version": 1,
                "gamma": GAMMA,
                "num_stream_layers": 1,
                "mode": mode,
                "lora_rows": "streams" if mode == "lossless" else "all",
                "stream_id": {"type": "embedding"},
                "stream_init": {"type": "identity"},
                "stream_position": "anchor_plus_j",
                "prune": None,
                "base_model": {"model_type": "llama", "hidden_size": D, "num_hidden_layers": LAYERS, "vocab_size": V},
            }
        )
    )
    return case


def write_base(directory: Path, tensors: dict[str, mx.array], shards: int = 1) -> None:
    """Write ``model.safetensors``, or shards with their index."""
    if shards == 1:
        mx.save_safetensors(str(directory / "model.safetensors"), tensors, {"format": "pt"})
        return
    weight_map = {}
    names = sorted(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        mx.save_safetensors(str(directory / file), part, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_raw(path: Path, header: dict[str, Any] | bytes, data: bytes = b"") -> None:
    """Write a safetensors file with any header, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def snapshot(root: Path) -> set[str]:
    """Every path under ``root``, hidden ones too."""
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}
