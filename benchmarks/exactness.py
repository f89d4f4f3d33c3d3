"""Compare our tokens with mlx-lm's over a wide grid: prompts x trees x insertions x samplers x drafters.

    scripts/with-openblas python -m benchmarks.exactness --prompts 200
    scripts/with-openblas python -m benchmarks.exactness --prompts 1000 --models bundled --in-turn

Every family runs on a tiny random float32 model, and the bundled model on held-out prompts of its recipe, as many as
are asked for. The reference is
``mlx_lm.generate.generate_step`` on the same weights with the same seed. Random streams are rarely right, so for
three prompts in four a scripted drafter stands in: right at a random rank seven times in ten, always right, never
right. The last line is one JSON document; the exit code is 1 when any token differs.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.sample_utils import make_sampler

from benchmarks.tasks.text_to_sql.heldout import HELDOUT_SEED
from benchmarks.tasks.text_to_sql.task import examples
from specstream_mlx import DraftOptions, load
from tests.tiny import (
    END_OF_TEXT,
    EVERY_FAMILY,
    FAMILIES,
    NumberTokenizer,
    drafter,
    make_model,
    our_tokens,
    plain_tokens,
    random_prompt,
)

TREES = ("chain:4", "cartesian:2x2x2x1", "best-first:8")
INSERTIONS = ("leaf", "deferred", "parallel")
TEMPERATURES = (0.0, 0.8)
ACCURACIES = (None, 0.7, 1.0, 0.0)  # None: the model's own streams
PREFILL_STEP = 32  # so that prompts span several chunks


@dataclass
class Arm:
    """One model with its prompts."""

    name: str
    model: Any
    tokenizer: Any
    prompts: list[list[int]]
    end_of_text: tuple[int, ...]
    max_tokens: int


def tiny_arm(family: str, num_prompts: int) -> Arm:
    """A random model; prompts of 1 to 80 tokens, as far as its context holds them."""
    model = make_model(family, seed=1)
    longest = min(80, (model.context_length or 512) - 1)
    prompts = [random_prompt(1 + (37 * index) % longest, seed=index) for index in range(num_prompts)]
    return Arm(family, model, NumberTokenizer(), prompts, (END_OF_TEXT,), 16)


def bundled_arm(num_prompts: int) -> Arm:
    """The bundled model on held-out questions of its recipe, which makes as many as are asked for."""
    model, tokenizer = load()
    questions = itertools.islice(examples("heldout", HELDOUT_SEED), num_prompts)
    prompts = [tokenizer.encode(question.prompt) for question in questions]
    return Arm("bundled", model, tokenizer, prompts, tuple(tokenizer.eos_token_ids), 128)


def cases(arm: Arm, in_turn: bool = False, first_turn: int = 0) -> Iterator[tuple[bool, dict[str, Any]]]:
    """Run the grid, yielding whether the tokens were equal and which case it was.

    ``in_turn``: one tree and insertion per prompt, from number ``first_turn`` on, instead of all.
    """
    drafts = list(itertools.product(TREES, INSERTIONS))
    for index, prompt in enumerate(arm.prompts):
        turn = (first_turn + index // len(ACCURACIES)) % len(drafts)
        accuracy = ACCURACIES[index % len(ACCURACIES)]
        for temp in TEMPERATURES:
            sampler = make_sampler(temp)
            expected = plain_tokens(
                arm.model.base,
                prompt,
                arm.max_tokens,
                seed=index,
                end_of_text=arm.end_of_text,
                sampler=sampler,
                prefill_step_size=PREFILL_STEP,
            )
            for tree, insertion in drafts[turn : turn + 1] if in_turn else drafts:
                script: Callable[[], AbstractContextManager[None]] = nullcontext
                if accuracy is not None:
                    script = lambda: drafter(arm.model, expected, len(prompt), accuracy, index)  # noqa: B023, E731
                with script():
                    tokens = our_tokens(
                        arm.model,
                        prompt,
                        arm.max_tokens,
                        tokenizer=arm.tokenizer,
                        seed=index,
                        sampler=sampler,
                        draft="tree",
                        draft_options=DraftOptions(tree=tree, insertion=insertion),
                        prefill_step_size=PREFILL_STEP,
                    )
                case = {"prompt": index, "temp": temp, "tree": tree, "insertion": insertion, "accuracy": accuracy}
                yield tokens == expected, case


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=int, default=200, help="prompts per model")
    parser.add_argument("--models", nargs="+", default=[*FAMILIES, "bundled"], choices=[*EVERY_FAMILY, "bundled"])
    parser.add_argument("--in-turn", action="store_true", help="one tree and insertion per prompt instead of all")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"mlx": mx.__version__, "mlx_lm": mlx_lm.__version__, "models": {}}
    different = 0
    for name in arguments.models:
        arm = bundled_arm(arguments.prompts) if name == "bundled" else tiny_arm(name, arguments.prompts)
        started, counts, failed = time.perf_counter(), [0, 0], []
        for number, (equal, case) in enumerate(cases(arm, arguments.in_turn), start=1):
            counts[equal] += 1
            if not equal:
                failed.append(case)
                print(f"{name}: tokens differ: {case}", file=sys.stderr)
            if sys.stderr.isatty():
                print(f"\r{name}: {number} generations", end="", file=sys.stderr)
        seconds = round(time.perf_counter() - started, 1)
        different += counts[0]
        report["models"][name] = {"generations": sum(counts), "identical": counts[1], "different": failed[:20]}
        print(f"{name:8} {counts[1]:6} of {sum(counts):6} generations token-identical to mlx-lm  ({seconds} s)")
    print(json.dumps(report))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
