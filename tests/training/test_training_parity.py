"""The training against the PyTorch twin: losses, gradients of every trained tensor, and a loss curve of 20 steps.

Both sides start from one random checkpoint: PEFT's live LoRA on Hugging Face modules there, the converter's output
here. float32; the tolerances allow for the order of summation.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx.utils import tree_flatten

from specstream_convert import ConvertOptions, convert
from specstream_mlx import load
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.training.batches import Example, make_batch
from specstream_mlx.training.loss import LossWeights, loss_and_gradients
from specstream_mlx.training.settings import TrainSettings
from specstream_mlx.training.trainable import train_streams_and_lora, trained_tensors
from specstream_mlx.training.trainer import train

pytest.importorskip("torch", reason="the parity tests need the torch extra")

import torch

from specstream_torch import checkpoint as twin_checkpoint
from specstream_torch import finetune as twin_finetune
from specstream_torch import loss as twin_loss
from specstream_torch.testing import make_tiny_checkpoint
from tests.tolerances import FLOAT32

pytestmark = pytest.mark.parity

ATOL = 1e-4
"""Losses of 3 to 8, and gradients up to some 5, after both programs' whole forward and backward."""
CASES: dict[str, dict[str, Any]] = {
    "shared": {},
    "lossless": {"mode": "lossless"},
    "shared-low-rank-pruner": {"stream_init": "low_rank_residual", "prune": True, "num_stream_layers": 3},
    "lossless-low-rank-anchor-tied": {
        "mode": "lossless",
        "stream_init": "low_rank",
        "stream_position": "anchor",
        "prune": True,
        "tie_word_embeddings": True,
    },
    "lossless-value-rotation": {"mode": "lossless", "stream_id": "value_rotation", "gamma": 3},
    "shared-value-rotation": {"stream_id": "value_rotation", "gamma": 2},
}
_RNG = np.random.default_rng(11)
EXAMPLES = [
    Example(tuple(_RNG.integers(3, 97, prompt).tolist()), (*_RNG.integers(3, 97, answer - 1).tolist(), 2))
    for prompt, answer in ((7, 12), (3, 20), (11, 2), (5, 1), (2, 9))
]


def both(family: str, directory: Path, **case: Any) -> tuple[SpecStreamModel, Any]:
    """One random checkpoint as our trainable model and as the twin's."""
    base, adapter = make_tiny_checkpoint(family, directory, seed=5, hidden_size=32, **case)
    out = directory / "out"
    fuse = False if case.get("mode", "shared") == "shared" else None
    convert(ConvertOptions(adapter_path=adapter, mlx_path=out, hf_path=str(base), fuse=fuse))
    model, _ = load(out)
    train_streams_and_lora(model)
    twin = twin_checkpoint.load_checkpoint(base, adapter, trainable=True)
    twin.train()
    return model, twin


def twin_gradients(twin: Any) -> dict[str, np.ndarray]:
    """The twin's gradients under our names and in our orientation."""
    gradients = {}
    for name, parameter in twin.named_parameters():
        if not parameter.requires_grad:
            continue
        value = parameter.grad.numpy()
        name = name.removeprefix("base_model.model.")
        if name.startswith("specstream."):
            gradients["specstream." + name.split("default.", 1)[1]] = value
        else:
            ours = name.replace(".lora_A.default.weight", ".lora_a").replace(".lora_B.default.weight", ".lora_b")
            gradients["lora." + ours] = value.T
    return gradients


def our_gradients(gradients: Any) -> dict[str, np.ndarray]:
    flat = {name: np.array(value) for name, value in tree_flatten(gradients)}
    return {
        name.replace("streams.", "specstream.", 1) if name.startswith("streams.") else "lora." + name[len("base.") :]: v
        for name, v in flat.items()
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_losses_and_gradients_are_the_twins(family: str, case: str, tmp_path: Path) -> None:
    """Red when: a row sees too much, a weight or a mean is off, or a gradient takes a wrong way or none."""
    model, twin = both(family, tmp_path, **CASES[case])
    lossless = CASES[case].get("mode") == "lossless"
    theirs = twin_loss.streaming_loss(
        twin,
        twin_loss.make_batch([twin_loss.Example(e.prompt, e.answer) for e in EXAMPLES], model.gamma),
        stream_weight=0.3,
        prune_weight=0.7,
    )
    theirs.loss.backward()
    expected = twin_gradients(twin)
    weights = LossWeights(main=0.0 if lossless else 1.0, streams=0.3, prune=0.7)
    for rows_per_chunk, checkpoint in ((4096, False), (4096, True), (60, False)):
        report, gradients = loss_and_gradients(
            model, make_batch(EXAMPLES, model.gamma), weights, rows_per_chunk=rows_per_chunk, checkpoint=checkpoint
        )
        found = our_gradients(gradients)
        assert report.loss == pytest.approx(float(theirs.loss.detach()), abs=ATOL)
        assert report.streams == pytest.approx(theirs.stream_losses, abs=ATOL)
        assert report.agreement == pytest.approx(theirs.accuracies[1:], abs=FLOAT32)
        assert report.main == pytest.approx(theirs.main_loss, abs=ATOL, nan_ok=True)
        if theirs.prune_loss is not None:
            assert report.prune == pytest.approx(theirs.prune_loss, abs=ATOL)
        assert found.keys() == expected.keys() == trained_tensors(model).keys()
        for name, value in expected.items():
            assert found[name].shape == value.shape, name
            assert np.abs(found[name] - value).max() <= ATOL, name
    assert max(np.abs(value).max() for value in expected.values()) > 0.01, "gradients too small to prove anything"


@pytest.mark.parametrize("mode", ["shared", "lossless"])
def test_the_loss_curve_of_20_steps_is_the_twins(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red when: batches, schedule, clipping, accumulation of Adam or the two learning rates differ.

    atol 1e-4 (2e-5 was measured) on losses of 5 to 8: Adam divides a gradient by its own size, so rounding in the
    smallest gradients moves the parameters they belong to.
    """
    base, _ = make_tiny_checkpoint("llama", tmp_path / "tiny", seed=2, hidden_size=32)
    start = tmp_path / "start"
    curve: list[float] = []

    def add_lora_and_keep(*arguments: Any, **options: Any) -> Any:
        model = twin_checkpoint.add_lora(*arguments, **options)
        generator = torch.Generator().manual_seed(3)  # the converter refuses an adapter that does nothing
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        twin_checkpoint.save_checkpoint(model, start)
        return model

    def note(self: Any, result: Any, tokens: int) -> None:
        curve.append(float(result.loss.detach()))

    monkeypatch.setattr(twin_finetune, "add_lora", add_lora_and_keep)
    monkeypatch.setattr(twin_finetune._Progress, "add", note)
    monkeypatch.setattr(twin_finetune._Progress, "line", lambda *_: None)
    shared = {"mode": mode, "gamma": 3, "rank": 4, "batch_size": 3, "iters": 20, "seed": 7, "stream_weight": 0.2}
    rates = {"learning_rate": 5e-3, "stream_lr_scale": 6.0, "warmup": 4}
    twin_finetune.finetune(
        twin_finetune.FinetuneConfig(
            model=str(base), output=str(tmp_path / "theirs"), num_stream_layers=2, prune_rank=2, **shared, **rates
        ),
        [twin_loss.Example(e.prompt, e.answer) for e in EXAMPLES],
        report=lambda _: None,
    )
    out = tmp_path / "out"
    fuse = False if mode == "shared" else None
    convert(ConvertOptions(adapter_path=start, mlx_path=out, hf_path=str(base), fuse=fuse))
    model, _ = load(out)
    train_streams_and_lora(model)
    events: list[dict[str, Any]] = []
    settings = TrainSettings(num_stream_layers=2, prune_rank=2, steps_per_report=1, **shared, **rates)
    assert model.stream_config is not None
    model.stream_config = replace(model.stream_config, lora={"rank": 4, "scale": 2.0})
    train(model, settings, EXAMPLES, [], tmp_path / "ours", report=events.append)
    ours = [event["loss"] for event in events if event["event"] == "train"]
    assert len(ours) == len(curve) == 20
    assert curve[-1] < curve[0] - 0.5, "nothing was learnt"
    assert np.abs(np.array(ours) - np.array(curve)).max() <= ATOL
