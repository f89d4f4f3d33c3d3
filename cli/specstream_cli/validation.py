"""Checks of single values, made before anything is loaded."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import typer

from specstream_mlx.errors import InvalidInputError

TREE = re.compile(r"chain:[1-9]\d*|cartesian:[1-9]\d*(?:x[1-9]\d*)*|best-first:[1-9]\d*")
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def within(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[float | None], float | None]:
    """An option callback that accepts ``low <= x <= high`` (``low < x`` with ``above``), never NaN or infinity."""
    bound = f"above {low}" if above else f"of at least {low}"
    expected = bound if math.isinf(high) else f"{bound} and at most {high}"

    def check(value: float | None) -> float | None:
        if value is None:
            return None
        if not math.isfinite(value) or value < low or value > high or (above and value == low):
            raise typer.BadParameter(f"got {value}, expected a number {expected}")
        return value

    return check


def finite(value: float) -> float:
    """An option callback that refuses NaN and infinity."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"got {value}, expected a finite number")
    return value


def tree_spec(value: str | None) -> str | None:
    """An option callback for the spelling of a draft tree."""
    if value is not None and not TREE.fullmatch(value):
        raise typer.BadParameter(
            f"got {value!r}, expected chain:DEPTH, cartesian:K1xK2x... or best-first:NODES, such as 'best-first:8'"
        )
    return value


def utf8(value: str | None) -> str | None:
    """An option callback that refuses bytes of the command line that are not UTF-8."""
    if value is not None:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise typer.BadParameter("the text is not valid UTF-8") from None
    return value


def utf8_each(values: list[str] | None) -> list[str] | None:
    """As ``utf8``, for an option that may be given several times; an empty text is refused too."""
    for value in values or []:
        utf8(value)
        if not value:
            raise typer.BadParameter("the text is empty")
    return values


def regular_expression(value: str | None) -> str | None:
    """An option callback for a Python regular expression."""
    if value is not None:
        try:
            re.compile(value)
        except re.error as error:
            raise typer.BadParameter(f"got {value!r}, not a regular expression ({error})") from None
    return value


def repo_id(value: str | None) -> str | None:
    """An option callback for the id of a repository to write to."""
    if value is not None and not REPO.fullmatch(value):
        raise typer.BadParameter(f"got {value!r}, expected a repository id such as org/name")
    return value


def is_repo_id(value: str, option: str) -> bool:
    """Tell a repository id from a directory.

    Only ``namespace/name`` is an id, and only when nothing here has that path and no directory here is called
    ``namespace``: a mistyped path must not become a download.

    Raises:
        InvalidInputError: ``value`` is empty, a file, or looks like a path that does not exist.
    """
    if not value:
        raise InvalidInputError(f"{option}: empty; give a directory or a repository id")
    path = Path(value).expanduser()
    if path.is_dir():
        return False
    if path.exists():
        raise InvalidInputError(f"{option}: {value} is not a directory; give the directory that holds config.json")
    if REPO.fullmatch(value) and not Path(value.split("/")[0]).is_dir():
        return True
    raise InvalidInputError(
        f"{option}: {value}: no such directory; give a model directory, or a repository id such as org/name"
    )


def any_repo_id(values: Mapping[str, str | None]) -> bool:
    """Whether one of the given values, by option, is a repository id; every one is checked by `is_repo_id`."""
    found = [is_repo_id(value, option) for option, value in values.items() if value is not None]
    return any(found)
