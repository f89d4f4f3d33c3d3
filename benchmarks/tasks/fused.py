"""A model directory with a task's adapter in it: the LoRA merged into a full-precision base, the streams beside it.

Stock `mlx_lm.load` opens the directory as the fine-tuned model, so drafting and the baseline run on the same weights.
A quantised base is left as it is; its adapter stays live.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from specstream_mlx.formats.atomic import replaced_directory

LIVE = Path("adapters")
STREAM_FILES = ("specstream.safetensors", "specstream_config.json")


def write_fused(base: Path, adapter: Path, out: Path) -> Path:
    """Write `base` with `adapter` merged to `out`, in the dtype of the base, and return `out`.

    Raises:
        SystemExit: the adapter does not fit, or the base is quantised.
    """
    if "quantization" in read_json(base / "config.json"):
        raise SystemExit(f"{base}: quantised, LoRA is not merged into it; leave the adapter live")
    live = adapter / LIVE if (adapter / LIVE).is_dir() else adapter
    lora = load_tensors(live / "adapters.safetensors")
    scale = float(read_json(live / "adapter_config.json")["lora_parameters"]["scale"])
    with replaced_directory(out) as temporary:
        for file in base.iterdir():
            if file.is_file() and not file.name.startswith("model") and file.name not in STREAM_FILES:
                shutil.copy2(file, temporary / file.name)
        merged = set()
        for file in sorted(base.glob("model*.safetensors")):
            weights = load_tensors(file)
            for name in list(weights):
                path = name.removesuffix(".weight")
                if f"{path}.lora_a" in lora:
                    weights[name] = _merge(weights[name], lora[f"{path}.lora_a"], lora[f"{path}.lora_b"], scale)
                    merged.add(path)
            mx.save_safetensors(str(temporary / file.name), weights, metadata={"format": "mlx"})
        for file in base.glob("model*.json"):
            shutil.copy2(file, temporary / file.name)
        missing = sorted({name.rsplit(".", 1)[0] for name in lora} - merged)
        if missing:
            raise SystemExit(f"{live}: {missing[0]} is not in {base}; the adapter is another base's")
        for name in STREAM_FILES:
            if (adapter / name).exists():
                shutil.copy2(adapter / name, temporary / name)
    return out


def _merge(weight: mx.array, lora_a: mx.array, lora_b: mx.array, scale: float) -> mx.array:
    delta = scale * (lora_a.astype(mx.float32) @ lora_b.astype(mx.float32)).T
    return (weight.astype(mx.float32) + delta).astype(weight.dtype)


def load_tensors(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file by name."""
    return dict(mx.load(str(path)))  # type: ignore[arg-type]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    return dict(json.loads(path.read_text(encoding="utf-8")))
