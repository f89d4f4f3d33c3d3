"""What a library raised while it read files, as one of our errors in one line."""

from pathlib import Path

from specstream_mlx.errors import InvalidInputError, UnsupportedError


def load_error(path: Path, error: Exception, what: str = "model") -> Exception:
    """The error to raise for whatever mlx-lm or transformers raised about ``what`` in ``path``."""
    text = " ".join(str(error).split()) or type(error).__name__
    reason = text[:400]
    if "trust_remote_code" in text:
        return UnsupportedError(
            f"{path}: {what} needs code that comes with the checkpoint; trust_remote_code lets it run, if you trust it "
            f"({reason})"
        )
    if "not supported" in reason or "model_file" in reason:
        return UnsupportedError(f"{path}: {reason}")
    return InvalidInputError(f"{path}: {what} cannot be loaded ({type(error).__name__}: {reason})")
