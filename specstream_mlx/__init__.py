"""Speculative Streaming on MLX: one model drafts and verifies, the text stays exactly the same."""

from specstream_mlx.bundled import default_model_path
from specstream_mlx.engine.generate import GenerationResponse, generate, stream_generate
from specstream_mlx.models.load import load
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.planning.plan import DraftOptions
from specstream_mlx.target.caches import PrefixCache

__version__ = "0.1.0"

__all__ = [
    "DraftOptions",
    "GenerationResponse",
    "PrefixCache",
    "SpecStreamModel",
    "default_model_path",
    "generate",
    "load",
    "stream_generate",
]
