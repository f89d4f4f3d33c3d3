"""What a library raised while it read files, as one of our errors in one line."""

from pathlib import Path

from specstream_mlx.errors import InvalidInputError, UnsupportedError


def load_error(path: Path, error: Exception, what: str = "model") -> Exception:
    """The error to raise for whatever mlx-lm or transformers raised about ``what`` in ``path``."""
    reason = " ".join(str(error).split())[:400] or type(error).__name__
    if "trust_remote_code" in reason:
        return UnsupportedError(
            f"{path}: {what} needs code that comes with the checkpoint; give --trust-remote-code "
            f"(trust_remote_code=True) if you trust it ({reason})"
        )
    if "not supported" in reason or "model_file" in reason:
        return UnsupportedError(f"{path}: {reason}")
    return InvalidInputError(f"{path}: {what} cannot be loaded ({type(error).__name__}: {reason})")
