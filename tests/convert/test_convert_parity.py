"""MLX logits of converted checkpoints against PEFT's own, float32, tiny random models of every family.

Tolerance 1e-4: logits are around 3, both sides sum in float32 in another order; 1e-5 is what is seen.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from transformers import AutoModelForCausalLM  # noqa: E402

from specstream_convert import ConvertOptions, convert  # noqa: E402
from specstream_convert.torch_reference.generate import load_reference, reference_logits  # noqa: E402
from specstream_convert.torch_reference.testing import make_tiny_checkpoint, write_tiny_base  # noqa: E402
from specstream_convert.verify import output_logits  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "opt", "opt-post-norm", "opt-projected", "gpt2")
TOKENS = [5, 17, 3, 88, 40, 41, 2, 9, 60, 33]
ATOL = 1e-4
SMALL = {"hidden_size": 32, "num_layers": 2}


def difference(out: Path, wanted: np.ndarray[Any, Any], *, live: bool = False) -> float:
    """The largest logit difference; printed, so that ``pytest -s`` gives the table of the maxima."""
    found = float(np.abs(output_logits(out, np.array(TOKENS), live=live) - wanted).max())
    print(f"max |difference| {found:.2e}")
    return found


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared(tmp_path: Path, family: str, tie: bool) -> None:
    """Main logits equal PEFT's; the base alone is far away, so a forgotten merge would show."""
    paths = make_tiny_checkpoint(family, tmp_path, tie_word_embeddings=tie, num_stream_layers=1, **SMALL)
    wanted = reference_logits(load_reference(*paths), TOKENS).main
    report = convert(ConvertOptions(adapter_path=paths.adapter, mlx_path=tmp_path / "out"))
    assert difference(tmp_path / "out", wanted) < ATOL
    convert(ConvertOptions(adapter_path=paths.adapter, mlx_path=tmp_path / "live", fuse=False))
    assert difference(tmp_path / "live", wanted, live=True) < ATOL
    assert np.abs(output_logits(tmp_path / "live", np.array(TOKENS), live=False) - wanted).max() > 100 * ATOL
    assert report.warnings == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_lossless(tmp_path: Path, family: str) -> None:
    """Main logits are the base's own."""
    paths = make_tiny_checkpoint(family, tmp_path, mode="lossless", num_stream_layers=1, prune=True, **SMALL)
    base = AutoModelForCausalLM.from_pretrained(paths.base, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = base(torch.tensor([TOKENS])).logits[0].numpy()
    convert(ConvertOptions(adapter_path=paths.adapter, mlx_path=tmp_path / "out"))
    assert difference(tmp_path / "out", wanted) < ATOL


def test_stock_mlx_lm_opens_the_output(tmp_path: Path) -> None:
    """Model and tokenizer, through mlx-lm's own ``load``."""
    from mlx_lm import load

    paths = make_tiny_checkpoint("llama", tmp_path, num_stream_layers=1, **SMALL)
    convert(ConvertOptions(adapter_path=paths.adapter, mlx_path=tmp_path / "out"))
    _, tokenizer = load(str(tmp_path / "out"))
    assert tokenizer.decode(tokenizer.encode("SELECT 1")).endswith("SELECT 1")


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd rank and alpha": {"r": 3, "lora_alpha": 7},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 1, "layers.0.mlp.*": 32}},
    "patterns with rslora": {"rank_pattern": {".*_proj": 5}, "alpha_pattern": {"o_proj": 3}, "use_rslora": True},
    "layers_to_transform": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "regex": {"target_modules": r".*\.(q_proj|down_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "exclude_modules": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("fuse", [True, False], ids=["merged", "live"])
@pytest.mark.parametrize("feature", FEATURES)
def test_peft_features(tmp_path: Path, feature: str, fuse: bool) -> None:
    """Each configuration written by PEFT itself, merged and live; both keep PEFT's scale per module."""
    write_tiny_base("llama", tmp_path / "base", **SMALL)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj"]}
    if "mlp" in str(FEATURES[feature]):
        settings["target_modules"] = ["q_proj", "v_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **(settings | FEATURES[feature])))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.eval()
        wanted = model(torch.tensor([TOKENS])).logits[0].numpy()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    options = {"adapter_path": tmp_path / "adapter", "mlx_path": tmp_path / "out", "lora_only": True, "fuse": fuse}
    convert(ConvertOptions(**options))
    assert difference(tmp_path / "out", wanted, live=not fuse) < ATOL
