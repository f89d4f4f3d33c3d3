"""The fingerprint: a base is known again in another dtype, and no other base passes for it."""

import hashlib
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from specstream_mlx.errors import InvalidInputError
from specstream_mlx.formats.config import CONFIG_NAME, WEIGHTS_NAME
from specstream_mlx.formats.fingerprint import fingerprint, is_marked
from specstream_mlx.models.load import load
from tests.tiny import make_model, save_directory

DTYPES = (mx.float32, mx.bfloat16, mx.float16)
NORM = mx.array(1 + 0.1 * np.random.default_rng(3).standard_normal(256).astype(np.float32))
OTHER = NORM + 0.01


def digest(value: mx.array) -> str:
    return hashlib.sha256(np.array(value.astype(mx.float32)).astype("<f4").tobytes()).hexdigest()


def test_the_mark() -> None:
    assert fingerprint("model.norm.weight", NORM) == {
        "tensor": "model.norm.weight",
        "sha256": digest(NORM),
        "sha256_bf16": digest(NORM.astype(mx.bfloat16)),
        "sha256_f16": digest(NORM.astype(mx.float16)),
    }


@pytest.mark.parametrize("held", DTYPES, ids=str)
@pytest.mark.parametrize("marked", DTYPES, ids=str)
def test_copies_in_other_dtypes(marked: mx.Dtype, held: mx.Dtype) -> None:
    """Either side may be rounded; two different roundings of an F32 base cannot be told from two bases."""
    mark = fingerprint("x", NORM.astype(marked))
    assert is_marked(mark, NORM.astype(held)) is (marked == held or mx.float32 in (marked, held))
    assert not is_marked(mark, OTHER.astype(held))
    half = NORM.astype(mx.bfloat16)  # as most bases are published: every later copy is exact
    assert is_marked(fingerprint("x", half.astype(marked)), half.astype(held))


def test_marks_with_one_digest() -> None:
    """Files written before the roundings were recorded."""
    assert is_marked({"sha256": digest(NORM)}, NORM)
    assert is_marked({"sha256": digest(NORM).upper()}, NORM)
    assert is_marked({"sha256": digest(NORM.astype(mx.bfloat16))}, NORM)
    assert not is_marked({"sha256": digest(NORM)}, NORM.astype(mx.bfloat16))
    assert not is_marked({"sha256": digest(NORM)}, OTHER)
    assert not is_marked({}, NORM)
    assert not is_marked({"sha256": 7, "sha256_bf16": None}, NORM)


def test_equal_roundings_are_not_enough() -> None:
    """Another base, trained on from this one, that differs only beyond the last digit of BF16."""
    near = NORM * (1 + 2.0**-22)
    assert not mx.array_equal(near, NORM)
    assert mx.array_equal(near.astype(mx.bfloat16), NORM.astype(mx.bfloat16))
    assert not is_marked(fingerprint("x", NORM), near)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:transformers.*")
def test_streams_over_a_copy_in_another_dtype(tmp_path: Path) -> None:
    """The runtime puts a stream adapter over a bf16 copy of its F32 base, and over no other base."""
    whole = save_directory(make_model("llama", seed=21), tmp_path / "whole")
    sidecar, half, wrong = tmp_path / "sidecar", tmp_path / "half", tmp_path / "wrong"
    sidecar.mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        shutil.move(whole / name, sidecar / name)
    weights = mx.load(str(whole / "model.safetensors"))
    norm = weights["model.norm.weight"] + mx.linspace(0.001, 0.2, 32)
    raw = json.loads((sidecar / CONFIG_NAME).read_text())
    raw["base_model"] = {"fingerprint": fingerprint("model.norm.weight", norm)}
    (sidecar / CONFIG_NAME).write_text(json.dumps(raw))
    for place, change in ((half, 0.0), (wrong, 0.02)):
        shutil.copytree(whole, place, ignore=shutil.ignore_patterns("model.safetensors"))
        copied = weights | {"model.norm.weight": (norm + change).astype(mx.bfloat16)}
        mx.save_safetensors(str(place / "model.safetensors"), copied, {"format": "mlx"})
    assert load(half, adapter=sidecar)[0].stream_config is not None
    with pytest.raises(InvalidInputError, match="another base"):
        load(wrong, adapter=sidecar)
