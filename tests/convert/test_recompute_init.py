"""``--recompute-init``: PiSSA and OLoRA adapters made and trained by PEFT, against PEFT's own logits.

The adapter is perturbed after its initialisation as training would; forgetting the recomputation is far off.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from convert_cases import ADAPTER, CONFIG, Case, Q
from float64_reference import initial64

from specstream_convert import ConvertOptions, convert, inspect_checkpoint
from specstream_convert.changes import initial
from specstream_convert.files.stored import StoredTensor
from specstream_convert.verification.forward import output_logits
from specstream_mlx.errors import InvalidInputError, UnsupportedError, UsageError, VerificationError
from specstream_mlx.formats.safetensors import open_tensors

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from transformers import AutoModelForCausalLM  # noqa: E402

from specstream_torch.testing import write_tiny_base  # noqa: E402
from tests.tolerances import FLOAT32, LOGITS  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
TOKENS = [5, 17, 3, 88, 40, 41, 2, 9, 60, 33]
TARGETS = {
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "o_proj", "gate_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
}


def trained(directory: Path, family: str, dtype: Any = None, convert_on_save: bool = False, **settings: Any) -> Any:
    """Write ``base`` and ``adapter``; return PEFT's logits of the perturbed adapter."""
    write_tiny_base(family, directory / "base", hidden_size=32, num_layers=2)
    dtype = dtype or torch.float32
    base = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=dtype)
    if dtype != torch.float32:
        base.save_pretrained(directory / "base")
    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[family], "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.LoraConfig(**(defaults | settings)))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            if convert_on_save:
                model.save_pretrained(directory / "initial", save_embedding_layers=False)
            for name, parameter in sorted(model.named_parameters()):
                if ".lora_" in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            wanted = model.eval()(torch.tensor([TOKENS])).logits[0].float().numpy()
        extra = {"path_initial_model_for_weight_conversion": str(directory / "initial")} if convert_on_save else {}
        model.save_pretrained(directory / "adapter", save_embedding_layers=False, **extra)
    return wanted


def options(directory: Path, **changes: Any) -> ConvertOptions:
    settings: dict[str, Any] = {
        "adapter_path": directory / "adapter",
        "hf_path": str(directory / "base"),
        "mlx_path": directory / "out",
        "lora_only": True,
        "recompute_init": True,
    }
    return ConvertOptions(**(settings | changes))


def difference(out: Path, wanted: Any, live: bool = False) -> float:
    found = float(np.abs(output_logits(out, np.array(TOKENS), live=live) - wanted).max())
    print(f"max |difference| {found:.2e}")
    return found


@pytest.mark.parametrize("live", [False, True], ids=["merged", "live"])
@pytest.mark.parametrize(
    ("family", "init"), [(family, init) for family in TARGETS for init in ("pissa", "olora")
                         if (family, init) != ("gpt2", "olora")]
)  # fmt: skip
def test_against_peft(tmp_path: Path, family: str, init: str, live: bool) -> None:
    """As PEFT computes, merged or as a live LoRA of twice the rank; without the recomputation it is far off."""
    wanted = trained(tmp_path, family, init_lora_weights=init)
    report = convert(options(tmp_path, fuse=not live))
    assert difference(tmp_path / "out", wanted, live) < LOGITS
    assert report.warnings == ()
    assert report.lora is not None
    assert report.lora["ranks"] == [8]
    _forget(tmp_path)
    convert(options(tmp_path, recompute_init=False, mlx_path=tmp_path / "naive"))
    assert difference(tmp_path / "naive", wanted) > 1000 * LOGITS


def _forget(directory: Path) -> None:
    """Make the adapter look like an ordinary LoRA."""
    path = directory / "adapter" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": True}))


@pytest.mark.parametrize("live", [False, True], ids=["merged", "live"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 1, "down_proj": 12}},
        {"r": 32, "lora_alpha": 8, "target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=["rslora", "patterns", "full rank", "lm_head"],
)
def test_scales_and_ranks(tmp_path: Path, settings: dict[str, Any], init: str, live: bool) -> None:
    wanted = trained(tmp_path, "llama", init_lora_weights=init, **settings)
    convert(options(tmp_path, fuse=not live))
    assert difference(tmp_path / "out", wanted, live) < LOGITS


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_converted_by_peft(tmp_path: Path, init: str) -> None:
    """Saved with path_initial_model_for_weight_conversion it is an ordinary LoRA of twice the rank."""
    wanted = trained(tmp_path, "llama", init_lora_weights=init, convert_on_save=True)
    raw = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (raw["r"], raw["init_lora_weights"]) == (8, True)
    convert(options(tmp_path, recompute_init=False))
    assert difference(tmp_path / "out", wanted) < LOGITS
    with pytest.raises(UsageError, match="nothing to recompute"):
        convert(options(tmp_path, mlx_path=tmp_path / "again"))


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_rounded_base(tmp_path: Path, dtype: Any, init: str) -> None:
    """PEFT rounds what it leaves of a 16-bit weight; the recomputed weight differs by that rounding and no more."""
    wanted = trained(tmp_path, "llama", dtype=dtype, init_lora_weights=init)
    report = convert(options(tmp_path, dtype="float32"))
    assert any("rounded" in warning for warning in report.warnings)
    print(f"logits {difference(tmp_path / 'out', wanted):.3g}")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    held = mx.load(str(tmp_path / "out" / "model.safetensors"))
    largest = 0.0
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            residual = module.get_base_layer().weight.detach().float().numpy()
            delta = module.get_delta_weight("default").detach().float().numpy()
            found = np.array(held[f"{name}.weight"])
            share = np.abs(found - (residual + delta)) / (unit * np.abs(residual) + 1e-5)
            largest = max(largest, float(share.max()))
            assert share.max() < 1, name
    print(f"largest share of one rounding of the residual: {largest:.2f}")
    assert largest > 0.5  # the rounding is real; a base in float32 would be below 0.01


def test_without_the_flag(case: Case) -> None:
    """Named: the field, its value, and both ways out; no base is needed to say so."""
    case.json(f"adapter/{CONFIG}", lambda raw: raw.update(init_lora_weights="pissa"))
    with pytest.raises(UnsupportedError) as caught:
        convert(case.options(hf_path=None))
    for words in (
        "init_lora_weights is 'pissa'",
        "--recompute-init",
        "path_initial_model_for_weight_conversion",
        CONFIG,
    ):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ("pissa_niter_4", "randomised"),
        ("corda", "calibration"),
        ("lora_ga", "gradients"),
        ("loftq", "quantisation"),
        ("something_new", "base weights were changed"),
    ],
)
@pytest.mark.parametrize("asked", [False, True])
def test_what_cannot_be_recomputed(case: Case, init: str, reason: str, asked: bool) -> None:
    case.json(f"adapter/{CONFIG}", lambda raw: raw.update(init_lora_weights=init))
    with pytest.raises(UnsupportedError) as caught:
        convert(case.options(recompute_init=asked))
    assert init in str(caught.value)
    assert reason in str(caught.value)
    assert "path_initial_model_for_weight_conversion" in str(caught.value)


def test_inspect_says_so(case: Case) -> None:
    case.json(f"adapter/{CONFIG}", lambda raw: raw.update(init_lora_weights="pissa"))
    found = inspect_checkpoint(case.adapter)
    assert found.problems == ()
    assert any("--recompute-init" in note for note in found.notes)


def test_kasa(case: Case) -> None:
    case.json(f"adapter/{CONFIG}", lambda raw: raw.update(kasa_config={"x": 1}))
    with pytest.raises(UnsupportedError, match="kasa_config.*changed at initialisation"):  # noqa: RUF043
        convert(case.options(recompute_init=True))


def test_a_quantised_base(case: Case, tmp_path: Path) -> None:
    convert(case.options(quantize=True, q_group_size=32, mlx_path=tmp_path / "q"))
    case.json(f"adapter/{CONFIG}", lambda raw: raw.update(init_lora_weights="olora"))
    with pytest.raises(UnsupportedError, match=r"--recompute-init needs .* quantised.*--hf-path"):
        convert(case.options(hf_path=str(tmp_path / "q"), recompute_init=True))


def test_lossless(lossless_case: Case) -> None:
    lossless_case.json(f"adapter/{CONFIG}", lambda raw: raw.update(init_lora_weights="pissa"))
    with pytest.raises(UnsupportedError, match="mode lossless"):
        convert(lossless_case.options(recompute_init=True))


def test_ambiguous_factors(case: Case) -> None:
    """Equal singular values at the cut, dependent columns: PEFT's choice was decided by rounding."""
    name = f"{Q.removeprefix('base_model.model.')}.weight"
    case.tensors("base/model.safetensors", lambda t: t.update({name: mx.eye(32)}))
    case.json(f"adapter/{CONFIG}", lambda raw: raw.update(init_lora_weights="pissa"))
    with pytest.raises(UnsupportedError, match=r"q_proj\.weight: float32 rounding decides"):
        convert(case.options(recompute_init=True))
    case.json(f"adapter/{CONFIG}", lambda raw: raw.update(init_lora_weights="olora"))
    convert(case.options(recompute_init=True))
    twice = mx.concatenate([mx.ones((32, 2)), mx.eye(32)[:, 2:]], axis=1)
    case.tensors("base/model.safetensors", lambda t: t.update({name: twice}))
    with pytest.raises(UnsupportedError, match=r"q_proj\.weight: float32 rounding decides"):
        convert(case.options(recompute_init=True, overwrite=True))


def test_olora_of_a_transposed_weight(tmp_path: Path) -> None:
    """PEFT factors a Conv1D's weight as it is stored, (in, out); only a square one survives its own forward pass."""
    trained(tmp_path, "gpt2", init_lora_weights="olora", target_modules=["attn.c_proj"])
    with pytest.raises(UnsupportedError, match=r"c_proj\.weight: PEFT's OLoRA factors the transposed weight"):
        convert(options(tmp_path))


def test_pissa_has_no_negative_scale(case: Case) -> None:
    case.json(f"adapter/{CONFIG}", lambda raw: raw.update(init_lora_weights="pissa", lora_alpha=-8))
    with pytest.raises(UnsupportedError, match="lora_alpha"):
        convert(case.options(recompute_init=True))


def test_a_dead_save_is_still_seen(case: Case) -> None:
    """The recomputed factors are never zero; the check for adapters without effect looks at the trained ones."""
    case.json(f"adapter/{CONFIG}", lambda raw: raw.update(init_lora_weights="olora"))
    case.tensors(f"adapter/{ADAPTER}", lambda t: t.update({n: mx.zeros(t[n].shape) for n in t if "lora_B" in n}))
    with pytest.raises(InvalidInputError, match="does nothing"):
        convert(case.options(recompute_init=True))


@pytest.mark.parametrize("live", [False, True], ids=["merged", "live"])
@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_verification_recomputes_on_its_own(case: Case, monkeypatch: pytest.MonkeyPatch, kind: str, live: bool) -> None:
    """Factors that are wrong by a thousandth are found, merged and live."""
    case.json(f"adapter/{CONFIG}", lambda raw: raw.update(init_lora_weights=kind))
    original = initial.Initial.read

    def wrong(self: initial.Initial) -> tuple[mx.array, mx.array]:
        a, b = original(self)
        return a * 1.001, b

    monkeypatch.setattr(initial.Initial, "read", wrong)
    with pytest.raises(VerificationError, match=r"reference|s\*B@A"):
        convert(case.options(recompute_init=True, fuse=not live))


@pytest.mark.parametrize("shape", [(24, 24), (40, 24), (24, 40)], ids=str)
@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_two_ways_agree(tmp_path: Path, kind: str, shape: tuple[int, int]) -> None:
    """The factors against the reference's: other decompositions, the same product; of the right rank."""
    weight = mx.array(np.random.default_rng(3).standard_normal(shape).astype(np.float32))
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {"w": weight})
    stored = StoredTensor(open_tensors(tmp_path / "x.safetensors"), "w")
    found = initial.Initial(kind, stored, rank=5, scale=1.5)
    a, b = (np.array(x).astype(np.float64) for x in found.read())
    a0, b0 = initial64(found)
    np.testing.assert_allclose(b @ a, b0 @ a0, rtol=0, atol=FLOAT32)
    assert found.problem() is None
    left = np.array(weight) - (1.5 if kind == "pissa" else 1.0) * b @ a
    assert np.linalg.matrix_rank(left, tol=1e-4) == min(shape) - 5
