"""Speculative Streaming on MLX: one model drafts and verifies, the text stays exactly the same.

A public name is imported when it is first asked for (PEP 562), so errors and plain types come without starting MLX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specstream_mlx.bundled import default_model_path
    from specstream_mlx.engine.batch_generate import batch_generate
    from specstream_mlx.engine.generate import GenerationResponse, generate, stream_generate
    from specstream_mlx.errors import (
        InvalidInputError,
        SpecStreamError,
        UnsupportedError,
        UsageError,
        VerificationError,
    )
    from specstream_mlx.models.load import load
    from specstream_mlx.models.model import SpecStreamModel
    from specstream_mlx.options import DraftOptions, DraftReport
    from specstream_mlx.target.caches import PrefixCache

__version__ = "0.1.0"

__all__ = [
    "DraftOptions",
    "DraftReport",
    "GenerationResponse",
    "InvalidInputError",
    "PrefixCache",
    "SpecStreamError",
    "SpecStreamModel",
    "UnsupportedError",
    "UsageError",
    "VerificationError",
    "batch_generate",
    "default_model_path",
    "generate",
    "load",
    "stream_generate",
]

_HOMES = {
    "DraftOptions": "options",
    "DraftReport": "options",
    "GenerationResponse": "engine.generate",
    "InvalidInputError": "errors",
    "PrefixCache": "target.caches",
    "SpecStreamError": "errors",
    "SpecStreamModel": "models.model",
    "UnsupportedError": "errors",
    "UsageError": "errors",
    "VerificationError": "errors",
    "batch_generate": "engine.batch_generate",
    "default_model_path": "bundled",
    "generate": "engine.generate",
    "load": "models.load",
    "stream_generate": "engine.generate",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value  # asked for once; later uses find it here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
