"""Nemotron 4 and Minitron."""

from collections.abc import Mapping
from typing import ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class NemotronFamily(DecoderFamily):
    """Norms whose weights are counted from one, and a partial rotary embedding."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("nemotron",)
    SIZES: ClassVar[Mapping[str, str]] = {"rms_norm_eps": "norm_eps"}
