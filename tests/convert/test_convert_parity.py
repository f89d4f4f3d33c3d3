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
from specstream_convert.verification.forward import output_logits  # noqa: E402
from specstream_torch.generate import load_reference, reference_logits  # noqa: E402
from specstream_torch.testing import make_tiny_checkpoint  # noqa: E402
from tests.tolerances import LOGITS  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "opt", "opt-post-norm", "opt-projected", "gpt2")
TOKENS = [5, 17, 3, 88, 40, 41, 2, 9, 60, 33]
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
    assert difference(tmp_path / "out", wanted) < LOGITS
    convert(ConvertOptions(adapter_path=paths.adapter, mlx_path=tmp_path / "live", fuse=False))
    assert difference(tmp_path / "live", wanted, live=True) < LOGITS
    assert np.abs(output_logits(tmp_path / "live", np.array(TOKENS), live=False) - wanted).max() > 100 * LOGITS
    assert report.warnings == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_lossless(tmp_path: Path, family: str) -> None:
    """Main logits are the base's own."""
    paths = make_tiny_checkpoint(family, tmp_path, mode="lossless", num_stream_layers=1, prune=True, **SMALL)
    base = AutoModelForCausalLM.from_pretrained(paths.base, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = base(torch.tensor([TOKENS])).logits[0].numpy()
    convert(ConvertOptions(adapter_path=paths.adapter, mlx_path=tmp_path / "out"))
    assert difference(tmp_path / "out", wanted) < LOGITS


def test_stock_mlx_lm_opens_the_output(tmp_path: Path) -> None:
    """Model and tokenizer, through mlx-lm's own ``load``."""
    from mlx_lm import load

    paths = make_tiny_checkpoint("llama", tmp_path, num_stream_layers=1, **SMALL)
    convert(ConvertOptions(adapter_path=paths.adapter, mlx_path=tmp_path / "out"))
    _, tokenizer = load(str(tmp_path / "out"))
    assert tokenizer.decode(tokenizer.encode("SELECT 1")).endswith("SELECT 1")
