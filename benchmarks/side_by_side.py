"""Stock mlx-lm and Speculative Streaming on the same weights, prompt by prompt in turn.

    python benchmarks/side_by_side.py                                  the bundled model on its held-out questions
    python benchmarks/side_by_side.py --model DIR --prompts-file F     another model; F holds {"prompt": ...} lines

The same measurement as ``specstream-mlx benchmark``, which can do more; here the first question and its answer are
shown too, and the last line of the output is one JSON document. The protocol is in benchmarks/README.md.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; 0, or an exit code of the command line, 5 when an arm gave other tokens than the baseline."""
    options = parse(arguments)
    from specstream_mlx.errors import SpecStreamError

    try:
        document = compare(options)
    except SpecStreamError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    from specstream_cli.benchmark import tables

    sample = document["workloads"][0]["sample"]
    print(f"prompt 1:\n{sample['prompt']}\n\nanswer: {sample['answer'].strip()}\n")
    print(tables(document))
    if options.json:
        options.json.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(json.dumps(document, allow_nan=False))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; names and meanings are those of ``specstream-mlx benchmark``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="MLX model directory; default: the bundled model")
    parser.add_argument("--prompts-file", type=Path, help="JSON lines with a prompt each; default: the model's samples")
    parser.add_argument("--prompts", type=at_least_one, default=12, metavar="N", help="prompts to use (default 12)")
    parser.add_argument("--repeats", type=at_least_one, default=5, metavar="R", help="timed rounds (default 5)")
    parser.add_argument("--max-tokens", type=at_least_one, default=128, help="most tokens per answer (default 128)")
    parser.add_argument(
        "--draft",
        action="append",
        choices=("auto", "tree", "chain", "off"),
        help="an arm beside mlx-lm; may be repeated (default: auto and tree)",
    )
    parser.add_argument("--tree", help="tree of the tree and auto arms, such as best-first:8 or cartesian:2x2x1x1")
    parser.add_argument("--insertion", choices=("leaf", "deferred", "parallel"), help="how streams are run")
    parser.add_argument("--allow-differences", action="store_true", help="print figures although 16-bit ties differ")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the JSON document, indented, to FILE")
    return parser.parse_args(arguments)


def at_least_one(text: str) -> int:
    """A positive number."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """The document of one comparison.

    Raises:
        SpecStreamError: bad input, or other tokens than the baseline's.
    """
    from specstream_cli.benchmark import load_arms, measure_all, workloads
    from specstream_mlx.target import machine

    def remark(line: str) -> None:
        print(line, file=sys.stderr)

    draft = options.draft or ["auto", "tree"]
    arms, tokenizer, target, about = load_arms(
        options.model, draft, options.max_tokens, remark, tree=options.tree, insertion=options.insertion
    )
    files = [options.prompts_file] if options.prompts_file else None
    loads = workloads(options.model, files, options.prompts, None, tokenizer, target, options.max_tokens, remark)
    record = {"benchmark": "side by side", "machine": machine.describe(), "versions": machine.versions()}
    counts = {"repeats": options.repeats, "max_tokens": options.max_tokens}
    results = measure_all(arms, loads, options.repeats, options.allow_differences, None)
    return record | about | counts | {"workloads": results}


if __name__ == "__main__":
    sys.exit(main())
