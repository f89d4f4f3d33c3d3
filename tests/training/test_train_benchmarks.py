"""The benchmarks of training: what they train, and what they count."""

import argparse

import mlx.core as mx
import pytest

from benchmarks import train_memory
from benchmarks.train_padding import padding
from specstream_mlx.calibration.shapes import SHAPES
from specstream_mlx.training.batches import Example
from tests.tiny import active_memory


def test_every_arm_trains_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red when: an arm does not run, measures nothing, or does not train what it says."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
    monkeypatch.setitem(SHAPES, "tiny", SHAPES["llama-40m"] | sizes)
    options = argparse.Namespace(random_weights="tiny", path=None, batch_size=2, max_seq_length=16, rank=2, iters=2)
    monkeypatch.setattr(mx, "compile", lambda function=None, **_: function if function else lambda f: f)
    # Not mlx-lm's checkpointing, which changes the class of the blocks for good.
    chosen = [name for name, arm in train_memory.ARMS.items() if arm.mode or not arm.checkpoint]
    active_memory()  # nothing of the tests before is freed while this is measured
    found = {name: train_memory.measure(train_memory.ARMS[name], options) for name in chosen}
    assert all(arm["peak_gb"] > arm["base_gb"] > 0 < arm["seconds"] for arm in found.values())
    assert found["shared, 4-bit"]["base_gb"] < 0.3 * found["shared"]["base_gb"]
    assert "of mlx-lm, 4-bit" in train_memory.line("shared, 4-bit", found)


def test_padding_is_counted_by_hand() -> None:
    """Red when: rows that fill up a batch count as real, or anchors are counted as answers' tokens."""
    rows = [Example((1,) * 4, (1,) * 12), Example((1,) * 2, (1,) * 6)]
    assert padding(rows, 2) == {"main rows": pytest.approx(8 / 32), "stream rows": pytest.approx(6 / 22)}
    assert padding(rows, 1) == {"main rows": pytest.approx(8 / 32), "stream rows": 0}
