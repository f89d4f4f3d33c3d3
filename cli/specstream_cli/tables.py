"""Plain text tables: aligned columns that survive a pipe, never wrapped and never cut."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Left-aligned columns two spaces apart, a rule under the header, one newline at the end."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "".join(line.rstrip() + "\n" for line in lines)


def document(value: Mapping[str, Any], indent: str = "") -> str:
    """A JSON object for people: one key a line, nested objects and sentences indented, lists of objects as tables."""
    lines: list[str] = []
    plain = [key for key, item in value.items() if not _is_nested(item)]
    width = max((len(key) for key in plain), default=0)
    for key, item in value.items():
        if not _is_nested(item):
            lines.append(f"{indent}{key.ljust(width)}  {_text(item)}\n")
        elif _is_prose(item):
            lines += [f"{indent}{key}\n", *(f"{indent}  {sentence}\n" for sentence in item)]
        elif isinstance(item, Mapping):
            lines += [f"{indent}{key}\n", document(item, indent + "  ")]
        else:
            header = list(item[0])
            rows = table(header, [[_text(row.get(name)) for name in header] for row in item])
            lines += [f"{indent}{key}\n", *(f"{indent}  {line}\n" for line in rows.splitlines())]
    return "".join(lines)


def _is_nested(item: object) -> bool:
    if isinstance(item, Mapping):
        return bool(item)
    rows = isinstance(item, list | tuple) and bool(item) and all(isinstance(row, Mapping) and row for row in item)
    return rows or _is_prose(item)


def _is_prose(item: object) -> bool:
    """A list of sentences, unlike a list of words or numbers, gets a line for each."""
    return isinstance(item, list | tuple) and any(isinstance(part, str) and " " in part for part in item)


def _text(item: object) -> str:
    if item is None or item == {} or item == []:
        return "-"
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, list | tuple):
        return ", ".join(_text(part) for part in item)
    return str(item)
