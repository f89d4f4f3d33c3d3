"""What a PEFT checkpoint is worth on a task, in PyTorch: the metric, and tokens per pass of a chain.

    python -m benchmarks.tasks.checkpoint --task sql --base runs/smollm2/hf --checkpoint runs/sql/adapter

Prompts are answered greedily in batches. The tokens per pass are not measured by drafting: the
streams of every position of an answer are run at once, and the passes that a chain would have taken are counted.
It is the quick look for curves, and the only one on a machine without MLX; `run` is the measurement.
"""

from __future__ import annotations

import argparse
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


def checkpoint_figures(
    task: Task,
    rows: Sequence[Row],
    base: Path,
    checkpoint: Path | None,
    *,
    device: str = "cpu",
    batch_size: int = 32,
    dtype: str | None = None,
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
        figures["chain_tokens_per_pass"] = round(chain_tokens_per_pass(fast, streams, found, device), 4)
    return figures, texts


@torch.no_grad()
def chain_tokens_per_pass(fast: PackedLlama, streams: Any, examples: Sequence[Example], device: str) -> float:
    """Count the passes that a chain takes for the model's own answers."""
    config = streams.config
    tokens = passes = 0
    for example in examples:
        batch = pack([[Group((example,), 0)]], config.gamma, random.Random(0)).to(device)
        _, hidden = fast(batch, streams.stream_embeddings, config.num_stream_layers)
        assert hidden is not None
        guesses = (hidden[0] @ fast.head.t()).argmax(-1).tolist() if len(example.answer) > 1 else []
        tokens += len(example.answer)
        passes += chain_passes(example.answer, guesses)
    return tokens / max(1, passes)


def chain_passes(answer: Sequence[int], guesses: Sequence[Sequence[int]]) -> int:
    """The passes of the target for an answer; `guesses[i][j - 1]` is stream j's token for ``answer[i + j]``.

    The prefill yields ``answer[0]``, and with i the anchor a pass yields what it accepts and one token more.
    """
    passes, anchor = 1, 0
    while anchor + 1 < len(answer):
        accepted = 0
        for j, guess in enumerate(guesses[anchor], start=1):
            if anchor + j >= len(answer) or guess != answer[anchor + j]:
                break
            accepted += 1
        passes += 1
        anchor += accepted + 1
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
    )
    line = json.dumps(figures)
    print(line)
    if namespace.out is not None:
        namespace.out.write_text(line + "\n", encoding="utf-8")
    if namespace.answers is not None:
        namespace.answers.write_text("".join(json.dumps({"answer": text}) + "\n" for text in texts), encoding="utf-8")


if __name__ == "__main__":
    main()
