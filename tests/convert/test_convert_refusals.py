"""Every bad input of the first conversion path: the right class, a message that names the place, nothing written.

A row damages a sound case. ``words`` must all be in the message; the directory tree must be the same afterwards.
Each row would convert (or crash) without the check it is named for.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from convert_cases import (
    ADAPTER,
    CONFIG,
    GAMMA,
    LAYERS,
    PREFIX,
    RANK,
    STREAM_CONFIG,
    STREAMS,
    Case,
    D,
    Q,
    V,
    random_tensor,
    snapshot,
    write_raw,
)

from specstream_convert import convert
from specstream_mlx.errors import InvalidInputError, SpecStreamError, UnsupportedError, UsageError

A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
WEIGHTS, AC, SC = f"adapter/{ADAPTER}", f"adapter/{CONFIG}", f"adapter/{STREAM_CONFIG}"
BASE, BC = "base/model.safetensors", "base/config.json"
Damage = Callable[[Case], Any]


@dataclass
class Row:
    name: str
    error: type[SpecStreamError]
    words: tuple[str, ...]
    damage: Damage = lambda case: None
    mode: str = "shared"
    options: Callable[[Case], dict[str, Any]] = field(default=lambda case: {})


def data(change: Callable[[dict[str, mx.array]], Any], file: str = WEIGHTS) -> Damage:
    return lambda case: case.tensors(file, change)


def config(file: str = AC, **values: Any) -> Damage:
    return lambda case: case.json(file, lambda raw: raw.update(values))


def without(file: str, *keys: str) -> Damage:
    return lambda case: case.json(file, lambda raw: [raw.pop(key) for key in keys])


def text(file: str, content: bytes | str) -> Damage:
    body = content.encode() if isinstance(content, str) else content
    return lambda case: (case.root / file).write_bytes(body)


def raw(file: str, header: Any, body: bytes = b"") -> Damage:
    return lambda case: write_raw(case.root / file, header, body)


def remove(file: str) -> Damage:
    return lambda case: (case.root / file).unlink()


def renamed(old: str, new: str) -> Callable[[dict[str, mx.array]], Any]:
    return lambda t: t.update({new: t.pop(old)})


def replaced(name: str, change: Callable[[mx.array], mx.array]) -> Callable[[dict[str, mx.array]], Any]:
    return lambda t: t.update({name: change(t[name])})


def poisoned(value: mx.array) -> mx.array:
    array = np.array(value)
    array.flat[3] = np.nan
    return mx.array(array)


def only(pick: Callable[[str], bool]) -> Callable[[dict[str, mx.array]], Any]:
    return lambda t: [t.pop(name) for name in list(t) if not pick(name)]


def added(name: str, shape: tuple[int, ...]) -> Callable[[dict[str, mx.array]], Any]:
    return lambda t: t.update({name: mx.ones(shape)})


def rewritten(change: Callable[[bytes], bytes], file: str = WEIGHTS) -> Damage:
    return lambda case: (case.root / file).write_bytes(change((case.root / file).read_bytes()))


def second_form(change: float) -> Damage:
    def damage(case: Case) -> None:
        value = mx.load(str(case.root / WEIGHTS))[STREAMS]
        name = str(case.adapter / "specstream.safetensors")
        mx.save_safetensors(name, {"specstream.stream_embeddings": value + change})

    return damage


def base_file(name: str) -> Damage:
    return lambda case: shutil.copy(case.root / BASE, case.base / name)


def index(weight_map: dict[str, str]) -> Damage:
    return text("base/model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


def fifo(case: Case) -> None:
    (case.root / WEIGHTS).unlink()
    os.mkfifo(case.root / WEIGHTS)


def two_adapters(case: Case) -> None:
    for name in ("one", "two"):
        shutil.copytree(case.adapter, case.root / "several" / name)


def one_row_left(t: dict[str, mx.array]) -> None:
    for name in t:
        if "lora_B" in name:
            rows = t[name].shape[0]
            t[name] = mx.concatenate([t[name][: rows // 8], mx.zeros((rows - rows // 8, RANK))])


def zeroed(part: str) -> Callable[[dict[str, mx.array]], Any]:
    return lambda t: t.update({name: mx.zeros(t[name].shape) for name in t if part in name})


EMBED = PREFIX + "model.embed_tokens"
TOKENS = EMBED + ".token_adapter.trainable_tokens_delta"


def magnitudes(t: dict[str, mx.array]) -> None:
    """DoRA's, for every LoRA that is there."""
    for name in list(t):
        if name.endswith((".lora_B.weight", ".lora_embedding_B")):
            module = name.removesuffix(".lora_B.weight").removesuffix(".lora_embedding_B")
            t[module + ".lora_magnitude_vector"] = mx.ones(t[name].shape[0])


def lora_biases(t: dict[str, mx.array]) -> None:
    for name in list(t):
        if name.endswith(".lora_B.weight"):
            t[name.replace(".weight", ".bias")] = mx.ones(t[name].shape[0])


def embedding_lora(t: dict[str, mx.array]) -> None:
    t[EMBED + ".lora_embedding_A"], t[EMBED + ".lora_embedding_B"] = mx.ones((RANK, V)), mx.ones((D, RANK))


Q_BASE = "model.layers.0.self_attn.q_proj.weight"


def zero_row(value: mx.array) -> mx.array:
    return mx.concatenate([mx.zeros((1, value.shape[1])), value[1:]])


E, U, I = UsageError, UnsupportedError, InvalidInputError  # noqa: E741
F8 = {"x": {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [0, 4]}}
ROWS = [
    # safetensors files
    Row("truncated", I, (ADAPTER, "expected", "bytes", "incomplete"), rewritten(lambda body: body[:-100])),
    Row("empty", I, (ADAPTER, "empty"), text(WEIGHTS, b"")),
    Row("seven bytes", I, (ADAPTER, "7 bytes"), text(WEIGHTS, b"1234567")),
    Row("only a length", I, (ADAPTER, "incomplete"), text(WEIGHTS, b"\x99\0\0\0\0\0\0\0")),
    Row("huge header", I, (ADAPTER, "header claims"), text(WEIGHTS, b"\xff" * 8 + b"{}")),
    Row("no tensors", I, (ADAPTER, "no tensors", "ZeRO-3"), raw(WEIGHTS, {"__metadata__": {"format": "pt"}})),
    Row("lfs pointer", I, (ADAPTER, "git lfs pull"), text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n")),
    Row("bad header json", I, (ADAPTER, "not valid JSON"), raw(WEIGHTS, b"{not json")),
    Row("deep header json", I, (ADAPTER, "not valid JSON"), raw(WEIGHTS, b'{"a":' + b"[" * 200_000)),
    Row("header not an object", I, (ADAPTER, "not an object"), raw(WEIGHTS, b"[1]")),
    Row("twice in header", I, (ADAPTER, "appear twice", "x"), raw(WEIGHTS, b'{"x":{},"x":{}}')),
    Row(
        "negative shape",
        I,
        (f"{ADAPTER}:x", "shape"),
        raw(WEIGHTS, {"x": {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}}, bytes(16)),
    ),
    Row(
        "overlapping offsets",
        I,
        (f"{ADAPTER}:y", "begins at byte"),
        raw(
            WEIGHTS,
            {n: {"dtype": "F32", "shape": [4], "data_offsets": [o, o + 16]} for n, o in (("x", 0), ("y", 8))},
            bytes(24),
        ),
    ),
    Row(
        "offsets against shape",
        I,
        (f"{ADAPTER}:x", "needs 16 bytes"),
        raw(WEIGHTS, {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}, bytes(12)),
    ),
    Row(
        "huge declared tensor",
        I,
        (ADAPTER, "incomplete"),
        raw(WEIGHTS, {"x": {"dtype": "F32", "shape": [10**11], "data_offsets": [0, 4 * 10**11]}}, bytes(12)),
    ),
    Row("trailing bytes", I, (ADAPTER, "damaged"), rewritten(lambda body: body + b"1234")),
    Row("missing weights", I, (ADAPTER, "not found"), remove(WEIGHTS)),
    Row("pickle", U, ("adapter_model.bin", "pickle"),
        lambda c: (c.root / WEIGHTS).rename(c.adapter / "adapter_model.bin")),
    Row("fifo", I, (ADAPTER, "regular file"), fifo),
    Row("fp8", U, ("F8_E4M3", f"{Q}.lora_A"), data(lambda t: None)),
    Row("integers", I, (f"{ADAPTER}:{A}", "I32"), data(replaced(A, lambda v: v.astype(mx.int32)))),
    Row("nan", I, (f"{ADAPTER}:{B}", "1 of", "NaN"), data(replaced(B, poisoned))),
    Row("nan in streams", I, (f"{ADAPTER}:{STREAMS}", "NaN"), data(replaced(STREAMS, poisoned))),
    # LoRA tensors
    Row("A without B", I, (f"{ADAPTER}:{A}", "no matching lora_B"), data(lambda t: t.pop(B))),
    Row("B without A", I, (f"{ADAPTER}:{B}", "no matching lora_A"), data(lambda t: t.pop(A))),
    Row("empty A", I, (f"{ADAPTER}:{A}", "(0,)", "ZeRO-3"), data(replaced(A, lambda v: v[0, :0]))),
    Row("flat A", I, (f"{ADAPTER}:{A}", "two dimensions"), data(replaced(A, lambda v: v.reshape(-1)))),
    Row("ranks differ", I, (f"{ADAPTER}:{A}", "rank 3", "rank 4"), data(replaced(A, lambda v: v[:3]))),
    Row("rank against config", I, (f"{ADAPTER}:{A}", "rank 4", "8"), config(r=8)),
    Row("transposed A", I, (A, "lora_B"), data(replaced(A, lambda v: v.T))),
    Row("zero B", I, (ADAPTER, "does nothing"), data(zeroed("lora_B"))),
    Row("zero A", I, (ADAPTER, "does nothing"), data(zeroed("lora_A"))),
    Row("one eighth of B", I, (ADAPTER, "lora_B", "sharded"), data(one_row_left)),
    Row("missing layer", I, ("model.layers.1.mlp.up_proj", "incomplete"), data(only(lambda n: ".1." not in n))),
    Row("unknown module", I, (f"{ADAPTER}:{A.replace('q_proj', 'z_proj')}", "no linear layer"),
        data(lambda t: [t.update({n.replace("0.self_attn.q_proj", "0.self_attn.z_proj"): t.pop(n)}) for n in (A, B)])),
    Row("unknown tensor", I, (f"{ADAPTER}:{PREFIX}model.strange", "--key-map"),
        data(lambda t: t.update({PREFIX + "model.strange": mx.ones(3)}))),
    Row("unknown lora tensor", I, (f"{ADAPTER}:{Q}.lora_Q", "--key-map"),
        data(lambda t: t.update({Q + ".lora_Q": mx.ones(3)}))),
    Row("two unknown tensors", I, ("model.one", "model.two"),
        data(lambda t: t.update({PREFIX + "model.one": mx.ones(3), PREFIX + "model.two": mx.ones(3)}))),
    Row("collision", I, ("same tensor",), data(lambda t: t.update({"module." + A: t[A]}))),
    Row("magnitude without use_dora", I, (f"{ADAPTER}:{Q}.lora_magnitude_vector", "use_dora"),
        data(added(Q + ".lora_magnitude_vector", (D,)))),
    Row("use_dora without magnitude", I, (f"{ADAPTER}:{A}", "lora_magnitude_vector", "use_dora"),
        config(use_dora=True)),
    Row("magnitude of another size", I, (f"{ADAPTER}:{Q}.lora_magnitude_vector", f"({D + 1},)", f"({D},)"), lambda c: (
        c.json(AC, lambda raw: raw.update(use_dora=True)), c.tensors(WEIGHTS, magnitudes),
        c.tensors(WEIGHTS, added(Q + ".lora_magnitude_vector", (D + 1,))))),
    Row("magnitude alone", I, (f"{ADAPTER}:{Q}x.lora_magnitude_vector", "no lora_A"), lambda c: (
        c.json(AC, lambda raw: raw.update(use_dora=True)), c.tensors(WEIGHTS, magnitudes),
        c.tensors(WEIGHTS, added(Q + "x.lora_magnitude_vector", (D,))))),
    Row("dora of a zero row", I, (f"{ADAPTER}:{Q}.lora_magnitude_vector", "not finite"), lambda c: (
        c.json(AC, lambda raw: raw.update(use_dora=True)), c.tensors(WEIGHTS, magnitudes),
        c.tensors(WEIGHTS, replaced(B, zero_row)), c.tensors(BASE, replaced(Q_BASE, zero_row)))),
    Row("dora and a bias", U, (CONFIG, "use_dora with lora_bias"), config(use_dora=True, lora_bias=True)),
    Row("lora bias without lora_bias", I, (f"{ADAPTER}:{Q}.lora_B.bias", "lora_bias"),
        data(added(Q + ".lora_B.bias", (D,)))),
    Row("lora_bias without lora bias", I, (f"{ADAPTER}:{A}", "lora_B.bias"), config(lora_bias=True)),
    Row("lora bias without a bias", U, (f"{ADAPTER}:{Q}.lora_B.bias", "has no bias"), lambda c: (
        c.json(AC, lambda raw: raw.update(lora_bias=True)), c.tensors(WEIGHTS, lora_biases))),
    Row("half an embedding lora", I, ("lora_embedding_A", "no matching lora_B"),
        data(added(EMBED + ".lora_embedding_A", (RANK, V)))),
    Row("embedding lora on a layer", I, (f"{Q}.lora_A", "keep one"), data(lambda t: t.update(
        {Q + ".lora_embedding_A": mx.ones((RANK, D)), Q + ".lora_embedding_B": mx.ones((D, RANK))}))),
    Row("embedding lora elsewhere", I, ("model.norm.lora_embedding_A", "no embedding"), data(lambda t: t.update({
        PREFIX + "model.norm.lora_embedding_A": mx.ones((RANK, D)),
        PREFIX + "model.norm.lora_embedding_B": mx.ones((D, RANK))}))),
    Row("embedding lora of more rows", I, (f"{EMBED}.lora_embedding_A", f"({V + 1}, {D})", "rows, width"),
        data(lambda t: t.update({EMBED + ".lora_embedding_A": mx.ones((RANK, V + 1)),
                                 EMBED + ".lora_embedding_B": mx.ones((D, RANK))}))),
    Row("token rows unnamed", I, (f"{ADAPTER}:{TOKENS}", "trainable_token_indices"), data(added(TOKENS, (2, D)))),
    Row("token rows not saved", I, (ADAPTER, "no trained rows", "embed_tokens"), config(trainable_token_indices=[1])),
    Row("token rows of one of two", I, (ADAPTER, "no trained rows of lm_head"), lambda c: (
        c.json(AC, lambda raw: raw.update(trainable_token_indices={"embed_tokens": [1], "lm_head": [2]})),
        c.tensors(WEIGHTS, added(TOKENS, (1, D))))),
    Row("token rows too few", I, (f"{ADAPTER}:{TOKENS}", "(2, 32)", "(3, 32)"), lambda c: (
        c.json(AC, lambda raw: raw.update(trainable_token_indices=[1, 2, 3])),
        c.tensors(WEIGHTS, added(TOKENS, (2, D))))),
    Row("token beyond the vocabulary", I, (f"{ADAPTER}:{TOKENS}", f"token {V}", f"{V} rows"), lambda c: (
        c.json(AC, lambda raw: raw.update(trainable_token_indices=[V])), c.tensors(WEIGHTS, added(TOKENS, (1, D))))),
    Row("token twice", I, (CONFIG, "twice"), config(trainable_token_indices=[3, 3])),
    Row("token indices text", I, (CONFIG, "trainable_token_indices"), config(trainable_token_indices=["a"])),
    Row("token indices negative", I, (CONFIG, "trainable_token_indices"), config(trainable_token_indices=[-1])),
    Row("experts", U, ("experts",), data(lambda t: t.update({
        PREFIX + "model.layers.0.mlp.experts.lora_A.weight": mx.ones((4, D))}))),
    Row("embedding of another base", I, (f"{ADAPTER}:{EMBED}.weight", "another base", "modules_to_save"),
        data(added(EMBED + ".weight", (V, D)))),
    Row("frozen embedding of another base", I, (f"{ADAPTER}:{EMBED}.base_layer.weight", "another base"),
        data(added(EMBED + ".base_layer.weight", (V, D)))),
    Row("resized embedding alone", I, (f"{ADAPTER}:{EMBED}.weight", f"has {V + 8} rows", "lm_head"),
        data(added(EMBED + ".weight", (V + 8, D)))),
    Row("trained norm of another size", I, (f"{ADAPTER}:{PREFIX}model.norm.weight", f"({D + 1},)"), lambda c: (
        c.json(AC, lambda raw: raw.update(modules_to_save=["specstream", "model.norm"])),
        c.tensors(WEIGHTS, added(PREFIX + "model.norm.weight", (D + 1,))))),
    Row("trained norm of integers", I, (f"{ADAPTER}:{PREFIX}model.norm.weight", "I32"), lambda c: (
        c.json(AC, lambda raw: raw.update(modules_to_save=["specstream", "model.norm"])),
        c.tensors(WEIGHTS, lambda t: t.update({PREFIX + "model.norm.weight": mx.ones(D).astype(mx.int32)})))),
    Row("trained bias", I, ("q_proj.base_layer.bias", "--key-map"), data(added(Q + ".base_layer.bias", (D,)))),
    Row("no lora at all", I, ("no LoRA tensor", "--streams-path"), data(only(lambda n: "specstream" in n))),
    Row("several adapters in a file", E, ("--adapter-name", "one|two"),
        data(lambda t: [t.update({n.replace(".weight", f".{k}.weight"): t[n] for k in ("one", "two") for n in (A, B)}),
                        t.pop(A), t.pop(B)])),
    Row("several adapters", E, ("--adapter-name one|two",), two_adapters,
        options=lambda c: {"adapter_path": c.root / "several"}),
    Row("adapter not there", E, ("'three'", "one, two"), two_adapters,
        options=lambda c: {"adapter_path": c.root / "several", "adapter_name": "three"}),
    Row("adapter name as a path", E, ("one, two",), two_adapters,
        options=lambda c: {"adapter_path": c.root / "several", "adapter_name": "../adapter"}),
    Row("control characters", I, ("\\x1b[2J",), data(lambda t: t.update({"a\x1b[2J": mx.ones(3)}))),
    # adapter_config.json
    Row("no adapter config", I, (CONFIG, "not found", "scale"), remove(AC)),
    Row("adapter config not json", I, (CONFIG, "not valid JSON"), text(AC, "{")),
    Row("adapter config a list", I, (CONFIG, "object"), text(AC, "[]")),
    Row("adapter config with nan", I, (CONFIG, "NaN"), text(AC, '{"r": NaN}')),
    Row("adapter config with bom", I, (CONFIG,), text(AC, b"\xef\xbb\xbf{}")),
    Row("adapter config key twice", I, (CONFIG, "twice"), text(AC, '{"r": 1, "r": 2}')),
    Row("mlx adapter", I, ("mlx-lm's format",), text(AC, '{"fine_tune_type": "lora", "lora_parameters": {}}')),
    Row("no peft type", I, ("peft_type",), without(AC, "peft_type")),
    Row("other peft type", U, ("LOHA", "peft_type"), config(peft_type="LOHA")),
    Row("prompt tuning", U, ("PROMPT_TUNING", "nothing to merge"), config(peft_type="PROMPT_TUNING")),
    Row("no alpha", I, ("lora_alpha is None",), without(AC, "lora_alpha")),
    Row("alpha text", I, ("lora_alpha is '8'",), config(lora_alpha="8")),
    Row("alpha huge", I, ("lora_alpha",), config(lora_alpha=10**400)),
    Row("rank zero", I, ("r is 0",), config(r=0)),
    Row("rank true", I, ("r is True",), config(r=True)),
    Row("no rank", I, ("r is None",), without(AC, "r")),
    Row("bad pattern key", I, ("rank_pattern", "(q"), config(rank_pattern={"(q": 4})),
    Row("endless pattern", I, ("alpha_pattern", "costly"), config(alpha_pattern={"(a+)+$": 4})),
    Row("bad pattern value", I, ("alpha_pattern", "'x'"), config(alpha_pattern={"q_proj": "x"})),
    *(Row(f"config {name}", U, (CONFIG, name), config(**{name: value})) for name, value in {
        "use_qalora": True, "use_bdlora": {"x": 1}, "target_parameters": ["x"], "layer_replication": [[0, 2]],
        "megatron_config": {"a": 1}, "alora_invocation_tokens": [1], "arrow_config": {"a": 1},
        "monteclora_config": {"a": 1}, "kasa_config": {"a": 1}, "lora_ga_config": {"a": 1},
        "unheard_of": {"a": 1}}.items()),
    *(Row(f"init {name}", U, (CONFIG, "init_lora_weights", name), config(init_lora_weights=name))
      for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "unheard_of")),
    Row("bias of another kind", I, (CONFIG, "bias is 'some'"), config(bias="some")),
    Row("module to save not saved", I, (ADAPTER, "model.embed_tokens.weight", "modules_to_save", "incomplete"),
        config(modules_to_save=["specstream", "embed_tokens"])),
    Row("one of two modules to save not saved", I, (ADAPTER, "model.layers.1.input_layernorm.weight", "incomplete"),
        lambda c: (c.json(AC, lambda raw: raw.update(modules_to_save=["specstream", "input_layernorm"])),
                   c.tensors(WEIGHTS, added(PREFIX + "model.layers.0.input_layernorm.weight", (D,))))),
    Row("dora does not stay live with an embedding", U,
        ("embed_tokens.lora_embedding_A", "--keep-adapters", "per token"),
        lambda c: (c.json(AC, lambda raw: raw.update(use_dora=True)), c.tensors(WEIGHTS, embedding_lora),
                   c.tensors(WEIGHTS, magnitudes)), options=lambda c: {"fuse": False}),
    Row("dora on five bits", U, (f"{ADAPTER}:{A}", "5 bits", "--keep-adapters"), lambda c: (
        c.json(AC, lambda raw: raw.update(use_dora=True)), c.tensors(WEIGHTS, magnitudes)),
        options=lambda c: {"fuse": False, "quantize": True, "q_bits": 5, "q_group_size": 32}),
    Row("trained norm in a sidecar", U, ("model.norm.weight", "--adapter-only"), lambda c: (
        c.json(AC, lambda raw: raw.update(modules_to_save=["specstream", "model.norm"])),
        c.tensors(WEIGHTS, added(PREFIX + "model.norm.weight", (D,)))), options=lambda c: {"adapter_only": True}),
    # streams and their configuration
    Row("no stream config", I, (STREAM_CONFIG, "not found", f'"gamma": {GAMMA}', '"num_stream_layers": "?"'),
        remove(SC)),
    Row("stream config incomplete", I, ("missing gamma", f'"gamma": {GAMMA}'), without(SC, "gamma")),
    Row("gamma", I, (STREAMS, f"shape ({GAMMA}, {D})", "gamma is 5", f"{GAMMA} rows"), config(SC, gamma=5)),
    Row("too many stream layers", I, ("num_stream_layers is 9", f"{LAYERS} layers"), config(SC, num_stream_layers=9)),
    Row("no stream layers", I, ("num_stream_layers is 0",), config(SC, num_stream_layers=0)),
    Row("newer format", U, ("format_version 2", "upgrade"), config(SC, format_version=2)),
    Row("main attends streams", U, ("main_attends_streams",), config(SC, main_attends_streams=True)),
    Row("no mode", I, ("mode",), without(SC, "mode")),
    Row("unknown mode", I, ("mode is 'both'",), config(SC, mode="both")),
    Row("pruner not saved", I, ("specstream.prune.down.weight", "not saved"),
        config(SC, prune={"type": "low_rank", "rank": 2, "layer": 1})),
    Row("superfluous stream tensor", I, ("specstream.prune.up.weight", "not needed"),
        data(lambda t: t.update({PREFIX + "specstream.prune.up.weight": mx.ones((D, 2))}))),
    Row("transposed streams", I, (STREAMS, "transposed"), data(replaced(STREAMS, lambda v: v.T))),
    Row("no streams", I, (ADAPTER, "modules_to_save", "--lora-only"), data(lambda t: t.pop(STREAMS))),
    Row("lora around a stream module", I, (f"{PREFIX}specstream.stream_init.down.lora_A.weight", "retrain"),
        data(lambda t: t.update({PREFIX + "specstream.stream_init.down.lora_A.weight": mx.ones((2, D))}))),
    Row("only untrained copies", I, ("original_module",),
        data(renamed(STREAMS, PREFIX + "specstream.original_module.stream_embeddings"))),
    Row("two names of one tensor", I, ("same tensor",),
        data(lambda t: t.update({STREAMS + ".weight": t[STREAMS]}))),
    Row("forms A and B differ", I, (STREAMS, "specstream.safetensors", "differs"), second_form(0.5)),
    Row("integer streams", I, (STREAMS, "I32"), data(replaced(STREAMS, lambda v: v.astype(mx.int32)))),
    Row("rows of other sizes", I, ("rows of stream_embeddings",), data(lambda t: [
        t.pop(STREAMS), t.update({f"{STREAMS}.0": mx.ones(D), f"{STREAMS}.2": mx.ones(D)})])),
    # lossless
    Row("fuse in lossless", E, ("--fuse", "lossless"), mode="lossless", options=lambda c: {"fuse": True}),
    Row("lossless early layer", I, (A, "lossless", "layers 1 to 1"), data(lambda t: t.update(
        {A: mx.ones((RANK, D)), B: mx.ones((D, RANK))})), mode="lossless"),
    Row("lossless lm head", I, ("lm_head", "lossless"), data(lambda t: t.update(
        {PREFIX + "lm_head.lora_A.weight": mx.ones((RANK, D)), PREFIX + "lm_head.lora_B.weight": mx.ones((V, RANK))})),
        mode="lossless"),
    Row("lossless dora", I, ("lora_magnitude_vector", "lossless"), lambda c: (
        c.json(AC, lambda raw: raw.update(use_dora=True)), c.tensors(WEIGHTS, magnitudes)), mode="lossless"),
    Row("lossless embedding", I, ("embed_tokens.lora_embedding_A", "lossless"), data(embedding_lora), mode="lossless"),
    Row("lossless token rows", I, (TOKENS, "lossless", "model.embed_tokens.weight"), lambda c: (
        c.json(AC, lambda raw: raw.update(trainable_token_indices=[1])), c.tensors(WEIGHTS, added(TOKENS, (1, D)))),
        mode="lossless"),
    Row("lossless norm", I, (CONFIG, "model.norm", "lossless"), lambda c: (
        c.json(AC, lambda raw: raw.update(modules_to_save=["specstream", "model.norm"])),
        c.tensors(WEIGHTS, added(PREFIX + "model.norm.weight", (D,)))), mode="lossless"),
    Row("lossless half a layer", I, ("model.layers.1.mlp.up_proj", "incomplete"),
        data(only(lambda n: "up_proj" not in n)), mode="lossless"),
    # the base
    Row("no base", I, ("missing", "no such directory", "--hf-path"), options=lambda c: {"hf_path": "./missing"}),
    Row("absolute base", I, ("no such directory",), options=lambda c: {"hf_path": str(c.root / "missing")}),
    Row("base is a file", I, ("not a directory",), options=lambda c: {"hf_path": str(c.root / BC)}),
    Row("base unnamed", I, ("base_model_name_or_path",), without(AC, "base_model_name_or_path"),
        options=lambda c: {"hf_path": None}),
    Row("base name climbs", I, ("no such directory",), config(base_model_name_or_path="../../etc/nothing"),
        options=lambda c: {"hf_path": None}),
    Row("base without config", I, ("config.json", "not found"), remove(BC)),
    Row("base without weights", I, ("no model*.safetensors",), remove(BASE)),
    Row("base as pickle", U, ("pytorch_model.bin",),
        lambda c: (c.root / BASE).rename(c.base / "pytorch_model.bin")),
    Row("base truncated", I, ("model.safetensors", "incomplete"),
        rewritten(lambda body: body[:-9], BASE)),
    Row("base tensor missing", I, ("model.norm.weight", "missing"), data(lambda t: t.pop("model.norm.weight"), BASE)),
    Row("base tensor superfluous", I, ("model.strange", "not part"),
        data(lambda t: t.update({"model.strange": mx.ones(2)}), BASE)),
    Row("base nan", I, ("model.safetensors:model.norm.weight", "NaN"),
        data(replaced("model.norm.weight", poisoned), BASE)),
    Row("base too narrow", I, ("lora_A.weight", "(out, in)", "org/tiny"), config(BC, hidden_size=D)),
    Row("base of fewer layers", I, ("model.layers.1", "org/tiny"), data(only(lambda n: ".1." not in n), BASE)),
    Row("wrong hidden size recorded", I, ("base_model.hidden_size is 64",),
        lambda c: c.json(SC, lambda raw: raw["base_model"].update(hidden_size=64))),
    Row("wrong fingerprint", I, ("model.norm.weight", "fingerprint"),
        lambda c: c.json(SC, lambda raw: raw["base_model"].update(
            fingerprint={"tensor": "model.norm.weight", "sha256": "0" * 64}))),
    Row("other family", U, ("bloom", "supported: gpt2, llama"), config(BC, model_type="bloom")),
    Row("no family", U, ("model_type is None",), without(BC, "model_type")),
    Row("family is a path", U, ("model_type",), config(BC, model_type="../../evil")),
    Row("model file", U, ("model_file", "never run"), config(BC, model_file="evil.py")),
    Row("no hidden size", U, ("hidden_size is None",), without(BC, "hidden_size")),
    Row("epsilon", I, ("rms_norm_eps is 'x'",), config(BC, rms_norm_eps="x")),
    Row("sizes beyond any array", I, ("config.json", "mlx-lm cannot build"), config(BC, head_dim=2**30)),
    Row("bnb", U, ("quantised", "bitsandbytes"), config(BC, quantization_config={"quant_method": "bitsandbytes"})),
    Row("rope per layer", U, ("rope_parameters",), config(BC, rope_parameters={"full_attention": {"rope_theta": 1}})),
    Row("rope unknown type", U, ("'dynamic'",), config(BC, rope_parameters={
        "rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})),
    Row("rope unknown field", U, ("strange",), config(BC, rope_parameters={
        "rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "strange": 1})),
    Row("rope disagrees", I, ("rope_theta is 5",), config(BC, rope_theta=5)),
    Row("activation", U, ("hidden_act", "gelu"), config(BC, hidden_act="gelu")),
    Row("tied head differs", I, ("lm_head.weight", "tie_word_embeddings"), config(BC, tie_word_embeddings=True)),
    Row("index climbs", I, ("../x.safetensors", "not the name of a shard"), index({"a": "../x.safetensors"})),
    Row("index absolute", I, ("/etc/passwd",), index({"a": "/etc/passwd"})),
    Row("index names a missing shard", I, ("model-2.safetensors", "not there"),
        index({"a": "model.safetensors", "b": "model-2.safetensors"})),
    Row("index forgets tensors", I, ("is not listed",), index({"model.norm.weight": "model.safetensors"})),
    Row("stale shard", I, ("model-00001-of-00002.safetensors",), base_file("model-00001-of-00002.safetensors")),
    Row("base in float64", U, ("model.norm.weight", "F64"), raw(BASE, {
        "model.norm.weight": {"dtype": "F64", "shape": [D], "data_offsets": [0, 8 * D]}}, bytes(8 * D))),
    Row("quantised base and fuse", U, ("quantised", "--keep-adapters"),
        config(BC, quantization={"bits": 4, "group_size": 32}), options=lambda c: {"fuse": True}),
    Row("quantization incomplete", I, ("config.json", "group_size"), config(BC, quantization={"bits": 4})),
    Row("architectures", I, ("config.json", "mlx-lm cannot build"), config(BC, architectures=[[1]])),
    # arguments
    Row("nothing to convert", E, ("--adapter-path",), options=lambda c: {"adapter_path": None}),
    Row("adapter missing", I, ("no such directory",), options=lambda c: {"adapter_path": c.root / "nope"}),
    Row("adapter is a file", I, ("not a directory",), options=lambda c: {"adapter_path": c.root / WEIGHTS}),
    Row("output exists", E, ("already exists", "--overwrite"), lambda c: c.out.mkdir()),
    Row("output is not ours", E, ("conversion_report.json", "--overwrite"), lambda c: c.out.mkdir(),
        options=lambda c: {"overwrite": True}),
    Row("output is the adapter", E, ("input",), options=lambda c: {"mlx_path": c.adapter, "overwrite": True}),
    Row("output in the base", E, ("input",), options=lambda c: {"mlx_path": c.base / "out"}),
    Row("output around the input", E, ("input",), options=lambda c: {"mlx_path": c.root, "overwrite": True}),
    Row("output under a file", E, ("cannot be written (Not a directory)", "choose another place"), text("file", b"x"),
        options=lambda c: {"mlx_path": c.root / "file" / "out"}),
    Row("dtype", E, ("--dtype",), options=lambda c: {"dtype": "int8"}),
    Row("overflow", I, ("model.norm.weight", "range of F16"),
        data(replaced("model.norm.weight", lambda v: v * 1e6), BASE), options=lambda c: {"dtype": "float16"}),
    Row("q bits", E, ("--q-bits",), options=lambda c: {"quantize": True, "q_bits": 7}),
    Row("q mode", E, ("--q-mode",), options=lambda c: {"quantize": True, "q_mode": "magic"}),
    Row("q group too large", E, ("--q-group-size",), options=lambda c: {"quantize": True, "q_group_size": 128}),
    Row("recompute init", E, ("--recompute-init", "nothing to recompute"), options=lambda c: {"recompute_init": True}),
    Row("remote code", E, ("--trust-remote-code",), options=lambda c: {"trust_remote_code": True}),
    Row("ignore keys", E, ("--ignore-keys",), options=lambda c: {"ignore_keys": "("}),
    Row("key map", I, ("map.json", "not found"), options=lambda c: {"key_map": c.root / "map.json"}),
    Row("lora only with streams", E, ("--lora-only", "stream"), options=lambda c: {"lora_only": True}),
    Row("reference logits missing", I, ("x.npz", "not found"),
        options=lambda c: {"reference_logits": c.root / "x.npz"}),
    Row("reference logits damaged", I, ("x.npz", "npz"), text("x.npz", b"PK\3\4nothing"),
        options=lambda c: {"reference_logits": c.root / "x.npz"}),
    Row("tokenizer beyond the vocabulary", I, ("tokenizer.json", str(V)), text("base/tokenizer.json", json.dumps(
        {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": V, "content": "<x>"}]}))),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_refused(row: Row, pristine: dict[str, Case], tmp_path: Path) -> None:
    """The message names the place; no output, no temporary directory; one paragraph per problem."""
    case = pristine[row.mode].copy(tmp_path / "case")
    row.damage(case)
    if row.name == "fp8":
        _as_fp8(case)
    if row.name == "base too narrow":
        case.tensors(WEIGHTS, lambda t: t.update({A: random_tensor(np.random.default_rng(0), (RANK, 2 * D))}))
    if row.name == "base of fewer layers":
        case.json(BC, lambda raw: raw.update(num_hidden_layers=1))
    before = snapshot(tmp_path)
    with pytest.raises(SpecStreamError) as caught:
        convert(case.options(**row.options(case)))
    assert type(caught.value) is row.error, caught.value
    message = str(caught.value)
    for word in row.words:
        assert word in message, message
    assert all(line.strip() and line.isprintable() for line in message.splitlines())
    assert snapshot(tmp_path) == before


def _as_fp8(case: Case) -> None:
    """Rewrite the file's header so that one tensor is declared as fp8, which MLX would read as integers."""
    path = case.root / WEIGHTS
    body = path.read_bytes()
    length = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + length])
    entry = header[A]
    entry["dtype"] = "F8_E4M3"
    entry["shape"] = [RANK, entry["shape"][1] * 4]
    write_raw(path, header, body[8 + length :])
