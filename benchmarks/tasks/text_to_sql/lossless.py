"""Streams for a model that stays as it is: answers of its own, a lossless adapter, and what that is worth.

    python -m benchmarks.tasks.text_to_sql.lossless --out runs/text_to_sql

The base answers questions of the training split, `specstream-mlx train` makes streams that predict those answers, and
the held-out questions are asked of base and adapter. A step whose output is up to date is left out, and an
interrupted training goes on where it was, so the command may be given again at any time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from specstream_convert.base.config import mlx_config
from specstream_mlx.formats.config import read_json

from .build import ROOT
from .heldout import HELDOUT
from .prompts import write_prompts
from .stamps import digest, is_current, write_stamp


@dataclass(frozen=True)
class LosslessSettings:
    """What decides the adapter: how many questions are answered, and options of `specstream-mlx train`."""

    num_prompts: int = 4000
    seed: int = 0
    samples: int = 0
    max_tokens: int = 96
    num_stream_layers: int = 3
    rank: int = 32
    iters: int = 900
    batch_size: int = 8
    rows_per_chunk: int = 8192
    learning_rate: float = 2.5e-3
    stream_lr_scale: float = 30.0
    warmup: int = 30


def mlx_directory(base: Path, out: Path) -> Path:
    """The base as mlx-lm reads it: the same tensors; the rotary settings stand at the top level of `config.json`."""
    made_from = {"base": digest(base)}
    if not is_current(out, made_from):
        config, _, _ = mlx_config(read_json(base / "config.json"), base / "config.json")
        shutil.copytree(base, out, dirs_exist_ok=True)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_stamp(out, made_from)
    return out


def train(model: Path, out: Path, settings: LosslessSettings) -> Path:
    """Train the adapter, `lossless` under `out`, in a process of its own."""
    adapter, restart = out / "lossless", out / "lossless.checkpoints"
    made_from = asdict(settings) | {"model": digest(model)}
    if is_current(adapter, made_from):
        return adapter
    if restart.exists() and not is_current(restart, made_from):
        raise SystemExit(f"{restart} was made with other settings or another model; delete it or choose another --out")
    seed = random.Random(f"lossless/{settings.seed}").getrandbits(48)
    prompts = write_prompts(out / "lossless.prompts.jsonl", settings.num_prompts, seed)
    write_stamp(restart, made_from)
    options = {
        f"--{name.replace('_', '-')}": value for name, value in asdict(settings).items() if name != "num_prompts"
    }
    options |= {"--model": model, "--prompts": prompts, "--adapter-path": adapter, "--mode": "lossless"}
    interrupted = any(restart.glob("step-*"))
    command = ["-m", "specstream_mlx", "train", "--self-distill", "--resume" if interrupted else "--overwrite"]
    run_python([*command, *itertools.chain.from_iterable(options.items())])
    write_stamp(adapter, made_from)
    return adapter


def evaluate(model: Path, adapter: Path, figures: Path) -> dict[str, Any]:
    """Measure the adapter on the held-out questions; every answer is the bare model's, or there are no figures."""
    made_from = {"model": digest(model), "adapter": digest(adapter), "heldout": digest(HELDOUT)}
    if not is_current(figures, made_from):
        options = ["--model", model, "--adapter", adapter, "--examples", HELDOUT, "--out", figures]
        run_python(["-m", "benchmarks.tasks.text_to_sql.evaluate", *options])
        write_stamp(figures, made_from)
    return dict(json.loads(figures.read_text(encoding="utf-8")))


def run_python(arguments: list[Any]) -> None:
    """Run a command of this project on OpenBLAS, where MLX would use a slow BLAS."""
    subprocess.run([str(ROOT / "scripts" / "with-openblas"), sys.executable, *map(str, arguments)], check=True)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, train and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/text_to_sql"))
    parser.add_argument("--model", type=Path, help="an MLX directory; default: text-to-sql-base under --out, converted")
    for field in fields(LosslessSettings):
        default: Any = field.default
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(default), default=default)
    namespace = parser.parse_args(arguments)
    settings = LosslessSettings(**{field.name: getattr(namespace, field.name) for field in fields(LosslessSettings)})
    out = namespace.out
    model = namespace.model or mlx_directory(out / "text-to-sql-base", out / "text-to-sql-base-mlx")
    adapter = train(model, out, settings)
    figures = evaluate(model, adapter, out / "lossless.evaluation.json")
    size = sum(path.stat().st_size for path in adapter.glob("*.safetensors"))
    shown = {key: value for key, value in figures.items() if key != "drafts"} | {"adapter_bytes": size}
    print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
