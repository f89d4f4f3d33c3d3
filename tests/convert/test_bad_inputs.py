"""The catalogue of bad inputs, numbered, through the command line: exit code, message, and nothing written.

Every case damages a sound checkpoint and runs ``specstream-mlx convert`` on it. A refusal names the place (``words``)
and says what to do (``way``); nothing is on standard output, nothing is written, no temporary directory stays and the
input keeps its bytes. Code 0 marks inputs that look bad and have one right meaning: they convert, and say so.
"""

import hashlib
import json
import os
import pickle
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from convert_cases import (
    ADAPTER,
    CONFIG,
    GAMMA,
    KV,
    LAYERS,
    PREFIX,
    RANK,
    STREAM_CONFIG,
    STREAMS,
    Case,
    D,
    Q,
    V,
    make_case,
    random_tensor,
    snapshot,
    write_base,
    write_raw,
)
from test_convert_refusals import (
    added,
    base_file,
    config,
    data,
    index,
    one_row_left,
    only,
    poisoned,
    raw,
    remove,
    renamed,
    replaced,
    rewritten,
    second_form,
    text,
    two_adapters,
    without,
    zeroed,
)

from specstream_cli.app import main
from specstream_convert import convert, pipeline

ROOT = Path(__file__).parents[2]
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
S = PREFIX + "specstream."
WEIGHTS, AC, SC = f"adapter/{ADAPTER}", f"adapter/{CONFIG}", f"adapter/{STREAM_CONFIG}"
BASE, BC, INDEX = "base/model.safetensors", "base/config.json", "base/model.safetensors.index.json"
FORM_B = "adapter/specstream.safetensors"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
USAGE, INVALID, UNSUPPORTED, INTERRUPTED = 2, 3, 4, 130

# Numbers of which only the refusals that are final stand here; what the converter makes of the other variants (it
# converts them, or asks for a flag) is tested with the feature.
OTHER_FILE = {
    21: "DoRA, LoRA biases, trained token rows and VeLoRA",
    22: "PiSSA and OLoRA, with and without --recompute-init",
    24: "saved copies of base tensors",
    30: "--allow-pickle",
    35: "--keep-adapters and --dequantize on a quantised base",
    36: "a resized vocabulary with its tokenizer",
    37: "a tied base with a separate head",
    40: "OPT and GPT-2",
    48: "lossless with trained biases, embeddings and other modules_to_save",
}


@dataclass(frozen=True)
class Bad:
    """One bad input. ``options`` come after the default ones and replace them; ``{root}`` is the case's directory."""

    number: int
    name: str
    code: int
    words: tuple[str, ...]
    way: str
    damage: Callable[[Case], Any] = lambda case: None
    options: str = ""
    mode: str = "shared"
    base: bool = True  # give --hf-path

    @property
    def id(self) -> str:
        return f"{self.number:02d}-{self.name}"


def several(*damages: Callable[[Case], Any]) -> Callable[[Case], Any]:
    return lambda case: [damage(case) for damage in damages]


def declared(dtype: str, name: str = A, file: str = WEIGHTS) -> Callable[[Case], Any]:
    """Declare the bytes of one F32 tensor as another dtype of the same total size."""
    per_value = {"F8_E4M3": 4, "F8_E5M2": 4, "BOOL": 4, "U8": 4, "I32": 1, "F64": 0.5, "F4": 8, "I64": 0.5}[dtype]

    def damage(case: Case) -> None:
        body = (case.root / file).read_bytes()
        length = int.from_bytes(body[:8], "little")
        header = json.loads(body[8 : 8 + length])
        entry = header[name]
        entry["dtype"] = dtype
        entry["shape"][-1] = int(entry["shape"][-1] * per_value)
        write_raw(case.root / file, header, body[8 + length :])

    return damage


def f32(name: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    return {name: {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}}


def form_b(case: Case) -> None:
    """Move the stream tensors to their own file."""
    held = mx.load(str(case.root / WEIGHTS))
    mx.save_safetensors(str(case.root / FORM_B), {"specstream.stream_embeddings": held[STREAMS]})
    case.tensors(WEIGHTS, lambda t: t.pop(STREAMS))


def infinite(value: mx.array) -> mx.array:
    array = np.array(value)
    array.flat[[0, 5]] = np.inf
    return mx.array(array)


def narrow_base(case: Case) -> None:
    """A base of half the hidden size."""
    half_of = {D: D // 2, KV: KV // 2}
    half = make_case(case.root.parent / "narrow")
    case.json(BC, lambda raw: raw.update(hidden_size=D // 2))
    held = mx.load(str(half.root / BASE))
    for name, value in held.items():
        if value.ndim == 2:
            shape = tuple(half_of.get(n, n) for n in value.shape)
            held[name] = value[: shape[0], : shape[1]]
        else:
            held[name] = value[: D // 2]
    held = {name: mx.contiguous(value) for name, value in held.items()}
    mx.eval(held)
    (case.root / BASE).unlink()
    write_base(case.base, held)
    case.json(SC, lambda raw: raw.pop("base_model"))


def shallow_base(case: Case) -> None:
    case.tensors(BASE, only(lambda name: ".1." not in name))
    case.json(BC, lambda raw: raw.update(num_hidden_layers=1))
    case.json(SC, lambda raw: raw.pop("base_model"))


def sharded(case: Case) -> None:
    """The base in two shards with their index."""
    held = {name: mx.array(value) for name, value in mx.load(str(case.root / BASE)).items()}
    mx.eval(held)
    (case.root / BASE).unlink()
    write_base(case.base, held, shards=2)


SHARD = "model-{}-of-00002.safetensors".format
FIRST, SECOND = SHARD("00001"), SHARD("00002")


def two_owners(case: Case) -> None:
    sharded(case)
    norm = mx.load(str(case.base / SECOND)) | {}
    name = sorted(norm)[0]
    case.tensors(f"base/{FIRST}", lambda t: t.update({name: norm[name]}))


def shards_beside(case: Case) -> None:
    whole = (case.root / BASE).read_bytes()
    sharded(case)
    (case.root / BASE).write_bytes(whole)


def cache_snapshot(case: Case) -> None:
    """The layout of the Hugging Face cache: every file a symlink into ../../blobs."""
    sharded(case)
    blobs, snapshots = case.root / "hub" / "blobs", case.root / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshots.mkdir(parents=True)
    for i, path in enumerate(sorted(case.base.iterdir())):
        shutil.move(path, blobs / str(i))
        (snapshots / path.name).symlink_to(Path("..") / ".." / "blobs" / str(i))


def quantized_base(case: Case) -> None:
    convert(case.options(mlx_path=case.root / "quantized", quantize=True, q_group_size=32, verify=False))
    shutil.rmtree(case.base)
    (case.root / "quantized").rename(case.base)
    for name in ("specstream.safetensors", STREAM_CONFIG):
        (case.base / name).unlink()


class Hostile:
    """Unpickled, it leaves a file behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.canary,)


def hostile_pickle(*files: str, instead: bool = True) -> Callable[[Case], Any]:
    def damage(case: Case) -> None:
        if instead:
            (case.root / WEIGHTS).unlink()
        for file in files:
            (case.root / file).write_bytes(pickle.dumps(Hostile(case.root / "canary")))

    return damage


def instead_of(file: str, make: Callable[[Path], Any]) -> Callable[[Case], Any]:
    def damage(case: Case) -> None:
        (case.root / file).unlink()
        make(case.root / file)

    return damage


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def directory(path: Path) -> None:
    path.mkdir()
    (path / "x").write_text("x")


def sparse(case: Case) -> None:
    """A file that really is 400 GB long, all of it a hole."""
    size = 4 * 10**11
    write_raw(case.root / FORM_B, f32("specstream.stream_embeddings", [10**11 // D, D], 0, size))
    case.tensors(WEIGHTS, lambda t: t.pop(STREAMS))
    os.truncate(case.root / FORM_B, (case.root / FORM_B).stat().st_size + size)


def non_utf8(case: Case) -> None:
    os.rename(case.base, os.fsencode(case.root) + b"/base\xff\xfe")  # noqa: PTH104


def several_names(*names: str) -> Callable[[Case], Any]:
    def damage(case: Case) -> None:
        for name in names:
            shutil.copytree(case.adapter, case.root / "several" / name)

    return damage


def in_one_file(*names: str) -> Callable[[Case], Any]:
    def change(t: dict[str, mx.array]) -> None:
        for key in [key for key in t if "lora_" in key]:
            value = t.pop(key)
            t.update({key.replace(".weight", f".{name}.weight"): value for name in names})

    return data(change)


def prefixed(prefix: str) -> Callable[[Case], Any]:
    return data(lambda t: [t.update({prefix + name: t.pop(name)}) for name in list(t)])


def low_rank(case: Case, eta: int = 2, rho: int = 2) -> None:
    rng = np.random.default_rng(0)
    shapes = {"stream_init.down": (2, D), "stream_init.up": (D, 2), "prune.down": (2, D), "prune.up": (D, 2)}
    case.tensors(
        WEIGHTS, lambda t: t.update({f"{S}{name}.weight": random_tensor(rng, shape) for name, shape in shapes.items()})
    )
    case.json(
        SC,
        lambda raw: raw.update(
            stream_init={"type": "low_rank", "rank": eta}, prune={"type": "low_rank", "rank": rho, "layer": 1}
        ),
    )


def earlier_output(case: Case) -> None:
    convert(case.options(verify=False))
    (case.out / "mine.txt").write_text("mine")


HEAD_LORA = {PREFIX + "lm_head.lora_A.weight": (RANK, D), PREFIX + "lm_head.lora_B.weight": (V, RANK)}
TOKENIZER = json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": V, "content": "<x>"}]})

CASES = [
    Bad(1, "truncated", 3, (ADAPTER, "expected", "bytes", "incomplete"), "download", rewritten(lambda b: b[:-100])),
    Bad(1, "truncated-base", 3, ("model.safetensors", "incomplete"), "download", rewritten(lambda b: b[:-9], BASE)),
    Bad(1, "truncated-in-header", 3, (ADAPTER, "incomplete"), "download", rewritten(lambda b: b[:200])),
    Bad(1, "truncated-streams", 3, ("specstream.safetensors", "incomplete"), "download",
        several(form_b, rewritten(lambda b: b[:-4], FORM_B))),
    Bad(2, "empty", 3, (ADAPTER, "empty"), "save it again", text(WEIGHTS, b"")),
    Bad(2, "seven-bytes", 3, (ADAPTER, "7 bytes"), "again", text(WEIGHTS, b"1234567")),
    Bad(2, "only-a-length", 3, (ADAPTER, "incomplete"), "download", text(WEIGHTS, b"\x99\0\0\0\0\0\0\0")),
    Bad(2, "empty-base", 3, ("model.safetensors", "empty"), "again", text(BASE, b"")),
    Bad(3, "no-tensors", 3, (ADAPTER, "no tensors", "ZeRO-3"), "save it again with transformers >= 5",
        raw(WEIGHTS, {"__metadata__": {"format": "pt"}})),
    Bad(3, "no-tensors-no-metadata", 3, (ADAPTER, "no tensors"), "save it again", raw(WEIGHTS, {})),
    Bad(4, "empty-shape", 3, (f"{ADAPTER}:{A}", "(0,)", "ZeRO-3"), "save it again",
        data(replaced(A, lambda v: v[0, :0]))),
    Bad(4, "one-dimension", 3, (f"{ADAPTER}:{A}", "two dimensions"), "save it again",
        data(replaced(A, lambda v: v.reshape(-1)))),
    Bad(4, "no-rows", 3, (f"{ADAPTER}:{B}", "two dimensions"), "save it again", data(replaced(B, lambda v: v[:0]))),
    Bad(5, "lfs-pointer", 3, (ADAPTER, "Git LFS pointer"), "git lfs pull", text(WEIGHTS, LFS)),
    Bad(5, "lfs-pointer-base", 3, ("model.safetensors", "Git LFS pointer"), "git lfs pull", text(BASE, LFS)),
    Bad(5, "lfs-pointer-json", 3, (CONFIG, "not valid JSON"), "restore", text(AC, LFS)),
    Bad(6, "huge-header", 3, (ADAPTER, "header claims"), "again", text(WEIGHTS, b"\xff" * 8 + b"{}")),
    Bad(6, "header-over-the-limit", 3, (ADAPTER, "limit"), "again",
        text(WEIGHTS, (100_000_001).to_bytes(8, "little") + b"{}")),
    Bad(6, "header-json", 3, (ADAPTER, "not valid JSON"), "again", raw(WEIGHTS, b"{not json")),
    Bad(6, "header-deep", 3, (ADAPTER, "not valid JSON"), "again", raw(WEIGHTS, b'{"a":' + b"[" * 200_000)),
    Bad(6, "header-not-an-object", 3, (ADAPTER, "not an object"), "again", raw(WEIGHTS, b"[1]")),
    Bad(6, "header-not-utf8", 3, (ADAPTER, "not valid JSON"), "again", raw(WEIGHTS, b'{"\xff":1}')),
    Bad(6, "config-deep", 3, (CONFIG, "not valid JSON"), "restore", text(AC, b'{"a":' + b"[" * 200_000)),
    Bad(7, "negative-shape", 3, (f"{ADAPTER}:x", "shape"), "save it again",
        raw(WEIGHTS, f32("x", [-1, -4], 0, 16), bytes(16))),
    Bad(7, "overlapping-offsets", 3, (f"{ADAPTER}:y", "begins at byte"), "save it again",
        raw(WEIGHTS, f32("x", [4], 0, 16) | f32("y", [4], 8, 24), bytes(24))),
    Bad(7, "gap", 3, (f"{ADAPTER}:y", "begins at byte"), "save it again",
        raw(WEIGHTS, f32("x", [4], 0, 16) | f32("y", [4], 20, 36), bytes(36))),
    Bad(7, "offsets-against-shape", 3, (f"{ADAPTER}:x", "needs 16 bytes"), "save it again",
        raw(WEIGHTS, f32("x", [4], 0, 12), bytes(12))),
    Bad(7, "backward-offsets", 3, (f"{ADAPTER}:x", "needs 16 bytes"), "save it again",
        raw(WEIGHTS, f32("x", [4], 16, 0), bytes(16))),
    Bad(7, "trailing-bytes", 3, (ADAPTER, "damaged"), "again", rewritten(lambda b: b + b"1234")),
    Bad(7, "shape-of-floats", 3, (f"{ADAPTER}:x", "bad shape"), "save it again",
        raw(WEIGHTS, f32("x", [4.0], 0, 16), bytes(16))),
    Bad(7, "unknown-dtype", 3, (f"{ADAPTER}:x", "unknown dtype F33"), "save it again",
        raw(WEIGHTS, {"x": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))),
    Bad(7, "gap-in-the-base", 3, ("model.safetensors:y", "begins at byte"), "save it again",
        raw(BASE, f32("x", [4], 0, 16) | f32("y", [4], 20, 36), bytes(36))),
    Bad(8, "twice-in-header", 3, (ADAPTER, "appear twice", "x"), "save it again", raw(WEIGHTS, b'{"x":{},"x":{}}')),
    Bad(8, "twice-in-adapter-config", 3, (CONFIG, "'r' appears twice"), "keep one",
        rewritten(lambda b: b.replace(b"{", b'{"r": 8, ', 1), AC)),
    Bad(8, "twice-in-stream-config", 3, (STREAM_CONFIG, "'gamma' appears twice"), "keep one",
        rewritten(lambda b: b.replace(b"{", b'{"gamma": 3, ', 1), SC)),
    Bad(8, "twice-in-index", 3, ("index.json", "'a' appears twice"), "keep one",
        text(INDEX, '{"weight_map": {"a": "model.safetensors", "a": "model.safetensors"}}')),
    Bad(8, "twice-in-base-config", 3, ("config.json", "'vocab_size' appears twice"), "keep one",
        rewritten(lambda b: b.replace(b"{", b'{"vocab_size": 1, ', 1), BC)),
    *(Bad(9, name, 4, (f"{ADAPTER}:{A}", name), "save it as BF16 or F32", declared(name))
      for name in ("F8_E4M3", "F8_E5M2", "F64", "F4")),
    Bad(9, "streams-in-fp8", 4, (f"{ADAPTER}:{STREAMS}", "F8_E4M3"), "save it as BF16 or F32",
        several(declared("F8_E4M3", STREAMS), config(SC, base_model={}))),
    Bad(9, "base-in-fp8", 4, ("model.safetensors:model.norm.weight", "F8_E4M3"), "save it as BF16 or F32",
        declared("F8_E4M3", "model.norm.weight", BASE)),
    *(Bad(10, f"{dtype}-lora", 3, (f"{ADAPTER}:{A}", dtype), "expected a float tensor", declared(dtype))
      for dtype in ("I32", "I64", "BOOL", "U8")),
    Bad(10, "integer-streams", 3, (f"{ADAPTER}:{STREAMS}", "I32"), "expected a float tensor", declared("I32", STREAMS)),
    Bad(10, "integer-base", 3, ("model.safetensors:model.norm.weight", "I32"), "expected a float tensor",
        declared("I32", "model.norm.weight", BASE)),
    Bad(11, "nan-lora", 3, (f"{ADAPTER}:{B}", f"1 of {D * RANK} values"), "earlier checkpoint",
        data(replaced(B, poisoned))),
    Bad(11, "infinite-lora", 3, (f"{ADAPTER}:{A}", f"2 of {D * RANK} values"), "earlier checkpoint",
        data(replaced(A, infinite))),
    Bad(11, "nan-streams", 3, (f"{ADAPTER}:{STREAMS}", f"1 of {GAMMA * D} values"), "earlier checkpoint",
        data(replaced(STREAMS, poisoned))),
    Bad(11, "nan-base", 3, ("model.safetensors:model.norm.weight", f"1 of {D} values"), "earlier checkpoint",
        data(replaced("model.norm.weight", poisoned), BASE)),
    Bad(11, "nan-in-merged-weight", 3, ("model.safetensors:model.layers.0.self_attn.q_proj.weight", "NaN"),
        "earlier checkpoint", data(replaced("model.layers.0.self_attn.q_proj.weight", poisoned), BASE)),
    Bad(12, "overflow", 3, ("model.norm.weight", "range of F16"), "--dtype bfloat16",
        data(replaced("model.norm.weight", lambda v: v * 1e6), BASE), "--dtype float16"),
    Bad(12, "overflow-of-a-merge", 3, ("q_proj", "range of F16"), "--dtype bfloat16",
        data(replaced(B, lambda v: v * 1e6)), "--dtype float16"),
    Bad(13, "zero-b", 3, (f"{ADAPTER}:", "does nothing"), "save", data(zeroed("lora_B"))),
    Bad(13, "zero-a", 3, (f"{ADAPTER}:", "does nothing"), "save", data(zeroed("lora_A"))),
    Bad(13, "no-flag-for-it", 2, ("--allow-noop",), "--help", data(zeroed("lora_B")), "--allow-noop"),
    Bad(14, "one-eighth-of-b", 3, (f"{ADAPTER}:", "lora_B", "sharded"), "save it again unsharded", data(one_row_left)),
    Bad(15, "a-without-b", 3, (f"{ADAPTER}:{A}", "no matching lora_B"), "save", data(lambda t: t.pop(B))),
    Bad(15, "b-without-a", 3, (f"{ADAPTER}:{B}", "no matching lora_A"), "save", data(lambda t: t.pop(A))),
    Bad(16, "ranks-differ", 3, (f"{ADAPTER}:{A}", "rank 3", "rank 4"), "save", data(replaced(A, lambda v: v[:3]))),
    Bad(16, "rank-against-config", 3, (f"{ADAPTER}:{A}", "rank 4", "8", CONFIG), "save", config(r=8)),
    Bad(16, "rank-against-pattern", 3, (f"{ADAPTER}:{A}", "rank 4", "2", CONFIG), "save",
        config(rank_pattern={"q_proj": 2})),
    Bad(17, "r-zero", 3, (CONFIG, "r is 0"), "expected an integer", config(r=0)),
    Bad(17, "r-missing", 3, (CONFIG, "r is None"), "expected an integer", without(AC, "r")),
    Bad(17, "r-string", 3, (CONFIG, "r is '4'"), "expected an integer", config(r="4")),
    Bad(17, "r-fraction", 3, (CONFIG, "r is 4.5"), "expected an integer", config(r=4.5)),
    Bad(17, "alpha-missing", 3, (CONFIG, "lora_alpha is None"), "expected a number", without(AC, "lora_alpha")),
    Bad(17, "alpha-nan", 3, (CONFIG, "NaN is not valid JSON"), "write a number",
        rewritten(lambda b: b.replace(b'"lora_alpha": 8', b'"lora_alpha": NaN'), AC)),
    Bad(17, "alpha-string", 3, (CONFIG, "lora_alpha is '8'"), "expected a number", config(lora_alpha="8")),
    Bad(17, "alpha-true", 3, (CONFIG, "lora_alpha is True"), "expected a number", config(lora_alpha=True)),
    Bad(17, "alpha-huge", 3, (CONFIG, "lora_alpha"), "expected a number", config(lora_alpha=10**400)),
    Bad(17, "alpha-zero", 0, ("warning: lora_alpha is 0",), "does nothing", config(lora_alpha=0)),
    Bad(17, "alpha-negative", 0, ("warning: lora_alpha is -8",), "acts inverted", config(lora_alpha=-8)),
    Bad(17, "alpha-float", 0, ("wrote",), "verified", config(lora_alpha=8.0)),
    Bad(18, "config-missing", 3, (CONFIG, "not found"), "copy it from the training run", remove(AC)),
    Bad(18, "config-json", 3, (CONFIG, "not valid JSON"), "restore", text(AC, "{oops")),
    Bad(18, "config-list", 3, (CONFIG, "list"), "expected a JSON object", text(AC, "[]")),
    Bad(18, "config-bom", 3, (CONFIG, "BOM"), "restore", rewritten(lambda b: b"\xef\xbb\xbf" + b, AC)),
    Bad(18, "config-infinity", 3, (CONFIG, "-Infinity is not valid JSON"), "write a number",
        rewritten(lambda b: b.replace(b'"lora_alpha": 8', b'"lora_alpha": -Infinity'), AC)),
    Bad(18, "config-not-utf8", 3, (CONFIG, "not valid JSON"), "restore", text(AC, b'{"r": "\xff"}')),
    Bad(18, "config-empty", 3, (CONFIG, "not valid JSON"), "restore", text(AC, "")),
    Bad(19, "no-peft-type", 3, (CONFIG, "peft_type"), "not a PEFT adapter", without(AC, "peft_type")),
    Bad(19, "mlx-lm-format", 3, (CONFIG, "already in mlx-lm's format"), "nothing to convert",
        text(AC, json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0}}))),
    *(Bad(20, kind.lower().replace("_", "-"), 4, (CONFIG, f"peft_type {kind}"), "merge it in PEFT",
          config(peft_type=kind)) for kind in ("ADALORA", "LOHA", "IA3", "VERA")),
    Bad(20, "prompt-tuning", 4, (CONFIG, "PROMPT_TUNING"), "retrain with LoRA", config(peft_type="PROMPT_TUNING")),
    Bad(21, "alora-invocation-tokens", 4, (CONFIG, "alora_invocation_tokens"), "retrain without it",
        config(alora_invocation_tokens=[1])),
    Bad(21, "arrow-config", 4, (CONFIG, "arrow_config"), "convert one of its adapters", config(arrow_config={"a": 1})),
    *(Bad(21, name.replace("_", "-"), 4, (CONFIG, name), "merge it in PEFT", config(**{name: value}))
      for name, value in {"use_qalora": True, "use_bdlora": {"x": 1}, "layer_replication": [[0, 2]],
                          "monteclora_config": {"a": 1},
                          "megatron_config": {"a": 1}, "target_parameters": ["x"], "unheard_of": {"a": 1}}.items()),
    *(Bad(22, name, 4, (CONFIG, "init_lora_weights", name), "path_initial_model_for_weight_conversion",
          config(init_lora_weights=name)) for name in ("pissa_niter_4", "corda", "lora_ga", "loftq")),
    Bad(22, "kasa", 4, (CONFIG, "kasa_config"), "merge it in PEFT", config(kasa_config={"a": 1})),
    Bad(23, "narrow-base", 3, (f"{ADAPTER}:{A}", f"({D}, {D})", f"({D // 2}, {D // 2})", "org/tiny"), "the base given",
        narrow_base),
    Bad(23, "recorded-size", 3, (STREAM_CONFIG, "base_model.hidden_size is 64", str(D)), "--hf-path",
        lambda c: c.json(SC, lambda raw: raw["base_model"].update(hidden_size=64))),
    Bad(23, "recorded-heads", 3, (STREAM_CONFIG, "base_model.num_key_value_heads is 8"), "--hf-path",
        lambda c: c.json(SC, lambda raw: raw["base_model"].update(num_key_value_heads=8))),
    Bad(24, "fingerprint", 3, ("model.norm.weight", "fingerprint", "same shapes"), "--hf-path",
        lambda c: c.json(SC, lambda raw: raw["base_model"].update(
            fingerprint={"tensor": "model.norm.weight", "sha256": "0" * 64}))),
    Bad(24, "fingerprint-unreadable", 3, (STREAM_CONFIG, "fingerprint"), "remove it",
        lambda c: c.json(SC, lambda raw: raw["base_model"].update(fingerprint="abc"))),
    Bad(24, "saved-copy-differs", 3, (f"{ADAPTER}:{PREFIX}model.embed_tokens.weight",), "--hf-path", data(
        added(PREFIX + "model.embed_tokens.weight", (V, D)))),
    Bad(25, "shallow-base", 3, (f"{ADAPTER}:", "model.layers.1", "org/tiny"), "the base given", shallow_base),
    Bad(25, "adapter-of-fewer-layers", 3, (ADAPTER, "model.layers.1.mlp.up_proj", "incomplete"), "target_modules",
        data(only(lambda n: ".1." not in n))),
    Bad(25, "explained-by-config", 0, ("wrote",), "verified", several(
        data(only(lambda n: ".0." not in n)), config(layers_to_transform=[1]))),
    Bad(26, "unknown-tensor", 3, (f"{ADAPTER}:{PREFIX}model.strange",), "--ignore-keys",
        data(added(PREFIX + "model.strange", (3,)))),
    Bad(26, "unknown-lora", 3, (f"{ADAPTER}:{Q}.lora_Q",), "--key-map", data(added(Q + ".lora_Q", (3,)))),
    Bad(26, "all-are-listed", 3, ("model.one", "model.two"), "--key-map",
        data(lambda t: t.update({PREFIX + "model.one": mx.ones(3), PREFIX + "model.two": mx.ones(3)}))),
    Bad(26, "unknown-in-form-b", 3, ("specstream.safetensors:stray",), "--key-map",
        several(form_b, lambda c: c.tensors(FORM_B, added("stray", (3,))))),
    Bad(26, "unknown-stream-tensor", 3, (f"{ADAPTER}:{S}gate.weight", "not needed"), "--ignore-keys",
        data(added(S + "gate.weight", (3,)))),
    *(Bad(27, name, 0, ("wrapper prefix", "note: "), "removed", prefixed(prefix))
      for name, prefix in {"ddp": "module.", "compiled": "_orig_mod.", "fsdp": "_fsdp_wrapped_module."}.items()),
    Bad(27, "collision", 3, (f"{ADAPTER}:module.", "same tensor"), "keep one",
        data(lambda t: t.update({"module." + A: t[A]}))),
    Bad(28, "two-directories", 2, ("several", "one|two"), "choose --adapter-name", two_adapters,
        "--adapter-path {root}/several"),
    Bad(28, "two-in-a-file", 2, (ADAPTER, "one|two"), "choose --adapter-name", in_one_file("one", "two")),
    Bad(28, "no-such-name", 2, ("several", "three"), "choose from", two_adapters,
        "--adapter-path {root}/several --adapter-name three"),
    Bad(28, "no-such-name-in-the-file", 2, (ADAPTER, "three"), "choose from", in_one_file("one", "two"),
        "--adapter-name three"),
    Bad(29, "both-forms-of-weights", 0, ("adapter_model.bin was not opened",), "is used",
        hostile_pickle("adapter/adapter_model.bin", instead=False)),
    Bad(30, "hostile-pickle", 4, ("adapter_model.bin", "can run code"), "safe_serialization",
        hostile_pickle("adapter/adapter_model.bin")),
    Bad(30, "hostile-base", 4, ("pytorch_model.bin",), "save it as safetensors", several(
        hostile_pickle("base/pytorch_model.bin", instead=False), remove(BASE))),
    Bad(30, "trainer-files-unopened", 0, ("wrote",), "verified", lambda c: [
        (c.adapter / name).mkdir() for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")]),
    *(Bad(31, name, 3, ("index.json", "is not the name of a shard"), "beside it", index({"a": shard}))
      for name, shard in {"climbs": "../x.safetensors", "absolute": "/etc/passwd", "backslash": "..\\x.safetensors",
                          "nul": "model\0.safetensors", "subdirectory": "sub/model.safetensors",
                          "dots": "model..safetensors", "other-case": "Model.safetensors"}.items()),
    Bad(31, "not-a-map", 3, ("index.json", "weight_map"), "download it again", text(INDEX, "{}")),
    Bad(31, "cache-of-symlinks", 0, ("wrote",), "verified", cache_snapshot, "--hf-path {root}/hub/snapshots/abc"),
    Bad(32, "missing-shard", 3, ("index.json", SECOND), "download it again",
        several(sharded, remove(f"base/{SECOND}"))),
    Bad(32, "shard-not-in-index", 3, (SECOND, "not named in"), "remove it", several(
        base_file(FIRST), base_file(SECOND), remove(BASE), index({"a": FIRST}))),
    Bad(32, "tensor-in-two-shards", 3, ("index.json", "is not listed"), "download it again", two_owners),
    Bad(32, "tensor-not-there", 3, ("index.json", "strange is not in model.safetensors"), "download it again",
        index({"strange": "model.safetensors"})),
    Bad(32, "total-size-wrong", 3, ("index.json", "total_size"), "download it again", several(
        sharded, lambda c: c.json(INDEX, lambda raw: raw["metadata"].update(total_size=1)))),
    Bad(33, "shards-and-a-whole", 3, ("model.safetensors", "not named in"), "remove it", shards_beside),
    Bad(33, "shards-and-a-whole-no-index", 3, (FIRST, "would mix them"), "keep one complete set",
        several(shards_beside, remove(INDEX))),
    *(Bad(34, method, 4, ("config.json", "quantised", method), "full-precision base with --hf-path",
          config(BC, quantization_config={"quant_method": method, "bits": 8}))
      for method in ("bitsandbytes", "gptq", "awq", "hqq", "fp8", "compressed-tensors")),
    Bad(34, "unnamed", 4, ("config.json", "quantised"), "full-precision base",
        config(BC, quantization_config={"a": 1})),
    Bad(34, "named-by-its-quantised-copy", 4, ("config.json", "quantised"), "try unsloth/tiny", several(
        config(BC, quantization_config={"quant_method": "bitsandbytes"}),
        config(base_model_name_or_path="unsloth/tiny-bnb-4bit"))),
    Bad(35, "fuse-into-quantised", 4, ("base", "quantised"), "--keep-adapters", quantized_base, "--fuse"),
    Bad(36, "tokenizer-beyond-the-vocabulary", 3, ("tokenizer.json", str(V)), "--hf-path",
        text("base/tokenizer.json", TOKENIZER)),
    Bad(37, "tied-head-of-another-shape", 3, ("model.safetensors:lm_head.weight",), "tie_word_embeddings", several(
        config(BC, tie_word_embeddings=True), data(replaced("lm_head.weight", lambda v: v[:-1]), BASE))),
    Bad(38, "per-layer-rope", 4, ("config.json", "rope_parameters"), "expected",
        config(BC, rope_parameters={"full_attention": {"rope_theta": 1.0}})),
    Bad(38, "unknown-rope-type", 4, ("config.json", "'dynamic'"), "supported types: ", config(
        BC, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})),
    Bad(38, "unknown-rope-field", 4, ("config.json", "strange"), "supported types: ", config(
        BC, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "strange": 1})),
    Bad(38, "two-values", 3, ("config.json", "rope_theta is 5"), "remove the wrong one", config(BC, rope_theta=5)),
    Bad(38, "lifted", 0, ("rope_parameters lifted",), "verified"),
    Bad(39, "no-model-type", 4, ("config.json", "model_type is None"), "not a model's config.json",
        without(BC, "model_type")),
    Bad(39, "no-hidden-size", 4, ("config.json", "hidden_size is None"), "expected an integer",
        without(BC, "hidden_size")),
    Bad(39, "number-beyond-range", 3, ("config.json", "not finite"), "correct it",
        rewritten(lambda b: b.replace(b"{", b'{"initializer_range": 1e999, ', 1), BC)),
    Bad(39, "custom-code", 4, ("config.json", "custom"), "supported: ", config(
        BC, model_type="custom", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})),
    Bad(39, "model-file", 4, ("config.json", "model_file", "never run"), "remove it", config(BC, model_file="evil.py")),
    Bad(39, "auto-map-of-a-known-family", 0, ("auto_map dropped",), "no code of the checkpoint is run",
        config(BC, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})),
    Bad(39, "remote-code-flag", 2, ("--trust-remote-code",), "leave it out", options="--trust-remote-code"),
    *(Bad(40, name, 4, ("config.json", "model_type", "is not supported"), "supported: gpt2, llama",
          config(BC, model_type=kind)) for name, kind in {
              "unheard-of": "unheard_of", "path": "../../evil", "module": "os.path",
          }.items()),
    Bad(40, "mixture-of-experts", 4, ("config.json", "model_type", "are not converted"), "specstream-mlx train",
        config(BC, model_type="mixtral")),
    Bad(41, "missing", 3, (STREAM_CONFIG, "not found", f'"gamma": {GAMMA}', '"num_stream_layers": "?"'),
        "to be filled in", remove(SC)),
    Bad(41, "incomplete", 3, (STREAM_CONFIG, "missing gamma, mode", f'"gamma": {GAMMA}'), "to be filled in",
        without(SC, "gamma", "mode")),
    Bad(41, "ranks-in-the-template", 3, (STREAM_CONFIG, '"rank": 2', '"type": "low_rank"'), "to be filled in",
        several(low_rank, remove(SC))),
    Bad(41, "given-path-missing", 3, ("nothing.json", "not found"), "to be filled in",
        options="--specstream-config {root}/nothing.json"),
    Bad(42, "gamma", 3, (f"{ADAPTER}:{STREAMS}", f"shape ({GAMMA}, {D})", f"expected (5, {D})"), "gamma is 5",
        config(SC, gamma=5)),
    Bad(42, "gamma-out-of-range", 3, (STREAM_CONFIG, "gamma is 33"), "1..32", config(SC, gamma=33)),
    Bad(42, "gamma-zero", 3, (STREAM_CONFIG, "gamma is 0"), "1..32", config(SC, gamma=0)),
    Bad(42, "eta", 3, (f"{ADAPTER}:{S}stream_init.down.weight", f"shape (2, {D})", f"expected (5, {D})"),
        "configuration", lambda c: low_rank(c, eta=5)),
    Bad(42, "rho", 3, (f"{ADAPTER}:{S}prune.up.weight", f"shape ({D}, 2)", f"expected ({D}, 7)"), "configuration",
        lambda c: low_rank(c, rho=7)),
    Bad(42, "more-stream-layers-than-layers", 3, (STREAM_CONFIG, "num_stream_layers is 9", str(LAYERS)), "layers",
        config(SC, num_stream_layers=9)),
    Bad(42, "no-stream-layers", 3, (STREAM_CONFIG, "num_stream_layers is 0"), "at least 1",
        config(SC, num_stream_layers=0)),
    Bad(42, "prune-layer", 3, (STREAM_CONFIG, "prune.layer is 9", str(LAYERS)), "layers",
        config(SC, prune={"type": "low_rank", "rank": 2, "layer": 9})),
    Bad(43, "lora-around-streams", 3, (f"{ADAPTER}:{S}stream_init.down.lora_A.weight", "never saved"),
        "retrain with modules_to_save=['specstream']", data(added(S + "stream_init.down.lora_A.weight", (2, D)))),
    Bad(43, "base-layer-of-streams", 3, (f"{ADAPTER}:{S}stream_init.down.base_layer.weight", "never saved"),
        "retrain with modules_to_save=['specstream']", data(added(S + "stream_init.down.base_layer.weight", (2, D)))),
    Bad(44, "no-streams", 3, (ADAPTER, "after get_peft_model", "bare parameters", "forgotten"), "--lora-only",
        data(lambda t: t.pop(STREAMS))),
    Bad(44, "no-streams-no-config", 3, (ADAPTER, "after get_peft_model", "bare parameters", "forgotten"),
        "--lora-only", several(data(lambda t: t.pop(STREAMS)), remove(SC))),
    Bad(44, "lora-only", 0, ("wrote", "no streams"), "verified", several(data(lambda t: t.pop(STREAMS)), remove(SC)),
        "--lora-only"),
    Bad(45, "untrained-copies", 3, (f"{ADAPTER}:{S}original_module.stream_embeddings",), "save_pretrained",
        data(renamed(STREAMS, S + "original_module.stream_embeddings"))),
    Bad(46, "transposed", 3, (f"{ADAPTER}:{STREAMS}", f"({D}, {GAMMA})", "transposed"), "--key-map",
        data(replaced(STREAMS, lambda v: mx.contiguous(v.T)))),
    Bad(46, "singleton", 0, ("a dimension of size 1 removed",), "verified",
        data(replaced(STREAMS, lambda v: v.reshape(GAMMA, 1, D)))),
    Bad(46, "three-dimensions", 3, (f"{ADAPTER}:{STREAMS}", "shape"), "configuration",
        data(replaced(STREAMS, lambda v: v.reshape(GAMMA, 2, D // 2)))),
    Bad(47, "equal-rows", 0, ("warning: specstream.stream_embeddings has equal rows",), "untrained",
        data(replaced(STREAMS, lambda v: mx.ones_like(v)))),
    Bad(47, "zero", 0, ("warning: specstream.stream_embeddings is all zero",), "untrained",
        data(replaced(STREAMS, mx.zeros_like))),
    Bad(47, "zero-up", 0, ("warning: specstream.stream_init.up.weight is all zero",), "untrained", several(
        low_rank, data(replaced(S + "stream_init.up.weight", mx.zeros_like)))),
    Bad(48, "early-layer", 3, (f"{ADAPTER}:{A}", "lossless", "layers 1 to 1"), "use mode shared",
        data(lambda t: t.update({A: mx.ones((RANK, D)), B: mx.ones((D, RANK))})), mode="lossless"),
    Bad(48, "lm-head", 3, (f"{ADAPTER}:{PREFIX}lm_head.lora_A.weight", "lossless"), "use mode shared",
        data(lambda t: t.update({name: mx.ones(shape) for name, shape in HEAD_LORA.items()})), mode="lossless"),
    Bad(48, "lora-rows", 3, (STREAM_CONFIG, "lora_rows is 'all'"), "'streams'", config(SC, lora_rows="all"),
        mode="lossless"),
    Bad(48, "bias", 3, (CONFIG, "lossless", "bias"), "use mode shared", config(bias="all"), mode="lossless"),
    Bad(48, "modules-to-save", 3, (CONFIG, "lossless", "embed_tokens"), "use mode shared",
        config(modules_to_save=["specstream", "embed_tokens"]), mode="lossless"),
    Bad(49, "lossless-fuse", 2, ("--fuse", "lossless"), "leave it out", options="--fuse", mode="lossless"),
    Bad(50, "no-mode", 3, (STREAM_CONFIG, "missing mode"), "to be filled in", without(SC, "mode")),
    Bad(50, "unknown-mode", 3, (STREAM_CONFIG, "mode is 'both'"), "expected 'shared' or 'lossless'",
        config(SC, mode="both")),
    Bad(50, "newer-format", 4, (STREAM_CONFIG, "format_version 2"), "upgrade", config(SC, format_version=2)),
    Bad(50, "main-attends-streams", 4, (STREAM_CONFIG, "main_attends_streams"), "train with",
        config(SC, main_attends_streams=True)),
    Bad(50, "unknown-key", 3, (STREAM_CONFIG, "unknown 'gama'"), "x_", config(SC, gama=1)),
    Bad(51, "forms-differ", 3, (f"{ADAPTER}:{STREAMS}", "specstream.safetensors", "differs"), "remove",
        second_form(0.5)),
    Bad(51, "forms-of-other-tensors", 3, ("specstream.prune.up.weight", "only there"), "remove", several(
        second_form(0), lambda c: c.tensors(FORM_B, added("specstream.prune.up.weight", (D, 2))))),
    Bad(51, "forms-agree", 0, ("hold the same stream tensors",), "verified", second_form(0)),
    Bad(52, "exists", 2, ("out", "already exists"), "--overwrite", lambda c: c.out.mkdir()),
    Bad(52, "exists-as-a-file", 2, ("out", "not a directory"), "--overwrite", text("out", "x"), "--overwrite"),
    Bad(52, "not-ours", 2, ("out", "conversion_report.json"), "--overwrite replaces only", lambda c: c.out.mkdir(),
        "--overwrite"),
    Bad(52, "ours-and-something-else", 2, ("out", "mine.txt"), "--overwrite replaces only", earlier_output,
        "--overwrite"),
    Bad(52, "is-the-adapter", 2, ("adapter", "lies in the input"), "choose another --mlx-path",
        options="--mlx-path {root}/adapter --overwrite"),
    Bad(52, "in-the-base", 2, ("base", "lies in the input"), "choose another --mlx-path",
        options="--mlx-path {root}/base/out"),
    Bad(52, "around-the-input", 2, ("the input",), "choose another --mlx-path",
        options="--mlx-path {root} --overwrite"),
    Bad(52, "under-a-file", 2, ("cannot be written",), "choose another place", text("file", "x"),
        "--mlx-path {root}/file/out"),
    Bad(52, "dangling-link", 2, ("out", "not a directory"), "--overwrite", lambda c: c.out.symlink_to("nowhere"),
        "--overwrite"),
    Bad(53, "tensor-name-climbs", 3, (f"{ADAPTER}:../../evil",), "--key-map", data(added("../../evil", (2,)))),
    Bad(53, "tensor-name-absolute", 3, (f"{ADAPTER}:/etc/passwd",), "--key-map", data(added("/etc/passwd", (2,)))),
    Bad(53, "tensor-name-colours", 3, ("\\x1b[31mred\\x07",), "--key-map", data(added("\x1b[31mred\x07", (2,)))),
    Bad(53, "tensor-name-lines", 3, ("one\\nerror: two",), "--key-map", data(added("one\nerror: two", (2,)))),
    Bad(53, "tensor-name-right-to-left", 3, ("\\u202e",), "--key-map", data(added("\u202eevil", (2,)))),
    Bad(53, "tensor-name-endless", 3, ("..." ,), "--key-map", data(added("x" * 100_000, (2,)))),
    Bad(53, "module-name-climbs", 3, ("../../q_proj",), "the base given", data(lambda t: t.update({
        PREFIX + "../../q_proj.lora_A.weight": t.pop(A), PREFIX + "../../q_proj.lora_B.weight": t.pop(B)}))),
    Bad(53, "adapter-name-climbs", 2, ("../adapter",), "choose from", two_adapters,
        "--adapter-path {root}/several --adapter-name ../adapter"),
    Bad(53, "adapter-name-lines", 2, ("one\\ntwo",), "choose --adapter-name", several_names("one\ntwo", "x"),
        "--adapter-path {root}/several"),
    Bad(54, "huge-declared-tensor", 3, (ADAPTER, "incomplete"), "download",
        raw(WEIGHTS, f32("x", [10**11], 0, 4 * 10**11), bytes(12))),
    Bad(54, "more-than-any-machine", 3, (f"{ADAPTER}:x", "bad shape"), "save it again",
        raw(WEIGHTS, f32("x", [2**60, 2**60], 0, 2**122), bytes(12))),
    Bad(54, "huge-sparse-file", 3, ("specstream.safetensors:specstream.stream_embeddings", f"expected ({GAMMA}, {D})"),
        "gamma is 3", sparse),
    Bad(54, "zip-bomb", 4, ("adapter_model.bin", "not opened"), "safe_serialization", several(
        remove(WEIGHTS), lambda c: (c.adapter / "adapter_model.bin").write_bytes(b"PK\3\4" + bytes(1000)))),
    Bad(54, "huge-base-sizes", 3, ("config.json", "mlx-lm cannot build"), "restore", config(BC, head_dim=2**30)),
    Bad(54, "endless-layers", 3, ("config.json", "num_hidden_layers"), "no model has",
        config(BC, num_hidden_layers=10**9)),
    *(Bad(55, f"fifo-{Path(file).name}", 3, (Path(file).name, "not a regular file"), "give the file itself",
          instead_of(file, os.mkfifo)) for file in (WEIGHTS, BASE)),
    *(Bad(55, f"fifo-{file.replace('/', '-')}", 3, (Path(file).name,), "not a regular file",
          instead_of(file, os.mkfifo)) for file in (AC, SC, BC)),
    Bad(55, "fifo-key-map", 3, ("map.json",), "not a regular file", lambda c: os.mkfifo(c.root / "map.json"),
        "--key-map {root}/map.json"),
    Bad(55, "fifo-reference", 3, ("x.npz",), "npz", lambda c: os.mkfifo(c.root / "x.npz"),
        "--reference-logits {root}/x.npz"),
    Bad(55, "directory-as-weights", 3, (ADAPTER, "not a regular file"), "give the file itself",
        instead_of(WEIGHTS, directory)),
    Bad(55, "directory-as-config", 3, (CONFIG,), "not a regular file", instead_of(AC, directory)),
    Bad(55, "device-as-weights", 3, (ADAPTER, "not a regular file"), "give the file itself",
        instead_of(WEIGHTS, lambda path: path.symlink_to("/dev/zero"))),
    Bad(55, "symlink-loop", 3, (ADAPTER, "not found"), "--adapter-path is the directory", instead_of(WEIGHTS, loop)),
    Bad(55, "symlink-loop-config", 3, (CONFIG, "not found"), "copy it", instead_of(AC, loop)),
    Bad(55, "symlink-loop-as-adapter", 3, ("loop", "no such directory"), "--adapter-path",
        lambda c: loop(c.root / "loop"), "--adapter-path {root}/loop"),
    Bad(55, "symlink-loop-as-base", 3, ("loop", "no such directory"), "--hf-path", lambda c: loop(c.root / "loop"),
        "--hf-path {root}/loop"),
    Bad(55, "names-that-differ-in-case", 2, ("several", "ONE|one"), "choose --adapter-name",
        several_names("one", "ONE"), "--adapter-path {root}/several"),
    Bad(55, "not-utf8", 3, ("base\\udcff\\udcfe", "not UTF-8"), "rename it", non_utf8,
        "--hf-path {root}/base\udcff\udcfe"),
    Bad(57, "expert-lora", 4, (f"{ADAPTER}:{PREFIX}model.layers.0.mlp.experts.lora_A.weight",), "incompatible",
        data(added(PREFIX + "model.layers.0.mlp.experts.lora_A.weight", (4, D)))),
    Bad(57, "expert-base-layer-lora", 4, ("mlp.experts.base_layer.lora_B.weight",), "incompatible",
        data(added(PREFIX + "model.layers.0.mlp.experts.base_layer.lora_B.weight", (D, 4)))),
    Bad(57, "target-parameters", 4, (CONFIG, "target_parameters"), "merge it in PEFT",
        config(target_parameters=["mlp.experts.gate_up_proj"])),
]  # fmt: skip
# What the converter does not say or do yet; a case that starts to pass must leave this list.
TESTED_BELOW = {56: "test_interrupted"}


def test_every_number_is_here() -> None:
    numbers = [bad.number for bad in CASES]
    assert sorted({*numbers, *TESTED_BELOW}) == list(range(1, 58))
    assert set(OTHER_FILE) <= set(numbers)
    assert numbers == sorted(numbers)
    ids = {bad.id for bad in CASES}
    assert len(ids) == len(CASES)


def state(root: Path) -> dict[str, Any]:
    """Every path under ``root``, hidden ones too, with what it is and holds."""
    held: dict[str, Any] = {}
    for name in snapshot(root):
        path = root / name
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            held[name] = path.readlink()
        elif stat.S_ISREG(status.st_mode) and status.st_size < 10**8:
            held[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            held[name] = (stat.S_IFMT(status.st_mode), status.st_size if stat.S_ISREG(status.st_mode) else 0)
    return held


def command(bad: Bad, case: Case) -> list[str]:
    words = ["convert", "--adapter-path", str(case.adapter), "--mlx-path", str(case.out)]
    words += ["--hf-path", str(case.base)] if bad.base else []
    return [*words, *(word.replace("{root}", str(case.root)) for word in bad.options.split())]


def check(bad: Bad, code: int, out: str, err: str, case: Case, before: dict[str, Any]) -> None:
    assert (code, out) == (bad.code, ""), err
    assert "Traceback" not in err
    for word in (*bad.words, bad.way):
        assert word in err, err
    assert all(line.isprintable() for line in err.splitlines()), err
    after = state(case.root)
    if bad.code == 0:
        assert "out/conversion_report.json" in after
        after = {name: held for name, held in after.items() if name != "out" and not name.startswith("out/")}
    else:
        assert all(line.startswith("error: ") for line in err.splitlines()), err
        assert all(len(line) < 1500 for line in err.splitlines()), err
    assert after == before
    assert "canary" not in after


def parameter(bad: Bad) -> Any:
    return pytest.param(bad, id=bad.id)


@pytest.mark.parametrize("bad", [parameter(bad) for bad in CASES])
def test_bad_input(bad: Bad, pristine: dict[str, Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "not-utf8" in bad.name and sys.platform == "darwin":
        pytest.skip("file names of macOS are always UTF-8")
    if bad.name == "names-that-differ-in-case" and (tmp_path.parent / tmp_path.name.upper()).exists():
        pytest.skip("this file system does not tell cases apart")
    case = pristine[bad.mode].copy(tmp_path / "case")
    bad.damage(case)
    before = state(case.root)
    capsys.readouterr()
    code = main(command(bad, case))
    printed = capsys.readouterr()
    check(bad, code, printed.out, printed.err, case, before)
    assert {path.name for path in tmp_path.iterdir()} <= {"case", "narrow"}


@pytest.mark.parametrize("name", ["07-overlapping-offsets", "55-fifo-adapter_model.safetensors"])
def test_in_a_process_of_its_own(name: str, pristine: dict[str, Case], tmp_path: Path) -> None:
    """As a user meets it."""
    (bad,) = (each for each in CASES if each.id == name)
    case = pristine[bad.mode].copy(tmp_path / "case")
    bad.damage(case)
    before = state(case.root)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "convert", ROOT / "cli")))
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONWARNINGS": ""}
    program = [sys.executable, "-m", "specstream_mlx", *command(bad, case)]
    ran = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=600, check=False)
    check(bad, ran.returncode, ran.stdout, ran.stderr, case, before)
    assert ran.stderr.count("\n") == 1


def test_no_space(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """52: the output does not fit; a limit on file sizes stands in for a full disk."""
    before = state(case.root)
    bad = Bad(52, "no-space", 2, ("out", "cannot be written"), "too large")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        code = main(command(bad, case))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    printed = capsys.readouterr()
    check(bad, code, printed.out, printed.err.lower(), case, before)


def test_interrupted(case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """56: Ctrl-C at the last moment; at every other moment in test_convert_kill.py."""

    def interrupt(*_: Any) -> None:
        assert any(path.name.startswith(".out.partial-") for path in case.root.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "write_json", interrupt)
    before = state(case.root)
    capsys.readouterr()
    code = main(command(Bad(56, "interrupted", INTERRUPTED, (), ""), case))
    printed = capsys.readouterr()
    assert (code, printed.out, printed.err) == (INTERRUPTED, "", "interrupted\n")
    assert state(case.root) == before
