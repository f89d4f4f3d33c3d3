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
import re
import resource
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from mlx.utils import tree_flatten

from specstream_cli.tables import table

BASELINE = "baseline"
ARMS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "gamma 1": {"gamma": 1},
    "gamma 2": {"gamma": 2},
    "gamma 3": {"gamma": 3},
    "gamma 5": {"gamma": 5},
    "gamma 6": {"gamma": 6},
    "N_s 1": {"num_stream_layers": 1},
    "N_s 2": {"num_stream_layers": 2},
    "N_s 4": {"num_stream_layers": 4},
    "rank 4": {"rank": 4},
    "rank 8": {"rank": 8},
    "rank 16": {"rank": 16},
    "rank 64": {"rank": 64},
    "latent 0.1": {"latent_weight": 0.1},
    "latent 1": {"latent_weight": 1.0},
    "rescoring, context": {"rescoring": "context"},
    "rescoring, bilinear": {"rescoring": "bilinear"},
    "rescoring, mlp": {"rescoring": "mlp"},
    "pruner 8": {"prune_rank": 8},
    "init rank 16": {"stream_init_rank": 16},
    "value rotation 0.3": {"value_rotation": 0.3},
    "position anchor": {"stream_position": "anchor"},
    "4 anchors": {"max_anchors": 4},
    "learning rate 5e-4": {"learning_rate": 5e-4},
    "stream lr x1": {"stream_lr_scale": 1.0},
    "stream lr x10": {"stream_lr_scale": 10.0},
}
"""What each arm changes: settings of the training, or ``rescoring`` of the candidates afterwards."""
_KEPT = 0.99  # share of right children that the early exit must keep
_CHILDREN = 4  # candidates per stream among which it chooses


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
    parser.add_argument("--prompts", type=int, default=1000, help="training questions that the model answers")
    parser.add_argument("--heldout", type=int, default=100, help="held-out questions to measure on")
    parser.add_argument("--iters", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each arm; may be raised later")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The document of all arms, written to ``--out`` after each."""
    from specstream_mlx.training.datasets import Dataset

    budget = {
        "iters": options.iters,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "num_stream_layers": 3,
        "rank": 32,
        "gamma": 4,
        "warmup": min(30, options.iters // 4),
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
    for seed, name in itertools.product(range(options.seeds), options.only or list(ARMS)):
        runs = document["arms"].setdefault(name, [])
        if len(runs) <= seed:
            found, examples = measure(options, budget | ARMS[name] | {"seed": seed}, examples)
            runs.append(found)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            print(report(document), file=sys.stderr, flush=True)
    return document


def measure(options: argparse.Namespace, settings: dict[str, Any], examples: Any) -> tuple[dict[str, Any], Any]:
    """Train one arm and measure it; the answers are made once and handed on."""
    import mlx.core as mx

    from benchmarks import rescoring
    from specstream_mlx.training.evaluation import validate
    from specstream_mlx.training.run import TrainRun
    from specstream_mlx.training.trainable import trained_tensors
    from specstream_mlx.training.trainer import loss_weights

    settings = dict(settings)
    scorer_name = settings.pop("rescoring", None)
    with TemporaryDirectory() as folder:
        run = TrainRun.prepare(options.model, Path(folder) / "adapter", settings)
        if examples is None:
            examples = own_answers(options, run)
        mx.reset_peak_memory()
        begin, cpu = time.perf_counter(), cpu_seconds()
        events: list[dict[str, Any]] = []
        run.train(examples, report=events.append)
        figures: dict[str, Any] = {
            "seconds": round(time.perf_counter() - begin, 1),
            "cpu_seconds": round(cpu_seconds() - cpu, 1),
            "peak_memory_gb": round(mx.get_peak_memory() / 1e9, 3),
            "training_loss": next(event["loss"] for event in reversed(events) if event["event"] == "train"),
            "trained_parameters": sum(value.size for value in trained_tensors(run.model).values()),
        }
        found = validate(run.model, examples.valid, loss_weights(run.settings), batch_size=8)
        tokens_per_pass, accepted = found.tokens_per_pass, found.acceptance
        if scorer_name is not None:
            scorer = rescoring.SCORERS[scorer_name](run.model)
            rescoring.fit(scorer, rescoring.read_guesses(run.model, examples.train), run.settings.seed)
            tokens_per_pass, accepted = rescoring.acceptance(rescoring.read_guesses(run.model, examples.valid), scorer)
            figures["tokens_per_pass_before"] = round(found.tokens_per_pass, 4)
            figures["context_share_of_a_step"] = round(rescoring.context_share(run.model), 3)
            figures["trained_parameters"] += sum(value.size for _, value in tree_flatten(scorer.parameters()))
        if run.settings.prune_rank is not None:
            figures["wrong_children_pruned"] = round(wrong_children_pruned(run.model, examples.valid), 4)
        figures |= {
            "settings": settings,
            "tokens_per_pass": round(tokens_per_pass, 4),
            "acceptance": [round(rate, 4) for rate in accepted],
        }
        return figures, examples


def wrong_children_pruned(model: Any, examples: Any) -> float:
    """Share of wrong children that the early exit drops at the threshold that keeps ``_KEPT`` of the right ones.

    The children are the first ``_CHILDREN`` guesses of every stream, under the parent that the text has.
    """
    import mlx.core as mx
    import numpy as np

    from benchmarks.rescoring import children_of

    right, wrong = [], []
    for example in examples:
        main, parents, tokens, targets = children_of(model, example, _CHILDREN)
        chances = mx.softmax(model.early_exit_logits(main.trunk), axis=-1)
        chances = np.array(chances[mx.array(parents)[:, :, None], mx.array(tokens)])
        hit = tokens == targets[:, :, None]
        exists = np.broadcast_to((targets >= 0)[:, :, None], hit.shape)
        right.append(chances[hit & exists])
        wrong.append(chances[~hit & exists])
    threshold = np.quantile(np.concatenate(right), 1 - _KEPT)
    return float((np.concatenate(wrong) < threshold).mean())


def own_answers(options: argparse.Namespace, run: Any) -> Any:
    """The model's greedy answers to training questions, and to held-out ones to measure on."""
    from benchmarks.tasks.text_to_sql.heldout import HELDOUT
    from benchmarks.tasks.text_to_sql.prompts import write_prompts
    from specstream_mlx.training.datasets import Dataset

    held_out = HELDOUT.read_text(encoding="utf-8").splitlines(keepends=True)[: options.heldout]
    answers = options.out.with_suffix(".answers.jsonl")
    with TemporaryDirectory() as folder:
        files = write_prompts(Path(folder) / "train.jsonl", options.prompts, 4242), Path(folder) / "heldout.jsonl"
        files[1].write_text("".join(held_out), encoding="utf-8")
        return Dataset(*(run.own_answers(file, answers, {"samples": 0, "max_tokens": 128}).train for file in files))


def cpu_seconds() -> float:
    """Processor time of this process, which other programs lengthen less than they do the clock."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def report(document: dict[str, Any]) -> str:
    """The arms as a table: means over the seeds, with the range of tokens per pass where there are several."""
    header = ("arm", "tokens per pass", "acceptance by depth", "parameters", "CPU s", "note")
    rows = []
    for name, runs in document["arms"].items():
        seen = [run["tokens_per_pass"] for run in runs]
        spread = f" ({min(seen):.3f}..{max(seen):.3f})" if len(seen) > 1 else ""
        rows.append(
            (
                name,
                f"{mean(seen):.3f}{spread}",
                " ".join(f"{rate:.3f}" for rate in mean_acceptance(runs)),
                f"{runs[0]['trained_parameters']:,}",
                f"{mean([run['cpu_seconds'] for run in runs]):.0f}",
                note(runs),
            )
        )
    return table(header, rows)


def note(runs: Sequence[dict[str, Any]]) -> str:
    """What else there is to say of an arm."""
    if "tokens_per_pass_before" in runs[0]:
        gain = mean([run["tokens_per_pass"] / run["tokens_per_pass_before"] - 1 for run in runs])
        return f"{gain:+.2%} tokens per pass over the same streams' own ranking"
    if "wrong_children_pruned" in runs[0]:
        share = mean([run["wrong_children_pruned"] for run in runs])
        return f"drops {share:.1%} of wrong children, keeping {_KEPT:.0%} of right ones"
    return ""


def mean_acceptance(runs: Sequence[dict[str, Any]]) -> list[float]:
    """By depth, over the seeds."""
    return [mean(list(rates)) for rates in zip(*(run["acceptance"] for run in runs), strict=True)]


def plot(document: dict[str, Any], path: Path) -> None:
    """Tokens per pass of every arm, and acceptance by depth for each group of arms that differ in one thing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    arms = document["arms"]
    groups = [word for word in dict.fromkeys(re.split(r"[ ,]", name)[0] for name in arms) if word != BASELINE]
    columns = 4
    rows = -(-max(len(groups), 1) // columns)
    figure = Figure(figsize=(14, 4 + 3 * rows), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(4, 3 * rows))
    overview = top.subplots()
    for place, (name, runs) in enumerate(arms.items()):
        seen = [run["tokens_per_pass"] for run in runs]
        overview.bar(place, mean(seen), color="tab:gray" if name == BASELINE else "tab:blue")
        overview.plot([place] * len(seen), seen, "k.", markersize=4)
    overview.set_xticks(range(len(arms)), list(arms), rotation=30, ha="right", fontsize="small")
    overview.set_ylabel("tokens per pass")
    small = bottom.subplots(rows, columns, squeeze=False).flatten()
    for axes in small[len(groups) :]:
        axes.remove()
    for axes, group in zip(small, groups, strict=False):
        for name, runs in arms.items():
            if name == BASELINE or re.split(r"[ ,]", name)[0] == group:
                rates = mean_acceptance(runs)
                axes.plot(range(1, len(rates) + 1), rates, "o-", label=name, color="gray" if name == BASELINE else None)
        axes.set(title=group, xlabel="depth", ylabel="acceptance")
        axes.legend(fontsize="x-small")
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
