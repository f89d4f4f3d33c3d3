"""The list of breaks still fits the code: nothing is broken or run here."""

import ast
from pathlib import Path

import pytest

from tests.breaks import Break
from tests.breaks.__main__ import BREAKS, ROOT


def test_every_break_has_its_own_name() -> None:
    """Red when: two breaks cannot be told apart on the command line."""
    assert len({broken.name for broken in BREAKS}) == len(BREAKS)


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.name.replace(" ", "-"))
def test_a_break_fits_the_code(broken: Break) -> None:
    """Red when: the text to break was edited, or what breaks is no Python, or the test was moved or renamed."""
    text = (ROOT / broken.file).read_text(encoding="utf-8")
    assert text.count(broken.old) == 1
    assert broken.new != broken.old
    ast.parse(text.replace(broken.old, broken.new))
    file, _, words = broken.test.partition("::")
    assert Path(file).name.startswith("test_")
    assert words.partition(" and ")[0] in (ROOT / file).read_text(encoding="utf-8")
