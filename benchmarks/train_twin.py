"""Shared-mode training here against the PyTorch twin: one start, the same rows in the same order, the same settings.

    scripts/with-openblas python -m benchmarks.train_twin --iters 150

Rows of the text-to-SQL recipe fine-tune the bundled model in float32, once by ``specstream-mlx train`` and once by
``specstream_torch.finetune``, whose checkpoint the converter brings back. Both then answer held-out
questions with chain drafting. Needs the ``torch`` extra. The last line of the output is one JSON document.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlx_lm import load as load_stock

from benchmarks.tasks.text_to_sql.heldout import HELDOUT
from benchmarks.tasks.text_to_sql.task import examples
from specstream_cli.tables import table
from specstream_convert import ConvertOptions, convert
from specstream_mlx import default_model_path, load, stream_generate
from specstream_mlx.training.batches import Example
from specstream_mlx.training.datasets import Dataset, plain_prompt
from specstream_mlx.training.run import TrainRun
from specstream_mlx.training.trainable import attach


def main(arguments: Sequence[str] | None = None) -> int:
    """Train both, measure both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iters", type=int, default=150)
    parser.add_argument("--rows", type=int, default=1000, help="questions with answers to train on")
    parser.add_argument("--heldout", type=int, default=60, help="held-out questions to answer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    settings = {
        "gamma": 4,
        "num_stream_layers": 2,
        "rank": 32,
        "iters": options.iters,
        "batch_size": 8,
        "learning_rate": 2.5e-3,
        "stream_lr_scale": 30.0,
        "warmup": min(30, options.iters // 4),
        "seed": options.seed,
    }
    rows = read_rows(options.rows)
    with TemporaryDirectory() as name:
        folder = Path(name)
        ours = train_here(rows, folder, settings)
        twins = train_twin(rows, folder, settings)
        held_out = [json.loads(line)["prompt"] for line in HELDOUT.read_text(encoding="utf-8").splitlines()]
        document = {
            "settings": settings | {"rows": options.rows, "heldout": options.heldout},
            "losses": {"here": ours, "twin": twins},
            "largest_difference_of_losses": max(abs(a - b) for a, b in zip(ours, twins, strict=True)),
            "tokens_per_pass": {
                "here": tokens_per_pass(folder / "here", held_out[: options.heldout]),
                "twin": tokens_per_pass(folder / "twin", held_out[: options.heldout]),
            },
        }
    print(report(document))
    print(json.dumps(document))
    return 0


def read_rows(count: int) -> list[Example]:
    """Questions and answers of the recipe's training split."""
    _, tokenizer = load_stock(str(default_model_path()), lazy=True)  # type: ignore[misc]
    return [
        Example(
            tuple(plain_prompt(tokenizer, row.prompt)),
            (*tokenizer.encode(row.answer, add_special_tokens=False), tokenizer.eos_token_id),
        )
        for row in itertools.islice(examples("train", 4242), count)
    ]


def train_here(rows: list[Example], folder: Path, settings: dict[str, Any]) -> list[float]:
    """Write the common start to ``start`` and our adapter to ``here``; the losses of all steps."""
    quiet = {"steps_per_report": 1, "val_batches": 0, "save_every": 10**6}
    start, run = (TrainRun.prepare(None, folder / "here", settings | quiet | {"mode": "shared"}) for _ in range(2))
    attach(start.model, start.config(), rank=start.settings.rank, scale=start.settings.scale, seed=start.settings.seed)
    start.export_peft(folder / "start")
    events: list[dict[str, Any]] = []
    run.train(Dataset(rows, []), report=events.append)  # from the same start, which follows from the seed
    return [event["loss"] for event in events if event["event"] == "train"]


def train_twin(rows: list[Example], folder: Path, settings: dict[str, Any]) -> list[float]:
    """Train the twin from ``start`` and convert its checkpoint to ``twin``; the losses of all steps."""
    import torch

    from specstream_torch import finetune as twin
    from specstream_torch.loss import Example as TwinExample

    torch.set_num_threads(1)
    lines: list[str] = []
    config = twin.FinetuneConfig(
        model=str(default_model_path()), output=str(folder / "theirs"), start=str(folder / "start"), log_every=1
    )
    twin.finetune(
        replace(config, **settings),
        [TwinExample(row.prompt, row.answer) for row in rows],
        report=lines.append,
    )
    convert(
        ConvertOptions(
            adapter_path=folder / "theirs",
            mlx_path=folder / "twin",
            hf_path=str(default_model_path()),
            adapter_only=True,
        )
    )
    return [float(line.split("loss ")[1].split()[0]) for line in lines if "loss " in line]


def tokens_per_pass(adapter: Path, prompts: Sequence[str]) -> float:
    """Generated tokens over passes of the target, chain drafting, greedy."""
    model, tokenizer = load(adapter=str(adapter))
    tokens = passes = 0
    for prompt in prompts:
        *_, response = stream_generate(model, tokenizer, prompt, 128, draft="chain")
        tokens += response.generation_tokens
        passes += response.target_passes
    return tokens / passes


def report(document: dict[str, Any]) -> str:
    """Losses along the way, and what the ends are worth."""
    losses = document["losses"]
    steps = sorted({1, 20, *range(50, len(losses["here"]) + 1, 50), len(losses["here"])} - {0})
    rows = [
        (f"loss at step {step}", *(f"{losses[who][step - 1]:.4f}" for who in ("here", "twin")))
        for step in steps
        if step <= len(losses["here"])
    ]
    worth = document["tokens_per_pass"]
    rows.append(("tokens per pass", *(f"{worth[who]:.4f}" for who in ("here", "twin"))))
    return table(("", "here", "twin"), rows)


if __name__ == "__main__":
    sys.exit(main())
