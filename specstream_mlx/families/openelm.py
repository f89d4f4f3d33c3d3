"""OpenELM."""

from collections.abc import Mapping
from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class OpenElmFamily(DecoderFamily):
    """The number of heads differs by layer."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("openelm",)
    EMBEDDING: ClassVar[str] = "transformer.token_embeddings"
    LAYERS: ClassVar[str] = "transformer.layers"
    NORM: ClassVar[str] = "transformer.norm"
    ATTENTION: ClassVar[str] = "attn"
    SIZES: ClassVar[Mapping[str, str]] = {"hidden_size": "model_dim", "num_hidden_layers": "num_transformer_layers"}
