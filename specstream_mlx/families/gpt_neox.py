"""GPT-NeoX, Pythia among others."""

from collections.abc import Mapping
from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class GPTNeoXFamily(DecoderFamily):
    """Parallel blocks (they are mlx-lm's own) under other names."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("gpt_neox",)
    EMBEDDING: ClassVar[str] = "model.embed_in"
    LAYERS: ClassVar[str] = "model.h"
    NORM: ClassVar[str] = "model.final_layer_norm"
    HEAD: ClassVar[str] = "model.embed_out"
    ATTENTION: ClassVar[str] = "attention"
    SIZES: ClassVar[Mapping[str, str]] = {"rope_theta": "rotary_emb_base"}
