"""What the runtime asks of a model family, answered for llama-shaped models."""

from collections.abc import Mapping
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int32]


class DecoderFamily:
    """Where the parts of a model are found; the paths are llama's, and most families share them.

    Attributes:
        EMBEDDING, LAYERS, NORM: paths of the token embedding, the list of blocks and the final norm.
        HEAD: path of the LM head; where a base has none, its embedding is the head.
        ATTENTION: name of a block's attention.
        ROTARY: whether attention applies a rotary embedding. Without one, positions are learned and added to the
            embedding of a token: there are no more of them than ``max_position_embeddings``, and ``stream_position``
            has no effect, because a stream starts from a hidden state and never passes the embedding.
        SHARED_ATTENTION: whether blocks call mlx-lm's attention for all. One that is written out in the model wants
            masks as arrays and caches of floats, and mlx-lm cannot run texts of unequal length at once through it.
        SIZES: this family's names for the sizes that others call as in llama's ``config.json``.
        layers: the blocks, N of them.
    """

    EMBEDDING: ClassVar[str] = "model.embed_tokens"
    LAYERS: ClassVar[str] = "model.layers"
    NORM: ClassVar[str] = "model.norm"
    HEAD: ClassVar[str] = "lm_head"
    ATTENTION: ClassVar[str] = "self_attn"
    ROTARY: ClassVar[bool] = True
    SHARED_ATTENTION: ClassVar[bool] = True
    SIZES: ClassVar[Mapping[str, str]] = {}

    def __init__(self, base: Any) -> None:
        self._base = base
        self.args = base.args
        self.layers: list[Any] = at(base, self.LAYERS)

    @classmethod
    def size(cls, config: Mapping[str, Any], name: str) -> Any:
        """The size that llama calls ``name``, or None: ``size(gpt2_config, "hidden_size")`` is its ``n_embd``."""
        return config.get(cls.SIZES.get(name, name))

    @classmethod
    def fingerprint_tensor(cls, config: Mapping[str, Any]) -> str | None:
        """The small unquantised tensor that tells two bases of one shape apart; None when there is none."""
        return f"{cls.NORM}.weight"

    @classmethod
    def has_head(cls, base: Any) -> bool:
        """Whether a base has an LM head of its own; otherwise its embedding is the head."""
        owner, _, name = cls.HEAD.rpartition(".")
        return name in at(base, owner)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype in which hidden states enter the first block."""
        return self.embed(mx.zeros((1, 1), dtype=mx.int32), np.zeros(1, dtype=np.int32)).dtype

    def embed(self, tokens: mx.array, positions: Positions) -> mx.array:
        """(B, L) ids -> (B, L, D); ``positions`` (L,) are the rows' absolute positions, unused here."""
        hidden: mx.array = at(self._base, self.EMBEDDING)(tokens)
        return hidden

    def norm(self, hidden: mx.array) -> mx.array:
        """The final norm, (B, L, D) -> (B, L, D)."""
        normed: mx.array = at(self._base, self.NORM)(hidden)
        return normed

    def head(self, normed: mx.array) -> mx.array:
        """The LM head on normed hidden states, (B, L, D) -> (B, L, V) logits."""
        owner, _, name = self.HEAD.rpartition(".")
        module = at(self._base, owner)
        logits: mx.array = module[name](normed) if name in module else at(self._base, self.EMBEDDING).as_linear(normed)
        return logits

    def over_heads(self, mask: mx.array) -> mx.array:
        """A mask of its own for every sequence, (B, L, S), in the shape that spreads over the heads of a block."""
        return mask[:, None]


def at(module: Any, path: str) -> Any:
    """The part of a model at a dotted path; the model itself at the empty one."""
    for name in path.split(".") if path else ():
        module = getattr(module, name)
    return module
