"""The document of families covers what the code supports; its figures are a command's, not a test's."""

from pathlib import Path

import pytest

from benchmarks.exactness import INSERTIONS, TEMPERATURES, TREES
from specstream_mlx.families import FAMILIES, RECURRENT
from tests.families_table import PROMPTS, converts
from tests.family_cases import TOLERANCE
from tests.tiny import EVERY_FAMILY, base_config

TEXT = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")


def test_every_family_has_its_row():
    """Within the tolerance, all generations identical; and every supported model_type is among them."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line[:2] == "| "]
    assert [row[0] for row in rows[1:]] == sorted(EVERY_FAMILY)
    assert {base_config(row[0])["model_type"] for row in rows[1:]} == FAMILIES.keys()
    generations = PROMPTS * len(TEMPERATURES) * len(TREES) * len(INSERTIONS)
    for name, tree, insertions, training, identical, convert, _ in rows[1:]:
        assert max(float(tree), float(insertions), float(training)) <= TOLERANCE
        assert identical == f"{generations} of {generations}"
        assert convert == ("yes" if converts(name) else "no")


@pytest.mark.parametrize("name", sorted(RECURRENT))
def test_every_refusal_is_named(name):
    assert f"`{name}`" in TEXT
