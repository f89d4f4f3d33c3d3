"""GLM 4, dense and with experts, and Solar Open of the same shape."""

from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class GlmFamily(DecoderFamily):
    """Llama's shape, with norms and a partial rotary embedding of its own."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("glm", "glm4")


class GlmExpertsFamily(DecoderFamily):
    """The same with experts."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("glm4_moe", "solar_open")
