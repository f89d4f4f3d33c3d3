"""What each choice in training streams is worth: the same data and budget, one thing changed at a time.

    scripts/with-openblas python -m benchmarks.train_ablations --out runs/ablations.json

Lossless streams of a text-to-SQL model are trained on its own answers to questions of the recipe's training split and
measured on its own greedy answers to the held-out questions, where chain drafting's tokens per pass follow exactly
from which streams are right. An arm that is in the file already is left out, so the command may be given again; every
arm is kept, whether it won or lost. The last line of the output is one JSON document.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from specstream_cli.tables import table

BASELINE = "baseline"
ARMS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "N_s 1": {"num_stream_layers": 1},
    "N_s 2": {"num_stream_layers": 2},
    "N_s 4": {"num_stream_layers": 4},
    "rank 4": {"rank": 4},
    "rank 8": {"rank": 8},
    "gamma 1": {"gamma": 1},
    "gamma 2": {"gamma": 2},
    "gamma 6": {"gamma": 6},
    "latent 0.1": {"latent_weight": 0.1},
    "latent 1": {"latent_weight": 1.0},
    "pruner 8": {"prune_rank": 8},
    "init rank 16": {"stream_init_rank": 16},
    "value rotation 0.3": {"value_rotation": 0.3},
    "position anchor": {"stream_position": "anchor"},
    "stream lr x1": {"stream_lr_scale": 1.0},
    "4 anchors": {"max_anchors": 4},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and measure every arm that is not in the file yet."""
    options = parse(arguments)
    from specstream_mlx.errors import SpecStreamError

    try:
        document = run(options)
    except SpecStreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(report(document))
    if options.plot is not None:
        plot(document, options.plot)
    print(json.dumps(document))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="MLX model directory; default: the bundled model")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations.json"), help="figures, one arm after another")
    parser.add_argument("--plot", type=Path, help="also draw acceptance by depth to this PNG (needs matplotlib)")
    parser.add_argument("--only", action="append", choices=list(ARMS), help="an arm to run; may be repeated")
    parser.add_argument("--prompts", type=int, default=2000, help="training questions that the model answers")
    parser.add_argument("--heldout", type=int, default=100, help="held-out questions to measure on")
    parser.add_argument("--iters", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    parser.add_argument("--stream-lr-scale", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The document of all arms, written to ``--out`` after each."""
    from specstream_mlx.training.datasets import Dataset

    budget = {
        "iters": options.iters,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "stream_lr_scale": options.stream_lr_scale,
        "seed": options.seed,
        "num_stream_layers": 3,
        "rank": 32,
        "gamma": 4,
        "warmup": min(30, options.iters // 4),
        "rows_per_chunk": 8192,
        "val_batches": 0,
        "save_every": 10**6,
    }
    setting = {
        "model": Path(options.model).name if options.model else "bundled",
        "prompts": options.prompts,
        "heldout": options.heldout,
        "budget": budget,
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "mlx": version("mlx")},
    }
    document: dict[str, Any] = {"setting": setting, "arms": {}}
    if options.out.exists():
        document = json.loads(options.out.read_text(encoding="utf-8"))
        if {k: v for k, v in document["setting"].items() if k != "machine"} != {
            k: v for k, v in setting.items() if k != "machine"
        }:
            raise SystemExit(f"{options.out}: was made with other settings; give another --out")
    examples: Dataset | None = None
    for name in options.only or list(ARMS):
        if name not in document["arms"]:
            document["arms"][name], examples = measure(options, budget | ARMS[name], examples)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            print(report(document), file=sys.stderr, flush=True)
    return document


def measure(options: argparse.Namespace, settings: dict[str, Any], examples: Any) -> tuple[dict[str, Any], Any]:
    """Train one arm and measure it; the answers are made once and handed on."""
    import mlx.core as mx

    from specstream_mlx.training.evaluation import validate
    from specstream_mlx.training.run import TrainRun
    from specstream_mlx.training.trainable import trained_tensors
    from specstream_mlx.training.trainer import loss_weights

    with TemporaryDirectory() as folder:
        run = TrainRun.prepare(options.model, Path(folder) / "adapter", settings)
        if examples is None:
            examples = own_answers(options, run)
        mx.reset_peak_memory()
        begin, cpu = time.perf_counter(), cpu_seconds()
        events: list[dict[str, Any]] = []
        run.train(examples, report=events.append)
        seconds, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
        peak = mx.get_peak_memory()
        found = validate(run.model, examples.valid, loss_weights(run.settings), batch_size=8, rows_per_chunk=8192)
        last = next(event for event in reversed(events) if event["event"] == "train")
        return {
            "settings": settings,
            "tokens_per_pass": round(found.tokens_per_pass, 4),
            "acceptance": [round(rate, 4) for rate in found.acceptance],
            "agreement": [round(rate, 4) for rate in found.agreement],
            "training_loss": last["loss"],
            "prune_loss": last.get("prune_loss"),
            "latent_loss": last.get("latent_loss"),
            "trained_parameters": sum(value.size for value in trained_tensors(run.model).values()),
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
            "peak_memory_gb": round(peak / 1e9, 3),
        }, examples


def own_answers(options: argparse.Namespace, run: Any) -> Any:
    """The model's greedy answers to training questions, and to held-out ones to measure on."""
    from recipes.text_to_sql.heldout import HELDOUT
    from recipes.text_to_sql.task import examples
    from specstream_mlx.training.datasets import Dataset

    drawn = itertools.islice(examples("train", 4242), options.prompts)
    held_out = [json.loads(line) for line in HELDOUT.read_text(encoding="utf-8").splitlines()[: options.heldout]]
    answers = options.out.with_suffix(".answers.jsonl")
    parts = []
    with TemporaryDirectory() as folder:
        for name, prompts in (("train", [e.prompt for e in drawn]), ("heldout", [e["prompt"] for e in held_out])):
            file = Path(folder) / f"{name}.jsonl"
            file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
            part = run.own_answers(file, answers, {"samples": 0, "max_tokens": 128})
            parts.append([*part.train, *part.valid])
    return Dataset(*parts)


def cpu_seconds() -> float:
    """Processor time of this process, which other programs lengthen less than they do the clock."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def report(document: dict[str, Any]) -> str:
    """The arms as a table."""
    header = ("arm", "tokens per pass", "acceptance by depth", "parameters", "CPU s", "peak GB", "pruner loss")
    rows = [
        (
            name,
            f"{arm['tokens_per_pass']:.3f}",
            " ".join(f"{rate:.3f}" for rate in arm["acceptance"]),
            f"{arm['trained_parameters']:,}",
            f"{arm['cpu_seconds']:.0f}",
            f"{arm['peak_memory_gb']:.2f}",
            "-" if arm["prune_loss"] is None else f"{arm['prune_loss']:.3f}",
        )
        for name, arm in document["arms"].items()
    ]
    return table(header, rows)


def plot(document: dict[str, Any], path: Path) -> None:
    """Acceptance by depth of every arm."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, arm in document["arms"].items():
        axes.plot(range(1, len(arm["acceptance"]) + 1), arm["acceptance"], "o-", label=name)
    axes.set(xlabel="depth", ylabel="acceptance", ylim=(0, 1))
    axes.legend(fontsize="small")
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
