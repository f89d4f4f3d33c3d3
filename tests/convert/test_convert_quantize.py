"""``--quantize`` gives what mlx-lm's own quantisation of the merged model gives, bit by bit, and is verified."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from convert_cases import ADAPTER, CONFIG, Case, make_case, random_tensor, write_base
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.utils import _get_classes, load_model, quantize_model, save_config, save_model

from specstream_convert import convert
from specstream_convert.writing import quantized
from specstream_mlx.errors import VerificationError

WIDTH, INNER, VOCAB, LAYERS = 64, 128, 96, 2
PREFIX = "base_model.model."
SETTINGS = {
    "affine 4": {"q_bits": 4, "q_group_size": 64},
    "affine 6": {"q_bits": 6, "q_group_size": 32},
    "affine 8": {"q_bits": 8, "q_group_size": 32},
    "mxfp4": {"q_mode": "mxfp4", "q_bits": 4, "q_group_size": 32},
    "nvfp4": {"q_mode": "nvfp4", "q_bits": 4, "q_group_size": 16},
    "mxfp8": {"q_mode": "mxfp8", "q_bits": 8, "q_group_size": 32},
}


def family_case(root: Path, model_type: str, *, tie: bool = False, dtype: mx.Dtype = mx.float16) -> Case:
    """A base of ``model_type`` in three shards, and LoRA on every linear layer of its blocks."""
    rng = np.random.default_rng(3)
    case = Case(root)
    case.base.mkdir(parents=True)
    case.adapter.mkdir()
    config = {
        "model_type": model_type, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
        "head_dim": WIDTH // 4, "rope_theta": 10000.0, "max_position_embeddings": 128, "tie_word_embeddings": tie,
        "torch_dtype": "float16",
    }  # fmt: skip
    (case.base / "config.json").write_text(json.dumps(config))
    model_class, args_class = _get_classes(config)
    shapes = {name: value.shape for name, value in tree_flatten(model_class(args_class.from_dict(config)).parameters())}
    write_base(case.base, {name: random_tensor(rng, shape).astype(dtype) for name, shape in shapes.items()}, 3)
    lora = {}
    linear = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith("proj.weight")}
    for module, (rows, columns) in linear.items():
        lora[f"{PREFIX}{module}.lora_A.weight"] = random_tensor(rng, (4, columns))
        lora[f"{PREFIX}{module}.lora_B.weight"] = random_tensor(rng, (rows, 4), 0.05)
    mx.save_safetensors(str(case.adapter / ADAPTER), lora)
    targets = sorted({module.rpartition(".")[2] for module in linear})
    peft = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets}
    (case.adapter / CONFIG).write_text(json.dumps(peft | {"base_model_name_or_path": "org/x", "bias": "none"}))
    return case


def tensors_of(directory: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for path in sorted(directory.glob("model*.safetensors")):
        found |= mx.load(str(path))  # type: ignore[arg-type]
    return found


def check_as_mlx_lm(case: Case, settings: dict[str, Any]) -> None:
    """Convert with and without ``--quantize``; quantise the latter with mlx-lm; compare."""
    convert(case.options(lora_only=True, quantize=True, **settings))
    convert(case.options(lora_only=True, mlx_path=case.root / "merged"))
    model, config = load_model(case.root / "merged")
    how = {"group_size": settings["q_group_size"], "bits": settings["q_bits"], "mode": settings.get("q_mode", "affine")}
    model, config = quantize_model(model, config, **how)
    (case.root / "theirs").mkdir()
    save_model(case.root / "theirs", model)
    save_config(config, case.root / "theirs" / "config.json")
    ours, theirs = tensors_of(case.out), tensors_of(case.root / "theirs")
    assert set(ours) == set(theirs)
    assert any(name.endswith(".scales") for name in ours)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert mx.array_equal(ours[name], value), name
    configs = [json.loads((path / "config.json").read_text()) for path in (case.out, case.root / "theirs")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_same_bits_as_mlx_lm(tmp_path: Path, model_type: str, settings: dict[str, Any]) -> None:
    check_as_mlx_lm(family_case(tmp_path / "case", model_type), settings)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_same_bits_in_other_dtypes(tmp_path: Path, dtype: mx.Dtype) -> None:
    check_as_mlx_lm(family_case(tmp_path / "case", "qwen2", tie=True, dtype=dtype), SETTINGS["affine 4"])


def test_a_model_that_decides_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``quant_predicate`` leaves layers out and gives others their own settings, which config.json records."""

    def predicate(self: Any) -> Any:
        def decide(path: str, module: Any) -> Any:
            if path.endswith("down_proj"):
                return {"group_size": 32, "bits": 8}
            return not path.endswith("q_proj")

        return decide

    monkeypatch.setattr(llama.Model, "quant_predicate", property(predicate), raising=False)
    case = family_case(tmp_path / "case", "llama")
    check_as_mlx_lm(case, SETTINGS["affine 4"])
    found = json.loads((case.out / "config.json").read_text())["quantization"]
    assert found["model.layers.0.mlp.down_proj"] == {"group_size": 32, "bits": 8}
    assert "model.layers.0.self_attn.q_proj.scales" not in tensors_of(case.out)


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model is split as mlx-lm does, the parts of a layer together; twice gives the same bytes."""
    case = family_case(tmp_path / "case", "llama")
    convert(case.options(lora_only=True, quantize=True, mlx_path=case.root / "one"))
    monkeypatch.setattr(quantized, "MAX_FILE_BYTES", 20_000)
    report = convert(case.options(lora_only=True, quantize=True)).to_dict()
    files = sorted(path.name for path in case.out.glob("model*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    assert all((case.out / file).stat().st_size < 22_000 for file in files)
    one, many = tensors_of(case.root / "one"), tensors_of(case.out)
    assert set(one) == set(many)
    assert all(mx.array_equal(one[name], many[name]) for name in one)
    index = json.loads((case.out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {name: file for file in files for name in mx.load(str(case.out / file))}
    for name, file in index.items():
        assert index[name.rpartition(".")[0] + ".weight"] == file
    targets = {row["target"] for row in report["tensors"] if row["target"]}
    assert {f"{index[name]}:{name}" for name in index if name.endswith(".weight")} <= targets
    moved = case.copy(tmp_path / "moved")
    shutil.rmtree(moved.out)
    convert(moved.options(lora_only=True, quantize=True))
    assert {path.name: path.read_bytes() for path in case.out.iterdir()} == {
        path.name: path.read_bytes() for path in moved.out.iterdir()
    }


@pytest.mark.parametrize("changes", [{}, {"quantize": True, "q_group_size": 32}, {"fuse": False}])
def test_same_bytes_from_shards(tmp_path: Path, changes: dict[str, Any]) -> None:
    case = make_case(tmp_path / "case", shards=3)
    convert(case.options(**changes))
    convert(case.options(mlx_path=case.root / "again", **changes))
    first, second = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (case.out, case.root / "again")
    )
    assert first == second


def wrong_row(blocks: Any, how: Any) -> Iterator[tuple[mx.array, ...]]:
    for i, (weight, *others) in enumerate(ORIGINAL(blocks, how)):
        weight = mx.array(weight)
        weight[0] = weight[1] if i == 0 else weight[0]
        yield weight, *others


def fewer_bits_of_change(blocks: Any, how: Any) -> Iterator[tuple[mx.array, ...]]:
    return ORIGINAL((block * 1.02 for block in blocks), how)


ORIGINAL = quantized._quantize


@pytest.mark.parametrize("broken", [wrong_row, fewer_bits_of_change])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_verification_catches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Any, settings: dict[str, Any]
) -> None:
    """Every quantised tensor is compared, whether the LoRA changed it or not."""
    case = family_case(tmp_path / "case", "llama")
    monkeypatch.setattr(quantized, "_quantize", broken)
    with pytest.raises(VerificationError) as caught:
        convert(case.options(lora_only=True, quantize=True, **settings))
    assert "embed_tokens.weight: differs from the base" in str(caught.value)
    assert "self_attn.q_proj.weight: " in str(caught.value)
    assert not case.out.exists()
