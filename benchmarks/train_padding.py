"""What packing several rows into one could win in training: how much of a batch is padding.

    python -m benchmarks.train_padding

The batches are those of `train`, over one epoch, for two sets of rows: training questions of the text-to-SQL recipe,
and lengths like those of chats, drawn from log-normal distributions. Main rows are padding where they fill a batch up
to its longest row and that to a multiple of 16; stream rows are where they fill up a chunk of anchors. The last line is
one JSON document.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence

import numpy as np
from mlx_lm.utils import load_tokenizer

from benchmarks.tasks.text_to_sql.task import examples
from specstream_mlx import default_model_path
from specstream_mlx.training.batches import IGNORE, Example, anchor_chunks, iterate_batches, make_batch

GAMMA = 4
ROWS_PER_CHUNK = 1024
BATCH_SIZES = (1, 4, 8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000, metavar="N", help="rows of each set (default 4000)")
    options = parser.parse_args(arguments)
    found = {}
    for name, rows in {"text-to-SQL": text_to_sql(options.rows), "chats": chats(options.rows)}.items():
        lengths = np.array([(len(row.prompt), len(row.answer)) for row in rows])
        print(f"{name}: {len(rows)} rows, prompt {spread(lengths[:, 0])}, answer {spread(lengths[:, 1])} tokens")
        found[name] = {size: padding(rows, size) for size in BATCH_SIZES}
        for size, shares in found[name].items():
            print(f"  batches of {size}: padding is " + ", ".join(f"{v:.1%} of {k}" for k, v in shares.items()))
    print(json.dumps({"benchmark": "padding of training batches", "padding": found}))
    return 0


def text_to_sql(count: int) -> list[Example]:
    """Rows of the recipe's training split in tokens of the bundled model."""
    tokenizer = load_tokenizer(default_model_path())
    drawn = itertools.islice(examples("train", 0), count)
    return [
        Example(tuple(tokenizer.encode(row.prompt)), (*tokenizer.encode(" " + row.answer), tokenizer.eos_token_id))
        for row in drawn
    ]


def chats(count: int, longest: int = 2048) -> list[Example]:
    """Rows whose prompts have a median of 60 tokens and whose answers have one of 200, with long tails."""
    rng = np.random.default_rng(0)
    prompts = np.clip(rng.lognormal(np.log(60), 1.0, count), 5, longest // 2).astype(int)
    answers = np.clip(rng.lognormal(np.log(200), 0.9, count), 2, longest - prompts).astype(int)
    return [Example((1,) * prompt, (1,) * answer) for prompt, answer in zip(prompts, answers, strict=True)]


def spread(lengths: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> str:
    """The deciles that tell most."""
    low, median, high = np.percentile(lengths, (10, 50, 90)).astype(int)
    return f"{median} ({low}..{high})"


def padding(rows: Sequence[Example], batch_size: int) -> dict[str, float]:
    """The shares over one epoch of batches."""
    num_batches = -(-len(rows) // batch_size)
    main = main_real = streams = streams_real = 0
    for chosen in itertools.islice(iterate_batches(rows, batch_size, seed=0), num_batches):
        batch = make_batch([rows[row] for row in chosen], GAMMA)
        main += batch.tokens.size
        main_real += sum(len(rows[row]) for row in chosen)
        for sequences, columns in anchor_chunks(batch, ROWS_PER_CHUNK):
            streams += batch.stream_targets[sequences, columns].size
        streams_real += GAMMA * int((batch.stream_targets[:, :, 0] != IGNORE).sum())
    return {"main rows": 1 - main_real / main, "stream rows": 1 - streams_real / streams}


if __name__ == "__main__":
    sys.exit(main())
