"""Every PEFT feature with a defined result, saved by PEFT itself: MLX logits against PEFT's, merged and live."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from float64_reference import to_numpy  # noqa: E402
from peft_cases import (  # noqa: E402
    ADAPTER,
    ATOL,
    FEATURES,
    HEAD,
    RESIZED,
    ROWS,
    TOKENS,
    Bases,
    Feature,
    Saved,
    label,
    quiet,
    randomise,
    refused,
    targets,
    variants,
)
from safetensors.torch import load_file, save_file  # noqa: E402

from specstream_convert.verification.forward import output_logits  # noqa: E402
from specstream_mlx import generate, load  # noqa: E402
from specstream_mlx.errors import InvalidInputError, UnsupportedError  # noqa: E402

pytestmark = pytest.mark.parity
CONFIG = "adapter_config.json"
BY_NAME = {feature.name: feature for feature in FEATURES}
EMBEDDING = "embed_tokens"
EMBED_WEIGHT = "base_model.model.model.embed_tokens.base_layer.weight"
HEAD_A = "base_model.model.lm_head.lora_A.weight"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bases]:
    """Tiny bases, one for every family and tie."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Bases(tmp_path_factory.mktemp("bases"))
    torch.set_num_threads(threads)


def made(bases: Bases, name: str, directory: Path, tie: bool = False, **changes: Any) -> Saved:
    """A llama adapter with one feature of the table."""
    return bases.save(replace(BY_NAME[name], **changes), "llama", tie, directory)


def change(saved: Saved, **tensors: Any) -> None:
    """Change tensors of a saved adapter; None removes one."""
    held = load_file(saved.adapter / ADAPTER) | {name: value for name, value in tensors.items() if value is not None}
    kept = {name: value for name, value in held.items() if tensors.get(name, value) is not None}
    save_file(kept, saved.adapter / ADAPTER)


def change_config(saved: Saved, **values: Any) -> None:
    path = saved.adapter / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def tensors(path: Path) -> dict[str, mx.array]:
    return mx.load(str(path))


@pytest.mark.parametrize(
    ("feature", "family", "tie"), [pytest.param(*v, id=f"{v[1]}-{label(v[0], v[2])}") for v in variants()]
)
def test_logits_are_pefts(bases: Bases, tmp_path: Path, feature: Feature, family: str, tie: bool) -> None:
    """Merged and live; no tensor is without a fate; where there is no live form the refusal says what to do."""
    saved = bases.save(feature, family, tie, tmp_path / "adapter")
    plain = output_logits_of_base(bases, family, tie)
    assert np.abs(saved.logits[:, : plain.shape[1]] - plain).max() > 100 * ATOL
    for name, fuse in (("merged", True), ("live", False)):
        words = refused(feature, family, fuse=fuse)
        if words is not None:
            with pytest.raises(UnsupportedError, match=words):
                saved.convert(tmp_path / name, fuse=fuse)
            continue
        assert saved.difference(tmp_path / name, fuse=fuse) <= ATOL
        report = json.loads((tmp_path / name / "conversion_report.json").read_text())
        wanted = {(ADAPTER, tensor) for tensor in tensors(next(saved.adapter.rglob(ADAPTER)))}
        wanted |= {("model.safetensors", tensor) for tensor in tensors(saved.base / "model.safetensors")}
        assert {(row["file"], row["tensor"]) for row in report["tensors"]} == wanted


_plain: dict[Path, Any] = {}


def output_logits_of_base(bases: Bases, family: str, tie: bool) -> Any:
    path = bases.path(family, tie)
    if path not in _plain:
        with torch.no_grad():
            _plain[path] = bases.model(family, tie).eval()(torch.tensor([TOKENS])).logits[0].numpy()
    return _plain[path]


def test_eva_spreads_ranks(bases: Bases, tmp_path: Path) -> None:
    """The EVA row of the table is about something: PEFT redistributed the ranks."""
    saved = made(bases, "init EVA", tmp_path / "adapter")
    assert set(json.loads((saved.adapter / CONFIG).read_text())["rank_pattern"].values()) != {4}
    assert len(saved.convert(tmp_path / "out", fuse=False).lora["ranks"]) > 1


def test_pattern_order_is_the_files(bases: Bases, tmp_path: Path) -> None:
    """PEFT saves pattern keys sorted and goes by the file when it loads: overlapping keys then mean another scale."""
    settings = {"alpha_pattern": {"v_proj": 1, ".*_proj": 24}}
    saved = made(bases, "LoRA", tmp_path / "adapter", settings=lambda family: settings)
    with torch.no_grad(), quiet():
        loaded = peft.PeftModel.from_pretrained(bases.model("llama", False), saved.adapter).eval()
        wanted = loaded(torch.tensor([TOKENS])).logits[0].numpy()
    assert np.abs(wanted - saved.logits).max() > 100 * ATOL
    assert replace(saved, logits=wanted).difference(tmp_path / "out", fuse=True) <= ATOL


# Tied embeddings


@pytest.mark.parametrize("name", ["LoRA of the embedding", "modules_to_save LM head"])
def test_one_side_is_untied(bases: Bases, tmp_path: Path, name: str) -> None:
    """The output has an LM head of its own, says so, and the base's embedding has two fates."""
    report = made(bases, name, tmp_path / "adapter", tie=True).convert(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert report.base["tie_word_embeddings"] is False
    assert any("not tied" in note for note in report.notes)
    targets = [fate.target for fate in report.tensors if fate.tensor == "model.embed_tokens.weight"]
    assert targets == ["model.safetensors:model.embed_tokens.weight", "model.safetensors:lm_head.weight"]
    base = tensors(bases.path("llama", True) / "model.safetensors")["model.embed_tokens.weight"]
    out = tensors(tmp_path / "out" / "model.safetensors")
    side = {"model.embed_tokens.weight", "lm_head.weight"}
    assert sum(mx.array_equal(out[name], base) for name in side) == 1


def test_both_sides_stay_tied(bases: Bases, tmp_path: Path) -> None:
    """With ensure_weight_tying the second copy is checked and dropped."""
    saved = made(bases, "LoRA of the embedding, ensure_weight_tying", tmp_path / "adapter", tie=True)
    report = saved.convert(tmp_path / "out")
    assert "lm_head.weight" not in tensors(tmp_path / "out" / "model.safetensors")
    fates = {fate.tensor: fate.fate for fate in report.tensors}
    assert "shares" in fates[HEAD_A]
    change(saved, **{HEAD_A: load_file(saved.adapter / ADAPTER)[HEAD_A] + 1e-6})
    with pytest.raises(InvalidInputError, match=r"lm_head\.lora_A\.weight: differs .* ensure_weight_tying"):
        saved.convert(tmp_path / "other")
    change(saved, **{HEAD_A: None, HEAD_A.replace("_A", "_B"): None})
    with pytest.raises(InvalidInputError, match=r"ensure_weight_tying .* incomplete"):
        saved.convert(tmp_path / "other")


# Copies of the base


def test_frozen_copies(bases: Bases, tmp_path: Path) -> None:
    """PEFT saves the frozen embedding beside its LoRA: dropped when it is the base's, in any dtype; else refused."""
    saved = made(bases, "LoRA of the embedding", tmp_path / "adapter")
    fates = {fate.tensor: fate.fate for fate in saved.convert(tmp_path / "out").tensors}
    assert "equal to the base's" in fates[EMBED_WEIGHT]
    weight = load_file(saved.adapter / ADAPTER)[EMBED_WEIGHT]
    change(saved, **{EMBED_WEIGHT: weight.bfloat16()})
    assert saved.difference(tmp_path / "half", fuse=True) <= ATOL
    change(saved, **{EMBED_WEIGHT: weight + 1e-3})
    with pytest.raises(InvalidInputError, match=r"base_layer\.weight: differs .* another base, or trained without"):
        saved.convert(tmp_path / "other")


def test_two_names_of_one_module(bases: Bases, tmp_path: Path) -> None:
    """A resized module of modules_to_save is written twice; the two must be one."""
    saved = made(bases, "resized, modules_to_save both", tmp_path / "adapter")
    name = "base_model.model.lm_head.modules_to_save.weight"
    change(saved, **{name: load_file(saved.adapter / ADAPTER)[name] + 1})
    with pytest.raises(InvalidInputError, match="means the same tensor as"):
        saved.convert(tmp_path / "out")


# The vocabulary


def tokenizer(size: int) -> str:
    return json.dumps({"model": {"vocab": {f"t{i}": i for i in range(size)}}, "added_tokens": []})


def test_resized_vocabulary(bases: Bases, tmp_path: Path) -> None:
    """config.json has the new size, the adapter's tokenizer goes along, and one that is larger still is refused."""
    saved = made(bases, "resized vocabulary", tmp_path / "adapter")
    (saved.adapter / "tokenizer.json").write_text(tokenizer(RESIZED))
    report = saved.convert(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == RESIZED
    assert report.base["vocab_size"] == RESIZED
    assert (tmp_path / "out" / "tokenizer.json").read_text() == tokenizer(RESIZED)
    (saved.adapter / "tokenizer.json").write_text(tokenizer(RESIZED + 1))
    with pytest.raises(InvalidInputError, match=rf"token id {RESIZED}.*{RESIZED} rows"):
        saved.convert(tmp_path / "other")


def test_tokenizer_above_a_named_adapter(bases: Bases, tmp_path: Path) -> None:
    """A Trainer leaves the tokenizer one directory above a named adapter."""
    saved = made(bases, "adapter in a sub-directory", tmp_path / "adapter")
    (saved.adapter / "tokenizer.json").write_text(tokenizer(90))
    saved.convert(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == tokenizer(90)


def test_resized_on_one_side_only(bases: Bases, tmp_path: Path) -> None:
    """PEFT saves the resized embedding under its LoRA and forgets the LM head."""
    saved = made(bases, "LoRA of the embedding", tmp_path / "adapter", resize=True)
    with pytest.raises(InvalidInputError, match="only one side was saved"):
        saved.convert(tmp_path / "out")


def test_streams_of_a_resized_vocabulary(bases: Bases, tmp_path: Path) -> None:
    """The trainer may record the vocabulary before or after the resizing; another one is refused."""
    saved = made(bases, "resized vocabulary", tmp_path / "adapter")
    for size in (97, RESIZED):
        add_streams(saved.adapter, base_model={"vocab_size": size})
        saved.convert(tmp_path / str(size), lora_only=False)
        recorded = json.loads((tmp_path / str(size) / "specstream_config.json").read_text())["base_model"]
        assert recorded["vocab_size"] == RESIZED
        load(tmp_path / str(size))
    add_streams(saved.adapter, base_model={"vocab_size": 99})
    with pytest.raises(InvalidInputError, match="vocab_size is 99"):
        saved.convert(tmp_path / "other", lora_only=False)


# Live adapters


def add_streams(adapter: Path, **changes: Any) -> None:
    """Form B streams beside a PEFT adapter."""
    streams = {"specstream.stream_embeddings": 0.5 * torch.randn(3, 32, generator=torch.Generator().manual_seed(3))}
    save_file(streams, adapter / "specstream.safetensors")
    config = {
        "format": "specstream",
        "format_version": 1,
        "gamma": 3,
        "num_stream_layers": 1,
        "mode": "shared",
        "lora_rows": "all",
        "stream_id": {"type": "embedding"},
        "stream_init": {"type": "identity"},
        "stream_position": "anchor_plus_j",
        "prune": None,
    }
    (adapter / "specstream_config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "name", ["DoRA with rsLoRA and patterns", "LoRA of embedding and LM head", "modules_to_save norms"]
)
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_generation_with_a_live_adapter(bases: Bases, tmp_path: Path, name: str, tie: bool) -> None:
    """Our runtime drafts with the live form too, and says what the merged model says."""
    saved = made(bases, name, tmp_path / "adapter", tie=tie)
    add_streams(saved.adapter)
    texts = []
    for fuse in (True, False):
        saved.convert(tmp_path / str(fuse), lora_only=False, fuse=fuse)
        model, words = load(tmp_path / str(fuse))
        texts.append(generate(model, words, TOKENS, max_tokens=24, draft="tree"))
    assert texts[0] == texts[1]
    model, words = load(tmp_path / "True")
    assert texts[0] == generate(model, words, TOKENS, max_tokens=24, draft="off")


def test_a_dora_without_its_base(bases: Bases, tmp_path: Path) -> None:
    """``--adapter-only`` holds DoRA; loaded over the base it says what the merged model says."""
    saved = made(bases, "DoRA", tmp_path / "adapter")
    add_streams(saved.adapter)
    saved.convert(tmp_path / "merged", lora_only=False)
    saved.convert(tmp_path / "sidecar", lora_only=False, adapter_only=True)
    config = json.loads((tmp_path / "sidecar" / "adapters" / CONFIG).read_text())
    assert config["fine_tune_type"] == "dora"
    base = tmp_path / "base"
    shutil.copytree(saved.base, base)
    (base / "config.json").write_text((tmp_path / "merged" / "config.json").read_text())
    texts = []
    for model, words in (load(base, adapter=tmp_path / "sidecar"), load(tmp_path / "merged")):
        texts.append(generate(model, words, TOKENS, max_tokens=24))
    assert texts[0] == texts[1]


def test_live_adapters_cannot_untie(bases: Bases, tmp_path: Path) -> None:
    saved = made(bases, "LoRA of the LM head", tmp_path / "adapter", tie=True)
    add_streams(saved.adapter)
    with pytest.raises(UnsupportedError, match=r"unties the LM head.*leave out --adapter-only"):
        saved.convert(tmp_path / "out", lora_only=False, adapter_only=True)


# Quantised bases


@dataclass(frozen=True)
class Quantized:
    """A quantised mlx-lm base, and the same values in a PyTorch model."""

    path: Path
    model: Any


def quantized(bases: Bases, path: Path, bits: int = 8, tie: bool = False) -> Quantized:
    """Quantise a base with mlx-lm; the PyTorch model gets the dequantised weights."""
    source = bases.path("llama", tie)
    model, config = quantize_model(*load_model(source, lazy=False)[:2], group_size=32, bits=bits)
    path.mkdir()
    held = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), held)
    (path / "config.json").write_text(json.dumps(config))
    twin = bases.model("llama", tie)
    values = {}
    for name in (n for n in held if n.endswith(".scales")):
        module = name.removesuffix(".scales")
        parts = [held[f"{module}.{part}"] for part in ("weight", "scales", "biases")]
        values[f"{module}.weight"] = torch.tensor(to_numpy(mx.dequantize(*parts, group_size=32, bits=bits)))
    twin.load_state_dict(values, strict=False)
    return Quantized(path, twin)


def adapted(base: Quantized, directory: Path, copies: bool = False, **settings: Any) -> Saved:
    """An adapter trained over the dequantised weights."""
    with quiet():
        config = {"r": 4, "lora_alpha": 6, "target_modules": targets("llama"), "task_type": "CAUSAL_LM"} | settings
        model = peft.get_peft_model(base.model, peft.LoraConfig(**config))
        randomise(model)
        model.save_pretrained(directory, save_embedding_layers=copies)
        with torch.no_grad():
            logits = model.eval()(torch.tensor([TOKENS])).logits[0].numpy()
    return Saved(FEATURES[0], base.path, directory, logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"target_modules": ["q_proj", EMBEDDING, HEAD]},
        {"modules_to_save": ["norm"], "use_dora": True},
    ],
    ids=["dora", "embedding and head", "norms"],
)
def test_live_on_a_quantised_base(bases: Bases, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Nothing is lost: PEFT's logits over the same quantised values; norms, which are not quantised, are replaced."""
    saved = adapted(quantized(bases, tmp_path / "base"), tmp_path / "adapter", **settings)
    assert saved.convert(tmp_path / "out").placement == "live"
    assert np.abs(output_logits(tmp_path / "out", np.array(TOKENS), live=True) - saved.logits).max() <= ATOL


@pytest.mark.parametrize(
    ("bits", "tie", "settings", "words"),
    [
        (3, False, {"use_dora": True}, "3 bits"),
        (8, False, {"use_dora": True, "target_modules": ["q_proj", EMBEDDING]}, "one magnitude per token"),
        (8, False, {"modules_to_save": ["o_proj"]}, "changes model.layers.0.self_attn.o_proj.weight, which is quan"),
        (8, False, {"trainable_token_indices": ROWS}, "changes model.embed_tokens.weight, which is quantised"),
        (8, True, {"target_modules": ["q_proj", EMBEDDING]}, "its tied LM head values of its own"),
    ],
    ids=["3 bits", "dora of the embedding", "quantised layer", "token rows", "tied"],
)
def test_not_on_a_quantised_base(
    bases: Bases, tmp_path: Path, bits: int, tie: bool, settings: dict[str, Any], words: str
) -> None:
    """Refused with the way out; nothing is written."""
    saved = adapted(quantized(bases, tmp_path / "base", bits, tie), tmp_path / "adapter", **settings)
    with pytest.raises(UnsupportedError, match="full-precision base with --hf-path, or --dequantize") as caught:
        saved.convert(tmp_path / "out")
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_copy_of_a_quantised_weight_is_not_compared(bases: Bases, tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj", EMBEDDING]}
    saved = adapted(quantized(bases, tmp_path / "base"), tmp_path / "adapter", copies=True, **settings)
    with pytest.raises(InvalidInputError, match=r"base_layer\.weight: cannot be compared.*--ignore-keys"):
        saved.convert(tmp_path / "out")
    saved.convert(tmp_path / "out", ignore_keys=r".*base_layer.*")
    assert np.abs(output_logits(tmp_path / "out", np.array(TOKENS), live=True) - saved.logits).max() <= ATOL


def test_the_report_tells_what_the_adapter_is(bases: Bases, tmp_path: Path) -> None:
    report = made(bases, "DoRA with rsLoRA and patterns", tmp_path / "adapter").convert(tmp_path / "out", fuse=False)
    assert report.lora["use_dora"] is report.lora["use_rslora"] is True
    assert report.lora["ranks"] == [3, 4, 5, 6]
    m = [fate for fate in report.tensors if fate.tensor.endswith("lora_magnitude_vector")]
    assert {fate.target.rpartition(".")[2] for fate in m} == {"m"}


def test_an_adapter_that_only_trained_whole_modules(bases: Bases, tmp_path: Path) -> None:
    """LoRA that does nothing is a fault of the save, unless something else was trained."""
    saved = made(bases, "modules_to_save norms", tmp_path / "adapter")
    held = load_file(saved.adapter / ADAPTER)
    change(saved, **{name: torch.zeros_like(value) for name, value in held.items() if ".lora_B." in name})
    assert any("A or B is zero" in warning for warning in saved.convert(tmp_path / "out").warnings)
