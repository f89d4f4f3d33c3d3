"""``--dequantize``: a quantised mlx-lm base becomes a float one that a shared LoRA can be merged into."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from convert_cases import CONFIG, PREFIX, Case, Q, V, write_base
from float64_reference import dequantized64, to_numpy

from specstream_convert import convert
from specstream_convert.base import dequantize
from specstream_convert.files.stored import StoredTensor
from specstream_convert.verification.forward import output_logits
from specstream_mlx.errors import InvalidInputError, UnsupportedError, UsageError, VerificationError
from specstream_mlx.formats.safetensors import open_tensors
from tests.tolerances import FLOAT32, FLOAT64, LOGITS

NAME = f"{Q.removeprefix(PREFIX)}.weight"
NORM = "model.norm.weight"
TOKENS = np.arange(12) % V
AFFINE = [("affine", bits, 32) for bits in (2, 3, 4, 5, 6, 8)]
FLOAT = [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]


def load(path: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(path)))


def quantized(case: Case, mode: str, bits: int, group_size: int, dtype: mx.Dtype = mx.float32, shards: int = 1) -> None:
    """Quantise the case's base as mlx-lm does, norms left as they are; ``q_proj`` of layer 0 gets 8 bits of its own."""
    tensors: dict[str, mx.array] = {}
    settings: dict[str, Any] = {"mode": mode, "bits": bits, "group_size": group_size}
    for name, value in load(case.base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if value.ndim != 2 or value.shape[-1] % group_size:
            tensors[name] = value.astype(dtype)
            continue
        own = {"mode": "affine", "bits": 8, "group_size": 32} if name == NAME else settings
        parts = mx.quantize(value.astype(dtype), **own)
        tensors |= {f"{module}.{part}": held for part, held in zip(("weight", "scales", "biases"), parts, strict=False)}
    write_base(case.base, tensors, shards)
    if shards > 1:
        (case.base / "model.safetensors").unlink()
    own = {"mode": "affine", "bits": 8, "group_size": 32}
    block = settings | {NAME.removesuffix(".weight"): own}
    case.json("base/config.json", lambda raw: raw.update(quantization=block, quantization_config=block))


def by_mlx(case: Case, name: str) -> mx.array:
    """The float32 weight, dequantised by MLX from the files."""
    held = {n: v for file in sorted(case.base.glob("model*.safetensors")) for n, v in load(file).items()}
    config = json.loads((case.base / "config.json").read_text())["quantization"]
    module = name.removesuffix(".weight")
    if f"{module}.scales" not in held:
        return held[name].astype(mx.float32)
    how = config.get(module, config)
    scales, biases = held[f"{module}.scales"], held.get(f"{module}.biases")
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    settings = {key: how[key] for key in ("group_size", "bits", "mode")}
    return mx.dequantize(held[name], scales, biases, **settings, dtype=mx.float32)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize(("mode", "bits", "group_size"), [*AFFINE, *FLOAT], ids=str)
def test_merge(case: Case, mode: str, bits: int, group_size: int, dtype: mx.Dtype) -> None:
    """Every mode: merged in float32 from the unrounded values, then rounded once to the scales' dtype."""
    quantized(case, mode, bits, group_size, dtype)
    report = convert(case.options(dequantize=True)).to_dict()
    found = load(case.out / "model.safetensors")
    assert not any(name.endswith((".scales", ".biases")) for name in found)
    assert {value.dtype for value in found.values()} == {dtype}
    lora = load(case.adapter / "adapter_model.safetensors")
    delta = 2.0 * to_numpy(lora[f"{Q}.lora_B.weight"]).astype(np.float64) @ to_numpy(lora[f"{Q}.lora_A.weight"])
    wanted = mx.array((to_numpy(by_mlx(case, NAME)) + delta).astype(np.float32)).astype(dtype)
    unit = {mx.float32: FLOAT32, mx.bfloat16: 2.0**-7, mx.float16: 2.0**-10}[dtype]
    np.testing.assert_allclose(to_numpy(found[NAME]), to_numpy(wanted), rtol=unit, atol=FLOAT32)
    embedding = by_mlx(case, "model.embed_tokens.weight").astype(dtype)
    written = to_numpy(found["model.embed_tokens.weight"])
    np.testing.assert_allclose(written, to_numpy(embedding), rtol=unit, atol=FLOAT32)
    assert mx.array_equal(found[NORM], load(case.base / "model.safetensors")[NORM])
    config = json.loads((case.out / "config.json").read_text())
    assert "quantization" not in config
    assert "quantization_config" not in config
    assert report["placement"] == "merged"
    assert not report["base"]["quantized"]
    assert any("approximation" in warning for warning in report["warnings"])
    fates = {row["tensor"]: row["fate"] for row in report["tensors"]}
    assert fates[NAME] == "dequantised, merged with LoRA"
    assert fates["model.embed_tokens.weight"] == "dequantised"
    assert fates[NAME.replace("weight", "scales")].startswith("dropped: its part of")


def test_the_same_model(case: Case) -> None:
    """Without the LoRA's share the logits are those of the quantised model as mlx-lm runs it."""
    quantized(case, "affine", 4, 32)
    convert(case.options(dequantize=True, fuse=False))
    found = output_logits(case.out, TOKENS, live=False)
    convert(case.options(mlx_path=case.root / "kept"))
    assert np.abs(found - output_logits(case.root / "kept", TOKENS, live=False)).max() < LOGITS
    live = output_logits(case.root / "kept", TOKENS, live=True)
    assert np.abs(found - live).max() > 0.1
    convert(case.options(dequantize=True, mlx_path=case.root / "merged"))
    assert np.abs(output_logits(case.root / "merged", TOKENS, live=False) - live).max() < LOGITS


def test_shards_and_dtype(case: Case) -> None:
    """A sharded quantised base stays sharded; ``--dtype`` says what the float weights are stored as."""
    quantized(case, "mxfp4", 4, 32, mx.bfloat16, shards=3)
    report = convert(case.options(dequantize=True, dtype="float16"))
    files = sorted(case.out.glob("model-*.safetensors"))
    assert 1 < len(files) <= 3
    assert {value.dtype for file in files for value in load(file).values()} == {mx.float16}
    assert report.dtype == "float16"


def test_quantised_again(case: Case) -> None:
    quantized(case, "affine", 4, 32)
    report = convert(case.options(dequantize=True, quantize=True, q_bits=8, q_group_size=32))
    assert any("QUANTISED AGAIN" in warning for warning in report.warnings)
    assert json.loads((case.out / "config.json").read_text())["quantization"]["bits"] == 8


def test_a_float_base(case: Case) -> None:
    with pytest.raises(UsageError, match="--dequantize, but the base is not quantised"):
        convert(case.options(dequantize=True))


@pytest.mark.parametrize("other", ["adapter_only", "recompute_init"])
def test_contradictions(case: Case, other: str) -> None:
    with pytest.raises(UsageError, match="--dequantize contradicts"):
        convert(case.options(dequantize=True, **{other: True}))


def test_without_the_flag_it_is_named(case: Case) -> None:
    quantized(case, "affine", 4, 32)
    with pytest.raises(UnsupportedError, match="--dequantize"):
        convert(case.options(fuse=True))
    with pytest.raises(UsageError, match="--dequantize"):
        convert(case.options(dtype="float16"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("lm_head.biases"), r"lm_head\.weight: mode affine needs biases"),
        (lambda t: t.update({"lm_head.scales": t["lm_head.scales"] * mx.nan}), r"lm_head\.scales: gives values"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].astype(mx.int32)}), r"lm_head\.weight: packed"),
        (lambda t: t.update({"lm_head.scales": t["lm_head.scales"].astype(mx.uint8)}), r"lm_head\.weight: scales are"),
    ],
)
def test_damaged_layers(case: Case, change: Any, words: str) -> None:
    quantized(case, "affine", 4, 32)
    case.tensors("base/model.safetensors", change)
    with pytest.raises(InvalidInputError, match=words):
        convert(case.options(dequantize=True))
    assert not case.out.exists()


def test_unknown_mode(case: Case) -> None:
    quantized(case, "affine", 4, 32)
    case.json("base/config.json", lambda raw: raw["quantization"].update(mode="fp3"))
    with pytest.raises(UnsupportedError, match="mode 'fp3' is not known"):
        convert(case.options(dequantize=True))


@pytest.mark.parametrize("group_size", [16, 7])
def test_unknown_group_size(case: Case, group_size: int) -> None:
    quantized(case, "affine", 4, 32)
    case.json("base/config.json", lambda raw: raw["quantization"].update(group_size=group_size))
    with pytest.raises(InvalidInputError):
        convert(case.options(dequantize=True))


def test_verification_unpacks_on_its_own(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that are off by a hundred-thousandth are found."""
    quantized(case, "affine", 4, 32)
    original = dequantize.DequantizedTensor.blocks
    monkeypatch.setattr(
        dequantize.DequantizedTensor,
        "blocks",
        lambda self, **how: ((rows, value * 1.00001) for rows, value in original(self, **how)),
    )
    with pytest.raises(VerificationError, match="differs from the float64 reference"):
        convert(case.options(dequantize=True))


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("affine", b, g) for b in (2, 3, 4, 5, 6, 8)
                                                          for g in (32, 64, 128)] + FLOAT, ids=str)  # fmt: skip
def test_two_ways_agree(tmp_path: Path, mode: str, bits: int, group_size: int) -> None:
    """MLX and the reference's own unpacking, for every width and group, to the last bit of float32 but one."""
    weight = mx.array(np.random.default_rng(0).standard_normal((40, 256)).astype(np.float32))
    parts = mx.quantize(weight.astype(mx.bfloat16), mode=mode, bits=bits, group_size=group_size)
    held = dict(zip(("weight", "scales", "biases"), parts, strict=False))
    mx.save_safetensors(str(tmp_path / "x.safetensors"), held)
    file = open_tensors(tmp_path / "x.safetensors")
    tensor = dequantize.DequantizedTensor(
        file,
        "weight",
        scales=StoredTensor(file, "scales"),
        biases=StoredTensor(file, "biases") if "biases" in held else None,
        group_size=group_size,
        bits=bits,
        mode=mode,
    )
    found = to_numpy(tensor.read_float32())
    assert tensor.shape == found.shape == (40, 256)
    wanted = dequantized64(tensor, slice(0, 40))
    np.testing.assert_allclose(found, wanted, rtol=2.0**-23, atol=FLOAT64)  # one unit in the last place


def test_lossless(lossless_case: Case) -> None:
    """The base becomes float, the LoRA stays with the streams."""
    quantized(lossless_case, "affine", 8, 32)
    report = convert(lossless_case.options(dequantize=True))
    assert report.placement == "sidecar"
    assert "quantization" not in json.loads((lossless_case.out / "config.json").read_text())


def test_adapter_config_is_untouched(case: Case) -> None:
    quantized(case, "affine", 8, 32)
    before = (case.adapter / CONFIG).read_bytes()
    convert(case.options(dequantize=True))
    assert (case.adapter / CONFIG).read_bytes() == before
