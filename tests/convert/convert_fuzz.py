"""Damage checkpoints at random and convert them: a refusal or a complete output, never anything else.

    PYTHONPATH=.:convert python tests/convert/convert_fuzz.py --runs 20000 --seed 0

prints one line per kind of outcome and stops at the first traceback, left-over file or run over ten seconds.
"""

import argparse
import copy
import json
import random
import shutil
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert_cases import ADAPTER, CONFIG, STREAM_CONFIG, Case, make_case, snapshot

from specstream_convert import convert, inspect_checkpoint
from specstream_mlx.errors import SpecStreamError

LIMIT_SECONDS = 10.0
JSON_FILES = ("base/config.json", f"adapter/{CONFIG}", f"adapter/{STREAM_CONFIG}", "base/model.safetensors.index.json")
TENSOR_FILES = (f"adapter/{ADAPTER}", "base/model-00001-of-00002.safetensors")
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**30, 1e308, -0.0, 0.5, "", "a", "../x", "/etc/passwd", "\0",
    "é",
    "model-00001-of-00002.safetensors", [], {}, [1], [None], {"a": 1}, [[1, 2]], ["specstream"], "all-linear",
    "F8_E4M3", "I64", "BF16", [0, 0], [2**40, 1], [-1, 4], "(a+)+$", "default", "llama3",
]  # fmt: skip
Rng = random.Random


def damage_bytes(body: bytes, rng: Rng) -> bytes:
    """Flip, cut, repeat or insert bytes; early bytes, where headers are, more often."""
    data = bytearray(body)
    for _ in range(rng.choice((1, 1, 2, 8))):
        where = rng.randrange(min(len(data), rng.choice((16, 400, len(data)))) or 1) if data else 0
        action = rng.randrange(5)
        if action == 0 and data:
            data[where] ^= 1 << rng.randrange(8)
        elif action == 1:
            del data[where:]
        elif action == 2:
            data[where:where] = rng.randbytes(rng.choice((1, 7, 64)))
        elif action == 3:
            del data[where : where + rng.choice((1, 8, 100))]
        elif data:
            data[where] = rng.randrange(256)
    return bytes(data)


def damage_json(value: Any, rng: Rng) -> Any:
    """Replace, remove, rename or add one node somewhere in a JSON value."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        items = (
            list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
        )
        for key, child in items:
            places.append((node, key))
            collect(child)

    collect(value)
    if not places:
        return rng.choice(ODD)
    holder, key = rng.choice(places)
    action = rng.randrange(4)
    if action == 0 and isinstance(holder, dict):
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[rng.choice(("x", "lora_A", str(key) + "x", str(key)[1:], "model_file"))] = holder.pop(key)
    elif action == 2 and isinstance(holder, dict):
        holder[rng.choice(("use_dora", "quantization", "rope_scaling", "head_dim", "x_y"))] = rng.choice(ODD)
    else:
        holder[key] = rng.choice(ODD)
    return value


def damage_header(body: bytes, rng: Rng) -> bytes:
    """Change the JSON header of a safetensors file and keep its data."""
    (length,) = struct.unpack("<Q", body[:8])
    text = json.dumps(damage_json(json.loads(body[8 : 8 + length]), rng)).encode()
    return struct.pack("<Q", len(text)) + text + body[8 + length :]


def damage(case: Case, rng: Rng) -> str:
    """Damage one file of the case; return what was done."""
    kind: Callable[[bytes, Rng], bytes]
    if rng.random() < 0.45:
        name = rng.choice(JSON_FILES)
        kind = (
            (lambda body, r: json.dumps(damage_json(json.loads(body), r)).encode())
            if rng.random() < 0.8
            else damage_bytes
        )
    else:
        name = rng.choice(TENSOR_FILES)
        kind = damage_header if rng.random() < 0.5 else damage_bytes
    path = case.root / name
    path.write_bytes(kind(path.read_bytes(), rng))
    return name


def run_one(pristine: Case, root: Path, seed: int) -> str:
    """Convert and inspect one damaged copy; return the outcome's name.

    Raises:
        AssertionError: something other than a refusal or a complete output.
    """
    rng = random.Random(seed)
    case = pristine.copy(root)
    name = damage(case, rng)
    before, start = snapshot(root), time.monotonic()
    try:
        convert(case.options(lora_only=False, verify=rng.random() < 0.2))
        outcome = "converted"
        message = "-"
    except SpecStreamError as error:
        outcome, message = type(error).__name__, str(error)
    if outcome == "converted":
        assert (case.out / "conversion_report.json").exists(), f"seed {seed}: {name}: incomplete output"
    else:
        assert snapshot(root) == before, f"seed {seed}: {name}: files left behind"
    assert message.strip(), f"seed {seed}: {name}: empty message"
    assert all(line.isprintable() for line in message.splitlines()), f"seed {seed}: {name}: {message!r}"
    inspect_checkpoint(case.adapter)
    inspect_checkpoint(case.base)
    seconds = time.monotonic() - start
    assert seconds < LIMIT_SECONDS, f"seed {seed}: {name}: took {seconds:.1f} s"
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert randomly damaged checkpoints.")
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as directory:
        pristine = make_case(Path(directory) / "pristine", shards=2)
        for seed in range(arguments.seed, arguments.seed + arguments.runs):
            root = Path(directory) / "case"
            try:
                outcomes[run_one(pristine, root, seed)] += 1
            except BaseException:
                print(f"stopped at seed {seed}")
                raise
            shutil.rmtree(root)
    for outcome, count in outcomes.most_common():
        print(f"{count:7d} {outcome}")


if __name__ == "__main__":
    main()
