"""Answers a task's prompts and reports what drafting saves and what the answers are worth.

    python -m benchmarks.tasks.run --task sql --base runs/smollm2/mlx --data test.jsonl --json

The adapter that ships with the task is the default. Over a full-precision base it is merged first, into a directory
that stock mlx-lm opens too; over a quantised base it stays live. `--time` adds the speed-up over mlx-lm's plain
decoding of the same weights, prompt by prompt in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from specstream_mlx import DraftOptions, load
from specstream_mlx.engine.exactness import plain_model
from specstream_mlx.errors import SpecStreamError
from specstream_mlx.formats.places import resolve

from .evaluate import Decoding, Evaluation, evaluate, sum_by_depth
from .fused import read_json, write_fused
from .task import Task, default_rows, find_task, read_rows, task_names

DRAFTERS = ("streams", "prompt-lookup", "two-model", "none")


@contextmanager
def opened(base: str | None, adapter: Path | None) -> Iterator[tuple[Any, Any, Any]]:
    """Yield model, tokenizer and mlx-lm's model of the same weights."""
    path = resolve(base) if base is not None else None
    if adapter is None or path is None:
        model, tokenizer = load(path, adapter=adapter)
        yield model, tokenizer, plain_model(model, path, adapter)
        return
    if "quantization" in read_json(path / "config.json") or not has_lora(adapter):
        model, tokenizer = load(path, adapter=adapter)
        yield model, tokenizer, plain_model(model, path, adapter)
        return
    with tempfile.TemporaryDirectory(prefix="specstream-task-") as folder:
        fused = write_fused(path, adapter, Path(folder) / "model")
        model, tokenizer = load(fused)
        yield model, tokenizer, plain_model(model, fused)


def has_lora(adapter: Path) -> bool:
    """Whether an adapter changes main rows."""
    return any((adapter / name / "adapters.safetensors").exists() for name in (".", "adapters"))


def extra_parameters(model: Any, drafter: str | None) -> int:
    """How many numbers the drafter adds to the fine-tuned model."""
    if drafter in ("none", "prompt-lookup") or model.streams is None:
        return 0
    return sum(value.size for _, value in tree_flatten(model.streams.parameters()))


def report(found: Evaluation, drafter: str, extra: int, *, timed: bool) -> dict[str, Any]:
    """The JSON object of spec: counts, metric, and with `timed` the speed-up."""
    same = sum(o.text == p.text and o.tokens == p.tokens for o, p in zip(found.ours, found.plain, strict=True))
    figures: dict[str, Any] = {
        "task": found.task.name,
        "drafter": drafter,
        "prompts": len(found.rows),
        "tokens": sum(len(a.tokens) for a in found.ours),
        "tokens_per_pass": round(found.tokens_per_pass(), 4),
        "drafted_by_depth": sum_by_depth([a.drafted for a in found.ours]),
        "accepted_by_depth": sum_by_depth([a.accepted for a in found.ours]),
        "same_text_as_plain": same == len(found.rows),
        "prompts_with_equal_text": same,
        "ties": found.ties,
        "metric": {},
        "standard_error": {},
        "metric_rows": {},
        "extra_parameters": extra,
    }
    for name, value in found.metric().items():
        figures["metric"][name] = value["mean"]
        figures["standard_error"][name] = value["standard_error"]
        figures["metric_rows"][name] = value["n"]
    if timed:
        speed = found.speedup()
        figures["speedup"] = speed["decode"]
        figures["speedup_of_sums"] = speed["decode_of_sums"]
        figures["speedup_total"] = speed["total"]
    return figures


def chosen_decoding(namespace: argparse.Namespace, task: Task) -> Decoding:
    """The settings of decoding that the command line asks for."""
    drafter = namespace.drafter
    draft = "off" if drafter == "none" else namespace.draft or task.draft
    tree = namespace.tree
    if tree is None and namespace.draft is None and drafter in (None, "streams"):
        tree = task.tree
    options = None
    if tree or namespace.insertion or namespace.prune_threshold:
        options = DraftOptions(tree=tree, insertion=namespace.insertion, prune_threshold=namespace.prune_threshold)
    return Decoding(
        draft=draft,
        drafter=drafter if drafter not in (None, "streams", "none") else None,
        temp=namespace.temp,
        seed=namespace.seed,
        max_tokens=namespace.max_tokens or task.max_tokens,
        options=options,
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.tasks.run", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--task", required=True, choices=task_names())
    add("--base", help="MLX directory or repository of the base; default: the bundled model")
    add("--adapter", type=Path, help="default: the adapter that ships with the task; 'none' for the bare base")
    add("--data", type=Path, help="JSON lines; default: the task's own test rows, or the published set by name")
    add("--drafter", choices=DRAFTERS, help="who guesses; default: streams where there are some, else nobody")
    add("--draft", choices=("auto", "tree", "chain"), help="how a draft is shaped; default: the task's")
    add("--tree", help="a tree of one's own, as 'best-first:12' or 'chain:4'")
    add("--insertion", choices=("leaf", "deferred", "parallel"))
    add("--prune-threshold", type=float)
    add("--limit", type=int, help="only the first rows")
    add("--max-tokens", type=int, help="longest answer; default: the task's")
    add("--temp", type=float, default=0.0)
    add("--seed", type=int, default=0)
    add("--time", action="store_true", help="report the speed-up too")
    add("--json", action="store_true", help="print one JSON object")
    add("--out", type=Path, help="write the JSON object here too")
    add("--answers", type=Path, help="write prompts and answers here as JSON lines")
    return parser.parse_args(arguments)


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Do what the command line asks for and return the figures."""
    task = find_task(namespace.task)
    rows = read_rows(task, namespace.data, namespace.limit) if namespace.data else default_rows(task)
    rows = rows[: namespace.limit]
    adapter = namespace.adapter
    if adapter is None and namespace.base is not None and task.adapter.exists():
        adapter = task.adapter
    if adapter == Path("none"):
        adapter = None
    decoding = chosen_decoding(namespace, task)

    def tick(done: int, found: Evaluation) -> None:
        if done % 25 == 0 or done == len(rows):
            print(f"{done}/{len(rows)}  {found.tokens_per_pass():.2f} tokens per pass", file=sys.stderr, flush=True)

    with opened(namespace.base, adapter) as (model, tokenizer, plain):
        if model.streams is None and decoding.drafter is None and decoding.draft != "off":
            decoding = Decoding(**{**vars(decoding), "draft": "off", "options": None})
        found = evaluate(model, plain, tokenizer, task, rows, decoding, tick)
        name = decoding.drafter or ("none" if decoding.draft == "off" else "streams")
        figures = report(found, name, extra_parameters(model, name), timed=namespace.time)
    figures["draft"] = decoding.draft
    if decoding.options is not None and decoding.options.tree is not None:
        figures["draft"] = decoding.options.tree
    if namespace.answers is not None:
        lines = [
            json.dumps({"prompt": row["prompt"], "answer": own.text.strip(), "tokens": len(own.tokens)})
            for row, own in zip(rows, found.ours, strict=True)
        ]
        namespace.answers.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if found.problems:
        raise SystemExit("other answers than mlx-lm's:\n" + "\n".join(found.problems))
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Run and print."""
    namespace = parse_arguments(arguments)
    try:
        figures = run(namespace)
    except SpecStreamError as error:
        raise SystemExit(str(error)) from None
    if namespace.out is not None:
        namespace.out.parent.mkdir(parents=True, exist_ok=True)
        namespace.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if namespace.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
