"""Writes held-out examples as JSON lines, `{"prompt": ..., "answer": ...}`, for evaluation and benchmarks.

python -m benchmarks.tasks.text_to_sql.heldout
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict
from pathlib import Path

from .task import examples

HELDOUT_SEED = 1
HELDOUT_COUNT = 300
HELDOUT = Path(__file__).parent / "heldout.jsonl"


def write_heldout(path: Path, count: int = HELDOUT_COUNT) -> None:
    """Write the first `count` held-out examples of the evaluation seed."""
    lines = (json.dumps(asdict(example)) for example in itertools.islice(examples("heldout", HELDOUT_SEED), count))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=HELDOUT)
    parser.add_argument("--count", type=int, default=HELDOUT_COUNT)
    namespace = parser.parse_args(arguments)
    write_heldout(namespace.out, namespace.count)


if __name__ == "__main__":
    main()
