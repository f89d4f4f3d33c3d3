"""``--resume-adapter-file`` with adapters that others made: taken with their own LoRA, or refused in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from specstream_convert import ConvertOptions, convert
from specstream_mlx.errors import InvalidInputError, SpecStreamError, UnsupportedError, UsageError
from specstream_mlx.formats.adapter_directory import read_adapter, write_adapter
from specstream_mlx.training.datasets import Dataset
from specstream_mlx.training.export_peft import export_peft
from specstream_mlx.training.run import TrainRun
from specstream_mlx.training.trainable import lora_modules
from tests.training.training_cases import QUICK, prepared, rows, same, save_base

DATA = Dataset(rows(11), [])
SHORT = {"iters": 1, "warmup": 0, "learning_rate": 5e-2}
STILL = {"iters": 1, "warmup": 0, "learning_rate": 1e-30, "stream_lr_scale": 1.0, "val_batches": 0}
OWN = ("gamma", "num_stream_layers", "rank")  # of the quick settings, what an adapter decides
Q, V = "self_attn.q_proj", "self_attn.v_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module", params=["lossless", "shared"])
def peft(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a PyTorch trainer, which writes another ``training`` block than train here."""
    place = tmp_path_factory.mktemp(request.param)
    (place / "mode").write_text(request.param)
    for name, keys in {"some": [Q, V], "mixed": [Q, f"model.layers.2.{V}"]}.items():
        run = prepared(base, place / name, mode=request.param, lora_keys=keys, rank=3, scale=0.7, **SHORT)
        run.train(DATA)
        config, tensors = read_adapter(place / name)
        if name == "mixed":  # q of the last layer alone, v of the one before
            tensors = {key: value for key, value in tensors.items() if Q not in key or ".3." in key}
        export_peft(place / f"{name}-peft", config, tensors, 4, str(base))
        file = place / f"{name}-peft" / "specstream_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"training": {"epochs": 3}}))
        convert(
            ConvertOptions(
                adapter_path=place / f"{name}-peft", mlx_path=place / f"{name}-back", hf_path=str(base),
                adapter_only=True,
            )
        )  # fmt: skip
    return place


def started(base: Path, adapter: Path, target: Path, **changes: Any) -> TrainRun:
    """A run that starts from an adapter, with no setting that the adapter decides."""
    quick = {key: value for key, value in QUICK.items() if key not in OWN}
    return TrainRun.prepare(str(base), target, quick | STILL | changes, adapter=adapter)


def lora_of(tensors: dict[str, mx.array]) -> set[str]:
    return {name.removeprefix("lora.").rpartition(".")[0] for name in tensors if name.startswith("lora.")}


@pytest.mark.parametrize("name", ["some", "mixed"])
def test_an_adapter_of_a_pytorch_trainer_goes_on_with_the_modules_that_it_has(
    base: Path, peft: Path, name: str, tmp_path: Path
) -> None:
    """Red when: LoRA goes on every linear layer, or on other layers, whatever the adapter has; or starts afresh."""
    before = read_adapter(peft / f"{name}-back")[1]
    shared = (peft / "mode").read_text() == "shared"
    layers = (0, 1, 2, 3) if shared else (2, 3)
    expected = {f"model.layers.{layer}.{path}" for layer in layers for path in (Q, V)}
    if name == "mixed":
        expected = {f"model.layers.3.{Q}", f"model.layers.2.{V}"}
    assert lora_of(before) == expected
    run = started(base, peft / f"{name}-back", tmp_path / "out")
    assert (run.settings.rank, run.settings.scale) == (3, pytest.approx(0.7))
    if name == "some":
        assert (run.settings.lora_keys, run.settings.num_layers) == ([Q, V], -1)
    run.train(DATA)
    config, after = read_adapter(tmp_path / "out")
    assert same(after, before)
    run.export_peft(tmp_path / "peft")
    targets = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["target_modules"]
    assert targets == ([Q, V] if name == "some" else sorted(expected))
    convert(
        ConvertOptions(adapter_path=tmp_path / "peft", mlx_path=tmp_path / "back", hf_path=str(base), adapter_only=True)
    )
    assert same(read_adapter(tmp_path / "back")[1], before)
    again = started(base, tmp_path / "out", tmp_path / "again")
    assert again.settings.lora_keys == run.settings.lora_keys == config.training["lora_keys"]


def test_flags_that_say_what_an_adapter_has_are_no_contradiction(base: Path, peft: Path, tmp_path: Path) -> None:
    """Red when: a flag is refused for being there, or one that contradicts the adapter is swallowed."""
    adapter = peft / "some-back"
    asked: dict[str, Any] = {"lora_keys": [V, Q], "rank": 3}
    if (peft / "mode").read_text() == "shared":
        asked["num_layers"] = 4
        with pytest.raises(
            UsageError, match=r"v_proj of layers 0, 1, 2, 3, and --num-layers would have it on .* 2, 3;"
        ):
            started(base, adapter, tmp_path / "out", num_layers=2)
    run = started(base, adapter, tmp_path / "out", **asked)
    assert (run.settings.lora_keys, run.settings.num_layers) == ([Q, V], -1)
    with pytest.raises(UsageError, match=r"and lora_parameters.keys would have it on .*q_proj of layers") as caught:
        started(base, adapter, tmp_path / "out", lora_keys=[Q])
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="--rank 4 differs from its 3"):
        started(base, adapter, tmp_path / "out", rank=4)


def test_keys_are_paths_in_a_block_or_in_the_model(base: Path, tmp_path: Path) -> None:
    """Red when: a whole path is no key, or ``num_layers`` hides it, which it does not in mlx-lm."""
    keys = [Q, f"model.layers.0.{V}"]
    shared = prepared(base, tmp_path / "out", mode="shared", num_layers=1, lora_keys=keys)
    modules = lora_modules(shared.model, shared.config(), 1, keys)
    assert modules == {f"model.layers.0.{V}": 0, f"model.layers.3.{Q}": 3}
    with pytest.raises(UsageError, match=r"'model.layers.0.self_attn.v_proj' is no linear layer that may get LoRA"):
        prepared(base, tmp_path / "out", mode="lossless", lora_keys=keys)


def test_streams_alone_get_a_fresh_lora(base: Path, peft: Path, tmp_path: Path) -> None:
    """Red when: an adapter without LoRA cannot be trained on, or one whose LoRA is merged or lost is."""
    config, tensors = read_adapter(peft / "some")
    alone = tmp_path / "alone"
    alone.mkdir()
    streams = {name: value for name, value in tensors.items() if not name.startswith("lora.")}
    write_adapter(alone, config, streams, 4)
    file = alone / "specstream_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora": None}))
    if config.mode == "shared":
        shutil.rmtree(alone / "adapters")
        with pytest.raises(
            InvalidInputError, match="merged into a model, or lost; convert the fine-tune with"
        ) as caught:
            started(base, alone, tmp_path / "out")
        assert "\n" not in str(caught.value)
        return
    started(base, alone, tmp_path / "out", rank=2).train(DATA)
    after = read_adapter(tmp_path / "out")[1]
    assert same({name: after[name] for name in streams}, streams)
    assert len(lora_of(after)) == 14


def _embedding(tensors: dict[str, mx.array], config: dict[str, Any]) -> None:
    tensors["model.embed_tokens.lora_a"] = mx.ones((97, 3))
    tensors["model.embed_tokens.lora_b"] = mx.ones((3, 32))
    config["lora_parameters"]["keys"].append("model.embed_tokens")


def _of_two_ranks(tensors: dict[str, mx.array], _: dict[str, Any]) -> None:
    for side, axis in (("a", 1), ("b", 0)):
        name = f"lora.model.layers.3.{Q}.lora_{side}"
        tensors[name] = mx.take(tensors[name], mx.array([0, 1]), axis=axis)


def _below(tensors: dict[str, mx.array], _: dict[str, Any]) -> None:
    for name in [name for name in tensors if ".3." in name]:
        tensors[name.replace(".3.", ".0.")] = tensors.pop(name)


def _damaged(tensors: dict[str, mx.array], _: dict[str, Any]) -> None:
    for name in list(tensors):
        tensors[name] = tensors[name] * float("nan")


@pytest.mark.parametrize(
    ("mode", "change", "kind", "reason"),
    [
        ("shared", _embedding, UnsupportedError, "plain LoRA on linear layers of the blocks (model.embed_tokens), and"),
        ("shared", _damaged, InvalidInputError, "holds NaN or infinite values (and "),
        (
            "lossless",
            _of_two_ranks,
            UnsupportedError,
            "of several kinds (rank 2 with scale 0.7, rank 3 with scale 0.7)",
        ),
        ("lossless", _below, InvalidInputError, "lies below the stream layers, it would never act (and 1 more)"),
    ],
)
def test_what_train_cannot_go_on_with_is_one_line(
    base: Path, mode: str, change: Callable[..., None], kind: type[SpecStreamError], reason: str, tmp_path: Path
) -> None:
    """Red when: an adapter is refused tensor by tensor, or taken and changed."""
    adapter = tmp_path / "adapter"
    prepared(base, adapter, mode=mode, lora_keys=[Q, V], rank=3, scale=0.7, **SHORT).train(DATA)
    live = adapter / "adapters"
    file = live / "adapters.safetensors" if mode == "shared" else adapter / "specstream.safetensors"
    held: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
    tensors = {name: mx.array(value) for name, value in held.items()}
    mx.eval(tensors)
    config = json.loads((live / "adapter_config.json").read_text()) if mode == "shared" else {}
    change(tensors, config)
    mx.save_safetensors(str(file), tensors)
    if mode == "shared":
        (live / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(kind) as caught:
        started(base, adapter, tmp_path / "out")
    assert str(caught.value).startswith(f"--resume-adapter-file: {adapter}")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
