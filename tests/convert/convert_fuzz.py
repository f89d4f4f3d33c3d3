"""Damage checkpoints at random, convert and inspect them: a refusal or a complete output, never anything else.

    PYTHONPATH=.:convert:cli python tests/convert/convert_fuzz.py --runs 20000 --seed 0

stops at the first traceback, hang, left-over file or half-written output, and fails at the end when memory grew. The
last line is a JSON object with the counts; Ctrl-C ends it early with those so far. ``--seed N --runs 1`` repeats run N.
"""

import argparse
import copy
import hashlib
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from convert_cases import ADAPTER, CONFIG, GAMMA, STREAM_CONFIG, STREAMS, Case, V, make_case, snapshot

from specstream_convert import convert, inspect_checkpoint
from specstream_mlx.errors import SpecStreamError

SECONDS_PER_RUN = 10.0
MAX_GROWTH_MB = 300  # of the peak resident memory, over all runs after the first hundred
STREAM_FILE, KEY_MAP = "specstream.safetensors", "map.json"
JSON_FILES = (
    "base/config.json",
    f"adapter/{CONFIG}",
    f"adapter/{STREAM_CONFIG}",
    "base/model.safetensors.index.json",
    "base/tokenizer.json",
    KEY_MAP,
)
TENSOR_FILES = (f"adapter/{ADAPTER}", "base/model-00001-of-00002.safetensors", f"adapter/{STREAM_FILE}")
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**30, 10**400, 1e308, -0.0, 0.5, float("nan"), float("inf"),
    "", "a", "../x", "../../../tmp/x", "/etc/passwd", "\0", "\x1b[31m", "a\nb", "\u202e", "\ud800", "é", "x" * 5000,
    "model-00001-of-00002.safetensors", "C:\\x", "~", ".", [], {}, [1], [None], {"a": 1}, [[1, 2]],
    {"a": {"b": {"c": [{}] * 50}}}, ["specstream"], "all-linear", "F8_E4M3", "F64", "I64", "BF16", "F4", [0, 0],
    [2**40, 1], [-1, 4], [2**62, 2**62], [0] * 2000, "(a+)+$", "(" * 500, "default", "llama3", "lossless", "low_rank",
]  # fmt: skip
FIELDS = (
    "use_dora", "quantization", "quantization_config", "rope_scaling", "rope_parameters", "head_dim", "x_y", "bias",
    "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "exclude_modules",
    "layers_to_transform", "init_lora_weights", "use_rslora", "prune", "base_model", "fingerprint", "auto_map",
    "tie_word_embeddings", "sliding_window", "layer_types", "main_attends_streams", "format_version", "model_file",
)  # fmt: skip
NAMES = (
    "../../evil", "/etc/passwd", "a\nb", "\x1b[31m", "\0", "\u202e", "x" * 3000, "", ".", "..", "lora_A",
    "__metadata__",
    "model.norm.weight", "base_model.model.specstream.stream_embeddings.T",
    "base_model.model.specstream.f_eta.0.weight",
    "base_model.model.model.layers.99.mlp.up_proj.lora_A.weight", "lora.x.lora_a", "specstream.", "module.",
    "base_model.model.model.embed_tokens.lora_embedding_A", "base_model.model.lm_head.lora_A.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "stream_embeddings.7",
)  # fmt: skip
Rng = random.Random


class TooSlow(BaseException):
    """A run took longer than it may; no handler of the converter's catches it."""


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
        holder[rng.choice((*NAMES, str(key) + "x", str(key)[1:]))] = holder.pop(key)
    elif action == 2 and isinstance(holder, dict):
        holder[rng.choice(FIELDS)] = rng.choice(ODD)
    else:
        holder[key] = rng.choice(ODD)
    return value


def damage_header(body: bytes, rng: Rng) -> bytes:
    """Change the JSON header of a safetensors file and keep its data."""
    (length,) = struct.unpack("<Q", body[:8])
    text = json.dumps(damage_json(json.loads(body[8 : 8 + length]), rng)).encode()
    return struct.pack("<Q", len(text)) + text + body[8 + length :]


def as_json(value: Any, rng: Rng) -> bytes:
    """JSON text, sometimes with a key twice, a byte order mark, or endless nesting."""
    body = json.dumps(value).encode()
    action = rng.randrange(30)
    if action == 0 and body.startswith(b'{"'):
        key, _, rest = body[1:].partition(b":")
        body = b"{" + key + b": 1, " + key + b":" + rest
    elif action == 3:
        body = body.replace(rng.choice((b"0", b"1", b"4", b"null", b"true")), b"1e999", 1)
    elif action == 1:
        body = b"\xef\xbb\xbf" + body
    elif action == 2:
        body = body[:-1] + b', "deep": ' + b"[" * rng.choice((50, 100_000))
    return body


def damage(case: Case, rng: Rng) -> str:
    """Damage one or two files of the case; return their names."""
    damaged = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        kind: Callable[[bytes, Rng], bytes]
        if rng.random() < 0.5:
            name = rng.choice(JSON_FILES)
            kind = damage_bytes if rng.random() < 0.2 else lambda body, r: as_json(damage_json(json.loads(body), r), r)
        else:
            name = rng.choice(TENSOR_FILES)
            kind = damage_header if rng.random() < 0.6 else damage_bytes
        path = case.root / name
        if name in damaged or not path.exists():
            continue
        damaged.append(name)
        path.write_bytes(kind(path.read_bytes(), rng))
    return " and ".join(damaged) or "nothing"


def make_pristine(root: Path) -> list[Case]:
    """Sound checkpoints to damage: streams in the adapter, streams beside it under foreign names, and lossless."""
    cases = [make_case(root / "a", shards=2), make_case(root / "b", shards=2)]
    cases.append(make_case(root / "c", mode="lossless", shards=2))
    names = {f"token {i}": i for i in range(V)}
    tokenizer = {"version": "1.0", "added_tokens": [{"id": 0, "content": "<s>"}], "model": {"vocab": names}}
    for case in cases:
        (case.base / "tokenizer.json").write_text(json.dumps(tokenizer))
    beside = cases[1]
    value = mx.load(str(beside.adapter / ADAPTER))[STREAMS]
    beside.tensors(f"adapter/{ADAPTER}", lambda t: t.pop(STREAMS))
    rows = {f"P_{i}": value[i] for i in range(GAMMA)}
    mx.save_safetensors(str(beside.adapter / STREAM_FILE), rows, {"format": "pt"})
    renames = {name: f"specstream.stream_embeddings.{i}" for i, name in enumerate(rows)}
    (beside.root / KEY_MAP).write_text(json.dumps(renames))
    return cases


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise ``TooSlow`` in a block that takes longer than ``seconds``."""

    def stop(*_: Any) -> None:
        raise TooSlow(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_complete(out: Path) -> None:
    """Every file that the report names is there with its bytes, and no other."""
    report = json.loads((out / "conversion_report.json").read_text())
    held = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    assert set(held) == {*report["output_files"], "conversion_report.json"}, sorted(held)
    for name, entry in report["output_files"].items():
        assert hashlib.sha256(held[name].read_bytes()).hexdigest() == entry["sha256"], name


def run_one(pristine: list[Case], root: Path, seed: int, seconds: float = SECONDS_PER_RUN) -> str:
    """Convert and inspect one damaged copy; return the outcome's name.

    Raises:
        AssertionError: something other than a refusal or a complete output.
        TooSlow: the run took longer than ``seconds``.
    """
    rng = random.Random(seed)
    case = rng.choice(pristine).copy(root)
    name = damage(case, rng)
    key_map = case.root / KEY_MAP
    before = snapshot(root)
    options = {
        "verify": rng.random() < 0.1,
        "adapter_only": rng.random() < 0.3,
        "key_map": key_map if key_map.exists() else None,
        "fuse": rng.choice((None, None, False)),
    }
    with limited(seconds):
        try:
            convert(case.options(**options))
            outcome, message = "converted", "-"
        except SpecStreamError as error:
            outcome, message = type(error).__name__, str(error)
        if outcome == "converted":
            check_complete(case.out)
            assert snapshot(root) - {path for path in snapshot(root) if path.split("/")[0] == "out"} == before
        else:
            assert snapshot(root) == before, f"{name}: files left behind"
        assert message.strip(), f"{name}: empty message"
        assert all(line.isprintable() for line in message.splitlines()), f"{name}: {message!r}"
        assert len(message) < 100_000, f"{name}: endless message"
        places = {case.root / file.rpartition("/")[0] for file in name.split(" and ") if "/" in file}
        if STREAM_FILE in name:
            places.add(case.adapter / STREAM_FILE)
        if outcome == "converted" and rng.random() < 0.2:
            places.add(case.out)
        for place in places:
            json.dumps(inspect_checkpoint(place).to_dict(), allow_nan=False)
    return outcome


def warm_up(case: Case) -> None:
    """Let MLX compile what a verification needs, which counts as no run's time."""
    convert(case.options())
    inspect_checkpoint(case.out)


def peak_mb() -> float:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert and inspect randomly damaged checkpoints.")
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds-per-run", type=float, default=SECONDS_PER_RUN)
    arguments = parser.parse_args()
    outcomes: Counter[str] = Counter()
    slowest, begun, warm = 0.0, time.monotonic(), 0.0
    with tempfile.TemporaryDirectory() as directory:
        pristine = make_pristine(Path(directory) / "pristine")
        warm_up(pristine[0].copy(Path(directory) / "warm"))
        for i in range(arguments.runs):
            root, start = Path(directory) / "case", time.monotonic()
            try:
                outcomes[run_one(pristine, root, arguments.seed + i, arguments.seconds_per_run)] += 1
            except KeyboardInterrupt:
                print(f"interrupted after {sum(outcomes.values())} runs", file=sys.stderr)
                break
            except BaseException:
                print(f"stopped at --seed {arguments.seed + i}", file=sys.stderr)
                raise
            slowest = max(slowest, time.monotonic() - start)
            shutil.rmtree(root)
            warm = peak_mb() if i == min(100, arguments.runs - 1) else warm
    growth = peak_mb() - warm
    summary = {
        "runs": sum(outcomes.values()),
        "first_seed": arguments.seed,
        "outcomes": dict(outcomes.most_common()),
        "seconds": round(time.monotonic() - begun, 1),
        "slowest_run_seconds": round(slowest, 3),
        "peak_memory_mb": round(peak_mb(), 1),
        "memory_growth_mb": round(growth, 1),
    }
    print(json.dumps(summary))
    assert growth < MAX_GROWTH_MB, f"peak memory grew by {growth:.0f} MB"


if __name__ == "__main__":
    main()
