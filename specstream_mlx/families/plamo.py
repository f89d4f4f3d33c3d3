"""PLaMo 1."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class PlamoFamily(DecoderFamily):
    """Parallel blocks."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("plamo",)
    LAYERS: ClassVar[str] = "model.layers.layers"
    ROPE: ClassVar[str] = "rotary_emb"
