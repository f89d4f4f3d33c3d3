"""Writes a page with one answer per task, pass by pass: what was accepted, what was rejected, what main added.

    python -m benchmarks.tasks.examples --base runs/smollm2/mlx --data-dir data

In the manner of the paper's figure 19. A line is a pass of the target: accepted drafts in bold, the token that main
added, and struck through what the best rejected path would have gone on with.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specstream_mlx import stream_generate

from .run import opened
from .table import TASKS
from .task import Task, find_task, read_rows

DEFAULT_OUT = Path(__file__).parents[2] / "docs" / "task_examples.md"
HEADER = """# One answer per task, pass by pass

Every line is a pass of the model. **Bold** is what the streams had guessed and the model confirmed, plain is the token
that the model added in the same pass, ~~struck~~ is the rest of the likeliest guess, which was rejected. The first
line is the prompt's pass, which has no guess yet. Written by `python -m benchmarks.tasks.examples`.
"""


def pass_line(tokenizer: Any, tokens: Sequence[int], accepted: Sequence[int], drafted: Sequence[Sequence[int]]) -> str:
    """One pass in Markdown. `drafted` are the paths of the tree, `accepted` the drafts among `tokens` that held."""
    held, own = list(tokens[: len(accepted)]), list(tokens[len(accepted) :])
    parts = []
    if held:
        parts.append(f"**{_shown(tokenizer, held)}**")
    if own:
        parts.append(_shown(tokenizer, own))
    path = next((list(p) for p in drafted if list(p[: len(held)]) == held and len(p) > len(held)), [])
    rejected = path[len(held) :]
    if rejected and rejected[:1] != own[:1]:
        parts.append(f"~~{_shown(tokenizer, rejected)}~~")
    return " ".join(parts)


def _shown(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Token by token, with the spaces seen, and nothing that Markdown would read."""
    texts = [tokenizer.decode([token]).replace(" ", "·").replace("\n", "⏎").replace("|", "\\|") for token in tokens]
    return " ".join(f"`{text.replace('`', '´')}`" for text in texts)


def task_page(task: Task, base: str, adapter: Path, row: dict[str, Any]) -> str:
    """The passes of one answer."""
    lines = []
    with opened(base, adapter) as (model, tokenizer, _):
        text, last = "", None
        for last in stream_generate(
            model,
            tokenizer,
            task.prompt(row),
            max_tokens=task.max_tokens,
            draft=task.draft,  # type: ignore[arg-type]
        ):
            text += last.text
            lines.append(f"{last.target_passes}. {pass_line(tokenizer, last.tokens, last.accepted, last.drafted)}")
    assert last is not None
    shown = row["prompt"] if len(row["prompt"]) < 700 else row["prompt"][:700] + " ..."
    context = f"{row['context']}\n" if "context" in task.fields else ""
    return (
        f"## {task.title}\n\n```text\n{context}{shown}\n```\n\n> {text.strip()}\n\n"
        f"{last.generation_tokens} tokens in {last.target_passes} passes, {last.tokens_per_pass:.2f} per pass.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def main(arguments: list[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="benchmarks.tasks.examples", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", required=True, help="MLX directory or repository")
    parser.add_argument("--data-dir", type=Path, required=True, help="holds <task>/test.jsonl")
    parser.add_argument("--row", type=int, default=0, help="which row of each file")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    namespace = parser.parse_args(arguments)
    parts = [HEADER]
    for name in TASKS:
        task = find_task(name)
        if task.adapter.exists():
            rows = read_rows(task, namespace.data_dir / name / "test.jsonl", namespace.row + 1)
            parts.append(task_page(task, namespace.base, task.adapter, rows[namespace.row]))
    namespace.out.write_text("\n".join(parts), encoding="utf-8")
    print(namespace.out)


if __name__ == "__main__":
    main()
