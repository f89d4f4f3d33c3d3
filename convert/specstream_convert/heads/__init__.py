"""Published draft heads, Medusa's and EAGLE's, converted to adapter directories."""

from specstream_convert.heads.convert import convert_heads
from specstream_convert.heads.source import looks_like_heads

__all__ = ["convert_heads", "looks_like_heads"]
