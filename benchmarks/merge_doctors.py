"""Many files of ``specstream-mlx doctor --json``, as one table: a row for each machine.

    python -m benchmarks.merge_doctors mac1.json mac2.json          aligned columns
    python -m benchmarks.merge_doctors *.json --markdown            for a document
    python -m benchmarks.merge_doctors *.json --json                the rows as one JSON object

Files that are no such documents are named on standard error; the others are merged, and the exit code is 3.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specstream_cli.doctor import FORMAT, FORMAT_VERSION
from specstream_cli.tables import table

WEIGHTS = ("float32", "float16", "bfloat16", "4-bit")
DRAFTED = 5  # rows of the pass whose cost is shown, in plain steps


def main(arguments: Sequence[str] | None = None) -> int:
    """Merge and print; 0, or 3 when a file could not be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="documents of specstream-mlx doctor --json")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="a table for a document")
    form.add_argument("--json", action="store_true", help="one JSON object with the rows")
    options = parser.parse_args(arguments)
    rows, unread = [], 0
    for file in options.files:
        try:
            rows.append(row(read(file)))
        except ValueError as error:
            unread += 1
            print(f"error: {file}: {error}", file=sys.stderr)
    rows.sort(key=lambda found: (str(found["chip"]), found["memory"], str(found["mlx"])))
    if options.json:
        print(json.dumps({"machines": rows}))
    elif rows:
        lines = [[shown(value) for value in found.values()] for found in rows]
        print(markdown(list(rows[0]), lines) if options.markdown else table(list(rows[0]), lines), end="")
    return 3 if unread else 0


def read(file: Path) -> dict[str, Any]:
    """One document.

    Raises:
        ValueError: it cannot be read, or is something else.
    """
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no JSON"
        raise ValueError(f"cannot be read ({reason})") from error
    kind = (found.get("format"), found.get("format_version")) if isinstance(found, dict) else (None, None)
    if kind != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"is not version {FORMAT_VERSION} of {FORMAT}; make it with specstream-mlx doctor --json")
    return dict(found)


def row(found: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of one machine, in the order of the columns; None where something was not measured.

    Raises:
        ValueError: the document lacks something.
    """
    try:
        machine, speedup = found["machine"], found["speedup"]
        cells = {
            "chip": machine.get("processor") or None,
            "GPU cores": machine.get("gpu_cores"),
            "memory": machine.get("memory_gb") or 0.0,
            "system": machine.get("os"),
            "device": machine.get("device"),
            "mlx": found["versions"].get("mlx"),
        }
        exact = {entry["weights"]: exactness(entry) for entry in found["exactness"]}
        cells |= {weights: exact.get(weights) for weights in WEIGHTS}
        for bundled in (True, False):
            curve = next((entry for entry in found["costs"] if (entry["model"] == "bundled") == bundled), None)
            name = "bundled" if bundled else "4-bit shape"
            if not bundled:
                cells["shape"] = curve and curve["model"]
            cells[f"{name} step ms"] = curve and 1000 * curve["plain"]
            cells[f"{name} {DRAFTED} rows"] = (
                curve and dict(map(tuple, curve["chain"])).get(DRAFTED, 0) / curve["plain"]
            )
            cells[f"{name} break-even"] = curve and curve["break_even"]
        cells |= {
            "decode": speedup and speedup["decode"]["of_medians"],
            "first token ms": speedup and speedup["first_token_ms"]["ours"],
            "mlx-lm's": speedup and speedup["first_token_ms"]["mlx-lm"],
            "quick": found["quick"],
            "remarks": [line["name"] for line in found["lines"] if line["verdict"] != "ok"],
        }
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else "a value is of the wrong kind"
        raise ValueError(f"damaged ({reason}); make it again with specstream-mlx doctor --json") from error
    return cells


def exactness(entry: Mapping[str, Any]) -> str:
    """``exact``, ``ties 1/4`` or ``WRONG 1/4``."""
    if entry["beyond_rounding"]:
        return f"WRONG {entry['beyond_rounding']}/{entry['answers']}"
    return f"ties {entry['ties']}/{entry['answers']}" if entry["ties"] else "exact"


def shown(value: Any) -> str:
    """One cell as text."""
    if value is None or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a document; bars in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
