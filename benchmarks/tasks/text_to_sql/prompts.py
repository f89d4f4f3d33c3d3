"""Writes questions of the training split as JSON lines, `{"prompt": ...}`, for the model to answer itself.

python -m benchmarks.tasks.text_to_sql.prompts --out prompts.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from .task import examples

BUNDLED_SEED = 7
BUNDLED_COUNT = 1000


def write_prompts(path: Path, count: int = BUNDLED_COUNT, seed: int = BUNDLED_SEED) -> Path:
    """Write the first `count` questions of a seed; their answers are left out."""
    drawn = itertools.islice(examples("train", seed), count)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": row.prompt}) + "\n" for row in drawn), encoding="utf-8")
    return path


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=BUNDLED_COUNT)
    parser.add_argument("--seed", type=int, default=BUNDLED_SEED)
    namespace = parser.parse_args(arguments)
    write_prompts(namespace.out, namespace.count, namespace.seed)


if __name__ == "__main__":
    main()
