"""OPT, which mlx-lm 0.32 does not have: learned positions, ReLU, pre-norm or post-norm (opt-350m).

Written as mlx-lm writes its models, and run by all of its functions that take a model: ``generate_step``,
``stream_generate``, ``quantize_model``. Only ``mlx_lm.load`` of a path cannot find it; use ``specstream_mlx.load`` or
``mlx_lm.utils.load_model(path, get_model_classes=specstream_mlx.families.model_classes)``. mlx-lm's own loops know
no end of positions: they must be given a ``max_tokens`` that stays within the context, or end in the ValueError below.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention

POSITION_OFFSET = 2  # rows 0 and 1 of the position table stand for padding


@dataclass
class ModelArgs(BaseModelArgs):
    """The fields of OPT's ``config.json`` that change a number."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    ffn_dim: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    word_embed_proj_dim: int | None = None
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    activation_function: str = "relu"
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.word_embed_proj_dim is None:
            self.word_embed_proj_dim = self.hidden_size
        if self.activation_function != "relu":
            raise ValueError(f"activation_function {self.activation_function!r} is not supported, OPT's is 'relu'")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads")


class PositionalEmbedding(nn.Module):
    """A table of positions. No ``nn.Embedding``, so that quantisation leaves it alone."""

    def __init__(self, num_positions: int, dims: int) -> None:
        super().__init__()
        self.weight = mx.zeros((num_positions + POSITION_OFFSET, dims))

    def __call__(self, positions: mx.array) -> mx.array:
        """Positions counted from 0 -> their rows."""
        return self.weight[positions + POSITION_OFFSET]


class Attention(nn.Module):
    """Multi-head attention with biases and without positions."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        dim = args.hidden_size
        self.n_heads = args.num_attention_heads
        self.scale = (dim // self.n_heads) ** -0.5
        self.q_proj = nn.Linear(dim, dim, bias=args.enable_bias)
        self.k_proj = nn.Linear(dim, dim, bias=args.enable_bias)
        self.v_proj = nn.Linear(dim, dim, bias=args.enable_bias)
        self.out_proj = nn.Linear(dim, dim, bias=args.enable_bias)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """(B, L, D) -> (B, L, D)."""
        B, L, _ = x.shape

        queries, keys, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        queries = queries.reshape(B, L, self.n_heads, -1).transpose(0, 2, 1, 3)
        keys = keys.reshape(B, L, self.n_heads, -1).transpose(0, 2, 1, 3)
        values = values.reshape(B, L, self.n_heads, -1).transpose(0, 2, 1, 3)

        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)

        output = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return self.out_proj(output.transpose(0, 2, 1, 3).reshape(B, L, -1))


class DecoderLayer(nn.Module):
    """Attention and feed-forward; ``fc1`` and ``fc2`` lie in the block itself, as in the checkpoints."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        dim, affine = args.hidden_size, args.layer_norm_elementwise_affine
        self.pre_norm = args.do_layer_norm_before
        self.self_attn = Attention(args)
        self.self_attn_layer_norm = nn.LayerNorm(dim, affine=affine)
        self.fc1 = nn.Linear(dim, args.ffn_dim, bias=args.enable_bias)
        self.fc2 = nn.Linear(args.ffn_dim, dim, bias=args.enable_bias)
        self.final_layer_norm = nn.LayerNorm(dim, affine=affine)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """(B, L, D) -> (B, L, D)."""
        if self.pre_norm:
            h = x + self.self_attn(self.self_attn_layer_norm(x), mask, cache)
            return h + self.fc2(nn.relu(self.fc1(self.final_layer_norm(h))))
        h = self.self_attn_layer_norm(x + self.self_attn(x, mask, cache))
        return self.final_layer_norm(h + self.fc2(nn.relu(self.fc1(h))))


class OPTDecoder(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.embed_tokens = nn.Embedding(args.vocab_size, args.word_embed_proj_dim)
        self.embed_positions = PositionalEmbedding(args.max_position_embeddings, args.hidden_size)
        if args.word_embed_proj_dim != args.hidden_size:
            self.project_in = nn.Linear(args.word_embed_proj_dim, args.hidden_size, bias=False)
            self.project_out = nn.Linear(args.hidden_size, args.word_embed_proj_dim, bias=False)
        self.layers = [DecoderLayer(args) for _ in range(args.num_hidden_layers)]
        if args.do_layer_norm_before and not args._remove_final_layer_norm:
            self.final_layer_norm = nn.LayerNorm(args.hidden_size, affine=args.layer_norm_elementwise_affine)

    def embed(self, tokens: mx.array, positions: mx.array) -> mx.array:
        """(B, L) ids at (L,) or (B, L) positions -> (B, L, D)."""
        h = self.embed_tokens(tokens)
        if "project_in" in self:
            h = self.project_in(h)
        return h + self.embed_positions(positions)

    def norm(self, h: mx.array) -> mx.array:
        """The final norm, if the model has one."""
        return self.final_layer_norm(h) if "final_layer_norm" in self else h

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """(B, L) ids -> (B, L, D), after the final norm."""
        if cache is None:
            cache = [None] * len(self.layers)
        offset = cache[0].offset if cache[0] is not None else 0
        length, limit = inputs.shape[1], self.args.max_position_embeddings
        if isinstance(offset, int):
            if offset + length > limit:
                raise ValueError(f"{offset + length} tokens, the model has {limit} learned positions")
            positions = mx.arange(offset, offset + length)
        else:  # one offset per row; padding on the left has negative positions and is masked
            positions = mx.maximum(mx.arange(length) + offset[..., None], 0)

        h = self.embed(inputs, positions)
        mask = create_attention_mask(h, cache[0])
        for layer, c in zip(self.layers, cache, strict=True):
            h = layer(h, mask, c)
        return self.norm(h)


class OPTModel(nn.Module):
    """Holds ``decoder``, for the checkpoints' names."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.decoder = OPTDecoder(args)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """(B, L) ids -> (B, L, D), after the final norm."""
        return self.decoder(inputs, cache)


class Model(nn.Module):
    """OPT with its LM head."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = OPTModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.word_embed_proj_dim, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """(B, L) ids -> (B, L, V) logits."""
        return self.head(self.model(inputs, cache))

    def head(self, h: mx.array) -> mx.array:
        """Normed hidden states (B, L, D) -> (B, L, V) logits."""
        decoder = self.model.decoder
        if "project_out" in decoder:
            h = decoder.project_out(h)
        if self.args.tie_word_embeddings:
            return decoder.embed_tokens.as_linear(h)
        return self.lm_head(h)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Bring the names of ``OPTModel`` files to those of ``OPTForCausalLM``; drop a tied head's copy."""
        weights = {f"model.{name}" if name.startswith("decoder.") else name: w for name, w in weights.items()}
        if self.args.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        return weights

    @property
    def layers(self) -> list[DecoderLayer]:
        """The blocks."""
        return self.model.decoder.layers
