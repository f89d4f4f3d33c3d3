"""Adapters in shards, and dumps of a whole model with the adapter inside: the same output as the plain files give."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from convert_cases import ADAPTER, PREFIX, STREAMS, Case, Q

from specstream_convert import convert
from specstream_convert.verification.forward import output_logits
from specstream_mlx.errors import InvalidInputError, SpecStreamError
from tests.tolerances import LOGITS

WEIGHTS = f"adapter/{ADAPTER}"
NORM = "model.norm.weight"
Tensors = dict[str, mx.array]


def load(path: Path) -> Tensors:
    held = dict(mx.load(str(path)))
    mx.eval(held)
    return held


def write_shards(directory: Path, stem: str, tensors: Tensors, count: int) -> None:
    if count == 1:
        mx.save_safetensors(str(directory / f"{stem}.safetensors"), tensors)
        return
    names, weight_map = sorted(tensors), {}
    for i in range(count):
        file = f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::count]}
        mx.save_safetensors(str(directory / file), part)
        weight_map |= dict.fromkeys(part, file)
    (directory / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def make_dump(case: Case, *, stem: str = "model", shards: int = 1, config: bool = True) -> None:
    """Replace the adapter's file by ``PeftModel.state_dict()``: every tensor of the model under PEFT's names."""
    adapter, base = load(case.root / WEIGHTS), load(case.base / "model.safetensors")
    wrapped = {name.removeprefix(PREFIX).split(".lora_")[0] for name in adapter if ".lora_" in name}
    dump = {name.replace(".weight", ".default.weight"): value for name, value in adapter.items() if ".lora_" in name}
    for name, value in base.items():
        module = name.removesuffix(".weight")
        dump[f"{PREFIX}{module}.base_layer.weight" if module in wrapped else PREFIX + name] = value
    dump[PREFIX + "specstream.modules_to_save.default.stream_embeddings"] = adapter[STREAMS]
    dump[PREFIX + "specstream.original_module.stream_embeddings"] = 0 * adapter[STREAMS]
    (case.root / WEIGHTS).unlink()
    write_shards(case.adapter, stem, dump, shards)
    if config:
        shutil.copy(case.base / "config.json", case.adapter)


@pytest.fixture
def expected(pristine: dict[str, Case], tmp_path: Path) -> Path:
    """The output of the plain files."""
    case = pristine["shared"].copy(tmp_path / "plain")
    convert(case.options())
    return case.out


def same_weights(out: Path, expected: Path) -> None:
    found = {name: value for file in sorted(out.glob("model*.safetensors")) for name, value in load(file).items()}
    wanted = load(expected / "model.safetensors")
    assert set(found) == set(wanted)
    assert all(mx.array_equal(found[name], wanted[name]) for name in wanted)
    assert (out / "specstream.safetensors").read_bytes() == (expected / "specstream.safetensors").read_bytes()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stem", ["model", "adapter_model"])
def test_a_dump_is_its_own_base(case: Case, expected: Path, stem: str, shards: int) -> None:
    make_dump(case, stem=stem, shards=shards)
    shutil.rmtree(case.base)
    report = convert(case.options(hf_path=None)).to_dict()
    same_weights(case.out, expected)
    assert any("holds the base as well" in note for note in report["notes"])
    fates = {row["tensor"]: row["fate"] for row in report["tensors"]}
    assert fates[f"{PREFIX}{Q.removeprefix(PREFIX)}.base_layer.weight"] == "merged with LoRA"
    assert fates[PREFIX + NORM] == "copied"
    assert fates[PREFIX + "specstream.original_module.stream_embeddings"] == "untrained copy, dropped"
    assert len(fates) == len(report["tensors"])  # every tensor once


def test_a_dump_beside_its_base(case: Case, expected: Path) -> None:
    """With a base given the dump's copies must be its bits; they are dropped."""
    make_dump(case)
    report = convert(case.options())
    same_weights(case.out, expected)
    assert any(fate.tensor == PREFIX + NORM and "equal to the base's" in fate.fate for fate in report.tensors)


@pytest.mark.parametrize("name", [PREFIX + NORM, f"{Q}.base_layer.weight"])
def test_a_dump_of_another_base(case: Case, name: str) -> None:
    """A copy that differs from the base given is named, whether LoRA wraps its module or not."""
    make_dump(case)
    case.tensors("adapter/model.safetensors", lambda t: t.update({name: t[name] + 0.01}))
    with pytest.raises(SpecStreamError, match=name.replace(".", r"\.")):
        convert(case.options())
    convert(case.options(hf_path=None))  # alone it is a model of its own


def test_an_incomplete_dump_is_refused(case: Case) -> None:
    make_dump(case)
    missing = f"{PREFIX}model.layers.0.input_layernorm.weight"
    case.tensors("adapter/model.safetensors", lambda t: t.pop(missing))
    with pytest.raises(InvalidInputError, match=r"model\.layers\.0\.input_layernorm\.weight: missing"):
        convert(case.options(hf_path=None))


def test_a_dump_without_config_needs_a_base(case: Case, expected: Path) -> None:
    make_dump(case, config=False)
    case.json("adapter/adapter_config.json", lambda raw: raw.update(base_model_name_or_path=str(case.base)))
    convert(case.options(hf_path=None))
    same_weights(case.out, expected)


@pytest.mark.parametrize("copies", [[NORM], [f"{Q.removeprefix(PREFIX)}.base_layer.weight"]], ids=["norm", "q_proj"])
def test_copies_alone_are_no_dump(case: Case, expected: Path, copies: list[str]) -> None:
    """Frozen copies beside a ``config.json``: the norm without what LoRA wraps, or the reverse, is not a base."""
    base = load(case.base / "model.safetensors")
    held = {PREFIX + name: base[name.replace(".base_layer", "")] for name in copies}
    case.tensors(WEIGHTS, lambda t: t.update(held))
    if NORM not in copies:  # LoRA on q_proj alone, all of it with its base_layer
        case.json("adapter/adapter_config.json", lambda raw: raw.update(target_modules=".*layers.0.*q_proj"))
        case.tensors(
            WEIGHTS, lambda t: [t.pop(name) for name in list(t) if ".lora_" in name and not name.startswith(Q)]
        )
    shutil.copy(case.base / "config.json", case.adapter)
    case.json("adapter/adapter_config.json", lambda raw: raw.update(base_model_name_or_path=str(case.base)))
    report = convert(case.options(hf_path=None))
    assert any("equal to the base's" in fate.fate for fate in report.tensors)
    if NORM in copies:
        same_weights(case.out, expected)


def test_original_modules_are_the_base_s(case: Case, expected: Path) -> None:
    """A wrapped head: its untouched original belongs to the base, every tensor has one fate."""
    make_dump(case)
    head = PREFIX + "lm_head"

    def wrap(t: Tensors) -> None:
        t[f"{head}.original_module.weight"] = t[f"{head}.weight"]
        t[f"{head}.modules_to_save.default.weight"] = t.pop(f"{head}.weight")

    case.tensors("adapter/model.safetensors", wrap)
    report = convert(case.options(hf_path=None))
    same_weights(case.out, expected)
    names = [fate.tensor for fate in report.tensors]
    assert len(names) == len(set(names)) == len(load(case.adapter / "model.safetensors"))


def test_an_adapter_in_shards(case: Case, expected: Path) -> None:
    tensors = load(case.root / WEIGHTS)
    (case.root / WEIGHTS).unlink()
    write_shards(case.adapter, "adapter_model", tensors, 3)
    report = convert(case.options())
    same_weights(case.out, expected)
    names = {f"adapter_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert names <= {fate.file for fate in report.tensors}
    assert {f"adapter/{name}" for name in names} <= set(report.input_hashes)


def test_the_adapter_s_own_file_comes_first(case: Case, expected: Path) -> None:
    """A merged model beside the adapter, as trainers leave it, is not mistaken for the adapter."""
    shutil.copy(case.base / "model.safetensors", case.adapter)
    shutil.copy(case.base / "config.json", case.adapter)
    convert(case.options())
    same_weights(case.out, expected)


def test_other_files_of_the_stem_are_left_alone(case: Case, expected: Path) -> None:
    shutil.copy(case.root / WEIGHTS, case.adapter / "adapter_model.backup.safetensors")
    convert(case.options())
    same_weights(case.out, expected)


def drop_shard(directory: Path) -> None:
    (directory / "adapter_model-00002-of-00003.safetensors").unlink()


def drop_index(directory: Path) -> None:
    (directory / "adapter_model.safetensors.index.json").unlink()
    drop_shard(directory)


def stray_shard(directory: Path) -> None:
    shutil.copy(
        directory / "adapter_model-00002-of-00003.safetensors", directory / "adapter_model-00004-of-00004.safetensors"
    )


def path_in_index(directory: Path) -> None:
    index = directory / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../base/model.safetensors"}}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_shard, "adapter_model-00002-of-00003.safetensors, which is not there"),
        (drop_index, "without adapter_model.safetensors.index.json"),
        (stray_shard, "adapter_model-00004-of-00004.safetensors: not named"),
        (path_in_index, "not the name of a shard beside it"),
    ],
)
def test_damaged_shards(case: Case, damage: Callable[[Path], Any], words: str) -> None:
    tensors = load(case.root / WEIGHTS)
    (case.root / WEIGHTS).unlink()
    write_shards(case.adapter, "adapter_model", tensors, 3)
    damage(case.adapter)
    with pytest.raises(InvalidInputError) as caught:
        convert(case.options())
    assert words in str(caught.value)
    assert not case.out.exists()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_s_own_state_dict(tmp_path: Path) -> None:
    """The dump that ``PeftModel.state_dict()`` gives, against PEFT's logits."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from specstream_convert import ConvertOptions
    from specstream_torch.testing import write_tiny_base

    write_tiny_base("llama", tmp_path / "base", hidden_size=32, num_layers=2)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"]))
    generator = torch.Generator().manual_seed(1)
    tokens = [5, 17, 3, 40, 41, 2, 9]
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        wanted = model.eval()(torch.tensor([tokens])).logits[0].numpy()
    (tmp_path / "dump").mkdir()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()},
              tmp_path / "dump" / "model.safetensors")  # fmt: skip
    model.peft_config["default"].save_pretrained(tmp_path / "dump")
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "dump")
    convert(ConvertOptions(adapter_path=tmp_path / "dump", mlx_path=tmp_path / "out", lora_only=True))
    assert np.abs(output_logits(tmp_path / "out", np.array(tokens), live=False) - wanted).max() < LOGITS
