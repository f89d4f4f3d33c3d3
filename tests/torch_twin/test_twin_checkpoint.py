"""Saving and loading: the files are the contract's, and what comes back computes the same."""

import hashlib
import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from safetensors.torch import load_file, save_file  # noqa: E402
from twin_models import PROMPT, load, tiny  # noqa: E402

from specstream_mlx.formats.config import StreamConfig as RuntimeConfig  # noqa: E402
from specstream_torch.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from specstream_torch.modeling import forward_streams, stream_module  # noqa: E402
from specstream_torch.streams import StreamConfig  # noqa: E402

OPTIONS = {"prune": True, "stream_init": "low_rank_residual"}
STREAM_TENSORS = {
    "stream_embeddings": (4, 32),
    "stream_init.down.weight": (3, 32),
    "stream_init.up.weight": (32, 3),
    "prune.down.weight": (3, 32),
    "prune.up.weight": (32, 3),
}


@pytest.mark.parametrize("mode", ["shared", "lossless"])
@pytest.mark.parametrize("form", ["A", "B"])
@torch.no_grad()
def test_round_trip(tmp_path: Path, form: str, mode: str) -> None:
    """Catches: streams left at random by PEFT, a tensor under another name, a lost scale or layer selection."""
    model = load("llama", mode=mode, **OPTIONS)
    save_checkpoint(model, tmp_path / "out", form=form)
    again = load_checkpoint(tiny("llama", mode=mode, **OPTIONS).base, tmp_path / "out").eval()
    call = (torch.tensor([PROMPT]), torch.tensor([[2, 8]]))
    first, second = forward_streams(model, *call), forward_streams(again, *call)
    assert torch.equal(first.streams, second.streams)
    assert torch.equal(first.main, second.main)

    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    in_adapter = {k.removeprefix("base_model.model.specstream."): v for k, v in adapter.items() if "specstream" in k}
    names = {"adapter_config.json", "adapter_model.safetensors", "specstream_config.json"}
    if form == "A":
        found = in_adapter
    else:
        assert in_adapter == {}
        names.add("specstream.safetensors")
        loaded = load_file(tmp_path / "out" / "specstream.safetensors")
        found = {k.removeprefix("specstream."): v for k, v in loaded.items()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {key: tuple(value.shape) for key, value in found.items()} == STREAM_TENSORS
    assert {value.dtype for value in found.values()} == {torch.float32}
    layers = {int(key.split(".layers.")[1].split(".")[0]) for key in adapter if "lora_" in key}
    assert layers == ({2, 3} if mode == "lossless" else {0, 1, 2, 3})


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("form", ["A", "B"])
def test_resumed_model_trains_the_same_tensors(tmp_path: Path, form: str, trainable: bool) -> None:
    """Catches: streams frozen after a resume, a base that thaws."""
    save_checkpoint(load("llama", **OPTIONS), tmp_path / "out", form=form)
    model = load_checkpoint(tiny("llama", **OPTIONS).base, tmp_path / "out", trainable=trainable)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "specstream" in name for name in trained)
    assert all(parameter.requires_grad == trainable for parameter in stream_module(model).parameters())
    assert (len([name for name in trained if "lora_" in name]) == 4 * 7 * 2) == trainable


def test_config_is_the_contract(tmp_path: Path) -> None:
    """Catches: a field the runtime refuses, numbers that are not the base's, a fingerprint of something else."""
    paths = tiny("llama", mode="lossless", **OPTIONS)
    save_checkpoint(load("llama", mode="lossless", **OPTIONS), tmp_path, training={"seed": 1}, base_name="org/model")
    raw = json.loads((tmp_path / "specstream_config.json").read_text())
    norm = load_file(paths.base / "model.safetensors")["model.norm.weight"]
    digest = hashlib.sha256(norm.numpy().astype("<f4").tobytes()).hexdigest()
    assert raw == {
        "format": "specstream",
        "format_version": 1,
        "gamma": 4,
        "num_stream_layers": 2,
        "mode": "lossless",
        "lora_rows": "streams",
        "stream_id": {"type": "embedding"},
        "stream_init": {"type": "low_rank", "rank": 3, "residual": True},
        "stream_position": "anchor_plus_j",
        "main_attends_streams": False,
        "prune": {"type": "low_rank", "rank": 3, "layer": 2, "residual": True, "final_norm": True},
        "base_model": {
            "name_or_path": "org/model",
            "model_type": "llama",
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 97,
            "tie_word_embeddings": False,
            "fingerprint": {"tensor": "model.norm.weight", "sha256": digest},
        },
        "training": {"seed": 1},
    }
    runtime = RuntimeConfig.from_dict(raw)
    assert runtime.tensor_shapes(32) == STREAM_TENSORS
    assert StreamConfig.from_json(raw) == stream_module(load("llama", mode="lossless", **OPTIONS)).config
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/model"


def test_value_rotation_config_round_trip() -> None:
    """Catches: an epsilon that is not written, or one written where there is no rotation."""
    config = StreamConfig(stream_id="value_rotation", epsilon=0.25)
    model = load("llama", stream_id="value_rotation", epsilon=0.25)
    raw = config.to_json(model.config)
    assert raw["stream_id"] == {"type": "value_rotation", "epsilon": 0.25}
    assert StreamConfig.from_json(raw) == config
    assert RuntimeConfig.from_dict(raw).stream_id.epsilon == 0.25
    assert stream_module(model).state_dict() == {}


def test_missing_streams_are_refused(tmp_path: Path) -> None:
    """Catches: a checkpoint without stream tensors that loads with random ones."""
    save_checkpoint(load("llama"), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "specstream" not in key}, path)
    with pytest.raises(ValueError, match="has 0 specstream tensors, expected 1"):
        load_checkpoint(tiny("llama").base, tmp_path)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """Catches: writing in place."""
    model = load("llama")
    save_checkpoint(model, tmp_path / "out", training={"run": 1})
    with pytest.raises(ValueError, match="form is 'C'"):
        save_checkpoint(model, tmp_path / "out", form="C")
    assert json.loads((tmp_path / "out" / "specstream_config.json").read_text())["training"] == {"run": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
