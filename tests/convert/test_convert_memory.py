"""Memory: what a conversion holds does not grow with the base, nor do blocks of rows change what it computes.

The peaks are those of processes of their own; ``benchmarks/convert_memory.py`` measures real sizes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import float64_reference as reference
import mlx.core as mx
import numpy as np
import pytest
from convert_cases import ADAPTER, PREFIX, RANK, Case, D, V, make_case, random_tensor
from float64_reference import Reference, to_numpy

from benchmarks.convert_memory import Files, make_files, measure
from specstream_convert import convert
from specstream_convert.base.config import mlx_config
from specstream_convert.changes.kinds import AddScaled, Change, Lora, Replace, Rescale, SetRows, changed
from specstream_convert.files.stored import StoredTensor
from specstream_convert.verification import forward
from specstream_convert.verification.forward import output_logits
from specstream_mlx.errors import InvalidInputError
from specstream_mlx.formats import safetensors
from specstream_mlx.formats.safetensors import open_tensors
from tests.tolerances import CLOSE_LOGITS, FLOAT32, FLOAT64

MB = 1_000_000
SHAPE = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 8000,
}  # fmt: skip


def make(root: Path, **shape: int) -> Files:
    """A base in shards of 8 MB."""
    root.mkdir()
    return make_files(root, SHAPE | shape, 8 * MB)


def peak(files: Files, mode: str) -> int:
    """The most memory that a process takes which converts it."""
    return int(measure(files.base.parent, files, mode, 0, argparse.Namespace(no_verify=False))["peak_bytes"])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Files, int]:
    """A base large enough to be run part by part, and the peak of its conversion."""
    files = make(tmp_path_factory.mktemp("small") / "x")
    assert 2 * sum(files.shards) > forward.WHOLE_MODEL_BYTES
    return files, peak(files, "merge")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make(tmp_path_factory.mktemp("deep") / "x", num_hidden_layers=18)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make(tmp_path_factory.mktemp("wide") / "x", vocab_size=48_000)


@pytest.mark.parametrize("mode", ["merge", "quantize"])
def test_memory_does_not_grow_with_layers_and_shards(small: tuple[Files, int], deep: Files, mode: str) -> None:
    """Red when: the model is held as a whole, in any dtype, while it is written or verified."""
    grown = sum(deep.shards) - sum(small[0].shards)
    assert grown > 60 * MB
    assert len(deep.shards) > 2 * len(small[0].shards)
    more = peak(deep, mode) - small[1]
    assert more < grown / 4, f"{more / MB:.0f} MB more for {grown / MB:.0f} MB more"


@pytest.mark.parametrize("mode", ["merge", "keep-adapters"])
def test_memory_of_a_large_tensor(small: tuple[Files, int], wide: Files, mode: str) -> None:
    """Red when: a merged LM head, its LoRA's product or an embedding exists in float32."""
    grown = max(wide.shards) - max(small[0].shards)
    assert grown > 40 * MB
    more = peak(wide, mode) - small[1]
    assert more < 1.5 * grown, f"{more / MB:.0f} MB more for a tensor {grown / MB:.0f} MB larger"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two or three rows."""
    monkeypatch.setattr(safetensors, "BLOCK", 3 * D)
    monkeypatch.setattr(reference, "BLOCK", 2 * D)


def stored(path: Path, tensors: dict[str, mx.array]) -> dict[str, StoredTensor]:
    mx.save_safetensors(str(path), tensors)
    file = open_tensors(path)
    return {name: StoredTensor(file, name) for name in tensors}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("transposed", [False, True])
def test_changes_in_blocks(tmp_path: Path, small_blocks: None, axis: int, transposed: bool) -> None:
    """Every change, one after the other, as if the tensor were one block."""
    rng = np.random.default_rng(1)
    tensors = {
        "w": random_tensor(rng, (D, V) if transposed else (V, D)),
        "t": random_tensor(rng, (V, D)),
        "rows": random_tensor(rng, (4, D)),
        "a": random_tensor(rng, (2, V if axis == 0 else D)),
        "b": random_tensor(rng, (D if axis == 0 else V, 2)),
        "m": 1 + random_tensor(rng, (D if axis == 0 else V,)),
        "bias": random_tensor(rng, (V, D)),
    }
    held = stored(tmp_path / "x.safetensors", tensors)
    source = StoredTensor(held["w"].file, "w", transposed)
    rows = (60, 0, 5, 31)
    changes: Sequence[Change] = (
        SetRows(held["rows"], rows),
        Lora("w", held["a"], held["b"], 0.5, embedding=axis == 0),
        Rescale(held["m"], axis),
        AddScaled(held["bias"], 0.25),
    )
    w, t, new, a, b, m, bias = (to_numpy(tensors[name]).astype(np.float64) for name in tensors)
    for start, before in (((), w.T if transposed else w), ((Replace(held["t"]),), t)):
        wanted = before.copy()
        wanted[list(rows)] = new
        wanted += 0.5 * ((b @ a).T if axis == 0 else b @ a)
        norms = np.linalg.norm(wanted, axis=axis, keepdims=True)
        wanted = wanted / norms * (m[None] if axis == 0 else m[:, None]) + 0.25 * bias
        blocks = list(changed(source, (*start, *changes)))
        assert len(blocks) > 10
        np.testing.assert_allclose(to_numpy(mx.concatenate(blocks)), wanted, rtol=0, atol=2 * FLOAT32)
        ours = Reference.of(source, (*start, *changes))
        np.testing.assert_allclose(np.concatenate([ours.rows(rows)[0] for rows in ours.blocks()]), wanted, atol=FLOAT64)


def with_lora_on_the_head(tensors: dict[str, mx.array]) -> None:
    rng = np.random.default_rng(5)
    tensors[f"{PREFIX}lm_head.lora_A.weight"] = random_tensor(rng, (RANK, D))
    tensors[f"{PREFIX}lm_head.lora_B.weight"] = random_tensor(rng, (V, RANK))


@pytest.mark.parametrize(
    "settings",
    [{}, {"fuse": False}, {"dtype": "float16"}, {"quantize": True, "q_group_size": 32}],
    ids=["merge", "live", "cast", "quantize"],
)
@pytest.mark.parametrize("tie", [False, True])
def test_blocks_and_parts_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None, settings: dict[str, Any], tie: bool
) -> None:
    """Blocks of rows give the tensors of one block; a model run part by part gives the logits of the whole."""
    case = make_case(tmp_path / "case", tie=tie)
    if not tie:
        case.tensors(f"adapter/{ADAPTER}", with_lora_on_the_head)
    monkeypatch.setattr(forward, "WHOLE_MODEL_BYTES", 0)
    convert(case.options(**settings))
    tokens, live = np.arange(9), settings.get("fuse") is False
    parts = output_logits(case.out, tokens, live=live)
    monkeypatch.undo()
    np.testing.assert_allclose(parts, output_logits(case.out, tokens, live=live), rtol=0, atol=CLOSE_LOGITS)
    convert(case.options(mlx_path=case.root / "whole", **settings))
    for name, value in mx.load(str(case.root / "whole" / "model.safetensors")).items():  # type: ignore[union-attr]
        found = mx.load(str(case.out / "model.safetensors"))[name]  # type: ignore[index]
        if found.dtype in (mx.float32, mx.float16):  # float16 has 11 bits
            np.testing.assert_allclose(to_numpy(found), to_numpy(value), rtol=2.0**-10, atol=FLOAT32)


def test_values_that_are_not_finite_are_counted_over_all_blocks(case: Case, small_blocks: None) -> None:
    def spoil(tensors: dict[str, mx.array]) -> None:
        value = tensors["lm_head.weight"]
        tensors["lm_head.weight"] = mx.where(mx.arange(V)[:, None] % 10 == 7, mx.array(np.inf), value)

    case.tensors("base/model.safetensors", spoil)
    with pytest.raises(InvalidInputError, match=f"lm_head.weight: {6 * D} of {V * D} values are NaN or infinite"):
        convert(case.options())
    assert not case.out.exists()


def test_layers_no_model_has_are_refused_before_they_are_built(tmp_path: Path) -> None:
    raw = {
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 9,
        "num_hidden_layers": 1001, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    with pytest.raises(InvalidInputError, match="num_hidden_layers is 1001"):
        mlx_config(raw, tmp_path / "config.json")
    mlx_config(raw | {"num_hidden_layers": 1000}, tmp_path / "config.json")
