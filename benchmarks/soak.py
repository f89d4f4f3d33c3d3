"""Generate again and again in one process: memory must stay flat and repeats must give the same tokens.

    scripts/with-openblas python -m benchmarks.soak --generations 1000

Runs the bundled model over prompts, samplers, trees and insertions in turn, loading it anew every 20 generations and
closing the generator early now and then. A case that comes again must give the tokens that it gave first. The slope of
the memory is that of a straight line through the second half of the run. The last line is one JSON document; the exit
code is 1 when a repeat differs or memory grows by more than ``--most-growth`` MB over the second half.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from specstream_mlx import DraftOptions, default_model_path, load, stream_generate

SAMPLERS: tuple[dict[str, Any], ...] = (
    {"temp": 0.0},
    {"temp": 0.8, "top_p": 0.9},
    {"temp": 1.0, "top_k": 20, "min_p": 0.02},
    {"temp": 1.0, "xtc_probability": 0.5},
)
PENALTIES: tuple[dict[str, Any], ...] = ({}, {"repetition_penalty": 1.1, "logit_bias": {7: 0.5}})
DRAFTS: tuple[tuple[Any, str | None, Any], ...] = (
    ("auto", None, None),
    ("tree", "cartesian:2x2x1x1", "deferred"),
    ("tree", "best-first:8", "parallel"),
    ("chain", None, "leaf"),
    ("off", None, None),
)
NUM_PROMPTS = 6
RELOAD_EVERY = 4 * len(DRAFTS)
CLOSE_EARLY_EVERY = 7
MAX_TOKENS = 24


def resident_mb() -> float:
    """This process's resident memory; where the system does not tell, its peak."""
    status = Path("/proc/self/statm")
    if status.exists():
        import os

        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


def slope(values: list[tuple[int, float]]) -> float:
    """MB per 1,000 generations over the second half of (generation, MB) pairs."""
    half = values[len(values) // 2 :]
    return float(1000 * np.polyfit([number for number, _ in half], [mb for _, mb in half], 1)[0])


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--generations", type=int, default=1000)
    parser.add_argument("--most-growth", type=float, default=20.0, help="MB over the second half (default 20)")
    arguments = parser.parse_args()
    lines = (default_model_path() / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[:NUM_PROMPTS]]
    cases = list(itertools.product(prompts, SAMPLERS, PENALTIES, DRAFTS))
    cases = [cases[index] for index in np.random.default_rng(0).permutation(len(cases))]
    model, tokenizer = load()
    first: dict[int, list[int]] = {}
    repeats = different = tokens_made = 0
    resident: list[tuple[int, float]] = []
    active: list[tuple[int, float]] = []
    started = time.perf_counter()
    for number in range(arguments.generations):
        if number and number % RELOAD_EVERY == 0:
            model, tokenizer = load()
        index = number % len(cases)
        prompt, sampling, penalties, (draft, tree, insertion) = cases[index]
        tokens: list[int] = []
        closes = number % CLOSE_EARLY_EVERY == CLOSE_EARLY_EVERY - 1
        responses = stream_generate(
            model,
            tokenizer,
            prompt,
            max_tokens=MAX_TOKENS,
            sampler=make_sampler(**sampling),
            logits_processors=make_logits_processors(**penalties),
            draft=draft,
            draft_options=DraftOptions(tree=tree, insertion=insertion),
            seed=index,
        )
        for response in responses:
            tokens += response.tokens
            if closes and len(tokens) > MAX_TOKENS // 2:
                break
        responses.close()
        tokens_made += len(tokens)
        if index in first:
            repeats += 1
            shorter = min(len(tokens), len(first[index]))
            different += tokens[:shorter] != first[index][:shorter]
        first.setdefault(index, tokens)
        if number % max(arguments.generations // 20, 1) == 0 or number == arguments.generations - 1:
            mx.clear_cache()
            resident.append((number, resident_mb()))
            active.append((number, mx.get_active_memory() / 1e6))
            print(f"{number:6} resident {resident[-1][1]:8.1f} MB  active {active[-1][1]:8.2f} MB", file=sys.stderr)
    growth = {name: slope(v) * arguments.generations / 2000 for name, v in (("resident", resident), ("active", active))}
    report = {
        "mlx": mx.__version__,
        "mlx_lm": mlx_lm.__version__,
        "generations": arguments.generations,
        "tokens": tokens_made,
        "seconds": round(time.perf_counter() - started, 1),
        "repeats": repeats,
        "repeats_that_differ": different,
        "resident_mb": {"start": resident[0][1], "end": resident[-1][1], "per_1000_generations": slope(resident)},
        "active_mb": {"start": active[0][1], "end": active[-1][1], "per_1000_generations": slope(active)},
    }
    print(
        f"{arguments.generations} generations, {repeats} repeats, {different} with other tokens; resident "
        f"{resident[0][1]:.0f} -> {resident[-1][1]:.0f} MB, active {active[0][1]:.1f} -> {active[-1][1]:.1f} MB"
    )
    print(json.dumps(report))
    return 1 if different or max(growth.values()) > arguments.most_growth else 0


if __name__ == "__main__":
    sys.exit(main())
