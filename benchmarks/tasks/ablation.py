"""The paper's choices on one model and task: stream layers, streams, chain and tree, each with its cost of training.

    python -m benchmarks.tasks.ablation --task e2e_nlg --base runs/smollm2/hf --steps 20 \\
      --start runs/tasks/shared/e2e_nlg/adapter --data train.jsonl --test test.jsonl

Every setting goes on from the same checkpoint for the same steps on the same rows; streams of another depth or number
begin as those of the checkpoint. Tokens per pass are counted on test prompts, as `checkpoint` does it, for a chain and
for a tree. `--own FILE` takes the own answers (`own.json`) of an earlier run instead of the data, for the streams to
learn from. The figures go to `ablation.json` beside this module, which the table reads, and with matplotlib to a plot.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from specstream_torch.loss import Example
from specstream_torch.packed.trainer import PackedConfig, train_packed

from .checkpoint import checkpoint_figures
from .finetune import encode_rows
from .task import Task, find_task, read_rows, task_names
from .text_to_sql.pretrain import keep_freed_memory

FOLDER = Path(__file__).parent
TREE = 15
EMBEDDINGS = "base_model.model.specstream.stream_embeddings"


def with_streams(checkpoint: Path, gamma: int, out: Path) -> Path:
    """A copy of a checkpoint with another number of streams; those that are new begin as the last one."""
    shutil.copytree(checkpoint, out)
    config = json.loads((out / "specstream_config.json").read_text(encoding="utf-8"))
    tensors = load_file(out / "adapter_model.safetensors")
    held = tensors[EMBEDDINGS]
    rows = [min(row, len(held) - 1) for row in range(gamma)]
    tensors[EMBEDDINGS] = held[rows].contiguous()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config | {"gamma": gamma}, indent=2)
    (out / "specstream_config.json").write_text(text + "\n", encoding="utf-8")
    return out


def one_setting(
    task: Task, base: Path, start: Path, examples: Sequence[Example], rows: Sequence[Any], config: PackedConfig
) -> dict[str, Any]:
    """Train one setting and count its passes."""
    with tempfile.TemporaryDirectory(prefix="specstream-ablation-") as folder:
        first = with_streams(start, config.gamma, Path(folder) / "start")
        made = train_packed(base, examples, Path(folder) / "run", config, start=first, report=lambda line: None)
        training = json.loads((made / "specstream_config.json").read_text(encoding="utf-8"))["training"]
        figures, _ = checkpoint_figures(task, rows, base, made, dtype="bfloat16", trees=(0, TREE))
    counted = figures["counted_tokens_per_pass"]
    return {
        "chain": counted["chain"],
        "tree": counted[f"best-first:{TREE}"],
        "seconds_per_step": round(training["processor_seconds"] / max(1, training["steps"]), 2),
    }


def ablate(
    task: Task,
    base: Path,
    start: Path,
    examples: Sequence[Example],
    rows: Sequence[Any],
    settings: PackedConfig,
    *,
    layers: Sequence[int],
    streams: Sequence[int],
) -> list[dict[str, Any]]:
    """The rows of the table."""
    found = []
    for number in layers:
        figures = one_setting(task, base, start, examples, rows, replace(settings, num_stream_layers=number))
        found.append({"group": "stream layers", "setting": str(number)} | figures)
        print(json.dumps(found[-1]), flush=True)
    for number in streams:
        figures = one_setting(task, base, start, examples, rows, replace(settings, gamma=number))
        found.append({"group": "streams", "setting": str(number)} | figures)
        print(json.dumps(found[-1]), flush=True)
    return found


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Tokens per pass over each setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = sorted({row["group"] for row in rows})
    figure, axes = pyplot.subplots(1, len(groups), figsize=(4 * len(groups), 3), squeeze=False)
    for axis, group in zip(axes[0], groups, strict=True):
        chosen = [row for row in rows if row["group"] == group]
        for kind in ("chain", "tree"):
            axis.plot([int(row["setting"]) for row in chosen], [row[kind] for row in chosen], marker="o", label=kind)
        axis.set_xlabel(group)
        axis.set_ylabel("tokens per pass")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, train, measure and write."""
    parser = argparse.ArgumentParser(prog="benchmarks.tasks.ablation", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--task", required=True, choices=task_names())
    parser.add_argument("--base", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--start", type=Path, required=True, help="checkpoint of form A that every setting starts from")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--own", type=Path, help="own answers of an earlier run, instead of the data")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--step-tokens", type=int, default=800)
    parser.add_argument("--limit", type=int, default=30, help="test prompts")
    parser.add_argument("--layers", type=int, nargs="*", default=[2, 4, 6, 8, 10])
    parser.add_argument("--streams", type=int, nargs="*", default=[2, 3, 4, 6])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=FOLDER / "ablation.json")
    namespace = parser.parse_args(arguments)
    keep_freed_memory()
    torch.set_num_threads(namespace.threads)
    task = find_task(namespace.task)
    if namespace.own is not None:
        pairs = json.loads(namespace.own.read_text(encoding="utf-8"))
        examples = [Example(tuple(prompt), tuple(answer)) for prompt, answer in pairs]
    else:
        examples = encode_rows(task, read_rows(task, namespace.data), namespace.base)
    training = json.loads((namespace.start / "specstream_config.json").read_text(encoding="utf-8"))
    settings = PackedConfig(
        **dict(task.training)
        | {
            "num_steps": namespace.steps,
            "num_stream_layers": training["num_stream_layers"],
            "gamma": training["gamma"],
            "step_tokens": namespace.step_tokens,
            "stream_weight": 0.5,
            "stream_learning_rate": 0.01,
            "seed": 2,
        }
    )
    rows = ablate(
        task,
        namespace.base,
        namespace.start,
        examples,
        read_rows(task, namespace.test, namespace.limit),
        settings,
        layers=namespace.layers,
        streams=namespace.streams,
    )
    kind = "the model's own answers" if namespace.own is not None else "the data"
    note = (
        f"{task.title}: every setting goes on for {namespace.steps} steps from the shipped adapter's checkpoint "
        f"({training['num_stream_layers']} stream layers, {training['gamma']} streams) on {kind}; tokens per pass "
        f"counted on {namespace.limit} test prompts, with a chain and with a best-first tree of {TREE} nodes."
    )
    namespace.out.write_text(json.dumps({"note": note, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        plot(rows, namespace.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
