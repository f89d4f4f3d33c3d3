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
from specstream_mlx.families import FAMILIES as FAMILIES_BY_TYPE
from specstream_mlx.families import model_classes
from specstream_mlx.formats.config import CONFIG_NAME, WEIGHTS_NAME, StreamConfig

ROTARY_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
WINDOW = 12  # of the models that have one; shorter than most texts of the tests
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHARED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1} | _EXPERTS
_ROUTED = {"norm_topk_prob": True, "routed_scaling_factor": 1.5, "n_group": 1, "topk_group": 1}
_MIXED = ["sliding_attention", "full_attention"] * 2
_ROPES = {
    "sliding_attention": {"rope_theta": 5000.0, "rope_type": "default"},
    "full_attention": {"rope_theta": 10000.0, "rope_type": "default"},
}
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
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
    "Klear": {"attention_bias": True, "mlp_only_layers": [1], "num_experts": 4, "n_shared_experts": 1}
    | {"decoder_sparse_step": 1, "norm_topk_prob": True}
    | _EXPERTS,
    "afmoe": {"layer_types": _MIXED, "sliding_window": WINDOW, "num_experts": 4, "num_dense_layers": 1} | _EXPERTS,
    "apertus": {"mlp_bias": False, "attention_bias": False, "post_norm": False, "qk_norm": True},
    "bailing_moe": {"num_experts": 4, "num_shared_experts": 1, "use_qk_norm": True, "first_k_dense_replace": 1}
    | {"norm_topk_prob": True, "partial_rotary_factor": 0.5}
    | _EXPERTS,
    "dbrx": {
        "d_model": 32,
        "n_layers": 4,
        "n_heads": 4,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek": _SHARED,
    "dots1": _SHARED | _ROUTED,
    "ernie4_5": {"use_bias": False},
    "ernie4_5_moe": {"use_bias": False, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}
    | {"moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "exaone": {"num_layers": 4, "layer_norm_epsilon": 1e-5},
    "exaone4": {"rope_scaling": None, "sliding_window": WINDOW, "sliding_window_pattern": "LLG"},
    "exaone_moe": {"layer_types": _MIXED, "sliding_window": WINDOW, "is_moe_layer": [False, True, True, True]}
    | {"num_experts": 4, "num_shared_experts": 1}
    | _EXPERTS,
    "gemma4_text": {
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "layer_types": _MIXED,
        "sliding_window": WINDOW,
        "rope_parameters": None,
        "tie_word_embeddings": True,
    },
    "gemma4": {},
    "glm4_moe": {"rope_scaling": None, "use_qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.5}
    | _SHARED
    | _ROUTED,
    "gpt_bigcode": {"n_embd": 32, "n_layer": 4, "n_inner": 64, "n_head": 4, "n_positions": 512}
    | {"layer_norm_epsilon": 1e-5, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "gptj": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512, "rotary_dim": 4},
    "granitemoe": {
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "attention_bias": False,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "helium": {"attention_bias": False, "mlp_bias": False},
    "hunyuan": {"attention_bias": False, "moe_topk": 2, "num_experts": 4, "num_shared_expert": 1}
    | {"use_mixed_mlp_moe": True, "use_qk_norm": True, "use_cla": False, "cla_share_factor": 2}
    | {"rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}, "tie_word_embeddings": True},
    "hunyuan_v1_dense": {"rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}},
    "internlm2": {},
    "internlm3": {"qkv_bias": True},
    "laguna": {"layer_types": _MIXED, "sliding_window": WINDOW, "rope_parameters": _ROPES, "num_experts": 4}
    | {"shared_expert_intermediate_size": 32, "moe_routed_scaling_factor": 1.5}
    | _EXPERTS,
    "lille-130m": {"model_type": "lille-130m", "block_size": 512, "layer_norm_eps": 1e-5, "n_embd": 64}
    | {"n_head": 4, "n_kv_heads": 2, "n_layer": 4},
    "llama4_text": {"intermediate_size_mlp": 64, "no_rope_layers": [1, 1, 0, 1], "use_qk_norm": True},
    "mellum": {"layer_types": _MIXED, "sliding_window": WINDOW, "rope_parameters": _ROPES, "num_experts": 4}
    | {"norm_topk_prob": True}
    | _EXPERTS,
    "mimo": {},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": WINDOW,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 5000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "v_head_dim": 6,
        "swa_head_dim": 8,
        "swa_v_head_dim": 6,
        "partial_rotary_factor": 0.5,
        "attention_value_scale": 0.7,
    }
    | _SHARED
    | _ROUTED,
    "minicpm": {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 3.0},
    "minicpm3": {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 3.0, "q_lora_rank": 16, "kv_lora_rank": 8}
    | {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "num_key_value_heads": 4}
    | {"rope_scaling": {"original_max_position_embeddings": 64, "short_factor": [1.0, 1.0], "long_factor": [1.5, 2.0]}},
    "minimax": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32, "rotary_dim": 4},
    "ministral3": {
        "rope_parameters": _YARN
        | {"rope_theta": 10000.0, "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 4}
    },
    "ministral3-sliding": {
        "rope_parameters": _YARN
        | {"rope_theta": 10000.0, "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 4},
        "layer_types": _MIXED,
        "sliding_window": WINDOW,
    },
    "mistral3": {},
    "muse_glimmer": {"layer_types": _MIXED, "sliding_window": WINDOW, "output_multiplier": 0.5},
    "nemotron": {"hidden_act": "relu2", "norm_eps": 1e-5},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "openelm": {"num_transformer_layers": 4, "model_dim": 32, "ffn_dim_divisor": 8, "num_query_heads": [2, 4, 4, 6]}
    | {"num_kv_heads": [1, 2, 2, 3], "ffn_multipliers": [1.0, 1.5, 2.0, 2.0]},
    "phimoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [1.5, 2.0, 3.0, 4.0],
            "short_factor": [1.0] * 4,
            "long_mscale": 1.2,
            "short_mscale": 1.1,
        },
    },
    "phixtral": {"num_vocab": 97, "model_dim": 32, "num_heads": 4, "num_layers": 4, "rotary_dim": 4}
    | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "pixtral": {},
    "plamo": {"num_attention_heads": 4, "n_shared_head": 2},
    "qwen": {"kv_channels": 8, "layer_norm_epsilon": 1e-5},
    "qwen2_vl": {},
    "qwen3_vl": {},
    "qwen3_vl_moe": {},
    "solar_open": {"partial_rotary_factor": 1.0} | _SHARED | _ROUTED,
    "spark2_5": {"sliding_window": WINDOW, "rope_parameters": _ROPES},
    "step3p5": {"num_attention_groups": 2, "layer_types": _MIXED, "sliding_window": WINDOW, "moe_num_experts": 4}
    | {"moe_top_k": 2, "moe_intermediate_size": 32, "share_expert_dim": 32},
    "telechat3": {},
}
WINDOWED = (
    "llama-sliding",
    "afmoe",
    "cohere2",
    "exaone4",
    "exaone_moe",
    "gemma3",
    "gemma3_text",
    "gemma4",
    "gemma4_text",
    "gpt_oss",
    "laguna",
    "mellum",
    "mimo_v2_flash",
    "ministral3-sliding",
    "muse_glimmer",
    "olmo3",
    "spark2_5",
    "step3p5",
)
# Checkpoints with vision: the family whose configuration the language model has.
_LANGUAGE_MODELS = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "mistral3": "ministral3",
    "pixtral": "llama",
    "qwen2_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}
# Other names of a model_type that mlx-lm runs with the same code: in the table, but not in every test.
ALIASES = {
    "gemma4_unified": "gemma4",
    "iquestcoder": "llama",
    "llava": "mistral3",
    "minimax_m2": "minimax",
    "phi-msft": "phixtral",
    "qwen2_5_vl": "qwen2_vl",
    "xverse": "llama",
}
# Learned positions: models, and what tells the variants of one model_type apart.
LEARNED = {
    "opt": {"model_type": "opt"},
    "opt-post-norm": {"model_type": "opt", "do_layer_norm_before": False},
    "opt-projected": {"model_type": "opt", "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "gpt2": {"model_type": "gpt2"},
}
FAMILIES = (*ROTARY_FAMILIES, *LEARNED)  # the whole grid of tests runs on these
EVERY_FAMILY = (*FAMILIES, *VARIANTS)
# Whose blocks hold nothing for a pass that one of the others lacks; the test of all pairs leaves them out.
ALIKE = (
    *("Klear", "afmoe", "apertus", "bailing_moe", "dbrx", "deepseek", "dots1", "ernie4_5", "ernie4_5_moe", "exaone"),
    *("exaone_moe", "gemma4", "glm4_moe", "gptj", "granitemoe", "helium", "hunyuan", "hunyuan_v1_dense", "internlm2"),
    *("internlm3", "laguna", "lille-130m", "mellum", "mimo", "minicpm", "minimax", "ministral3", "nemotron", "olmoe"),
    *("phimoe", "pixtral", "plamo", "qwen", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "solar_open", "spark2_5"),
    *("step3p5", "telechat3"),
)
VOCAB_SIZE = 97
END_OF_TEXT = 5


def base_config(family: str, **changes: Any) -> dict[str, Any]:
    """The ``config.json`` of a 4-layer model with D = 32, V = 97; grouped-query attention where the family has it."""
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_ctx": 512, "n_positions": 512, "layer_norm_epsilon": 1e-5}
        return {"vocab_size": VOCAB_SIZE} | sizes | LEARNED[family] | changes
    if family in ALIASES:
        return base_config(ALIASES[family], **changes) | {"model_type": family}
    if family in _LANGUAGE_MODELS:
        text = base_config(_LANGUAGE_MODELS[family], **changes)
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
    streams = Streams(config, FAMILIES_BY_TYPE[base.model_type].size(vars(base.args), "hidden_size"))
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
