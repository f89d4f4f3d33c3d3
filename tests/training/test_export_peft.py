"""The PyTorch form of an adapter: PEFT and the PyTorch trainer take it, and the converter brings it back."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from specstream_convert import ConvertOptions, convert, inspect_checkpoint
from specstream_mlx import load
from specstream_mlx.errors import UnsupportedError
from specstream_mlx.families import CONVERTED
from specstream_mlx.formats.adapter_directory import read_adapter
from specstream_mlx.formats.config import read_json
from specstream_mlx.target.tree import DraftTree
from specstream_mlx.training.datasets import Dataset
from specstream_mlx.training.export_peft import check_peft
from specstream_mlx.training.run import TrainRun
from tests.passes import stream_logits, verify
from tests.tiny import random_prompt
from tests.tolerances import LOGITS
from tests.training.training_cases import QUICK, prepared, rows, same, save_base

DATA = Dataset(rows(11), rows(5))
CASES: dict[str, dict[str, Any]] = {
    "lossless": {"mode": "lossless", "scale": 0.3, "rank": 7},
    "shared": {"mode": "shared", "prune_rank": 2, "stream_init_rank": 3},
    "shared-top-3": {"mode": "shared", "num_layers": 3, "value_rotation": 0.2},
}
QUICKER = {"iters": 2, "val_batches": 0, "warmup": 0, "learning_rate": 5e-2}


@pytest.mark.parametrize(
    ("family", "case"),
    [*(("llama", case) for case in CASES), *((f, c) for f in ("opt", "gpt2") for c in ("lossless", "shared-top-3"))],
)
def test_the_peft_form_comes_back_bit_for_bit(family: str, case: str, tmp_path: Path) -> None:
    """Red when: a tensor is renamed, transposed or rounded wrongly on one of the two ways."""
    base = save_base(tmp_path / "base", family)
    run = prepared(base, tmp_path / "out", **(QUICKER | CASES[case]))
    run.train(DATA)
    run.export_peft(tmp_path / "peft")
    ours_config, ours = read_adapter(tmp_path / "out")
    assert inspect_checkpoint(tmp_path / "peft").problems == ()
    convert(
        ConvertOptions(adapter_path=tmp_path / "peft", mlx_path=tmp_path / "back", hf_path=str(base), adapter_only=True)
    )
    config, found = read_adapter(tmp_path / "back")
    assert same(found, ours)
    assert config.lora is not None
    assert ours_config.lora is not None
    scale = ours_config.lora["scale"]
    assert config.lora["scale"] == pytest.approx(scale, rel=1e-15, abs=1e-15)  # float64, one quotient
    assert config.to_dict()["prune"] == ours_config.to_dict()["prune"]


def test_a_module_is_named_by_its_whole_path_within_the_block(tmp_path: Path) -> None:
    """Red when: PEFT puts LoRA on GPT-2's ``mlp.c_proj`` too, which was never trained."""
    base = save_base(tmp_path / "base", "gpt2")
    run = prepared(base, tmp_path / "out", **QUICKER, mode="shared", lora_keys=["attn.c_proj"])
    run.train(DATA)
    run.export_peft(tmp_path / "peft")
    config = read_json(tmp_path / "peft" / "adapter_config.json")
    assert (config["target_modules"], config["layers_to_transform"]) == (["attn.c_proj"], None)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("family", "mode"),
    [(f, m) for f in ("llama", "opt", "gpt2") for m in ("lossless", "shared")]
    + [("phi3", "shared"), ("opt-projected", "lossless")],
)
def test_peft_loads_the_exported_form_and_agrees(family: str, mode: str, tmp_path: Path) -> None:
    """Red when: PEFT reads another model out of the directory than we trained, or the twin cannot go on from it."""
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from specstream_torch.checkpoint import load_base, load_checkpoint, save_checkpoint
    from specstream_torch.generate import reference_logits
    from specstream_torch.loss import make_batch, streaming_loss
    from specstream_torch.testing import make_tiny_checkpoint

    hf_base, adapter = make_tiny_checkpoint(family, tmp_path, hidden_size=32, prune=False)
    mlx_base = tmp_path / "mlx"
    convert(ConvertOptions(adapter_path=adapter, mlx_path=mlx_base, hf_path=str(hf_base), fuse=False))
    shutil.rmtree(mlx_base / "adapters")
    for name in ("specstream.safetensors", "specstream_config.json"):
        (mlx_base / name).unlink()
    run = TrainRun.prepare(str(mlx_base), tmp_path / "out", QUICK | QUICKER | {"mode": mode, "prune_rank": 2})
    run.train(DATA)
    run.export_peft(tmp_path / "peft")

    tokens = random_prompt(12, seed=8)
    twin = load_checkpoint(load_base(hf_base), tmp_path / "peft", trainable=True)
    reference = reference_logits(twin.eval(), tokens, 11)
    model, _ = load(mlx_base, tmp_path / "out")
    caches = model.make_cache()
    model(mx.array([tokens[:-1]]), cache=caches)
    verified = verify(model, mx.array(tokens[-1:]), DraftTree.chain(0), caches)
    model.commit(verified, [0], caches)
    assert np.abs(np.array(verified.logits[0]) - reference.main[-1]).max() <= LOGITS
    assert np.abs(np.array(stream_logits(model, verified, 0, caches)) - reference.streams).max() <= LOGITS

    batch = make_batch(DATA.train[:3], 3, generator=torch.Generator().manual_seed(0))
    loss = streaming_loss(twin.train(), batch, stream_weight=0.1).loss
    loss.backward()
    trained = {name: value for name, value in twin.named_parameters() if value.requires_grad}
    # 7 LoRA targets in a block of llama, 6 of opt, 4 of gpt2: A and B of each in every layer that has them.
    counts = {"llama": 7, "phi3": 4, "opt": 6, "opt-projected": 6, "gpt2": 4}
    num_layers = 4 if mode == "shared" else 2
    assert sum("lora_" in name for name in trained) == 2 * counts[family] * num_layers
    assert all(value.grad is not None for value in trained.values())
    with torch.no_grad():
        for value in trained.values():
            value -= 0.05 * value.grad
    assert streaming_loss(twin, batch, stream_weight=0.1).loss < loss
    save_checkpoint(twin, tmp_path / "further", base_name=str(mlx_base))
    convert(ConvertOptions(adapter_path=tmp_path / "further", mlx_path=tmp_path / "back", adapter_only=True))
    further = read_adapter(tmp_path / "back")[1]
    ours = read_adapter(tmp_path / "out")[1]
    moved = [mx.abs(further[name] - ours[name]).max().item() for name in ours]
    assert 0 < max(moved) < 0.5


def test_families_that_do_not_convert_are_not_exported() -> None:
    """Red when: a PEFT directory is written that nothing reads, or a family that converts is forgotten."""
    for family in CONVERTED:
        check_peft(family)
    with pytest.raises(UnsupportedError, match="'gemma2' have no PyTorch form"):
        check_peft("gemma2")
