"""The document of PEFT features covers what the code does; its figures are a command's, not a test's."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft_cases import ATOL, FAMILIES, refused, ties  # noqa: E402
from peft_table import known_fields, refusals, rows  # noqa: E402

DOCUMENT = Path(__file__).parents[2] / "docs" / "peft.md"


def cells(title: str) -> dict[str, list[str]]:
    """The rows of one table of the document by their first cell."""
    part = DOCUMENT.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:2] == "| "]
    return {row[0]: row[1:] for row in found[1:]}


@pytest.mark.parametrize("title", ["Merged into the base", "Live"])
def test_every_feature_has_its_row(title: str) -> None:
    """With a figure within the tolerance, or a refusal, for every family it is tried on."""
    found = cells(title)
    assert list(found) == [name for _, _, name in rows()]
    for feature, tie, name in rows():
        for family, cell in zip(FAMILIES, found[name], strict=True):
            if family not in feature.families or tie not in ties(feature, family):
                assert cell == "-"
            elif refused(feature, family, fuse=title != "Live"):
                assert re.fullmatch(r"refused \(\d+\)", cell)
            else:
                assert float(cell) <= ATOL


def test_every_refusal_has_its_row(tmp_path: Path) -> None:
    assert {name: [why] for name, why in refusals(tmp_path)} == cells("Refused")


def test_every_field_of_peft_is_known() -> None:
    """A field that PEFT adds is neither ignored nor converted by accident."""
    assert {field.name for field in fields(peft.LoraConfig)} <= known_fields()
