"""The one reader of JSON lines: one JSON object a line, for prompts, data sets and answers.

A line ends at a line feed and nowhere else: JSON may hold U+2028, U+0085 and the other characters at which
``str.splitlines`` splits. A byte order mark at the beginning of the file is skipped. Half a surrogate pair, which JSON
can spell and no tokenizer takes, is refused.
"""

import json
from pathlib import Path
from typing import Any

from specstream_mlx.errors import InvalidInputError


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        InvalidInputError: no such file, or it cannot be read; the line of a byte that is not UTF-8 is named.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise InvalidInputError(f"{path}: cannot be read ({reason})") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InvalidInputError(f"{path}:{line}: cannot be read ({error}); save the file as UTF-8") from error


def text_lines(text: str) -> list[tuple[int, str]]:
    """Lines that are not empty, with their numbers."""
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_jsonl(
    path: Path, expected: str = "an object", *, may_be_cut: bool = False
) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a file, with the numbers of their lines; empty lines are skipped.

    Args:
        path: the file.
        expected: what a line looks like, for messages.
        may_be_cut: a last line that is not JSON is left out: the writer was interrupted.

    Raises:
        InvalidInputError: the file cannot be read, or a line is not a JSON object; file and line are named.
    """
    rows = []
    lines = text_lines(read_text(path))
    for number, line in lines:
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
            if "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])[1:-1]
            raise InvalidInputError(f"{where}: {half} alone is no character; drop the row") from error
        except (ValueError, RecursionError) as error:
            if may_be_cut and number == lines[-1][0]:
                break
            raise InvalidInputError(f"{where}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise InvalidInputError(f"{where}: a {type(row).__name__}, expected {expected}")
        rows.append((number, row))
    return rows
