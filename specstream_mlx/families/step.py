"""Step 3.5."""

from collections.abc import Mapping
from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class StepFamily(DecoderFamily):
    """Experts, windows, and a gate after attention."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("step3p5",)
    SIZES: ClassVar[Mapping[str, str]] = {"num_key_value_heads": "num_attention_groups"}
