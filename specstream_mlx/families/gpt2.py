"""GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from specstream_mlx.errors import UnsupportedError
from specstream_mlx.families.decoder import Positions
from specstream_mlx.families.hugging_face import HuggingFace
from specstream_mlx.families.learned_positions import LearnedPositions

if TYPE_CHECKING:
    import mlx.core as mx


def _complete(config: dict[str, Any], where: Path) -> list[str]:
    width, inner = config["n_embd"], config.get("n_inner")
    if inner not in (None, 4 * width):
        raise UnsupportedError(f"{where}: n_inner is {inner!r}; mlx-lm computes 4 * n_embd = {4 * width}")
    if config.get("n_ctx") is None:
        config["n_ctx"] = config["n_positions"]
        return ["config.json: no n_ctx, which mlx-lm asks for; set to n_positions"]
    return []


class GPT2Family(LearnedPositions):
    """``model.h`` between ``wte`` + ``wpe`` and ``ln_f``; the head is ``wte``."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("gpt2",)
    EMBEDDING: ClassVar[str] = "model.wte"
    POSITIONS: ClassVar[str | None] = "model.wpe"
    LAYERS: ClassVar[str] = "model.h"
    NORM: ClassVar[str] = "model.ln_f"
    ATTENTION: ClassVar[str] = "attn"
    SIZES: ClassVar[Mapping[str, str]] = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }
    HUGGING_FACE: ClassVar[HuggingFace | None] = HuggingFace(
        root="transformer",
        bare=("h", "wte", "wpe", "ln_f"),  # files of GPT2Model
        conv1d=r"model\.h\.\d+\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))\.weight",
        ignored=r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",  # the causal mask
        values="attn.c_attn",
        sizes=("n_embd", "n_layer", "n_head", "n_positions", "vocab_size"),
        epsilons=("layer_norm_epsilon",),
        fixed={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "tie_word_embeddings": (True,),
        },
        complete=_complete,
    )

    def embed(self, tokens: mx.array, positions: Positions) -> mx.array:
        """(B, L) ids at (L,) absolute positions -> (B, L, D)."""
        return super().embed(tokens, positions) + self._base.model.wpe(
            self._within_table(positions, self.args.n_positions)
        )
