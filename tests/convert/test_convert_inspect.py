"""``inspect``: what a directory holds, told from headers; damage becomes a listed problem, not a failure."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from convert_cases import (
    ADAPTER,
    CONFIG,
    GAMMA,
    LAYERS,
    LINEAR,
    PREFIX,
    RANK,
    STREAM_CONFIG,
    STREAMS,
    Case,
    D,
    Q,
    V,
    snapshot,
)

from specstream_cli.app import main
from specstream_convert import convert, inspect_checkpoint
from specstream_mlx.errors import InvalidInputError

NUM_LORA = LAYERS * sum(RANK * (rows + columns) for rows, columns in LINEAR.values())


def test_peft_directory(case: Case) -> None:
    found = inspect_checkpoint(case.adapter)
    assert (found.kind, found.mode, found.gamma, found.num_stream_layers) == ("peft adapter", "shared", GAMMA, 1)
    assert found.lora == {"ranks": [RANK], "scales": [2.0], "num_modules": 7 * LAYERS}
    assert found.num_stream_parameters == GAMMA * D
    assert found.num_medusa_parameters == GAMMA * (D * D + D * V)
    assert found.medusa_formula == f"{GAMMA} heads x (D x D residual block + D x V LM head), D = {D}, V = {V}"
    assert found.streams == {
        "stream_id": {"type": "embedding"},
        "stream_init": {"type": "identity"},
        "stream_position": "anchor_plus_j",
        "prune": None,
    }
    assert found.num_lora_parameters == NUM_LORA
    assert found.base is not None
    assert found.base["name_or_path"] == "org/tiny"
    assert found.problems == ()
    assert list(found.to_dict())[:2] == ["path", "kind"]


@pytest.mark.parametrize(("adapter_only", "kind"), [(False, "specstream model"), (True, "stream adapter")])
def test_output(lossless_case: Case, adapter_only: bool, kind: str) -> None:
    convert(lossless_case.options(adapter_only=adapter_only))
    found = inspect_checkpoint(lossless_case.out)
    assert (found.kind, found.mode, found.gamma) == (kind, "lossless", GAMMA)
    assert found.num_stream_parameters == GAMMA * D
    assert found.num_lora_parameters == NUM_LORA // LAYERS
    assert found.adapter_bytes == 4 * (GAMMA * D + NUM_LORA // LAYERS)
    assert found.problems == ()


def test_plain_model_and_stream_file(case: Case) -> None:
    found = inspect_checkpoint(case.base)
    assert (found.kind, found.gamma, found.problems) == ("model", None, ())
    convert(case.options())
    assert inspect_checkpoint(case.out / "specstream.safetensors").kind == "stream file"


def test_quantized(case: Case) -> None:
    convert(case.options(quantize=True, q_group_size=32))
    assert inspect_checkpoint(case.out).quantization == {"group_size": 32, "bits": 4, "mode": "affine"}


def test_problems_are_listed(case: Case) -> None:
    before = snapshot(case.root)
    case.json(f"adapter/{STREAM_CONFIG}", lambda raw: raw.update(gamma=7))
    assert any("stream_embeddings" in line for line in inspect_checkpoint(case.adapter).problems)
    (case.adapter / ADAPTER).write_bytes(b"")
    assert any("empty" in line for line in inspect_checkpoint(case.adapter).problems)
    (case.adapter / CONFIG).unlink()
    assert any(CONFIG in line for line in inspect_checkpoint(case.adapter).problems)
    assert inspect_checkpoint(case.root / "base").problems == ()
    assert snapshot(case.root) == before - {f"adapter/{CONFIG}"}


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no such file"):
        inspect_checkpoint(tmp_path / "nothing")
    assert inspect_checkpoint(tmp_path).kind == "unknown"
    assert inspect_checkpoint(tmp_path).problems


WEIGHTS = f"adapter/{ADAPTER}"


def test_medusa_of_a_7b_shape(case: Case) -> None:
    """The figure that papers give for a 7B model: about 6e8."""
    case.json("base/config.json", lambda raw: raw.update(hidden_size=4096, vocab_size=32000))
    found = inspect_checkpoint(case.base)
    assert found.num_medusa_parameters == 4 * (4096 * 4096 + 4096 * 32000) == 591_396_864


def test_adapters_in_directories(case: Case) -> None:
    """Each with its own facts; a damaged one is counted and does not hide the other."""
    home = case.root / "several"
    shutil.copytree(case.adapter, home / "one")
    shutil.copytree(case.adapter, home / "two")
    other = Case(case.root)
    other.json(f"several/two/{CONFIG}", lambda raw: raw.update(lora_alpha=16, base_model_name_or_path="org/other"))
    other.json(f"several/two/{STREAM_CONFIG}", lambda raw: raw.update(gamma=5))
    found = inspect_checkpoint(home)
    assert found.kind == "peft adapters"
    one, two = found.adapters
    assert one == {
        "name": "one",
        "base": "org/tiny",
        "mode": "shared",
        "gamma": GAMMA,
        "num_stream_layers": 1,
        "ranks": [RANK],
        "scales": [2.0],
        "num_modules": 7 * LAYERS,
        "num_lora_parameters": NUM_LORA,
        "num_stream_parameters": GAMMA * D,
        "num_problems": 0,
    }
    assert (two["name"], two["base"], two["scales"], two["gamma"]) == ("two", "org/other", [4.0], 5)
    assert two["num_problems"] == len(found.problems) == 1
    assert "several/two" in found.problems[0]


def test_adapters_in_one_file(case: Case) -> None:
    def rename(t: dict[str, mx.array]) -> None:
        for name in [name for name in t if "lora_" in name]:
            value = t.pop(name)
            t[name.replace(".weight", ".one.weight")] = value
            t[name.replace(".weight", ".two.weight")] = value

    case.tensors(WEIGHTS, rename)
    found = inspect_checkpoint(case.adapter)
    assert [row["name"] for row in found.adapters] == ["one", "two"]
    assert [row["num_lora_parameters"] for row in found.adapters] == [NUM_LORA, NUM_LORA]
    assert found.problems == ()


def test_default_adapter_beside_a_named_one(case: Case) -> None:
    shutil.copytree(case.adapter, case.adapter / "second")
    assert [row["name"] for row in inspect_checkpoint(case.adapter).adapters] == ["default", "second"]


def test_trainer_checkpoint(case: Case) -> None:
    """Inside an output directory of the HF Trainer; its pickles are directories here, so opening one would fail."""
    step = case.root / "run" / "checkpoint-10"
    shutil.copytree(case.adapter, step)
    for name in ("optimizer.pt", "training_args.bin"):
        (step / name).mkdir()
    for place in (step, step.parent):
        found = inspect_checkpoint(place)
        assert (found.kind, found.gamma, found.problems) == ("peft adapter", GAMMA, ())
        assert any("HF Trainer" in note for note in found.notes)


def test_plain_adapter(case: Case) -> None:
    case.tensors(WEIGHTS, lambda t: t.pop(STREAMS))
    (case.adapter / STREAM_CONFIG).unlink()
    found = inspect_checkpoint(case.adapter)
    assert (found.kind, found.gamma, found.problems) == ("peft adapter", None, ())
    assert any("--lora-only" in note for note in found.notes)


def test_live_adapter(case: Case) -> None:
    """A model directory with a live LoRA, and that LoRA by itself, as mlx-lm would load it."""
    convert(case.options(fuse=False))
    found = inspect_checkpoint(case.out)
    assert (found.kind, found.num_lora_parameters, found.problems) == ("specstream model", NUM_LORA, ())
    alone = inspect_checkpoint(case.out / "adapters")
    assert (alone.kind, alone.num_lora_parameters, alone.problems) == ("mlx-lm adapter", NUM_LORA, ())
    assert alone.adapter_bytes == 4 * NUM_LORA
    assert found.adapter_bytes == 4 * (GAMMA * D + NUM_LORA)
    assert alone.lora == {
        "fine_tune_type": "lora",
        "ranks": [RANK],
        "scales": [2.0],
        "num_modules": 7 * LAYERS,
        "num_layers": LAYERS,
    }


def test_quantized_with_streams(lossless_case: Case) -> None:
    convert(lossless_case.options(quantize=True, q_group_size=32))
    found = inspect_checkpoint(lossless_case.out)
    assert (found.kind, found.mode, found.problems) == ("specstream model", "lossless", ())
    assert found.quantization == {"group_size": 32, "bits": 4, "mode": "affine"}


def test_numbers_beyond_any_range(case: Case) -> None:
    """JSON may say 1e999; the answer is JSON all the same."""
    file = case.base / "config.json"
    file.write_text(file.read_text().replace('"vocab_size": 61', '"vocab_size": 1e999'))
    found = inspect_checkpoint(case.base).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False))["base"]["vocab_size"] == "inf"
    assert any("vocab_size is inf" in line for line in found["problems"])


def nan(name: str) -> Callable[[dict[str, mx.array]], Any]:
    return lambda t: t.update({name: mx.full(t[name].shape, float("nan"))})


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


DAMAGE: dict[str, tuple[Callable[[Case], Any], str]] = {
    "nan in lora": (lambda c: c.tensors(WEIGHTS, nan(f"{Q}.lora_A.weight")), "lora_A.weight: 128 of 128"),
    "nan in streams": (lambda c: c.tensors(WEIGHTS, nan(STREAMS)), "stream_embeddings: 96 of 96"),
    "zero B": (
        lambda c: c.tensors(WEIGHTS, lambda t: t.update({n: mx.zeros_like(v) for n, v in t.items() if "lora_B" in n})),
        "does nothing",
    ),
    "rank": (lambda c: c.json(f"adapter/{CONFIG}", lambda raw: raw.update(r=8)), "rank 4, but adapter_config.json"),
    "lossless": (
        lambda c: c.json(f"adapter/{STREAM_CONFIG}", lambda raw: raw.update(mode="lossless", lora_rows="streams")),
        "mode lossless allows LoRA only in layers 1 to 1",
    ),
    "unknown tensor": (
        lambda c: c.tensors(WEIGHTS, lambda t: t.update({Q + ".lora_Q": mx.ones(2)})),
        "lora_Q: not a tensor",
    ),
    "no stream config": (lambda c: (c.adapter / STREAM_CONFIG).unlink(), '"gamma": 3'),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_problems_of_adapters(case: Case, damage: Callable[[Case], Any], words: str) -> None:
    """What the converter would refuse is found without the base."""
    damage(case)
    assert any(words in line for line in inspect_checkpoint(case.adapter).problems)


OUTPUT_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard gone": (lambda out: (out / "model.safetensors").unlink(), "no model"),
    "tensor of another shape": (lambda out: change_json(out / "config.json", vocab_size=V + 1), "embed_tokens.weight"),
    "another base": (
        lambda out: mx.save_safetensors(
            str(out / "model.safetensors"),
            {n: v + 0.01 if n == "model.norm.weight" else v for n, v in loaded(out / "model.safetensors").items()},
        ),
        "fingerprint",
    ),
    "live scale": (
        lambda out: change_json(out / "adapters" / CONFIG, lora_parameters={"rank": 4, "scale": "2"}),
        "scale is '2'",
    ),
    "live rank": (
        lambda out: change_json(out / "adapters" / CONFIG, lora_parameters={"rank": 9, "scale": 2.0}),
        "rank is 9, the tensors have rank 4",
    ),
    "live half": (
        lambda out: mx.save_safetensors(
            str(out / "adapters" / "adapters.safetensors"), {"model.layers.0.mlp.up_proj.lora_a": mx.ones((D, 4))}
        ),
        "needs both lora_a and lora_b",
    ),
    "live foreign": (
        lambda out: mx.save_safetensors(str(out / "adapters" / "adapters.safetensors"), {"x.weight": mx.ones(3)}),
        "x.weight: not a lora_a",
    ),
    "live gone": (lambda out: (out / "adapters" / "adapters.safetensors").unlink(), "file not found"),
}


def loaded(path: Path) -> dict[str, mx.array]:
    held = {name: mx.array(value) for name, value in mx.load(str(path)).items()}
    mx.eval(held)
    return held


@pytest.mark.parametrize(("damage", "words"), OUTPUT_DAMAGE.values(), ids=OUTPUT_DAMAGE)
def test_problems_of_outputs(case: Case, damage: Callable[[Path], Any], words: str) -> None:
    convert(case.options(fuse=False, verify=False))
    damage(case.out)
    assert any(words in line for line in inspect_checkpoint(case.out).problems)


def test_the_command(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """People get a table, programs JSON; problems give exit code 3 in both."""
    shutil.copytree(case.adapter, case.adapter / "second")
    assert main(["inspect", str(case.adapter)]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.split()[:1] == ["second"])
    assert row.split()[1:4] == ["org/tiny", "shared", str(GAMMA)]
    shutil.rmtree(case.adapter / "second")
    assert main(["inspect", str(case.adapter)]) == 0
    shown = capsys.readouterr().out
    assert f"num_medusa_parameters  {GAMMA * (D * D + D * V):,} (93 times the streams')" in shown
    assert main(["inspect", str(case.adapter), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(inspect_checkpoint(case.adapter).to_dict()))
    case.tensors(WEIGHTS, nan(STREAMS))
    assert main(["inspect", str(case.adapter), "--json"]) == 3
    printed = capsys.readouterr()
    assert json.loads(printed.out)["problems"]
    assert f"{ADAPTER}:{PREFIX}specstream.stream_embeddings" in printed.err


def test_streams_without_tensors(case: Case) -> None:
    """Value rotation from the identity has no stream tensor, so none is missed."""
    case.tensors(f"adapter/{ADAPTER}", lambda tensors: tensors.pop(STREAMS))
    case.json(f"adapter/{STREAM_CONFIG}", lambda raw: raw.update(stream_id={"type": "value_rotation", "epsilon": 0.1}))
    assert inspect_checkpoint(case.adapter).problems == ()
    case.json(f"adapter/{STREAM_CONFIG}", lambda raw: raw.update(stream_id={"type": "embedding"}))
    assert "not found" in inspect_checkpoint(case.adapter).problems[0]


def test_a_stream_adapter_without_a_report(lossless_case: Case) -> None:
    """A sidecar that was trained, not converted, is known by its LoRA."""
    convert(lossless_case.options(adapter_only=True))
    (lossless_case.out / "conversion_report.json").unlink()
    assert inspect_checkpoint(lossless_case.out).kind == "stream adapter"
