"""Checks of single values, made before anything is loaded."""

import math
import re
from collections.abc import Callable, Mapping

import typer

from specstream_mlx.errors import SpecStreamError, UsageError
from specstream_mlx.formats.places import Repository, is_repository_id, locate

TREE = re.compile(r"chain:[1-9]\d*|cartesian:[1-9]\d*(?:x[1-9]\d*)*|best-first:[1-9]\d*")


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


def unescaped(text: str) -> str:
    r"""A text of the command line with ``\n`` and ``\t`` as line feed and tab, as mlx-lm reads its prompt."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def unescaped_each(values: list[str] | None) -> list[str] | None:
    """As ``utf8_each``, each text ``unescaped``."""
    utf8_each(values)
    return None if values is None else [unescaped(value) for value in values]


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
    if value is not None and not is_repository_id(value):
        raise typer.BadParameter(f"got {value!r}, expected a repository id such as org/name")
    return value


def is_repo_id(value: str, option: str, revision: str | None = None) -> bool:
    """Whether ``value`` names a repository, not a directory; see ``specstream_mlx.formats.places.locate``.

    Raises:
        InvalidInputError: neither an existing directory nor a repository id.
        UsageError: a revision of a directory.
    """
    try:
        return isinstance(locate(value, revision), Repository)
    except SpecStreamError as error:
        raise type(error)(f"{option}: {error}") from error


def any_repo_id(values: Mapping[str, str | None], revision: str | None = None) -> bool:
    """Whether one of the given values, by option, is a repository id; every one is checked by `is_repo_id`.

    ``revision`` is of ``--model``.

    Raises:
        UsageError: a revision without a model.
    """
    if revision is not None and values.get("--model") is None:
        raise UsageError("--revision: is of the repository that --model names; give both or neither")
    found = [
        is_repo_id(value, option, revision if option == "--model" else None)
        for option, value in values.items()
        if value is not None
    ]
    return any(found)
