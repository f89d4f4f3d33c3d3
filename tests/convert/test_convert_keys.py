"""PEFT's names and scales: pure functions."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specstream_convert.adapter.peft_config import PeftConfig, layer_of, matched
from specstream_convert.adapter.peft_keys import Kind, parse, without_wrappers

P = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("raw", "kind", "module", "adapter"),
    [
        (f"{P}{Q}.lora_A.weight", Kind.LORA_A, Q, None),
        (f"{P}{Q}.lora_B.default.weight", Kind.LORA_B, Q, "default"),
        (f"module.{P}{Q}.lora_A.sql.weight", Kind.LORA_A, Q, "sql"),
        (f"_orig_mod.{P}{Q}.lora_A.weight", Kind.LORA_A, Q, None),
        (f"{P}model._fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.mlp.up_proj.lora_B.weight",
         Kind.LORA_B, "model.layers.0.mlp.up_proj", None),
        (f"{Q}.lora_A.weight", Kind.LORA_A, Q, None),
        (f"{P}{Q}.lora_B.bias", Kind.LORA_BIAS, Q, None),
        (f"{P}{Q}.lora_magnitude_vector", Kind.DORA, Q, None),
        (f"{P}{Q}.lora_magnitude_vector.default.weight", Kind.DORA, Q, "default"),
        (f"{P}{Q}.lora_velora_embed", Kind.VELORA, Q, None),
        (f"{P}{Q}.lora_A.bias", Kind.OTHER, f"{Q}.lora_A.bias", None),
        (f"{P}model.embed_tokens.lora_embedding_A", Kind.EMBEDDING_A, "model.embed_tokens", None),
        (f"{P}model.embed_tokens.lora_embedding_B.sql", Kind.EMBEDDING_B, "model.embed_tokens", "sql"),
        (f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta", Kind.TOKENS, "model.embed_tokens", None),
        (f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta.sql", Kind.TOKENS, "model.embed_tokens", "sql"),
        (f"{P}model.embed_tokens.token_adapter.base_layer.weight", Kind.BASE_COPY, "model.embed_tokens.weight", None),
        (f"{P}model.embed_tokens.modules_to_save.weight", Kind.SAVED, "model.embed_tokens.weight", None),
        (f"{P}model.layers.0.mlp.experts.base_layer.lora_A.weight", Kind.EXPERT_LORA,
         "model.layers.0.mlp.experts.base_layer", None),
        (f"{P}{Q}.base_layer.weight", Kind.BASE_COPY, f"{Q}.weight", None),
        (f"{P}model.embed_tokens.weight", Kind.SAVED, "model.embed_tokens.weight", None),
        (f"{P}lm_head.modules_to_save.default.weight", Kind.SAVED, "lm_head.weight", "default"),
        (f"{P}lm_head.original_module.weight", Kind.UNTRAINED, "lm_head.weight", None),
        (f"{P}specstream.stream_embeddings", Kind.STREAM, "stream_embeddings", None),
        (f"{P}model.specstream.stream_init.down.weight", Kind.STREAM, "stream_init.down.weight", None),
        ("specstream.prune.up.weight", Kind.STREAM, "prune.up.weight", None),
        (f"{P}specstream.modules_to_save.default.stream_embeddings", Kind.STREAM, "stream_embeddings", "default"),
        (f"{P}specstream.original_module.stream_embeddings", Kind.UNTRAINED, "specstream.stream_embeddings", None),
        (f"{P}specstream.stream_init.down.lora_A.weight", Kind.STREAM_WRAPPED, "stream_init.down.lora_A.weight", None),
        (f"{P}{Q}.lora_E", Kind.OTHER, f"{Q}.lora_E", None),
    ],
)  # fmt: skip
def test_names(raw: str, kind: Kind, module: str, adapter: str | None) -> None:
    key = parse(raw)
    assert (key.kind, key.module, key.adapter, key.raw) == (kind, module, adapter, raw)


@given(st.text(max_size=80))
def test_any_name_is_parsed(raw: str) -> None:
    assert parse(raw).raw == raw
    assert parse(P + raw).kind in Kind


def test_wrappers_are_reported() -> None:
    assert without_wrappers("base_model.model.x") == ("x", False)
    assert without_wrappers("module.module.base_model.model.x._orig_mod.y") == ("x.y", True)


def config(**values: object) -> PeftConfig:
    return PeftConfig(Path("adapter_config.json"), **({"rank": 8, "alpha": 16.0, "use_rslora": False} | values))


def test_scales() -> None:
    assert config().scale_of(Q) == 2.0
    assert config(use_rslora=True).scale_of(Q) == 16 / math.sqrt(8)
    mixed = config(rank_pattern={"q_proj": 4}, alpha_pattern={"layers.0.self_attn.q_proj": 2.0, "q_proj": 64.0})
    assert mixed.scale_of(Q) == 2 / 4
    assert mixed.scale_of("model.layers.1.self_attn.q_proj") == 64 / 4
    assert mixed.scale_of("model.layers.1.self_attn.k_proj") == 16 / 8


def test_patterns_match_as_in_peft() -> None:
    """The first key in order wins; a key is a regular expression that ends a dotted path."""
    assert matched({"proj": 1, "q_proj": 2}, Q, 0) == 2
    assert matched({".*": 1, "q_proj": 2}, Q, 0) == 1
    assert matched({"layers.[01].self_attn.q_proj": 3}, Q, 0) == 3
    assert matched({"layers.1.self_attn.q_proj": 3}, "model.layers.11.self_attn.q_proj", 0) == 0


def test_expected_modules() -> None:
    names = [f"model.layers.{i}.self_attn.{leaf}" for i in range(12) for leaf in ("q_proj", "k_proj")] + ["lm_head"]
    everything = config(target_modules=("q_proj", "k_proj")).expected_modules(names)
    assert everything == set(names) - {"lm_head"}
    some = config(target_modules=("q_proj",), exclude_modules=("layers.1.self_attn.q_proj",))
    assert some.expected_modules(names) == {n for n in names if n.endswith("q_proj")} - {names[2]}
    upper = config(target_modules=("q_proj",), layers_to_transform=(1, 11))
    assert upper.expected_modules(names) == {names[2], names[22]}
    assert config(target_modules=r".*\.q_proj").expected_modules(names) is None


def test_layer_of() -> None:
    assert layer_of("model.layers.10.mlp.up_proj") == 10
    assert layer_of("lm_head") is None


def test_modules_to_save() -> None:
    """PEFT wraps every module whose path ends with a name, and puts no LoRA inside."""
    saving = config(target_modules=("q_proj", "down_proj"), modules_to_save=("mlp", "norm"))
    assert saving.saves("model.layers.0.mlp.down_proj")
    assert saving.saves("model.layers.0.input_layernorm")
    assert not saving.saves("model.layers.0.self_attn.q_proj")
    assert saving.expected_modules([Q, "model.layers.0.mlp.down_proj"]) == {Q}


def test_token_rows() -> None:
    assert config(trainable_token_indices=(3, 1)).token_rows("model.embed_tokens") == (3, 1)
    by_module = config(trainable_token_indices={"embed_tokens": (3, 1), "lm_head": (2,)})
    assert by_module.token_rows("model.embed_tokens") == (3, 1)
    assert by_module.token_rows("lm_head") == (2,)
    assert by_module.token_rows("model.norm") is None
