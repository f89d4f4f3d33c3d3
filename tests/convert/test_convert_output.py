"""What is written: the files of the contract, the exact numbers, the same bytes every time, all or nothing."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from convert_cases import (
    ADAPTER,
    CONFIG,
    GAMMA,
    PREFIX,
    RANK,
    STREAM_CONFIG,
    STREAMS,
    Case,
    D,
    Q,
    V,
    make_case,
    snapshot,
    write_base,
)
from float64_reference import to_numpy
from mlx_lm.utils import load_adapters, load_model

from specstream_convert import ConvertOptions, convert, pipeline, plan
from specstream_convert.changes import kinds
from specstream_convert.files.stored import StoredTensor
from specstream_convert.verification.forward import output_logits
from specstream_convert.writing import outputs, write
from specstream_mlx.errors import UsageError, VerificationError
from specstream_mlx.formats.config import StreamConfig, read_json
from specstream_mlx.formats.safetensors import open_tensors
from specstream_mlx.formats.tensor_writer import TensorOut, write_tensors
from tests.tolerances import CLOSE_LOGITS, FLOAT32, LOGITS

WEIGHTS = f"adapter/{ADAPTER}"
NAME = "model.layers.0.self_attn.q_proj.weight"
TOKENS = np.arange(12) % V


def load(path: Path) -> dict[str, mx.array]:
    return mx.load(str(path))


def merged_by_hand(case: Case, scale: float = 2.0) -> np.ndarray[Any, Any]:
    tensors = load(case.root / WEIGHTS)
    a, b = (to_numpy(tensors[f"{Q}.lora_{side}.weight"]).astype(np.float64) for side in "AB")
    return to_numpy(load(case.base / "model.safetensors")[NAME]).astype(np.float64) + scale * (b @ a)


def test_shared(case: Case) -> None:
    """The files of the contract; LoRA merged; streams kept bit by bit; stock mlx-lm opens it."""
    report = convert(case.options()).to_dict()
    assert {path.name for path in case.out.iterdir()} == {
        "README.md", "config.json", "conversion_report.json", "model.safetensors", "specstream.safetensors",
        "specstream_config.json",
    }  # fmt: skip
    assert json.loads((case.out / "conversion_report.json").read_text()) == json.loads(json.dumps(report))
    merged = load(case.out / "model.safetensors")
    np.testing.assert_allclose(to_numpy(merged[NAME]), merged_by_hand(case), rtol=0, atol=FLOAT32)
    streams = load(case.out / "specstream.safetensors")
    assert set(streams) == {"specstream.stream_embeddings"}
    assert mx.array_equal(streams["specstream.stream_embeddings"], load(case.root / WEIGHTS)[STREAMS])
    config = json.loads((case.out / "config.json").read_text())
    assert config["rope_theta"] == 30000.0
    assert config["rope_scaling"] is None
    assert "rope_parameters" not in config
    assert report["verification"]["tensors"]["merged"] == 14
    assert report["verification"]["logits"]["max_abs_difference"] < LOGITS
    fates = {(row["file"], row["tensor"]) for row in report["tensors"]}
    inputs = {(ADAPTER, name) for name in load(case.root / WEIGHTS)}
    assert fates == inputs | {("model.safetensors", name) for name in load(case.base / "model.safetensors")}
    config_out = StreamConfig.from_dict(read_json(case.out / STREAM_CONFIG))
    assert (config_out.gamma, config_out.mode) == (GAMMA, "shared")
    assert config_out.lora is not None
    assert (config_out.lora["rank"], config_out.lora["scale"]) == (RANK, 2.0)
    assert config_out.lora["placement"] == "merged"
    assert config_out.source is not None
    assert "adapter/" + ADAPTER in config_out.source["sha256"]
    assert str(case.root) not in (case.out / "conversion_report.json").read_text()


def test_lossless(lossless_case: Case) -> None:
    """The base is untouched, the LoRA stands in the sidecar under mlx-lm's orientation."""
    case = lossless_case
    assert convert(case.options()).placement == "sidecar"
    before, after = load(case.base / "model.safetensors"), load(case.out / "model.safetensors")
    assert set(before) == set(after)
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    sidecar, adapter = load(case.out / "specstream.safetensors"), load(case.root / WEIGHTS)
    path = "model.layers.1.mlp.up_proj"
    assert mx.array_equal(sidecar[f"lora.{path}.lora_a"], adapter[f"{PREFIX}{path}.lora_A.weight"].T)
    assert mx.array_equal(sidecar[f"lora.{path}.lora_b"], adapter[f"{PREFIX}{path}.lora_B.weight"].T)
    assert len(sidecar) == 1 + 2 * 7
    assert json.loads((case.out / STREAM_CONFIG).read_text())["lora"]["scale"] == 2.0


def test_live_adapters_equal_the_merge(case: Case) -> None:
    """``--keep-adapters`` with mixed ranks and scales: padded, folded, loaded by mlx-lm, the same logits."""
    up = f"{PREFIX}model.layers.1.mlp.up_proj"

    def narrower(tensors: dict[str, mx.array]) -> None:
        tensors[f"{up}.lora_A.weight"] = tensors[f"{up}.lora_A.weight"][:2]
        tensors[f"{up}.lora_B.weight"] = tensors[f"{up}.lora_B.weight"][:, :2]

    case.tensors(WEIGHTS, narrower)
    patterns = {"rank_pattern": {"layers.1.mlp.up_proj": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True}
    case.json(f"adapter/{CONFIG}", lambda raw: raw.update(patterns))
    convert(case.options(fuse=False))
    convert(case.options(mlx_path=case.root / "fused", fuse=True))
    live, fused = output_logits(case.out, TOKENS, live=True), output_logits(case.root / "fused", TOKENS, live=False)
    assert np.abs(live - fused).max() < CLOSE_LOGITS
    assert np.abs(live - output_logits(case.out, TOKENS, live=False)).max() > 0.05
    model = load_adapters(load_model(case.out)[0], str(case.out / "adapters"))
    assert model.model.layers[0].self_attn.q_proj.scale == 8 / 2  # alpha / sqrt(r) of the first module
    config = json.loads((case.out / STREAM_CONFIG).read_text())
    assert config["lora"]["placement"] == "live"
    assert config["lora"]["ranks"] == [2, 4]


def test_adapter_only(case: Case) -> None:
    case_files = {"README.md", "conversion_report.json", "specstream.safetensors", "specstream_config.json"}
    convert(case.options(adapter_only=True))
    assert {path.name for path in case.out.iterdir()} == case_files | {"adapters"}
    convert(case.options(adapter_only=True, overwrite=True))


def test_adapter_only_lossless(lossless_case: Case) -> None:
    convert(lossless_case.options(adapter_only=True))
    assert "adapters" not in {path.name for path in lossless_case.out.iterdir()}
    assert (lossless_case.out / "specstream.safetensors").stat().st_size < 30_000


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_base(tmp_path: Path, dtype: str) -> None:
    """A 16-bit base stays 16-bit; the merge is float32 and rounded once."""
    case = make_case(tmp_path / "case", dtype=getattr(mx, dtype))
    report = convert(case.options()).to_dict()
    merged = load(case.out / "model.safetensors")[NAME]
    assert merged.dtype == getattr(mx, dtype)
    wanted = mx.array(merged_by_hand(case).astype(np.float32)).astype(merged.dtype)
    assert float((merged != wanted).mean()) < 0.01
    assert report["verification"]["tensors"]["max_share_of_rounding_bound"] <= 1


def test_dtype(case: Case) -> None:
    convert(case.options(dtype="bfloat16"))
    assert {value.dtype for value in load(case.out / "model.safetensors").values()} == {mx.bfloat16}
    assert json.loads((case.out / "config.json").read_text())["dtype"] == "bfloat16"
    streams = load(case.out / "specstream.safetensors")
    assert {value.dtype for value in streams.values()} == {mx.float32}


def test_fingerprint_is_of_the_written_base(case: Case) -> None:
    """What the runtime hashes is the norm it loads, in whatever dtype that was written."""
    import hashlib

    convert(case.options(dtype="bfloat16"))
    norm = to_numpy(load(case.out / "model.safetensors")["model.norm.weight"]).astype("<f4")
    recorded = json.loads((case.out / STREAM_CONFIG).read_text())["base_model"]["fingerprint"]
    assert recorded["tensor"] == "model.norm.weight"
    assert recorded["sha256"] == recorded["sha256_bf16"] == hashlib.sha256(norm.tobytes()).hexdigest()


@pytest.mark.parametrize("fuse", [None, False])
def test_quantize(case: Case, fuse: bool | None) -> None:
    """Quantised once, after the merge; mlx-lm opens it; a live LoRA stays in float32."""
    convert(case.options(quantize=True, q_bits=8, q_group_size=32, fuse=fuse))
    config = json.loads((case.out / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    convert(case.options(mlx_path=case.root / "full"))
    full = output_logits(case.root / "full", TOKENS, live=False)
    quantized = output_logits(case.out, TOKENS, live=fuse is False)
    assert 0 < np.abs(full - quantized).max() < 0.2


@pytest.mark.parametrize("mode", ["shared", "lossless"])
def test_quantized_base(pristine: dict[str, Case], tmp_path: Path, mode: str) -> None:
    """A quantised mlx-lm base is passed through; a shared LoRA stays live on it."""
    case = pristine[mode].copy(tmp_path / "case")
    plain = case.options(adapter_path=None, streams_path=case.root / "s", quantize=True, q_bits=4, q_group_size=32)
    (case.root / "s").mkdir()
    streams = load(case.root / WEIGHTS)[STREAMS]
    mx.save_safetensors(str(case.root / "s" / "specstream.safetensors"), {"specstream.stream_embeddings": streams})
    shutil.copy(case.adapter / STREAM_CONFIG, case.root / "s")
    convert(ConvertOptions(**{**plain.__dict__, "mlx_path": case.root / "quantized"}))
    report = convert(case.options(hf_path=str(case.root / "quantized")))
    assert report.placement == ("live" if mode == "shared" else "sidecar")
    before, after = (load(path / "model.safetensors") for path in (case.root / "quantized", case.out))
    assert set(before) == set(after)
    assert all(mx.array_equal(before[name], after[name]) for name in before)


def test_shards(tmp_path: Path) -> None:
    """A sharded base gives as many shards, an index that is right, and the same numbers as one file."""
    one, three = make_case(tmp_path / "one"), make_case(tmp_path / "three", shards=3)
    convert(one.options())
    convert(three.options())
    index = json.loads((three.out / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: value for file in sorted(set(index.values())) for name, value in load(three.out / file).items()}
    whole = load(one.out / "model.safetensors")
    assert set(found) == set(index) == set(whole)
    assert all(mx.array_equal(found[name], whole[name]) for name in whole)


def test_tied(tmp_path: Path) -> None:
    """A tied base whose file also holds the head: dropped when equal."""
    case = make_case(tmp_path / "case", tie=True)
    tensors = dict(load(case.base / "model.safetensors"))
    mx.eval(tensors)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_base(case.base, tensors)
    report = convert(case.options()).to_dict()
    assert "lm_head.weight" not in load(case.out / "model.safetensors")
    assert any(row["fate"].startswith("dropped: tied") for row in report["tensors"])


def test_lora_on_the_head(case: Case) -> None:
    head = PREFIX + "lm_head"

    def add(tensors: dict[str, mx.array]) -> None:
        tensors[f"{head}.lora_A.weight"], tensors[f"{head}.lora_B.weight"] = mx.ones((RANK, D)), mx.ones((V, RANK))

    case.tensors(WEIGHTS, add)
    convert(case.options())
    before, after = (load(path / "model.safetensors")["lm_head.weight"] for path in (case.base, case.out))
    np.testing.assert_allclose(to_numpy(after - before), 8.0, rtol=0, atol=8 * FLOAT32)


def moved(prefix: str, strip: str = PREFIX) -> Callable[[dict[str, mx.array]], None]:
    def change(tensors: dict[str, mx.array]) -> None:
        for name in list(tensors):
            if "specstream" not in name:
                tensors[prefix + name.removeprefix(strip)] = tensors.pop(name)

    return change


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (moved("module.base_model.model."), "wrapper prefix"),
        (moved("base_model.model.lm."), "'lm.' removed"),
        (moved("base_model.model.", PREFIX + "model."), "'model.' put before"),
        (lambda t: t.update({STREAMS + ".weight": t.pop(STREAMS)}), "read as specstream.stream_embeddings"),
        (lambda t: t.update({f"{STREAMS}.{i}": t[STREAMS][i] for i in range(GAMMA)}) or t.pop(STREAMS), "rows"),
        (lambda t: t.update({STREAMS: t[STREAMS][:, None]}), "dimension of size 1"),
        (lambda t: t.update({PREFIX + "specstream.modules_to_save.default.stream_embeddings": t[STREAMS],
                             PREFIX + "specstream.original_module.stream_embeddings": 0 * t.pop(STREAMS)}), None),
        (lambda t: [t.update({n.replace(".weight", ".default.weight"): t.pop(n)}) for n in list(t) if "lora" in n],
         None),
    ],
    ids=["ddp", "wrapper", "inner model", "nn.Embedding", "ParameterList", "singleton", "raw copies", "named"],
)  # fmt: skip
def test_other_spellings(
    case: Case, pristine: dict[str, Case], tmp_path: Path, change: Callable[..., Any], note: str | None
) -> None:
    """Names that other trainers write give the same output tensors, and a note where something was changed."""
    case.tensors(WEIGHTS, change)
    report = convert(case.options())
    assert note is None or any(note in line for line in report.notes), report.notes
    reference = pristine["shared"].copy(tmp_path / "reference")
    convert(reference.options(verify=False))
    for file in ("model.safetensors", "specstream.safetensors"):
        assert (case.out / file).read_bytes() == (reference.out / file).read_bytes()


def test_form_b(case: Case) -> None:
    """Form B, with the stream file beside the adapter or named; forms A and B with the same bits."""
    streams = load(case.root / WEIGHTS)[STREAMS]
    mx.eval(streams)
    mx.save_safetensors(str(case.adapter / "specstream.safetensors"), {"specstream.stream_embeddings": streams})
    assert any("same stream tensors" in note for note in convert(case.options()).notes)
    case.tensors(WEIGHTS, lambda t: t.pop(STREAMS))
    convert(case.options(overwrite=True))
    (case.root / "elsewhere").mkdir()
    (case.adapter / "specstream.safetensors").rename(case.root / "elsewhere" / "specstream.safetensors")
    convert(case.options(overwrite=True, streams_path=case.root / "elsewhere"))
    assert mx.array_equal(load(case.out / "specstream.safetensors")["specstream.stream_embeddings"], streams)


def test_key_map_and_ignored_keys(case: Case) -> None:
    strange = PREFIX + "model.strange"
    case.tensors(WEIGHTS, lambda t: t.update({"my.embeddings": t.pop(STREAMS), strange: mx.ones(3)}))
    (case.root / "map.json").write_text(json.dumps({"my.embeddings": "specstream.stream_embeddings"}))
    report = convert(case.options(key_map=case.root / "map.json", ignore_keys=r".*\.strange"))
    assert ("my.embeddings", "copied") in {(fate.tensor, fate.fate) for fate in report.tensors}
    assert (strange, "ignored by --ignore-keys") in {(fate.tensor, fate.fate) for fate in report.tensors}


def test_lora_only(case: Case) -> None:
    case.tensors(WEIGHTS, lambda t: t.pop(STREAMS))
    (case.adapter / STREAM_CONFIG).unlink()
    report = convert(case.options(lora_only=True))
    assert report.mode is None
    assert not (case.out / "specstream.safetensors").exists()
    np.testing.assert_allclose(
        to_numpy(load(case.out / "model.safetensors")[NAME]), merged_by_hand(case), rtol=0, atol=FLOAT32
    )


def test_frozen_copies_are_dropped(case: Case) -> None:
    """PEFT saves frozen embeddings beside the LoRA; equal to the base's they are consumed."""
    embedding = load(case.base / "model.safetensors")["model.embed_tokens.weight"]
    case.tensors(WEIGHTS, lambda t: t.update({PREFIX + "model.embed_tokens.weight": embedding}))
    report = convert(case.options())
    assert any("equal to the base's" in fate.fate for fate in report.tensors)


def test_torch_is_not_needed(case: Case) -> None:
    """Where neither PyTorch nor PEFT is installed, a conversion and its verification are the same."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'peft'))\n"
        "from pathlib import Path; from specstream_convert import ConvertOptions, convert\n"
        f"convert(ConvertOptions(hf_path={str(case.base)!r}, adapter_path=Path({str(case.adapter)!r}), "
        f"mlx_path=Path({str(case.out)!r})))"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    convert(case.options(mlx_path=case.root / "here"))
    assert (case.out / "model.safetensors").read_bytes() == (case.root / "here/model.safetensors").read_bytes()
    assert json.loads((case.out / "conversion_report.json").read_text())["verification"]["tensors"]["merged"] == 14


def test_same_input_same_bytes(case: Case, tmp_path: Path) -> None:
    """Twice, from different directories: every file is the same, byte by byte."""
    convert(case.options())
    again = case.copy(tmp_path / "moved")
    shutil.rmtree(again.out)
    convert(again.options())
    files = {path.name: path.read_bytes() for path in case.out.iterdir()}
    assert files == {path.name: path.read_bytes() for path in again.out.iterdir()}


def test_dry_run(case: Case) -> None:
    before = snapshot(case.root)
    report = convert(case.options(dry_run=True)).to_dict()
    assert snapshot(case.root) == before
    assert report["dry_run"]
    assert {row["fate"] for row in report["tensors"]} == {"merged", "copied", "merged with LoRA"}


def test_progress(case: Case) -> None:
    seen: list[tuple[str, int, int]] = []
    convert(case.options(), lambda *step: seen.append(step))
    assert list(dict.fromkeys(step[0] for step in seen)) == ["hash", "write", "verify"]
    assert all(0 < done <= total for _, done, total in seen)


def test_overwrite_replaces_only_ours(case: Case) -> None:
    convert(case.options())
    first = (case.out / "model.safetensors").read_bytes()
    case.json(f"adapter/{CONFIG}", lambda raw: raw.update(lora_alpha=80))
    convert(case.options(overwrite=True))
    assert (case.out / "model.safetensors").read_bytes() != first
    (case.out / "notes.txt").write_text("mine")
    before = snapshot(case.root)
    with pytest.raises(UsageError, match=r"notes\.txt"):
        convert(case.options(overwrite=True))
    assert snapshot(case.root) == before


def break_writing(case: Case, monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise failure

    monkeypatch.setattr(pipeline, "write_json", fail)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError("bug")])
def test_nothing_is_left_after_a_failure(case: Case, monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    """Ctrl-C, a full disk, a fault of ours: neither output nor temporary directory, nor parents made for it."""
    before = snapshot(case.root)
    break_writing(case, monkeypatch, failure)
    with pytest.raises(UsageError if isinstance(failure, OSError) else type(failure)) as caught:
        convert(case.options(mlx_path=case.root / "new" / "deep" / "out"))
    assert not isinstance(failure, OSError) or "No space left" in str(caught.value)
    assert snapshot(case.root) == before


def test_failed_overwrite_keeps_the_old(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(case.options())
    before = {path.name: path.read_bytes() for path in case.out.iterdir()}
    break_writing(case, monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        convert(case.options(overwrite=True))
    assert {path.name: path.read_bytes() for path in case.out.iterdir()} == before
    assert {path.name for path in case.root.iterdir()} == {"adapter", "base", "out"}


def scaled(factor: float) -> Callable[..., Iterator[mx.array]]:
    original = outputs.changed

    def broken(source: StoredTensor, changes: Any) -> Iterator[mx.array]:
        for value, (_, plain) in zip(original(source, changes), source.blocks(), strict=True):
            yield plain + factor * (value - plain)

    return broken


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        ("changed", scaled(1.0001), "differs from the float32 reference"),
        ("changed", scaled(0.0), "differs from the float32 reference"),
        ("cast", lambda value, dtype, place: value + 1e-3, "differs from the base although nothing changes it"),
    ],
    ids=["wrong scale", "forgotten merge", "changed weights"],
)
def test_verification_catches(
    case: Case, monkeypatch: pytest.MonkeyPatch, name: str, broken: Any, message: str
) -> None:
    """A merge broken on purpose is found, nothing is written; without verification it would have been."""
    monkeypatch.setattr(outputs, name, broken)
    before = snapshot(case.root)
    with pytest.raises(VerificationError, match=message):
        convert(case.options())
    assert snapshot(case.root) == before
    convert(case.options(verify=False))


def test_the_float64_reference_catches_what_the_arithmetic_does_wrong(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when: the oracle of these tests shares the converter's arithmetic, or no conversion is held beside it."""
    original = kinds.Lora.read
    monkeypatch.setattr(kinds.Lora, "read", lambda self: (1.0001 * original(self)[0], original(self)[1]))
    with pytest.raises(VerificationError, match="differs from the float64 reference"):
        convert(case.options())


def test_verification_catches_a_wrong_sidecar(lossless_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.LoraSet, "live", lambda self, item: tuple(2 * x.T for x in item.read()))
    with pytest.raises(VerificationError, match=r"LoRA differs from s\*B@A"):
        convert(lossless_case.options())


def test_verification_catches_a_wrong_config(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rope_theta that did not arrive changes the logits and nothing else."""
    original = write._write_weights
    monkeypatch.setattr(write, "_write_weights", lambda *a: original(*a) | {"rope_theta": 10.0})
    with pytest.raises(VerificationError, match="logits"):
        convert(case.options())


def test_reference_logits(case: Case) -> None:
    convert(case.options())
    right = output_logits(case.out, TOKENS, live=False)
    np.savez(case.root / "right.npz", tokens=TOKENS, logits=right)
    np.savez(case.root / "wrong.npz", tokens=TOKENS, logits=right + 0.1)
    report = convert(case.options(overwrite=True, reference_logits=case.root / "right.npz")).to_dict()
    assert report["verification"]["reference_logits"]["max_abs_difference"] < CLOSE_LOGITS
    with pytest.raises(VerificationError, match=r"wrong\.npz"):
        convert(case.options(overwrite=True, reference_logits=case.root / "wrong.npz"))


def test_merge_error_is_seen_through_float32(case: Case) -> None:
    """The rounding bound is tight enough to see an error of a thousandth of the LoRA's own share."""
    report = convert(case.options()).to_dict()
    assert report["verification"]["tensors"]["max_share_of_rounding_bound"] < 0.5


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.uint32, mx.uint8, mx.bool_, mx.int64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 5)])
def test_tensor_files_round_trip(tmp_path: Path, dtype: mx.Dtype, shape: tuple[int, ...]) -> None:
    """Written by us, read by MLX and by us, for every dtype and odd shapes."""
    value = mx.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    path = tmp_path / "x.safetensors"
    tensors = [TensorOut.of("b", value), TensorOut.of("a", mx.array([1.5, 2.5]))]
    digest = write_tensors(path, tensors, {"format": "mlx"})
    assert open_tensors(path).sha256() == digest
    for found in (open_tensors(path).read("b"), load(path)["b"]):
        assert found.dtype == dtype
        assert tuple(found.shape) == shape
        assert mx.array_equal(found, value)
