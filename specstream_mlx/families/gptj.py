"""GPT-J."""

from collections.abc import Mapping
from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class GPTJFamily(DecoderFamily):
    """GPT-2's names, and a rotary embedding."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("gptj",)
    EMBEDDING: ClassVar[str] = "model.wte"
    LAYERS: ClassVar[str] = "model.h"
    NORM: ClassVar[str] = "model.ln_f"
    ATTENTION: ClassVar[str] = "attn"
    SIZES: ClassVar[Mapping[str, str]] = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }
