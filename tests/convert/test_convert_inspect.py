"""``inspect``: what a directory holds, told from headers; damage becomes a listed problem, not a failure."""

from pathlib import Path

import pytest
from convert_cases import ADAPTER, CONFIG, GAMMA, LAYERS, LINEAR, RANK, STREAM_CONFIG, Case, D, V, snapshot

from specstream_convert import convert, inspect_checkpoint
from specstream_mlx.errors import InvalidInputError

NUM_LORA = LAYERS * sum(RANK * (rows + columns) for rows, columns in LINEAR.values())


def test_peft_directory(case: Case) -> None:
    found = inspect_checkpoint(case.adapter)
    assert (found.kind, found.mode, found.gamma, found.num_stream_layers) == ("peft adapter", "shared", GAMMA, 1)
    assert found.lora == {"ranks": [RANK], "scales": [2.0], "num_modules": 7 * LAYERS}
    assert found.num_stream_parameters == GAMMA * D
    assert found.num_medusa_parameters == 4 * (D * D + D * V)
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
