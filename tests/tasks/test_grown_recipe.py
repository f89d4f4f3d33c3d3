"""The recipe of the grown model with tiny settings: the function it keeps, what it can learn, its restart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from benchmarks.tasks.text_to_sql import grow  # noqa: E402
from benchmarks.tasks.text_to_sql.finetune import FinetuneSettings  # noqa: E402
from benchmarks.tasks.text_to_sql.grow import GrowSettings, build_grown, grown_model, layer_sources  # noqa: E402
from benchmarks.tasks.text_to_sql.pretrain import PretrainSettings, pretrain  # noqa: E402
from benchmarks.tasks.text_to_sql.tokenizer import save_tokenizer, train_sentencepiece  # noqa: E402
from specstream_mlx import load  # noqa: E402
from tests.tolerances import LOGITS  # noqa: E402

pytestmark = pytest.mark.parity

GROWTH = GrowSettings(width=3, num_layers=5, num_top=1, noise=0.5)
CONTINUED = PretrainSettings(num_steps=3, cooldown_steps=2, batch_size=2, warmup_steps=1, muon_learning_rate=0.0)
STREAMS = FinetuneSettings(num_steps=2, batch_size=2, num_stream_layers=2, rank=4, prune_rank=2, warmup_steps=1)


def tiny(vocab_size: int = 90) -> LlamaForCausalLM:
    """A random Llama of 3 layers with grouped heads and norms that are not all ones."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a directory with a tokenizer."""
    directory = tmp_path_factory.mktemp("small")
    save_tokenizer(train_sentencepiece(1024, 600, 0), directory, 1024)
    tiny(1024).save_pretrained(directory)
    return directory


def test_a_grown_model_computes_what_the_small_one_computes() -> None:
    """Catches a factor missing in a norm, a split of the wrong side, and noise that does not cancel."""
    small = tiny()
    grown = grown_model(small, GROWTH)
    config = grown.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (96, 120, 5)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (12, 6, 8)
    tokens = torch.randint(0, 90, (2, 30))
    with torch.no_grad():
        before, after = small(tokens).logits, grown(tokens).logits
    assert before.std() > 1
    torch.testing.assert_close(after, before, atol=LOGITS, rtol=0)


def test_all_that_was_added_can_learn_on_its_own() -> None:
    """Catches copies of a unit that stay copies for ever, and added layers that no gradient reaches."""
    grown = grown_model(tiny(), GROWTH)
    tokens = torch.randint(0, 90, (2, 30))
    grown(tokens, labels=tokens).loss.backward()
    for layer, (_, is_added) in zip(grown.model.layers, layer_sources(3, GROWTH), strict=True):
        down, gate = layer.mlp.down_proj.weight, layer.mlp.gate_proj.weight
        assert down.grad.abs().max() > 0
        assert is_added == (not down.any())
        if not is_added:
            first, second, _ = gate.grad.chunk(3)
            assert (first - second).abs().max() > 0.01 * first.abs().max()


def test_added_layers_stand_below_the_top_each_above_its_source() -> None:
    assert layer_sources(3, GROWTH) == [(0, False), (0, True), (1, False), (1, True), (2, False)]
    assert [source for source, _ in layer_sources(6, grow.GROW)] == [0, 1, 1, 2, 2, 3, 3, 4, 5]
    with pytest.raises(ValueError, match="expected 3 to 5"):
        layer_sources(3, replace(GROWTH, num_layers=6))


def test_training_goes_on_from_the_model_it_is_given(small: Path, tmp_path: Path) -> None:
    """Catches a start that is ignored, a restart that begins again from it, and one made from another start."""
    still = replace(CONTINUED, num_steps=1, adam_learning_rate=0.0)
    base = pretrain(still, tmp_path / "still", start=small, report_count=1)
    for name, tensor in load_file(small / "model.safetensors").items():
        assert torch.equal(tensor, load_file(base / "model.safetensors")[name]), name

    whole = pretrain(CONTINUED, tmp_path / "whole", start=small, report_count=1)
    pretrain(CONTINUED, tmp_path / "parts", start=small, save_seconds=0, stop=2)
    with pytest.raises(SystemExit, match="other settings"):
        pretrain(CONTINUED, tmp_path / "parts", start=base)
    parts = pretrain(CONTINUED, tmp_path / "parts", start=small, report_count=1)
    trained = load_file(parts / "model.safetensors")
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(tensor, trained[name]), name
    assert not torch.equal(trained["model.norm.weight"], load_file(small / "model.safetensors")["model.norm.weight"])


def test_one_command_makes_the_grown_model_and_does_nothing_twice(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = []

    def evaluate(model: Path, heldout: Path, figures: Path) -> dict[str, Any]:
        evaluated.append((model, len(heldout.read_text().splitlines())))
        return {"exact_match": 0.0, "drafts": {}}

    monkeypatch.setattr(grow, "evaluate_model", evaluate)
    growth = replace(GROWTH, width=2, num_layers=4)
    lines: list[str] = []

    def build() -> None:
        build_grown(
            tmp_path, small, growth=growth, continued=CONTINUED, streams=STREAMS, num_heldout=2, report=lines.append
        )

    build()
    model, _ = load(str(tmp_path / "model"))
    assert (model.gamma, len(model.base.layers)) == (4, 4)
    assert evaluated == [(tmp_path / "model", 2)]
    config = json.loads((tmp_path / "model" / "specstream_config.json").read_text())
    assert (config["num_stream_layers"], config["base_model"]["name_or_path"]) == (2, grow.BASE_NAME)
    assert json.loads(lines[-1]) == {"exact_match": 0.0}

    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError("a step was done again")

    for target in (
        "benchmarks.tasks.text_to_sql.grow.grown_model",
        "benchmarks.tasks.text_to_sql.pretrain.LlamaForCausalLM",
        "benchmarks.tasks.text_to_sql.finetune.train",
        "specstream_convert.convert",
    ):
        monkeypatch.setattr(target, fail)
    build()
