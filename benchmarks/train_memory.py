"""Peak memory and processor time of training: `mlx_lm lora` and ours, at the same settings.

    scripts/with-openblas python -m benchmarks.train_memory
    scripts/with-openblas python -m benchmarks.train_memory --random-weights llama-40m --batch-size 2
    scripts/with-openblas python -m benchmarks.train_memory --arm mlx-lm --arm shared

Rows of random tokens, all of one length, every position an anchor; AdamW; LoRA of one rank on every linear layer, in
lossless mode of the stream layers alone. Each arm has a process of its own: mlx-lm's trainer, or ours. The peak is
MLX's, the base's weights included; the processor time is the least of any iteration but the first. The last line is one
JSON document.
"""

import argparse
import contextlib
import gc
import io
import itertools
import json
import multiprocessing
import resource
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs
from mlx_lm.tuner.trainer import train as train_lora
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from specstream_mlx import SpecStreamModel, default_model_path
from specstream_mlx.calibration.shapes import SHAPES
from specstream_mlx.errors import SpecStreamError
from specstream_mlx.formats.places import resolve
from specstream_mlx.options import Mode
from specstream_mlx.target import machine
from specstream_mlx.training import trainer
from specstream_mlx.training.batches import Example
from specstream_mlx.training.settings import TrainSettings
from specstream_mlx.training.trainable import attach

Stamp = Callable[..., None]


@dataclass(frozen=True)
class Arm:
    """One training.

    Attributes:
        mode: of the streams; None: `mlx_lm lora`.
        checkpoint: `--grad-checkpoint`.
        one_chunk: all stream rows at once.
        bits: of the base's weights; None: as they are.
        baseline: the arm that it is set beside.
    """

    mode: Mode | None = None
    checkpoint: bool = False
    one_chunk: bool = False
    bits: int | None = None
    baseline: str = "mlx-lm"


ARMS = {
    "mlx-lm": Arm(),
    "lossless": Arm("lossless"),
    "lossless, one chunk": Arm("lossless", one_chunk=True),
    "shared": Arm("shared"),
    "shared, one chunk": Arm("shared", one_chunk=True),
    "mlx-lm, checkpoint": Arm(checkpoint=True),
    "lossless, checkpoint": Arm("lossless", checkpoint=True, baseline="mlx-lm, checkpoint"),
    "shared, checkpoint": Arm("shared", checkpoint=True, baseline="mlx-lm, checkpoint"),
    "mlx-lm, 4-bit": Arm(bits=4),
    "lossless, 4-bit": Arm("lossless", bits=4, baseline="mlx-lm, 4-bit"),
    "shared, 4-bit": Arm("shared", bits=4, baseline="mlx-lm, 4-bit"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 0, or an exit code of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="MLX model directory, its streams put aside; default: the bundled model")
    parser.add_argument("--random-weights", choices=sorted(SHAPES), help="a model of this shape instead of --model")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a batch (default 4)")
    parser.add_argument("--max-seq-length", type=int, default=512, help="tokens of every row (default 512)")
    parser.add_argument("--rank", type=int, default=32, help="of LoRA (default 32)")
    parser.add_argument("--iters", type=int, default=3, help="iterations of an arm, at least 2 (default 3)")
    parser.add_argument("--arm", action="append", choices=ARMS, help="may be repeated (default: all)")
    options = parser.parse_args(arguments)
    try:
        options.path = None if options.random_weights else str(resolve(options.model or default_model_path()))
    except SpecStreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    found: dict[str, dict[str, float]] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for name in options.arm or ARMS:
            found[name] = pool.submit(measure, ARMS[name], options).result()
            print(line(name, found), flush=True)
    document = {
        "benchmark": "memory of training",
        "machine": machine.describe(),
        "versions": machine.versions(),
        "model": f"{options.random_weights}, random weights" if options.random_weights else Path(options.path).name,
        "settings": {name: getattr(options, name) for name in ("batch_size", "max_seq_length", "rank", "iters")},
        "arms": found,
    }
    print(json.dumps(document))
    return 0


def line(name: str, found: dict[str, dict[str, float]]) -> str:
    """A row of the table."""
    own, beside = found[name], found.get(ARMS[name].baseline)
    words = f"{name:22}{own['peak_gb']:8.3f} GB{own['seconds']:9.2f} s an iteration"
    if beside is None or beside is own:
        return words
    return (
        f"{words}   {own['peak_gb'] / beside['peak_gb']:.2f}x the memory and "
        f"{own['seconds'] / beside['seconds']:.2f}x the time of {ARMS[name].baseline}"
    )


def measure(arm: Arm, options: argparse.Namespace) -> dict[str, float]:
    """Train in this process; GB of the base and at the peak, processor seconds of an iteration."""
    mx.random.seed(0)
    gc.collect()
    before = mx.get_active_memory()  # of this process's other models, where there are any
    if options.path is None:
        base: Any = Model(ModelArgs.from_dict(SHAPES[options.random_weights]))
    else:
        base = load_model(Path(options.path))[0]
    if arm.bits is not None:
        nn.quantize(base, group_size=64, bits=arm.bits)
    mx.eval(base.parameters())
    mx.clear_cache()
    mx.reset_peak_memory()
    base_gb = (mx.get_active_memory() - before) / 1e9
    rows = (
        np.random.default_rng(0)
        .integers(0, base.args.vocab_size, (8 * options.batch_size, options.max_seq_length))
        .tolist()
    )
    stamps: list[float] = []

    def stamp(*_: Any) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        stamps.append(used.ru_utime + used.ru_stime)

    with TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        train = train_mlx_lm if arm.mode is None else train_ours
        train(base, arm, rows, options, Path(scratch), stamp)
    seconds = min(after - before for before, after in itertools.pairwise(stamps))
    return {"base_gb": base_gb, "peak_gb": (mx.get_peak_memory() - before) / 1e9, "seconds": seconds}


def train_mlx_lm(
    base: Any, arm: Arm, rows: list[list[int]], options: argparse.Namespace, scratch: Path, stamp: Stamp
) -> None:
    """What `mlx_lm lora` does after it has read its data."""
    base.freeze()
    linear_to_lora_layers(base, len(base.layers), {"rank": options.rank, "scale": 2.0, "dropout": 0.0})
    arguments = TrainingArgs(
        batch_size=options.batch_size,
        iters=options.iters,
        steps_per_report=1,
        max_seq_length=options.max_seq_length,
        adapter_file=str(scratch / "adapters.safetensors"),
        grad_checkpoint=arm.checkpoint,
    )
    callback = TrainingCallback()
    callback.on_train_loss_report = stamp  # type: ignore[method-assign]
    train_lora(base, optim.AdamW(1e-4), [(row, 0) for row in rows], args=arguments, training_callback=callback)


def train_ours(
    base: Any, arm: Arm, rows: list[list[int]], options: argparse.Namespace, scratch: Path, stamp: Stamp
) -> None:
    """What `specstream-mlx train` does after it has read its data."""
    assert arm.mode is not None
    settings = TrainSettings(
        mode=arm.mode,
        rank=options.rank,
        iters=options.iters,
        batch_size=options.batch_size,
        max_seq_length=options.max_seq_length,
        grad_checkpoint=arm.checkpoint,
        rows_per_chunk=2**30 if arm.one_chunk else TrainSettings.rows_per_chunk,
    )
    model = SpecStreamModel(base, base.model_type)
    attach(model, settings.stream_config(len(model.layers), {}), rank=settings.rank, scale=settings.scale)
    examples = [Example(tuple(row[:1]), tuple(row[1:])) for row in rows]
    trainer.train(model, settings, examples, [], scratch / "adapter", progress=stamp)


if __name__ == "__main__":
    sys.exit(main())
