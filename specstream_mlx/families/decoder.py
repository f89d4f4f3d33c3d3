"""Llama-shaped models: what the runtime asks of a model family."""

from collections.abc import Mapping
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int32]


class DecoderFamily:
    """``model.embed_tokens``, ``model.layers``, ``model.norm``, and a tied or own ``lm_head``; rotary positions.

    Attributes:
        LAYERS: path of the list of blocks.
        INPUT: paths of the modules that run before the first block; what is neither here nor a block runs after.
        ATTENTION: name of a block's attention.
        ROTARY: whether attention applies a rotary embedding. Without one, positions are learned and added to the
            embedding of a token: there are no more of them than ``max_position_embeddings``, and ``stream_position``
            has no effect, because a stream starts from a hidden state and never passes the embedding.
        SIZES: this family's names for the sizes that others call as in llama's ``config.json``.
        layers: the blocks, N of them.
    """

    LAYERS: ClassVar[str] = "model.layers"
    INPUT: ClassVar[tuple[str, ...]] = ("model.embed_tokens",)
    ATTENTION: ClassVar[str] = "self_attn"
    ROTARY: ClassVar[bool] = True
    SIZES: ClassVar[Mapping[str, str]] = {}

    def __init__(self, base: Any) -> None:
        self._base = base
        self.layers: list[Any] = base.model.layers

    @classmethod
    def size(cls, config: Mapping[str, Any], name: str) -> Any:
        """The size that llama calls ``name``, or None: ``size(gpt2_config, "hidden_size")`` is its ``n_embd``."""
        return config.get(cls.SIZES.get(name, name))

    @classmethod
    def fingerprint_tensor(cls, config: Mapping[str, Any]) -> str | None:
        """The small unquantised tensor that tells two bases of one shape apart; None when there is none."""
        return "model.norm.weight"

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype in which hidden states enter the first block."""
        return self.embed(mx.zeros((1, 1), dtype=mx.int32), np.zeros(1, dtype=np.int32)).dtype

    def embed(self, tokens: mx.array, positions: Positions) -> mx.array:
        """(B, L) ids -> (B, L, D); ``positions`` (L,) are the rows' absolute positions, unused here."""
        return self._base.model.embed_tokens(tokens)

    def norm(self, hidden: mx.array) -> mx.array:
        """The final norm, (B, L, D) -> (B, L, D)."""
        return self._base.model.norm(hidden)

    def head(self, normed: mx.array) -> mx.array:
        """The LM head on normed hidden states, (B, L, D) -> (B, L, V) logits."""
        if self._base.args.tie_word_embeddings:
            return self._base.model.embed_tokens.as_linear(normed)
        return self._base.lm_head(normed)
