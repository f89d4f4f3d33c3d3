"""Lille 130M."""

from collections.abc import Mapping
from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class LilleFamily(DecoderFamily):
    """Norms within attention and feed-forward; the head is the embedding."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("lille-130m",)
    EMBEDDING: ClassVar[str] = "transformer.tok_embeddings"
    LAYERS: ClassVar[str] = "transformer.layers"
    NORM: ClassVar[str] = "transformer.norm"
    ATTENTION: ClassVar[str] = "attention"
    SIZES: ClassVar[Mapping[str, str]] = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "block_size",
    }
