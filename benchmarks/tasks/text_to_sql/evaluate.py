"""Measures an MLX directory on held-out examples: exact match, tokens per pass, acceptance by depth and rank.

    scripts/with-openblas python -m benchmarks.tasks.text_to_sql.evaluate --model runs/text_to_sql/model

Prints progress on stderr and one JSON document on stdout. Every way of drafting must give the tokens of plain
decoding, otherwise there are no figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import load as load_stock
from mlx_lm import stream_generate as stock_generate

from specstream_mlx import SpecStreamModel, load, stream_generate
from specstream_mlx.formats.jsonl import read_jsonl
from specstream_mlx.target.tree import DraftTree
from tests.passes import stream_logits, verify

from .heldout import HELDOUT

DRAFTS = ("off", "chain", "tree", "auto")
MAX_TOKENS = 128
NUM_RANKS = 4


def read_examples(path: Path, count: int | None = None) -> list[dict[str, str]]:
    """The first `count` prompts and answers of a JSON lines file, all of them without `count`."""
    return [row for _, row in read_jsonl(path)][:count]


def run(model: SpecStreamModel, tokenizer: Any, prompt: str, draft: Any) -> tuple[list[int], str, Any]:
    """Greedy tokens and text of one prompt, and the last response, which has the totals."""
    tokens: list[int] = []
    text = ""
    for response in stream_generate(model, tokenizer, prompt, MAX_TOKENS, draft=draft):
        tokens += response.tokens
        text += response.text
    return tokens, text, response


def guess_ranks(model: SpecStreamModel, prompt: list[int], answer: list[int]) -> list[list[int]]:
    """Where the streams of every anchor rank the tokens that come.

    One pass over prompt and answer with parallel insertion gives the streams of all anchors. Row `i` is the anchor
    before `answer[i]`; its entry `j - 1` is the rank (0 is the likeliest) of `answer[i + j]` under stream `j`. Rows
    are shorter near the end, where a stream has nothing to predict.
    """
    caches = model.make_cache()
    if len(prompt) > 1:
        model(mx.array(prompt[:-1])[None], cache=caches)
    nodes = [prompt[-1], *answer[:-1]]
    verified = verify(model, mx.array(nodes), DraftTree.chain(len(nodes) - 1), caches, insertion="parallel")
    ranks = []
    for node in range(len(answer) - 1):
        targets = answer[node + 1 : node + 1 + model.gamma]
        logits = stream_logits(model, verified, node, caches)[: len(targets)]
        right = mx.take_along_axis(logits, mx.array(targets)[:, None], axis=-1)
        ranks.append(mx.sum(logits > right, axis=-1))
    mx.eval(ranks)
    return [row.tolist() for row in ranks]  # type: ignore[misc]


def acceptance_by_rank(rows: list[list[int]], gamma: int) -> tuple[list[list[float]], list[int]]:
    """How often the right token is the k-th guess of stream j, given that the path so far can be drafted.

    That is: among the anchors at which each stream before j has the right token among its first `NUM_RANKS` guesses.
    Returns the (gamma, NUM_RANKS) table and the number of anchors behind each of its rows.
    """
    table, counts = [], []
    for depth in range(gamma):
        reached = [row[depth] for row in rows if len(row) > depth and all(r < NUM_RANKS for r in row[:depth])]
        table.append([sum(r == k for r in reached) / max(len(reached), 1) for k in range(NUM_RANKS)])
        counts.append(len(reached))
    return table, counts


def run_stock(model: Any, tokenizer: Any, prompt: str) -> tuple[list[int], str]:
    """Greedy tokens and text of mlx-lm itself."""
    tokens, text = [], ""
    for response in stock_generate(model, tokenizer, prompt, max_tokens=MAX_TOKENS):
        tokens.append(int(response.token))
        text += response.text
    return tokens, text


def evaluate(directory: Path, examples: list[dict[str, str]], adapter: Path | None = None) -> dict[str, Any]:
    """All figures of a model directory, or of a stream adapter over it.

    Raises:
        AssertionError: two ways of drafting gave different tokens, or a lossless adapter gave other tokens than mlx-lm
            does with the directory alone.
    """
    model, tokenizer = load(str(directory), adapter=adapter)
    lossless = model.stream_config is not None and model.stream_config.mode == "lossless"
    stock = load_stock(str(directory))[0] if adapter is not None and lossless else None
    totals: dict[str, dict[str, Any]] = {
        draft: {
            "generation_tokens": 0,
            "target_passes": 0,
            "stream_passes": 0,
            "drafted_by_depth": [0] * model.gamma,
            "accepted_by_depth": [0] * model.gamma,
        }
        for draft in DRAFTS
    }
    right = 0
    rows: list[list[int]] = []
    for number, example in enumerate(examples, 1):
        plain: list[int] = []
        if stock is not None:
            reference = run_stock(stock, tokenizer, example["prompt"])
        for draft in DRAFTS:
            tokens, text, last = run(model, tokenizer, example["prompt"], draft)
            if draft == "off":
                plain = tokens
                assert stock is None or (tokens, text) == reference, f"other tokens than mlx-lm's on example {number}"
                right += text.strip() == example["answer"]
            assert tokens == plain, f"draft {draft!r} gave other tokens than plain decoding on example {number}"
            total = totals[draft]
            for name in ("generation_tokens", "target_passes", "stream_passes"):
                total[name] += getattr(last, name)
            for name in ("drafted_by_depth", "accepted_by_depth"):
                total[name] = [a + b for a, b in zip(total[name], getattr(last, name), strict=True)]
        rows += guess_ranks(model, list(tokenizer.encode(example["prompt"])), plain)
        if number % 50 == 0:
            print(f"{number}/{len(examples)} examples, {right} right", file=sys.stderr, flush=True)
    for total in totals.values():
        total["tokens_per_pass"] = round(total["generation_tokens"] / total["target_passes"], 4)
    table, counts = acceptance_by_rank(rows, model.gamma)
    return {
        "num_examples": len(examples),
        "same_as_bare_base": len(examples) if stock is not None else None,
        "exact_match": round(right / len(examples), 4),
        "tokens_per_pass": {draft: total["tokens_per_pass"] for draft, total in totals.items()},
        "acceptance_by_rank": [[round(rate, 4) for rate in row] for row in table],
        "anchors_by_depth": counts,
        "drafts": totals,
    }


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("runs/text_to_sql/model"))
    parser.add_argument("--adapter", type=Path, help="a stream adapter over the model")
    parser.add_argument("--examples", type=Path, default=HELDOUT)
    parser.add_argument("--count", type=int, help="only the first of the examples")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of printing it")
    namespace = parser.parse_args(arguments)
    examples = read_examples(namespace.examples, namespace.count)
    figures = json.dumps(evaluate(namespace.model, examples, namespace.adapter), indent=2)
    if namespace.out is None:
        print(figures)
    else:
        namespace.out.write_text(figures + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
