"""How names from untrusted files are printed, and how many problems become one message."""

from collections.abc import Iterable
from pathlib import Path

from specstream_mlx.errors import InvalidInputError, SpecStreamError

MAX_LISTED = 60
MAX_NAME = 160


def escaped(name: str) -> str:
    """``name`` in printable ASCII, shortened in the middle when it is very long."""
    plain = "".join(c if c.isprintable() and c.isascii() else ascii(c)[1:-1] for c in name)
    if len(plain) > MAX_NAME:
        plain = f"{plain[: MAX_NAME // 2]}...{plain[-MAX_NAME // 3 :]}"
    return plain


def at(path: Path | str, tensor: str) -> str:
    """The place of a tensor as every message writes it: ``file:tensor``."""
    return f"{path}:{escaped(tensor)}"


def listing(problems: Iterable[str]) -> str:
    """One problem per line; a long list ends with the number of those left out."""
    lines = list(problems)
    if len(lines) > MAX_LISTED:
        lines = [*lines[:MAX_LISTED], f"... and {len(lines) - MAX_LISTED} more of the same kind"]
    return "\n".join(lines)


def refuse(problems: Iterable[str], error: type[SpecStreamError] = InvalidInputError) -> None:
    """Raise one error that lists all problems; where there are none, do nothing."""
    lines = list(problems)
    if lines:
        raise error(listing(lines))
