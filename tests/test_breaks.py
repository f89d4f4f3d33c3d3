"""The list of breaks still fits the code: nothing is broken or run here."""

import ast

import pytest

from tests.breaks import ROOT, Break
from tests.breaks.__main__ import BREAKS


def test_every_break_has_its_own_name() -> None:
    """Red when: two breaks cannot be told apart on the command line."""
    assert len({broken.name for broken in BREAKS}) == len(BREAKS)


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.name.replace(" ", "-"))
def test_a_break_fits_the_code(broken: Break) -> None:
    """Red when: what is to break was rewritten, or what breaks is no Python, or the test was renamed."""
    text = (ROOT / broken.file).read_text(encoding="utf-8")
    changed = broken.applied(text)
    assert changed != text
    ast.parse(changed)
    assert (ROOT / broken.test_file).exists()


def test_lines_may_be_moved_and_wrapped() -> None:
    """Red when: a break is pinned to its line or to how its lines are wrapped."""
    text = (
        "def draw():\n    return a + b\n\n\nclass Sampler:\n    def draw(self):\n        return (a +\n            b)\n"
    )
    broken = Break("", "engine.sampling.Sampler.draw", "a + b", "a", "test_x")
    assert broken.applied(text) == text.replace("(a +\n            b)", "(a)")
    with pytest.raises(ValueError, match="0 times"):
        broken.applied(text.replace("class Sampler", "class Other"))
