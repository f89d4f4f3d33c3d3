"""A relative tolerance alone fails where a number is near 0 by chance, on another processor or another day."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent
PAIRS = {"rtol": "atol", "rel": "abs"}


def test_no_tolerance_is_relative_alone() -> None:
    """Red when: a comparison has ``rtol`` or ``rel`` and leaves the absolute part to a library's tiny default."""
    alone = []
    for file in sorted(TESTS.rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call):
                names = {keyword.arg for keyword in call.keywords}
                alone += [
                    f"{file.relative_to(TESTS)}:{call.lineno}: {relative} without {absolute}"
                    for relative, absolute in PAIRS.items()
                    if relative in names and absolute not in names
                ]
    assert not alone, "\n".join(alone)
