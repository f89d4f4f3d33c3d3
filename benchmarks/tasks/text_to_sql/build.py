"""Makes the bundled model from nothing: base, fine-tune, conversion, evaluation, bundle.

    python -m benchmarks.tasks.text_to_sql.build

A step whose output was made with the same settings from the same inputs is left out, and an interrupted training
goes on where it was, so the command may be given again at any time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specstream_mlx.formats.jsonl import read_jsonl

from .heldout import HELDOUT, write_heldout
from .prompts import write_prompts
from .stamps import digest, is_current, write_stamp

ROOT = Path(__file__).parents[3]
BUNDLE = ROOT / "specstream_mlx" / "bundled" / "text-to-sql"
MAX_BYTES = 16_000_000
NUM_SAMPLES = 24
LONG_ANSWER = range(40, 81)


def convert_model(base: Path, adapter: Path, model: Path) -> Path:
    """Convert the fine-tune to an MLX directory with our own converter, in float32."""
    from specstream_convert import ConvertOptions, convert

    made_from = {"base": digest(base), "adapter": digest(adapter)}
    if not is_current(model, made_from):
        convert(
            ConvertOptions(
                adapter_path=adapter, mlx_path=model, hf_path=str(base), dtype="float32", overwrite=model.exists()
            )
        )
        write_stamp(model, made_from)
    return model


def evaluate_model(model: Path, heldout: Path, figures: Path) -> dict[str, Any]:
    """Measure the model in a process of its own, on OpenBLAS where MLX would use a slow BLAS."""
    made_from = {"model": digest(model), "heldout": digest(heldout)}
    if not is_current(figures, made_from):
        command = [
            str(ROOT / "scripts" / "with-openblas"),
            sys.executable,
            "-m",
            "benchmarks.tasks.text_to_sql.evaluate",
        ]
        options = [
            "--model",
            str(model.resolve()),
            "--examples",
            str(heldout.resolve()),
            "--out",
            str(figures.resolve()),
        ]
        subprocess.run([*command, *options], cwd=ROOT, check=True)
        write_stamp(figures, made_from)
    return dict(json.loads(figures.read_text(encoding="utf-8")))


def choose_samples(heldout: list[dict[str, str]], num_tokens: Callable[[str], int]) -> list[dict[str, str]]:
    """Held-out examples to show, in the file's order but long answers first; nothing else decides."""
    long = [row for row in heldout if num_tokens(row["answer"]) in LONG_ANSWER]
    others = [row for row in heldout if num_tokens(row["answer"]) not in LONG_ANSWER]
    return [*long, *others][:NUM_SAMPLES]


def write_bundle(model: Path, heldout: Path, bundle: Path) -> int:
    """Put model, samples and prompts where the package looks for them, and return their size in bytes.

    Raises:
        SystemExit: they are larger than the package may be; the old bundle stays.
    """
    from specstream_mlx.training.distill import PROMPTS_NAME

    from .tokenizer import ExampleEncoder

    encoder = ExampleEncoder(model)
    rows = [row for _, row in read_jsonl(heldout)]
    samples = choose_samples(rows, lambda answer: len(encoder.tokenizer.encode(answer, add_special_tokens=False).ids))
    partial = bundle.with_name(f".{bundle.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in sorted(path for path in model.iterdir() if path.is_file()):
        (partial / file.name).write_bytes(file.read_bytes())
    lines = "".join(json.dumps(row) + "\n" for row in samples)
    (partial / "samples.jsonl").write_text(lines, encoding="utf-8")
    write_prompts(partial / PROMPTS_NAME)
    size = sum(path.stat().st_size for path in partial.iterdir())
    if size > MAX_BYTES:
        shutil.rmtree(partial)
        raise SystemExit(f"the bundle has {size:,} bytes, expected at most {MAX_BYTES:,}")
    shutil.rmtree(bundle, ignore_errors=True)
    partial.rename(bundle)
    return size


def build(out: Path, bundle: Path = BUNDLE, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Run all steps that are not up to date and return the evaluation's figures."""
    from .finetune import FinetuneSettings, finetune
    from .pretrain import PretrainSettings, pretrain
    from .rescale import rescale

    trained = pretrain(PretrainSettings(), out)
    report(f"base: {trained}")
    write_heldout(HELDOUT)
    base = rescale(trained, out / "text-to-sql-base")
    adapter = finetune(FinetuneSettings(), base, out, report=report)
    report(f"fine-tune: {adapter}")
    model = convert_model(base, adapter, out / "model")
    report(f"MLX directory: {model}")
    figures = evaluate_model(model, HELDOUT, out / "evaluation.json")
    size = write_bundle(model, HELDOUT, bundle)
    report(json.dumps({key: value for key, value in figures.items() if key != "drafts"} | {"bundle_bytes": size}))
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/text_to_sql"))
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--threads", type=int, default=1, help="of the trainings; the figures are made with 1")
    namespace = parser.parse_args(arguments)

    import torch

    from .pretrain import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(namespace.threads)
    build(namespace.out, namespace.bundle, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
