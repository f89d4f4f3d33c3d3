"""Stock mlx-lm and Speculative Streaming on the same weights, prompt by prompt in turn.

    python benchmarks/side_by_side.py                                  the bundled model on its held-out questions
    python benchmarks/side_by_side.py --model DIR --prompts-file F     another model; F holds {"prompt": ...} lines

The same measurement as ``specstream-mlx benchmark``, which can do more and prints tables; here the first question is
answered pass by pass before. The protocol is in benchmarks/README.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from specstream_mlx.options import DraftMode, Insertion


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; 0, or an exit code of the command line, 5 when an arm gave other tokens than the baseline."""
    options = parse(arguments)
    from specstream_cli.app import READER_GONE
    from specstream_cli.terminal import ReaderGone, answer
    from specstream_mlx.errors import SpecStreamError

    try:
        with answer() as out:
            compare(options, out)
    except SpecStreamError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except ReaderGone:
        return READER_GONE
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
        choices=get_args(DraftMode),
        help="an arm beside mlx-lm; may be repeated (default: auto)",
    )
    parser.add_argument("--tree", help="tree of the tree and auto arms, such as best-first:8 or cartesian:2x2x1x1")
    parser.add_argument("--insertion", choices=get_args(Insertion), help="how streams are run")
    parser.add_argument("--allow-differences", action="store_true", help="print figures although 16-bit ties differ")
    parser.add_argument("--json", action="store_true", help="print one JSON object with every figure instead")
    return parser.parse_args(arguments)


def at_least_one(text: str) -> int:
    """A positive number."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def compare(options: argparse.Namespace, out: Any) -> None:
    """Answer the first question and measure, and write both to ``out``.

    Raises:
        SpecStreamError: bad input, or other tokens than the baseline's.
    """
    from specstream_cli.benchmark import load_arms, measure_all, workloads
    from specstream_cli.terminal import progress_bar, to_stderr
    from specstream_mlx.target import machine

    draft = options.draft or ["auto"]
    arms, tokenizer, target, about = load_arms(
        options.model, draft, options.max_tokens, to_stderr, tree=options.tree, insertion=options.insertion
    )
    files = [options.prompts_file] if options.prompts_file else None
    loads = workloads(options.model, files, options.prompts, None, tokenizer, target, options.max_tokens, to_stderr)
    if not options.json:
        show_answer(arms[1], loads[0], tokenizer, out)
    with progress_bar() as progress:
        results = measure_all(arms, loads, options.repeats, options.allow_differences, progress)
    if options.json:
        record = {"benchmark": "side by side", "machine": machine.describe(), "versions": machine.versions()}
        counts = {"repeats": options.repeats, "max_tokens": options.max_tokens}
        out.write_json(record | about | counts | {"workloads": results})
        return
    stock, *ours = results[0]["arms"]
    for found in ours:
        out.write(comparison(stock, found, options.repeats) + "\n")


def show_answer(arm: Any, load: Any, tokenizer: Any, out: Any) -> None:
    """Write the first question, the passes of its answer as they come, and the answer."""
    from specstream_cli.passes import Pass, PassLines, is_coloured, legend

    coloured = is_coloured(out.stream)
    lines = PassLines(tokenizer.decode, coloured=coloured)
    steps: list[Any] = []
    out.write(f"Question\n{indented(load.texts[0])}\n\nPasses: {legend(coloured=coloured)}\n")
    for step in arm.start(load.prompts[0]):
        out.write(lines.line(Pass.of(step.response)) + "\n")
        steps.append(step)
    text = "".join(step.text for step in steps)
    tokens = sum(len(step.tokens) for step in steps)
    out.write(f"\nAnswer: {tokens} tokens in {steps[-1].passes} passes\n{indented(text)}\n\n")


def indented(text: str) -> str:
    """The lines of a text, two spaces in."""
    return "\n".join(f"  {line}" for line in text.strip().splitlines())


def comparison(stock: dict[str, Any], ours: dict[str, Any], repeats: int) -> str:
    """One line on an arm of ours beside stock mlx-lm."""
    equal, count = ours["prompts_with_equal_tokens"], ours["prompts"]
    same = f"{count} questions" if equal == count else f"{equal} of {count} questions"
    seconds = [arm["total_seconds"]["median"] for arm in (stock, ours)]
    return (
        f"Beside stock mlx-lm: the same text on {same}, {ours['total_speedup']['of_medians']:.2f}x as fast "
        f"({seconds[1]:.2f} s instead of {seconds[0]:.2f} s; decoding alone "
        f"{ours['decode_speedup']['of_medians']:.2f}x; --draft {ours['arm']}, median of {repeats} rounds)"
    )


if __name__ == "__main__":
    sys.exit(main())
