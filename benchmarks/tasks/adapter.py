"""Turns a PEFT checkpoint into the adapter that ships with a task: MLX form, LoRA in float16, a card with licences.

    python -m benchmarks.tasks.adapter --task sql --base runs/smollm2/hf --checkpoint runs/tasks/shared/sql/adapter

The conversion is that of `specstream-mlx convert`, verified: with the LoRA merged into the base against the logits of
the checkpoint in PyTorch, and as an adapter, tensor by tensor. The trainer rounds the LoRA to float16 when it ends, so
float16 loses nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from transformers import AutoTokenizer

from specstream_convert.options import ConvertOptions
from specstream_convert.pipeline import convert
from specstream_mlx.errors import SpecStreamError
from specstream_mlx.formats.atomic import replaced_directory
from specstream_torch.generate import load_reference, reference_logits

from .base import BASE_NAME
from .fused import load_tensors, read_json
from .task import Task, find_task, task_names

MOST_BYTES = 6_000_000
BASE_LICENCE = "Apache-2.0"


def _convert(base: Path, checkpoint: Path, out: Path, **more: Any) -> dict[str, Any]:
    """Run the converter and return its report.

    Raises:
        SystemExit: it refuses, or what it wrote fails its verification.
    """
    options = ConvertOptions(adapter_path=checkpoint, mlx_path=out, hf_path=str(base), **more)
    try:
        return dict(convert(options).to_dict())
    except SpecStreamError as error:
        raise SystemExit(str(error)) from None


def write_adapter(task: Task, base: Path, checkpoint: Path, out: Path) -> dict[str, Any]:
    """Write the adapter of a task to `out` and return what the converter said of the merged model.

    Raises:
        SystemExit: the conversion failed, float16 would change the LoRA, or the adapter is too large.
    """
    with tempfile.TemporaryDirectory(prefix="specstream-adapter-") as folder:
        _convert(base, checkpoint, Path(folder) / "adapter", adapter_only=True)
        halves = _halves(Path(folder) / "adapter" / "adapters" / "adapters.safetensors")
        logits = _pytorch_logits(task, base, checkpoint, Path(folder) / "reference.npz")
        merged = _convert(base, checkpoint, Path(folder) / "model", fuse=True, reference_logits=logits)
        with replaced_directory(out) as temporary:
            made = Path(folder) / "adapter"
            for name in ("specstream.safetensors", "specstream_config.json"):
                shutil.copy2(made / name, temporary / name)
            (temporary / "adapters").mkdir()
            shutil.copy2(made / "adapters" / "adapter_config.json", temporary / "adapters" / "adapter_config.json")
            target = temporary / "adapters" / "adapters.safetensors"
            mx.save_safetensors(str(target), halves, metadata={"format": "mlx"})
            (temporary / "README.md").write_text(
                card(task, read_json(made / "specstream_config.json")), encoding="utf-8"
            )
            size = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
            if size > MOST_BYTES:
                raise SystemExit(f"{out}: {size:,} bytes, at most {MOST_BYTES:,} ship; lower the LoRA rank")
    return merged


def _pytorch_logits(task: Task, base: Path, checkpoint: Path, path: Path) -> Path:
    """Write what the checkpoint says in PyTorch, for the converter to compare with what it wrote."""
    text = f"{task.title}: {task.source}. Fine-tuned and converted, it says the same as before."
    tokens = AutoTokenizer.from_pretrained(str(base))(text)["input_ids"]
    np.savez(path, tokens=np.array(tokens), logits=reference_logits(load_reference(base, checkpoint), tokens).main)
    return path


def _halves(source: Path) -> dict[str, mx.array]:
    """The tensors in float16, which must hold every value."""
    tensors = load_tensors(source)
    halves = {name: value.astype(mx.float16) for name, value in tensors.items()}
    changed = [n for n, v in halves.items() if not mx.array_equal(v.astype(mx.float32), tensors[n]).item()]
    if changed:
        raise SystemExit(f"{source}: {changed[0]} does not fit into float16; finish the training, which rounds it")
    return halves


def card(task: Task, config: dict[str, Any]) -> str:
    """What the adapter is, how to run it, what it was made from and under which licences."""
    training = config.get("training", {})
    return f"""# {task.title}: LoRA and {config["gamma"]} streams for SmolLM2-135M-Instruct

Shared mode. The top {config["num_stream_layers"]} of {config["base_model"]["num_hidden_layers"]} layers run streams.
LoRA of rank {training.get("rank")} on the linear layers of the top {training.get("lora_layers")} layers, in float16.

```bash
python -m benchmarks.tasks.base --out runs/smollm2
python -m benchmarks.tasks.run --task {task.name} --base runs/smollm2/mlx --data test.jsonl
```

Base: {BASE_NAME}, {BASE_LICENCE}. Data: {task.source}.
The last stage of the training took {training.get("steps")} steps; `benchmarks/tasks/recipe.py` has all of it.
"""


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and write the adapter."""
    parser = argparse.ArgumentParser(prog="benchmarks.tasks.adapter", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--task", required=True, choices=task_names())
    parser.add_argument("--base", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--checkpoint", type=Path, required=True, help="PEFT checkpoint of form A")
    parser.add_argument("--out", type=Path, help="default: where the task's adapter ships")
    namespace = parser.parse_args(arguments)
    task = find_task(namespace.task)
    out = namespace.out or task.adapter
    report = write_adapter(task, namespace.base, namespace.checkpoint, out)
    print(json.dumps(report.get("verification", report), indent=2))
    print(out)


if __name__ == "__main__":
    main()
