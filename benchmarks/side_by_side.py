"""Stock mlx-lm and Speculative Streaming on the same weights, prompt by prompt in turn.

    python benchmarks/side_by_side.py                                  the bundled model on its held-out questions
    python benchmarks/side_by_side.py --model DIR --prompts-file F     another model; F holds {"prompt": ...} lines

No figure is printed before every arm has given the same tokens as ``mlx_lm.stream_generate`` on every prompt. The
last line of the output is one JSON document. The protocol is in benchmarks/README.md.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

BASELINE = "mlx-lm"
Generation = Iterator[tuple[list[int], str, int]]  # new ids, new text, passes so far


@dataclass(frozen=True)
class Run:
    """One arm's answer to one prompt, with its clock."""

    tokens: list[int]
    text: str
    passes: int
    decode_seconds: float  # from the arrival of the first token to the end
    total_seconds: float  # from the call to the end, prefill included


@dataclass
class Arm:
    """One way to generate; ``runs[repeat][prompt]``."""

    name: str
    start: Callable[[list[int]], Generation]
    runs: list[list[Run]] = field(default_factory=list)

    def seconds(self, kind: str) -> list[float]:
        """Per repeat, the seconds of all prompts together."""
        return [sum(getattr(run, kind) for run in runs) for runs in self.runs]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; 0, or 5 when an arm gave other tokens than the baseline."""
    options = parse(arguments)
    from specstream_mlx.errors import SpecStreamError

    try:
        return compare(options)
    except SpecStreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="MLX model directory with streams; default: the bundled model")
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
    parser.add_argument("--insertion", choices=("deferred", "parallel"), help="how streams are run")
    parser.add_argument(
        "--allow-differences",
        action="store_true",
        help="print figures although tokens differ, as ties in 16-bit or quantised weights may; they are counted",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the JSON document, indented, to FILE")
    options = parser.parse_args(arguments)
    options.draft = list(dict.fromkeys(options.draft or ["auto", "tree"]))
    return options


def at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def compare(options: argparse.Namespace) -> int:
    from specstream_mlx import default_model_path

    directory = Path(options.model) if options.model else default_model_path()
    texts = read_prompts(options.prompts_file or directory / "samples.jsonl")[: options.prompts]
    arms, tokenizer = load_arms(directory, options)
    prompts = [encode(tokenizer, text) for text in texts]
    arms = warm_up(arms, prompts)
    different = differences(arms)
    print_answers(arms, texts[0])
    for name, indices in different.items():
        if indices:
            print(f"{name}: other tokens than {BASELINE} on prompts {', '.join(map(str, indices))}", file=sys.stderr)
    if any(different.values()) and not options.allow_differences:
        print("error: tokens differ, so no figure is given (16-bit ties: --allow-differences)", file=sys.stderr)
        return 5
    for arm in arms:
        arm.runs.clear()
    for repeat in range(options.repeats):
        measure(arms, prompts, repeat)
    document = report(arms, different, options, directory)
    print_table(document)
    line = json.dumps(document, allow_nan=False)
    if options.json:
        options.json.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
    print(line)
    return 0


def read_prompts(path: Path) -> list[str]:
    from specstream_mlx.errors import InvalidInputError

    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        texts = [row["prompt"] for row in rows]
    except OSError as error:
        raise InvalidInputError(f"{path}: {error.strerror}; give --prompts-file") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(f"{path}: expected lines of JSON objects with a 'prompt' ({error})") from error
    if not texts:
        raise InvalidInputError(f"{path}: no prompts in it")
    return texts


def load_arms(directory: Path, options: argparse.Namespace) -> tuple[list[Arm], Any]:
    """The baseline from stock ``mlx_lm.load`` and our arms from ``specstream_mlx.load``: two copies of the weights."""
    import mlx_lm

    import specstream_mlx

    ours, tokenizer = specstream_mlx.load(directory)
    stock, stock_tokenizer, *_ = mlx_lm.load(str(directory))

    def plain(prompt: list[int]) -> Generation:
        responses = mlx_lm.stream_generate(stock, stock_tokenizer, prompt, max_tokens=options.max_tokens)
        return (([response.token], response.text, response.generation_tokens) for response in responses)

    def speculative(mode: Any) -> Callable[[list[int]], Generation]:
        draft_options = specstream_mlx.DraftOptions(
            tree=options.tree if mode in ("tree", "auto") else None,
            insertion=options.insertion if mode != "off" else None,
        )

        def start(prompt: list[int]) -> Generation:
            responses = specstream_mlx.stream_generate(
                ours, tokenizer, prompt, max_tokens=options.max_tokens, draft=mode, draft_options=draft_options
            )
            return ((response.tokens, response.text, response.target_passes) for response in responses)

        return start

    arms = [Arm(BASELINE, plain), *(Arm(mode, speculative(mode)) for mode in options.draft)]
    return arms, tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """The prompt as ids, made once: every arm gets the same."""
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": text}]
        chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer.encode(chat, add_special_tokens=False))
    bos = tokenizer.bos_token
    return list(tokenizer.encode(text, add_special_tokens=bos is None or not text.startswith(bos)))


def generate_once(arm: Arm, prompt: list[int]) -> Run:
    """One answer. Every response holds ids on the host, so nothing is pending when the clock is read."""
    tokens: list[int] = []
    text, passes, first = "", 0, 0.0
    started = time.perf_counter()
    for new_tokens, new_text, passes_so_far in arm.start(prompt):
        first = first or time.perf_counter()
        tokens += new_tokens
        text += new_text
        passes = passes_so_far
    ended = time.perf_counter()
    return Run(tokens, text, passes, ended - first, ended - started)


def warm_up(arms: list[Arm], prompts: list[list[int]]) -> list[Arm]:
    """Every arm once over every prompt: compiles, fills caches, and gives the tokens to compare."""
    for arm in arms:
        arm.runs.append([generate_once(arm, prompt) for prompt in prompts])
    return arms


def differences(arms: list[Arm]) -> dict[str, list[int]]:
    """Per arm, the prompts on which its tokens or its text are not the baseline's."""
    reference = [(run.tokens, run.text) for run in arms[0].runs[0]]
    return {
        arm.name: [i for i, run in enumerate(arm.runs[0]) if (run.tokens, run.text) != reference[i]] for arm in arms[1:]
    }


def measure(arms: list[Arm], prompts: list[list[int]], repeat: int) -> None:
    """One round: prompt after prompt, all arms in turn, another arm first each time."""
    for arm in arms:
        arm.runs.append([])
    for index, prompt in enumerate(prompts):
        shift = (index + repeat) % len(arms)
        for arm in arms[shift:] + arms[:shift]:
            arm.runs[-1].append(generate_once(arm, prompt))


def weights_dtype(directory: Path) -> str:
    """The type most weights are stored in; packed integers mean a quantised model."""
    from safetensors import safe_open

    sizes: Counter[str] = Counter()
    for file in directory.glob("model*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                view = tensors.get_slice(name)
                sizes[view.get_dtype()] += math.prod(view.get_shape())
    return sizes.most_common(1)[0][0]


def report(
    arms: list[Arm], different: dict[str, list[int]], options: argparse.Namespace, directory: Path
) -> dict[str, Any]:
    rows = []
    for arm in arms:
        tokens = sum(len(run.tokens) for run in arm.runs[0])
        passes = sum(run.passes for run in arm.runs[0])
        row: dict[str, Any] = {
            "arm": arm.name,
            "prompts": len(arm.runs[0]),
            "prompts_with_equal_tokens": len(arm.runs[0]) - len(different.get(arm.name, [])),
            "tokens": tokens,
            "passes": passes,
            "tokens_per_pass": tokens / passes,
        }
        for kind in ("decode_seconds", "total_seconds"):
            own, base = arm.seconds(kind), arms[0].seconds(kind)
            ratios = [b / a for a, b in zip(own, base, strict=True)]
            row[kind] = {"median": statistics.median(own), "min": min(own), "max": max(own), "all": own}
            row[kind.replace("seconds", "speedup")] = {
                "of_medians": statistics.median(base) / statistics.median(own),
                "min": min(ratios),
                "max": max(ratios),
            }
        rows.append(row)
    return {
        "benchmark": "side_by_side",
        "model": directory.name,
        "dtype": weights_dtype(directory),
        "repeats": options.repeats,
        "max_tokens": options.max_tokens,
        "tree": options.tree,
        "insertion": options.insertion,
        "machine": machine(),
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "transformers", "numpy")}
        | {"python": platform.python_version(), "specstream-mlx": own_version()},
        "arms": rows,
    }


def own_version() -> str:
    from specstream_mlx import __version__

    return __version__


def machine() -> dict[str, Any]:
    import mlx.core as mx

    preload = os.environ.get("LD_PRELOAD", "")
    info = mx.device_info()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "processor": processor(),
        "device": str(mx.default_device()),
        "device_name": str(info.get("device_name", "")),
        "cpus": os.cpu_count(),
        "blas": "openblas" if "openblas" in preload else "accelerate" if sys.platform == "darwin" else "bundled",
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
    }


def processor() -> str:
    """The processor's name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def print_answers(arms: list[Arm], prompt: str) -> None:
    print(f"prompt 1:\n{prompt}\n")
    for arm in arms:
        print(f"{arm.name:>8}: {arm.runs[0][0].text.strip()}")
    print()


def print_table(document: dict[str, Any]) -> None:
    rows = document["arms"]
    print(
        f"{rows[0]['prompts']} prompts, {rows[0]['tokens']} tokens, {document['repeats']} rounds, {document['dtype']}"
    )
    print("seconds: median of the rounds; speed-up over mlx-lm: ratio of medians (least..most of the rounds)\n")
    header = ("arm", "same text", "passes", "tok/pass", "decode s", "speed-up", "total s", "speed-up")
    cells = [header, *(table_row(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print()


def table_row(row: dict[str, Any]) -> tuple[str, ...]:
    equal, count = row["prompts_with_equal_tokens"], row["prompts"]
    speedups = [row[kind] for kind in ("decode_speedup", "total_speedup")]
    decode, total = (f"{s['of_medians']:.2f}x ({s['min']:.2f}..{s['max']:.2f})" for s in speedups)
    baseline = row["arm"] == BASELINE
    return (
        row["arm"],
        "-" if baseline else "yes" if equal == count else f"{equal} of {count}",
        str(row["passes"]),
        f"{row['tokens_per_pass']:.2f}",
        f"{row['decode_seconds']['median']:.3f}",
        "1" if baseline else decode,
        f"{row['total_seconds']['median']:.3f}",
        "1" if baseline else total,
    )


if __name__ == "__main__":
    sys.exit(main())
