"""What it takes to keep several adapters on one base and to switch between them.

    scripts/with-openblas python -m benchmarks.adapter_switch
    scripts/with-openblas python -m benchmarks.adapter_switch --model DIR --adapter A --adapter B
    scripts/with-openblas python -m benchmarks.adapter_switch --random-weights llama-1b --dtype float16

Without `--adapter` two lossless adapters of random numbers are made for the model: they cost what trained ones cost.
Every switch is timed, and the first token after it beside a later one, which would show work put off until then. The
base's arrays are looked at before and after: they must be the same objects. The last line is one JSON document.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from specstream_mlx import SpecStreamModel, default_model_path, load
from specstream_mlx.calibration.shapes import DTYPES, SHAPES, random_model
from specstream_mlx.errors import SpecStreamError
from specstream_mlx.formats.adapter_directory import write_adapter
from specstream_mlx.target import machine
from specstream_mlx.training.settings import TrainSettings
from specstream_mlx.training.trainable import attach, trained_tensors


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 0, or an exit code of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="MLX model directory; default: the bundled model")
    parser.add_argument("--adapter", action="append", help="an adapter for it; may be repeated (default: random ones)")
    parser.add_argument("--random-weights", choices=sorted(SHAPES), help="a model of this shape instead of --model")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float16", help="of random weights")
    parser.add_argument("--q-bits", type=int, help="quantise random weights to so many bits")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA of random adapters (default 32)")
    parser.add_argument("--rounds", type=int, default=20, help="switches to each adapter and to the bare base")
    options = parser.parse_args(arguments)
    try:
        document = measure(options)
    except SpecStreamError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    for name, found in document["adapters"].items():
        print(
            f"{name}: {found['bytes']:,} bytes, loaded in {found['load_ms']:.1f} ms, switch "
            f"{found['switch_ms']['median']:.3f} ms (most {found['switch_ms']['max']:.3f}), first token after it "
            f"{found['first_token_ms']:.2f} ms, a later one {found['later_token_ms']:.2f} ms"
        )
    print(json.dumps(document))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The document."""
    with TemporaryDirectory() as scratch:
        if options.random_weights is not None:
            model = random_model(options.random_weights, options.dtype, options.q_bits)
        else:
            model = load(options.model or default_model_path())[0]
        model.use_adapter(None)
        directories = [Path(path) for path in options.adapter or []]
        if not directories:
            directories = [write_random(model, Path(scratch) / name, options.rank) for name in ("random-1", "random-2")]
        weights = bare_weights(model)
        adapters: dict[str | None, dict[str, Any]] = {}
        for directory in directories:
            started = time.perf_counter()
            name = model.load_adapter(directory)
            adapters[name] = {
                "bytes": model.adapters[name].num_bytes,
                "load_ms": 1000 * (time.perf_counter() - started),
            }
        adapters[None] = {"bytes": 0, "load_ms": 0.0}
        seconds: dict[str | None, list[tuple[float, float, float]]] = {name: [] for name in adapters}
        for _ in range(options.rounds + 1):
            for name, times in seconds.items():
                started = time.perf_counter()
                model.use_adapter(name)
                switched = time.perf_counter() - started
                times.append((switched, one_token(model), one_token(model)))
        model.use_adapter(None)
        now = bare_weights(model)
        assert all(now[name] is weights[name] for name in weights), "a switch copied or changed a weight of the base"
    for name, times in seconds.items():
        switches, first, later = zip(*times[1:], strict=True)  # the first round warms up
        milliseconds = [1000 * value for value in switches]
        adapters[name] |= {
            "switch_ms": {"median": statistics.median(milliseconds), "max": max(milliseconds)},
            "first_token_ms": 1000 * statistics.median(first),
            "later_token_ms": 1000 * statistics.median(later),
        }
    shape = options.random_weights
    return {
        "benchmark": "adapter switch",
        "machine": machine.describe(),
        "versions": machine.versions(),
        "model": f"{shape}, random weights" if shape else Path(options.model or default_model_path()).name,
        "base_bytes": sum(value.nbytes for value in weights.values()),
        "rounds": options.rounds,
        "adapters": {name or "bare base": found for name, found in adapters.items()},
    }


def bare_weights(model: SpecStreamModel) -> dict[str, mx.array]:
    """The base's arrays by name, no adapter being in use."""
    return dict(tree_flatten(model.base.parameters()))


def one_token(model: SpecStreamModel) -> float:
    """Seconds of one forward of one token."""
    started = time.perf_counter()
    mx.eval(model(mx.array([[1]]), cache=model.make_cache()))
    return time.perf_counter() - started


def write_random(model: SpecStreamModel, directory: Path, rank: int) -> Path:
    """A lossless adapter as `train` begins it."""
    config = TrainSettings(rank=rank).stream_config(len(model.layers), {})
    attach(model, config, rank=rank, scale=2.0)
    directory.mkdir()
    write_adapter(directory, config, trained_tensors(model), len(model.layers))
    model.use_adapter(None)
    return directory


if __name__ == "__main__":
    sys.exit(main())
