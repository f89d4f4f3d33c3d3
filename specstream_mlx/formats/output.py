"""What is written for users: a directory that appears whole or not at all, and JSON that is always the same."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.formats import atomic


@contextlib.contextmanager
def replaced_directory(target: Path, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """``atomic.replaced_directory`` for users.

    Raises:
        UsageError: it cannot be written; whatever ``target`` held is still there.
    """
    try:
        with atomic.replaced_directory(target, check) as temporary:
            yield temporary
    except OSError as error:
        raise UsageError(
            f"{target}: cannot be written ({error.strerror or error}); make room or choose another place; what was "
            "saved before is as it was"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON the same way every time.

    Raises:
        InvalidInputError: it holds a number that JSON cannot.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:  # JSON may say 1e999, which is read as infinity
        raise InvalidInputError(
            f"{path.name}: would hold a number that is not finite, as a configuration of the input does; correct it"
        ) from error
    path.write_bytes(text.encode("utf-8", "backslashreplace"))  # a name that is no UTF-8 becomes a JSON escape
