"""What a PEFT checkpoint is worth on a task, in PyTorch: the metric, and tokens per pass.

    python -m benchmarks.tasks.checkpoint --task sql --base runs/smollm2/hf --checkpoint runs/sql/adapter

Prompts are answered greedily in batches. The tokens per pass are not measured by drafting: the
streams of every position of an answer are run at once, and the passes that drafts from them would take are counted.
It is the quick look for curves, and the only one on a machine without MLX; `run` is the measurement.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from specstream_torch.checkpoint import load_base, load_checkpoint, upstream_deprecation_ignored
from specstream_torch.loss import Example
from specstream_torch.modeling import stream_module
from specstream_torch.packed.answers import own_answers
from specstream_torch.packed.llama import PackedLlama
from specstream_torch.packed.packing import Group, pack

from .figures import summary
from .task import Row, Task, default_rows, find_task, read_rows, task_names
from .text_to_sql.pretrain import keep_freed_memory

MOST_CANDIDATES = 8  # of a stream
TREES = (0, 8, 15)  # nodes below the root; 0 is a chain


def checkpoint_figures(
    task: Task,
    rows: Sequence[Row],
    base: Path,
    checkpoint: Path | None,
    *,
    device: str = "cpu",
    batch_size: int = 32,
    dtype: str | None = None,
    trees: Sequence[int] = TREES,
) -> tuple[dict[str, Any], list[str]]:
    """Return the figures of a checkpoint (None: of the base) and its answers, "" where none ended."""
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    model: Any = load_base(base)
    streams = None
    if checkpoint is not None:
        if (checkpoint / "specstream_config.json").exists():
            model = load_checkpoint(model, checkpoint)
            streams = stream_module(model)
        else:
            with upstream_deprecation_ignored():
                model = PeftModel.from_pretrained(model, str(checkpoint))
    model = model.to(device).eval()
    fast = PackedLlama(model, torch.float32 if dtype is None else getattr(torch, dtype))
    prompts = [tuple(tokenizer(task.prompt(row))["input_ids"]) for row in rows]
    eos_id = tokenizer.eos_token_id
    found = own_answers(fast, sorted(set(prompts)), max_tokens=task.max_tokens, eos_id=eos_id, batch_size=batch_size)
    answers = {example.prompt: example for example in found}
    texts = [tokenizer.decode(answers[p].answer[:-1]).strip() if p in answers else "" for p in prompts]
    figures: dict[str, Any] = {"task": task.name, "prompts": len(rows), "ended": sum(p in answers for p in prompts)}
    figures["products"] = dtype or "float32"
    figures["metric"] = {name: summary(values) for name, values in task.metric(rows, texts).items()}
    if streams is not None:
        figures["counted_tokens_per_pass"] = counted_tokens_per_pass(fast, streams, found, device, trees)
    return figures, texts


def counted_tokens_per_pass(
    fast: PackedLlama, streams: Any, examples: Sequence[Example], device: str, trees: Sequence[int] = TREES
) -> dict[str, float]:
    """Count the passes for the model's own answers, with a chain (0) and with best-first trees of so many nodes."""
    config = streams.config
    tokens = 0
    passes = dict.fromkeys(trees, 0)
    for example in examples:
        batch = pack([[Group((example,), 0)]], config.gamma, random.Random(0)).to(device)
        with torch.no_grad():
            _, hidden = fast(batch, streams.stream_embeddings, config.num_stream_layers)
            assert hidden is not None
            best = (hidden[0] @ fast.head.t()).float().log_softmax(-1).topk(MOST_CANDIDATES)
        tokens += len(example.answer)
        for nodes in trees:
            kept = [
                accepted_length(guesses, weights, example.answer[anchor + 1 :], nodes)
                for anchor, (guesses, weights) in enumerate(
                    zip(best.indices.tolist(), best.values.tolist(), strict=True)
                )
            ]
            passes[nodes] += num_passes(len(example.answer), kept)
    return {f"best-first:{n}" if n else "chain": round(tokens / max(1, count), 4) for n, count in passes.items()}


def accepted_length(
    guesses: Sequence[Sequence[int]], weights: Sequence[Sequence[float]], following: Sequence[int], nodes: int
) -> int:
    """How many of the tokens that follow stand in the draft: a chain for 0 nodes, else the likeliest paths.

    `guesses[j]` are stream j + 1's candidates, best first, `weights[j]` their log-probabilities.
    """
    if nodes == 0:
        pairs = zip((row[0] for row in guesses), following, strict=False)
        return next(
            (depth for depth, (guess, right) in enumerate(pairs) if guess != right), min(len(guesses), len(following))
        )
    # A heap of (minus log-probability, ranks): the next sibling and the first child follow a node that was taken.
    heap = [(-weights[0][0], (0,))]
    longest = 0
    for _ in range(nodes):
        if not heap:
            break
        cost, ranks = heapq.heappop(heap)
        depth, rank = len(ranks), ranks[-1]
        path = [guesses[level][r] for level, r in enumerate(ranks)]
        if path == list(following[:depth]):
            longest = max(longest, depth)
        if rank + 1 < len(guesses[depth - 1]):
            own = weights[depth - 1]
            heapq.heappush(heap, (cost + own[rank] - own[rank + 1], (*ranks[:-1], rank + 1)))
        if depth < len(guesses):
            heapq.heappush(heap, (cost - weights[depth][0], (*ranks, 0)))
    return longest


def num_passes(length: int, accepted: Sequence[int]) -> int:
    """The passes of the target for an answer; `accepted[i]` is how many tokens after ``answer[i]`` a draft there holds.

    The prefill yields ``answer[0]``, and with i the anchor a pass yields what it accepts and one token more.
    """
    passes, anchor = 1, 0
    while anchor + 1 < length:
        anchor += accepted[anchor] + 1
        passes += 1
    return passes


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.tasks.checkpoint", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--task", required=True, choices=task_names())
    parser.add_argument("--base", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--checkpoint", type=Path, help="PEFT directory; default: the bare base")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the products; default: float32")
    parser.add_argument("--tree", type=int, action="append", help="nodes of a tree, 0 for a chain; may be repeated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the figures here too")
    parser.add_argument("--answers", type=Path, help="write the answers here as JSON lines")
    namespace = parser.parse_args(arguments)
    keep_freed_memory()
    torch.set_num_threads(namespace.threads)
    task = find_task(namespace.task)
    rows = read_rows(task, namespace.data, namespace.limit) if namespace.data else default_rows(task)
    figures, texts = checkpoint_figures(
        task,
        rows[: namespace.limit],
        namespace.base,
        namespace.checkpoint,
        device=namespace.device,
        dtype=namespace.dtype,
        trees=namespace.tree or TREES,
    )
    line = json.dumps(figures)
    print(line)
    if namespace.out is not None:
        namespace.out.write_text(line + "\n", encoding="utf-8")
    if namespace.answers is not None:
        namespace.answers.write_text("".join(json.dumps({"answer": text}) + "\n" for text in texts), encoding="utf-8")


if __name__ == "__main__":
    main()
