"""Tiny random models, a tokenizer of plain numbers, and drafters that are as right as one likes."""

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import generate_step, generation_stream
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specstream_mlx import SpecStreamModel, stream_generate
from specstream_mlx.drafters.scripted import Scripted
from specstream_mlx.drafters.streams.parameters import Streams
from specstream_mlx.families import model_classes
from specstream_mlx.formats.config import CONFIG_NAME, WEIGHTS_NAME, StreamConfig

ROTARY_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
WINDOW = 12  # of the models that have one; shorter than most texts of the tests
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Rotary models and variants that differ from those above in a setting, and what tells them apart.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama-linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama-llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama-yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "llama-dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 28},
    "llama-sliding": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "sliding_window": WINDOW,
    },
    "cohere": {"layer_norm_eps": 1e-5, "logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": {"layer_norm_eps": 1e-5, "logit_scale": 0.25, "sliding_window": WINDOW},
    "gemma": {},
    "gemma2": {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": WINDOW, "sliding_window_pattern": 3},
    "gemma3": {},
    "glm": {},
    "glm4": {"attention_bias": True, "partial_rotary_factor": 0.5},
    "gpt_neox": {
        "layer_norm_eps": 1e-5,
        "num_key_value_heads": 4,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.5,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_scaling": None,
    },
    "granite": {
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
    "olmo3": {"sliding_window": WINDOW},
    "phi": {"num_key_value_heads": 4, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "phi3-longrope": {
        "rope_scaling": {"type": "longrope", "long_factor": [1.5, 2.0, 3.0, 4.0], "short_factor": [1.0] * 4},
        "original_max_position_embeddings": 64,
    },
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 32} | _EXPERTS,
    "qwen3_moe": {"num_experts": 4, "decoder_sparse_step": 2, "mlp_only_layers": [], "norm_topk_prob": True} | _EXPERTS,
    "seed_oss": {},
    "smollm3": {"no_rope_layer_interval": 3},
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5, "qk_layernorm": True},
    "starcoder2": {},
}
WINDOWED = ("llama-sliding", "cohere2", "gemma3", "gemma3_text", "gpt_oss", "olmo3")
# Learned positions: models, and what tells the variants of one model_type apart.
LEARNED = {
    "opt": {"model_type": "opt"},
    "opt-post-norm": {"model_type": "opt", "do_layer_norm_before": False},
    "opt-projected": {"model_type": "opt", "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "gpt2": {"model_type": "gpt2"},
}
FAMILIES = (*ROTARY_FAMILIES, *LEARNED)  # the whole grid of tests runs on these
EVERY_FAMILY = (*FAMILIES, *VARIANTS)
VOCAB_SIZE = 97
END_OF_TEXT = 5


def base_config(family: str, **changes: Any) -> dict[str, Any]:
    """The ``config.json`` of a 4-layer model with D = 32, V = 97; grouped-query attention where the family has it."""
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_ctx": 512, "n_positions": 512, "layer_norm_epsilon": 1e-5}
        return {"vocab_size": VOCAB_SIZE} | sizes | LEARNED[family] | changes
    if family == "gemma3":  # the language model is a part of it
        text = base_config("gemma3_text", **changes)
        return {"model_type": family, "vocab_size": VOCAB_SIZE, "text_config": text}
    config = {
        "model_type": family.partition("-")[0],
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 512,
    }
    if family in LEARNED:
        return config | {"ffn_dim": 64} | LEARNED[family] | changes
    rotary = {
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    return config | rotary | VARIANTS.get(family, {}) | changes


def stream_config(**changes: Any) -> StreamConfig:
    """Four streams over the top two of four layers, low-rank initialisation, with a pruner."""
    raw: dict[str, Any] = {
        "gamma": 4,
        "num_stream_layers": 2,
        "mode": "shared",
        "stream_id": {"type": "embedding"},
        "stream_init": {"type": "low_rank", "rank": 4},
        "stream_position": "anchor_plus_j",
        "prune": {"type": "low_rank", "rank": 4, "layer": 2},
    }
    return StreamConfig.from_dict(raw | changes)


def randomise(module: Any, seed: int, scale: float = 0.3) -> None:
    """Fill a module with seeded normal weights; norms stay near one."""
    filled = []
    for index, (name, value) in enumerate(tree_flatten(module.parameters())):
        noise = mx.random.normal(value.shape, key=mx.random.key(1000 * seed + index))
        is_norm = name.endswith("weight") and value.ndim == 1
        filled.append((name, 1 + 0.1 * noise if is_norm else scale * noise))
    module.update(tree_unflatten(filled))


def make_base(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model, mlx-lm's own or ours."""
    config = base_config(family, **changes)
    model_class, args_class = model_classes(config)
    base = model_class(args_class.from_dict(config))
    randomise(base, seed)
    return base


def make_model(family: str = "llama", seed: int = 0, base_changes: Any = None, **changes: Any) -> SpecStreamModel:
    """A random model with random streams; ``changes`` go into the stream configuration."""
    base = make_base(family, seed, **(base_changes or {}))
    config = stream_config(**changes)
    streams = Streams(config, 32)
    randomise(streams, seed + 1)
    return SpecStreamModel(base, base.model_type, config, streams)


def save_directory(model: SpecStreamModel, path: Path) -> Path:
    """Write a model as ``convert`` does: an MLX directory with streams and a tokenizer of one word per id."""
    path.mkdir(parents=True)
    config = vars(model.args) | {"eos_token_id": END_OF_TEXT}
    (path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.base.parameters())))
    save_streams(model, path)
    words = {f"w{index}": index for index in range(VOCAB_SIZE)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=f"w{END_OF_TEXT}").save_pretrained(str(path))
    return path


def save_streams(model: SpecStreamModel, path: Path) -> None:
    """Write the two stream files alone, which make a sidecar."""
    assert model.stream_config is not None
    assert model.streams is not None
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG_NAME).write_text(json.dumps(model.stream_config.to_dict()))
    tensors = {f"specstream.{name}": value for name, value in tree_flatten(model.streams.parameters())}
    mx.save_safetensors(str(path / WEIGHTS_NAME), tensors)


class NumberTokenizer(TokenizerWrapper):
    """Token ``n`` reads ``"n "``; just what the loop asks of a tokenizer."""

    def __init__(self, end_of_text: Sequence[int] = (END_OF_TEXT,)) -> None:
        self.__dict__["_end_of_text"] = end_of_text

    @property
    def eos_token_ids(self) -> set[int]:
        return set(self.__dict__["_end_of_text"])

    bos_token = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [int(number) for number in text.split()]

    @property
    def detokenizer(self) -> Any:
        return _NumberDetokenizer()


class _NumberDetokenizer:
    def __init__(self) -> None:
        self._segment = ""

    def add_token(self, token: int) -> None:
        self._segment += f"{token} "

    def finalize(self) -> None:
        pass

    @property
    def last_segment(self) -> str:
        segment, self._segment = self._segment, ""
        return segment


def plain_tokens(
    base: Any,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    seed: int | None = None,
    end_of_text: Sequence[int] = (END_OF_TEXT,),
    **kwargs: Any,
) -> list[int]:
    """What mlx-lm's own generation gives, the end-of-text token included."""
    if seed is not None:
        mx.random.seed(seed)
    tokens: list[int] = []
    for token, _ in generate_step(mx.array(prompt), base, max_tokens=max_tokens, **kwargs):
        tokens.append(token)
        if token in end_of_text:
            break
    return tokens


def our_tokens(model: SpecStreamModel, prompt: Sequence[int], max_tokens: int, **kwargs: Any) -> list[int]:
    """The token ids of our generation."""
    tokenizer = kwargs.pop("tokenizer") if "tokenizer" in kwargs else NumberTokenizer()
    responses = stream_generate(model, tokenizer, list(prompt), max_tokens, **kwargs)
    return [token for response in responses for token in response.tokens]


def active_memory() -> int:
    """Bytes in use once nothing is under way on any stream and no cycle waits to be collected."""
    gc.collect()
    mx.synchronize()
    mx.synchronize(generation_stream)
    return mx.get_active_memory()


def random_prompt(length: int, seed: int) -> list[int]:
    """Ids without end-of-text."""
    return [int(token) for token in np.random.default_rng(seed).integers(END_OF_TEXT + 1, VOCAB_SIZE, length)]


@contextmanager
def drafter(
    model: SpecStreamModel, continuation: Sequence[int], prompt_length: int, accuracy: float, seed: int = 0
) -> Iterator[None]:
    """Replace what the streams predict by a script that knows the right continuation, as right as ``Scripted`` says.

    The streams still run, so that everything they do to the caches happens.
    """
    streams = model.drafter
    model.drafter = Scripted(continuation, prompt_length, accuracy, seed, beside=streams)
    try:
        yield
    finally:
        model.drafter = streams
