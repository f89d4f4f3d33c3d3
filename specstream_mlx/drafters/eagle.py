"""EAGLE: a decoder layer that goes on with the target's features (arXiv 2401.15077, 2406.16858, 2503.01840).

The feature of a token is the hidden state that the target drew the next token from. A row of the layer is the feature
of token ``i`` with the embedding of token ``i + 1``, which is known by then; it lies at position ``i``, sees the rows
before it, and guesses token ``i + 2``. Its own output stands for the feature of token ``i + 1`` in the next row::

    target        f_0    f_1    f_2             features of the text, from taps
    token         t_1    t_2    root            shifted by one
    row           0      1      2     | 3               4
    guess                       g_1   | g_2             g_3
                                      | [out_2; g_1]    [out_3; g_2]      rows of guesses: gone after the draft

The rows of the text stay in a cache of the drafter's own. Rows of guesses are dropped and, where the guesses were
right, computed anew from the target's features.

EAGLE-1 and EAGLE-2 share their weights; EAGLE-2 chooses the tree by the layer's own probabilities (a wish without a
tree). EAGLE-3 reads hidden states after three layers, has an output norm and an LM head of its own, and its head may
cover a part of the vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache
from mlx_lm.models.rope_utils import initialize_rope

from specstream_mlx.drafters.growing import GrowingState
from specstream_mlx.drafters.head import BaseSizes
from specstream_mlx.drafters.protocol import Anchor
from specstream_mlx.errors import UnsupportedError
from specstream_mlx.formats.drafter_config import Settings
from specstream_mlx.target.caches import drop_rows
from specstream_mlx.target.target import Target

DEPTH = 6  # how far ahead it guesses; EAGLE-2's own
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
_MOST_AT_ONCE = 512  # rows of the text


@dataclass(frozen=True)
class LayerShape:
    """The sizes of EAGLE's decoder layer, which is a Llama layer."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_position_embeddings: int
    qkv_bias: bool

    @classmethod
    def read(cls, settings: Settings, hidden_size: int, where: str) -> "LayerShape":
        """From the settings of a head.

        Raises:
            UnsupportedError: a rotary embedding that we do not run.
        """
        num_heads = settings.integer("num_heads")
        scaling = settings.mapping("rope_scaling")
        kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
        if kind not in ROPE_TYPES:
            raise UnsupportedError(f"{where}: rope_scaling of type {kind!r}, expected one of {', '.join(ROPE_TYPES)}")
        shape = cls(
            hidden_size,
            settings.integer("intermediate_size"),
            num_heads,
            settings.integer("num_kv_heads", default=num_heads),
            settings.integer("head_dim", default=hidden_size // num_heads),
            settings.number("rms_norm_eps", 1e-6),
            settings.number("rope_theta", 10000.0),
            None if kind == "default" else scaling,
            settings.integer("max_position_embeddings", default=2048),
            settings.flag("qkv_bias", False),
        )
        settings.require(shape.num_heads % shape.num_kv_heads == 0, "num_heads is no multiple of num_kv_heads")
        return shape


class Attention(nn.Module):
    """Llama's, from rows of ``input_size``; rows of guesses may share a position."""

    def __init__(self, shape: LayerShape, input_size: int) -> None:
        super().__init__()
        self._shape = shape
        rows, kv_rows = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(input_size, rows, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(input_size, kv_rows, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(input_size, kv_rows, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(rows, shape.hidden_size, bias=False)
        self._rope = initialize_rope(
            shape.head_dim, shape.rope_theta, False, shape.rope_scaling, shape.max_position_embeddings
        )

    def __call__(self, x: mx.array, cache: KVCache, rows: "Rows") -> mx.array:
        """(1, L, input_size) -> (1, L, D); the rows' keys and values are appended to ``cache``."""
        length = x.shape[1]
        q, k, v = (
            part(x).reshape(1, length, -1, self._shape.head_dim).transpose(0, 2, 1, 3)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rows.together and length > 1:  # one position: the rows take the place of a batch
            turned = (self._rope(part.transpose(2, 1, 0, 3), offset=rows.position) for part in (q, k))
            q, k = (part.transpose(2, 1, 0, 3) for part in turned)
        else:
            q, k = (self._rope(part, offset=rows.position) for part in (q, k))
        keys, values = cache.update_and_fetch(k, v)
        scale = self._shape.head_dim**-0.5
        out = mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=rows.mask)
        merged: mx.array = self.o_proj(out.transpose(0, 2, 1, 3).reshape(1, length, -1))
        return merged


@dataclass(frozen=True, eq=False)
class Rows:
    """What is said of L rows: the position of the first, or of all ``together``, and what they see."""

    position: int
    together: bool
    mask: mx.array | str | None


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """(..., D) -> (..., D)."""
        out: mx.array = self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class EagleLayer(nn.Module):
    """A Llama layer; the first of EAGLE has no norm at its input."""

    def __init__(self, shape: LayerShape, first: bool) -> None:
        super().__init__()
        self.self_attn = Attention(shape, shape.hidden_size)
        self.mlp = MLP(shape)
        if not first:
            self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def __call__(self, x: mx.array, cache: KVCache, rows: Rows) -> mx.array:
        """(1, L, D) -> (1, L, D)."""
        normed = self.input_layernorm(x) if "input_layernorm" in self else x
        x = x + self.self_attn(normed, cache, rows)
        return x + self.mlp(self.post_attention_layernorm(x))


class EagleWeights(nn.Module):
    """``fc`` on an embedding and a feature, then layers; the LM head is the target's, without its final norm."""

    def __init__(self, shape: LayerShape, num_layers: int, fc_bias: bool, own_embedding: int | None) -> None:
        """``own_embedding``: its rows, where the head has one; None: the target's is used."""
        super().__init__()
        size = shape.hidden_size
        self.fc = nn.Linear(2 * size, size, bias=fc_bias)
        self.layers = [EagleLayer(shape, first=index == 0) for index in range(num_layers)]
        if own_embedding is not None:
            self.embed_tokens = nn.Embedding(own_embedding, size)

    @property
    def num_caches(self) -> int:
        """One per layer."""
        return len(self.layers)

    def features(self, target: Target, tapped: Sequence[mx.array]) -> mx.array:
        """(1, L, D) of the target's rows: the last hidden state after the final norm."""
        return target.family.norm(tapped[0])

    def __call__(self, features: mx.array, embedded: mx.array, caches: Sequence[KVCache], rows: Rows) -> mx.array:
        """(1, L, D) twice -> (1, L, D), which stand for the features of the next tokens."""
        x = self.fc(mx.concatenate([embedded, features], axis=-1))
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, cache, rows)
        return x

    def logits(self, target: Target, hidden: mx.array) -> mx.array:
        """(1, L, D) -> (L, V)."""
        return target.family.head(hidden)[0]

    def ids(self, guesses: mx.array) -> mx.array:
        """The target's ids of columns of the logits."""
        return guesses


class Eagle3Layer(nn.Module):
    """A Llama layer whose attention reads an embedding and a feature side by side, each after a norm of its own."""

    def __init__(self, shape: LayerShape, norm_before_residual: bool) -> None:
        super().__init__()
        self._norm_before_residual = norm_before_residual
        self.self_attn = Attention(shape, 2 * shape.hidden_size)
        self.mlp = MLP(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def __call__(self, features: mx.array, embedded: mx.array, cache: KVCache, rows: Rows) -> mx.array:
        """(1, L, D) twice -> (1, L, D)."""
        normed = self.hidden_norm(features)
        x = normed if self._norm_before_residual else features
        x = x + self.self_attn(mx.concatenate([self.input_layernorm(embedded), normed], axis=-1), cache, rows)
        return x + self.mlp(self.post_attention_layernorm(x))


class Eagle3Weights(nn.Module):
    """``fc`` on three of the target's hidden states, one layer, a norm and an LM head.

    ``d2t``: (draft vocabulary,) what to add to a guess for the target's id.
    """

    num_caches = 1

    def __init__(
        self,
        shape: LayerShape,
        *,
        target_hidden_size: int,
        draft_vocab_size: int,
        mapped: bool,
        norm_before_residual: bool,
        own_embedding: int | None,
    ) -> None:
        """``own_embedding``: its rows, where the head has one; None: the target's is used."""
        super().__init__()
        size = shape.hidden_size
        self.fc = nn.Linear(3 * target_hidden_size, size, bias=False)
        self.midlayer = Eagle3Layer(shape, norm_before_residual)
        self.norm = nn.RMSNorm(size, shape.rms_norm_eps)
        self.lm_head = nn.Linear(size, draft_vocab_size, bias=False)
        if mapped:
            self.d2t = mx.zeros((draft_vocab_size,), dtype=mx.int32)
        if own_embedding is not None:
            self.embed_tokens = nn.Embedding(own_embedding, size)

    def features(self, target: Target, tapped: Sequence[mx.array]) -> mx.array:
        """(1, L, D) of the target's rows: the three hidden states as one."""
        fused: mx.array = self.fc(mx.concatenate(list(tapped), axis=-1))
        return fused

    def __call__(self, features: mx.array, embedded: mx.array, caches: Sequence[KVCache], rows: Rows) -> mx.array:
        """As ``EagleWeights``."""
        out: mx.array = self.midlayer(features, embedded, caches[0], rows)
        return out

    def logits(self, target: Target, hidden: mx.array) -> mx.array:
        """(1, L, D) -> (L, draft vocabulary)."""
        logits: mx.array = self.lm_head(self.norm(hidden))[0]
        return logits

    def ids(self, guesses: mx.array) -> mx.array:
        """The target's ids of columns of the logits."""
        return guesses.astype(mx.int32) + self.d2t[guesses] if "d2t" in self else guesses


class Eagle:
    """As ``protocol.Drafter``: EAGLE-1 and EAGLE-2."""

    name = "eagle"
    ways = ("deferred",)

    def __init__(self, weights: EagleWeights | Eagle3Weights, taps: tuple[int, ...], depth: int = DEPTH) -> None:
        """``depth``: how far ahead to guess."""
        self.weights, self.taps, self.max_depth = weights, taps, depth

    @classmethod
    def from_settings(cls, raw: Mapping[str, Any], base: BaseSizes, where: str) -> "Eagle":
        """As ``head.Head``."""
        settings = Settings(raw, where)
        shape = LayerShape.read(settings, base.hidden_size, where)
        num_layers, fc_bias = settings.integer("num_layers", default=1), settings.flag("fc_bias", True)
        own_embedding = base.vocab_size if settings.flag("own_embedding", False) else None
        depth = settings.integer("depth", default=DEPTH)
        settings.check()
        return cls(EagleWeights(shape, num_layers, fc_bias, own_embedding), (base.num_layers,), depth)

    def begin(self, target: Target, prompt: Sequence[int]) -> "EagleState":
        """As ``Drafter``."""
        return EagleState(self, target, prompt)


class Eagle3(Eagle):
    """As ``protocol.Drafter``: EAGLE-3."""

    name = "eagle3"

    @classmethod
    def from_settings(cls, raw: Mapping[str, Any], base: BaseSizes, where: str) -> "Eagle3":
        """As ``head.Head``; the hidden states are those below the layers 2, N / 2 and N - 3 unless ``taps`` differ."""
        settings = Settings(raw, where)
        shape = LayerShape.read(settings, settings.integer("hidden_size", default=base.hidden_size), where)
        layers = base.num_layers
        taps = settings.layers("taps", layers, (min(2, layers), layers // 2, max(layers - 3, 0)))
        draft_vocab_size = settings.integer("draft_vocab_size", default=base.vocab_size)
        own_embedding = settings.flag("own_embedding", False)
        settings.require(
            own_embedding or shape.hidden_size == base.hidden_size,
            f"hidden_size {shape.hidden_size} differs from the base's {base.hidden_size} and own_embedding is false",
        )
        settings.require(
            draft_vocab_size <= base.vocab_size, f"draft_vocab_size {draft_vocab_size} is above {base.vocab_size}"
        )
        weights = Eagle3Weights(
            shape,
            target_hidden_size=base.hidden_size,
            draft_vocab_size=draft_vocab_size,
            mapped=draft_vocab_size < base.vocab_size,
            norm_before_residual=settings.flag("norm_before_residual", False),
            own_embedding=base.vocab_size if own_embedding else None,
        )
        depth = settings.integer("depth", default=DEPTH)
        settings.check()
        return cls(weights, taps, depth)


class EagleState(GrowingState):
    """The rows of the text in the layer's caches, and what came since the last draft."""

    reads_prompt = True

    def __init__(self, drafter: Eagle, target: Target, prompt: Sequence[int]) -> None:
        self._drafter, self._target = drafter, target
        self._caches = [KVCache() for _ in range(drafter.weights.num_caches)]
        self._tapped: list[tuple[list[mx.array], Sequence[int]]] = []  # hidden states, and the rows that are text
        self._tokens: list[Sequence[int] | mx.array] = [prompt[1:]]  # the token after each of those rows
        self._first: int | None = None  # position of the first row
        self._num_rows = 0  # of the text, in the caches
        self._hidden = mx.zeros((1, 1, 1))  # (1, k, D) of the last step's rows
        self._seen: mx.array | None = None  # (k, rows of guesses) which of them each row of the last step sees
        self._depth = 0
        self._before = self._state()

    def ran(self, taps: Mapping[int, mx.array], rows: Sequence[int], start: int) -> None:
        """As ``DraftState``; a long stretch goes through the layer at once, so that nothing of its size is kept."""
        if self._first is None:
            self._first = start
        self._before = self._state()
        self._tapped.append(([taps[layer] for layer in self._drafter.taps], rows))
        if self._num_rows + sum(len(kept) for _, kept in self._tapped) <= self._num_known:  # of the prompt
            self._absorb()
            mx.eval([cache.state for cache in self._caches])

    def commit(self, tokens: Sequence[int] | mx.array) -> None:
        """As ``DraftState``."""
        self._tokens.append(tokens)

    def withdraw(self) -> None:
        """As ``DraftState``."""
        self._num_rows, self._tapped, self._tokens = self._before
        self.finish()

    def start(self, anchor: Anchor) -> mx.array:
        """As ``GrowingState``: the rows of the text that came since, the last one with the root."""
        self._hidden = self._absorb()
        self._seen, self._depth = None, 0
        self.own_passes += 1
        return self._drafter.weights.logits(self._target, self._hidden)

    def grow(self, parents: mx.array, tokens: mx.array) -> mx.array:
        """As ``GrowingState``."""
        count = len(tokens)
        eye = mx.eye(count, dtype=mx.bool_)
        self._seen = eye if self._seen is None else mx.concatenate([self._seen[parents], eye], axis=1)
        self._depth += 1
        self.own_passes += 1
        alone = self._seen.shape[1] == self._depth and count == 1  # a chain sees all there is
        text = mx.ones((count, self._num_rows), dtype=mx.bool_)
        mask = None if alone else mx.concatenate([text, self._seen], axis=1)
        position = self._position + self._num_rows + self._depth - 1
        features = self._hidden[:, parents]
        self._hidden = self._run(features, tokens, Rows(position, True, mask), np.full(count, position + 1))
        return self._drafter.weights.logits(self._target, self._hidden)

    def ids(self, guesses: mx.array) -> mx.array:
        """As ``GrowingState``."""
        return self._drafter.weights.ids(guesses)

    def finish(self) -> None:
        """As ``GrowingState``: the rows of guesses go."""
        for cache in self._caches:
            drop_rows(cache, self._num_rows)
        self._hidden = self._hidden[:, :0]

    def _state(self) -> tuple[int, list[tuple[list[mx.array], Sequence[int]]], list[Sequence[int] | mx.array]]:
        """What ``withdraw`` puts back."""
        return self._num_rows, list(self._tapped), list(self._tokens)

    @property
    def _position(self) -> int:
        return self._first or 0

    @property
    def _num_known(self) -> int:
        """Rows whose next token is known, those in the caches included."""
        return self._num_rows + sum(len(tokens) for tokens in self._tokens)

    def _absorb(self) -> mx.array:
        """Run what came since through the layers; (1, 1, D) of the last row."""
        tapped = [mx.concatenate(list(parts), axis=1) for parts in zip(*map(_chosen, self._tapped), strict=True)]
        count = tapped[0].shape[1]
        tokens = mx.concatenate([_ids(tokens) for tokens in self._tokens])
        tokens, left = tokens[:count], tokens[count:]
        self._tapped, self._tokens = [], []
        if len(left):  # of the prompt; another thread may go on with them
            mx.eval(left)
            self._tokens.append(left)
        hidden = tapped[0]
        for begin in range(0, count, _MOST_AT_ONCE):
            span = slice(begin, min(begin + _MOST_AT_ONCE, count))
            length = span.stop - begin
            features = self._drafter.weights.features(self._target, [part[:, span] for part in tapped])
            position = self._position + self._num_rows
            rows = Rows(position, False, "causal" if length > 1 else None)
            hidden = self._run(features, tokens[span], rows, np.arange(position + 1, position + 1 + length))
            self._num_rows += length
            if count > _MOST_AT_ONCE:
                mx.eval([cache.state for cache in self._caches])
        return hidden[:, -1:]

    def _run(self, features: mx.array, tokens: mx.array, rows: Rows, positions: "np.ndarray[Any, Any]") -> mx.array:
        """Rows through the layers; ``positions`` are the tokens' in the text."""
        weights = self._drafter.weights
        if "embed_tokens" in weights:
            embedded = weights.embed_tokens(tokens[None])
        else:
            embedded = self._target.family.embed(tokens[None], positions.astype(np.int32))
        return weights(features, embedded, self._caches, rows)


def _chosen(stretch: tuple[list[mx.array], Sequence[int]]) -> list[mx.array]:
    """The rows of a stretch of the text, (1, k, D) per tap."""
    tapped, rows = stretch
    if len(rows) == tapped[0].shape[1]:
        return tapped
    return [part[:, mx.array(list(rows))] for part in tapped]


def _ids(tokens: Sequence[int] | mx.array) -> mx.array:
    return tokens.astype(mx.int32) if isinstance(tokens, mx.array) else mx.array(list(tokens), dtype=mx.int32)
