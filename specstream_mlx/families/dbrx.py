"""DBRX."""

from collections.abc import Mapping
from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class DbrxFamily(DecoderFamily):
    """Experts; attention lies between two norms of a part of its own."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("dbrx",)
    EMBEDDING: ClassVar[str] = "transformer.wte"
    LAYERS: ClassVar[str] = "transformer.blocks"
    NORM: ClassVar[str] = "transformer.norm_f"
    ATTENTION: ClassVar[str] = "norm_attn_norm.attn"
    SIZES: ClassVar[Mapping[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
    }
