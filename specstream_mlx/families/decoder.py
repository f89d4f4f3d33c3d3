"""What the runtime asks of a model family, answered for llama-shaped models.

A module of a family imports MLX only inside functions: the PyTorch method reads the same names without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from specstream_mlx.families.hugging_face import HuggingFace
from specstream_mlx.formats.config import BASE_FIELDS

if TYPE_CHECKING:
    import mlx.core as mx

Positions = npt.NDArray[np.int32]


class DecoderFamily:
    """Where the parts of a model are found; the paths are llama's, and most families share them.

    Attributes:
        MODEL_TYPES: the ``model_type`` of ``config.json`` that this class runs.
        MODEL: module of the model, where mlx-lm has none.
        EMBEDDING, LAYERS, NORM: paths of the token embedding, the list of blocks and the final norm.
        HEAD: path of the LM head; where a base has none, its embedding is the head.
        POSITIONS: path of the table of learned positions, which is added to the token embedding; None without one.
        ATTENTION: path of a block's attention.
        ROTARY: whether attention applies a rotary embedding; ``learned_positions`` has the others.
        ROPE: name of the rotary embedding in attention.
        SHARED_ATTENTION: whether blocks call mlx-lm's attention for all. One that is written out in the model wants
            masks as arrays and caches of floats, and mlx-lm cannot run texts of unequal length at once through it.
        SIZES: this family's names for the sizes that others call as in llama's ``config.json``.
        HUGGING_FACE: the family in Hugging Face's form; None where fine-tunes of it are not converted.
        layers: the blocks, N of them.
    """

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ()
    MODEL: ClassVar[str | None] = None
    EMBEDDING: ClassVar[str] = "model.embed_tokens"
    LAYERS: ClassVar[str] = "model.layers"
    NORM: ClassVar[str] = "model.norm"
    HEAD: ClassVar[str] = "lm_head"
    POSITIONS: ClassVar[str | None] = None
    ATTENTION: ClassVar[str] = "self_attn"
    ROTARY: ClassVar[bool] = True
    ROPE: ClassVar[str] = "rope"
    SHARED_ATTENTION: ClassVar[bool] = True
    SIZES: ClassVar[Mapping[str, str]] = {}
    HUGGING_FACE: ClassVar[HuggingFace | None] = None

    def __init__(self, base: Any) -> None:
        self._base = base
        self.args = base.args
        self.layers: list[Any] = at(base, self.LAYERS)

    @classmethod
    def refusal(cls, config: Mapping[str, Any]) -> str | None:
        """Why a model of this family with these settings is not run, as the end of a sentence; None when it is."""
        return None

    @classmethod
    def size(cls, config: Mapping[str, Any], name: str) -> Any:
        """The size that llama calls ``name``, or None: ``size(gpt2_config, "hidden_size")`` is its ``n_embd``."""
        return config.get(cls.SIZES.get(name, name))

    @classmethod
    def describe(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that the ``base_model`` block of ``specstream_config.json`` records of a base beside its name."""
        found = {name: cls.size(config, name) for name in BASE_FIELDS}
        found["num_key_value_heads"] = found["num_key_value_heads"] or found["num_attention_heads"]
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def fingerprint_tensor(cls, config: Mapping[str, Any]) -> str | None:
        """The small unquantised tensor that tells two bases of one shape apart; None when there is none."""
        return f"{cls.NORM}.weight"

    @classmethod
    def has_head(cls, base: Any) -> bool:
        """Whether a base has an LM head of its own; otherwise its embedding is the head."""
        owner, _, name = cls.HEAD.rpartition(".")
        return name in at(base, owner)

    @classmethod
    def embedding_scale(cls, args: Any) -> float | None:
        """The factor of the token embedding, from the model's arguments or its configuration; None without one."""
        return None

    @classmethod
    def scale_logits(cls, args: Any, logits: Any) -> Any:
        """The scaled logits, from an array of MLX or of PyTorch."""
        return logits

    @classmethod
    def logit_cap(cls, args: Any) -> float | None:
        """The bound that ``cap * tanh(logits / cap)`` puts on the logits; None without one."""
        return None

    def attention(self, layer: Any) -> Any:
        """The attention of a block; None when it is not where the family has it."""
        try:
            return at(layer, self.ATTENTION)
        except AttributeError:
            return None

    def is_rotary(self, layer: Any) -> bool:
        """Whether the attention of this block applies a rotary embedding; in some families not every block's does."""
        return self.ROTARY

    def block(self, layer: Any, hidden: mx.array, mask: Any, cache: Any, positions: mx.array | None = None) -> mx.array:
        """Run a block: (B, L, D) -> (B, L, D).

        Args:
            layer: one of ``layers``.
            hidden: (B, L, D).
            mask: as mlx-lm's attention takes it.
            cache: what takes the rows' keys and values; None: they attend to one another alone.
            positions: (L,) or (B * L,) absolute positions; None: they count up from ``cache.offset``. A rotary
                embedding knows them; only a block that uses positions otherwise needs them here.
        """
        out: mx.array = layer(hidden, mask, cache)
        return out

    def prompt_caches(self) -> list[Any]:
        """The caches that mlx-lm makes for the layers; they tell which layers have a window."""
        from mlx_lm.models.cache import make_prompt_cache

        caches: list[Any] = make_prompt_cache(self._base)
        return caches

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype in which hidden states enter the first block."""
        import mlx.core as mx

        return self.embed(mx.zeros((1, 1), dtype=mx.int32), np.zeros(1, dtype=np.int32)).dtype

    def embed(self, tokens: mx.array, positions: Positions) -> mx.array:
        """(B, L) ids -> (B, L, D); ``positions`` (L,) are the rows' absolute positions, unused here."""
        hidden: mx.array = at(self._base, self.EMBEDDING)(tokens)
        scale = self.embedding_scale(self.args)
        return hidden if scale is None else hidden * scale

    def norm(self, hidden: mx.array) -> mx.array:
        """The final norm, (B, L, D) -> (B, L, D)."""
        normed: mx.array = at(self._base, self.NORM)(hidden)
        return normed

    def head(self, normed: mx.array) -> mx.array:
        """The LM head on normed hidden states, (B, L, D) -> (B, L, V) logits."""
        owner, _, name = self.HEAD.rpartition(".")
        module = at(self._base, owner)
        logits: mx.array = module[name](normed) if name in module else at(self._base, self.EMBEDDING).as_linear(normed)
        logits = self.scale_logits(self.args, logits)
        cap = self.logit_cap(self.args)
        if cap is None:
            return logits
        import mlx.core as mx

        return mx.tanh(logits / cap) * cap

    def over_heads(self, mask: mx.array) -> mx.array:
        """A mask of its own for every sequence, (B, L, S), in the shape that spreads over the heads of a block."""
        return mask[:, None]


def at(module: Any, path: str) -> Any:
    """The part of a model at a dotted path; the model itself at the empty one."""
    for name in path.split(".") if path else ():
        module = getattr(module, name)
    return module
