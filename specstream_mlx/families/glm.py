"""GLM 4."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class GlmFamily(DecoderFamily):
    """Llama's shape, with norms and a partial rotary embedding of its own."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("glm", "glm4")
