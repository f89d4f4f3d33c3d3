"""Speculative Streaming on MLX: one model drafts and verifies, the text stays exactly the same."""

__version__ = "0.1.0"
