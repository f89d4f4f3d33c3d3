"""The document of families covers what the code supports; its figures are a command's, not a test's."""

from pathlib import Path

import pytest

from benchmarks.exactness import INSERTIONS, TEMPERATURES, TREES
from specstream_mlx.errors import UnsupportedError
from specstream_mlx.families import FAMILIES, REFUSED, check_supported
from tests.families_table import PARTS, PROMPTS, ROWS, converts, model_types, reasons, rows_of
from tests.family_cases import TOLERANCE
from tests.tiny import base_config

TEXT = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")


def test_every_family_has_its_row():
    """Within the tolerance, all generations identical; and every supported model_type is among them."""
    rows = rows_of(TEXT)
    assert list(rows) == sorted(ROWS)
    assert {base_config(name)["model_type"] for name in rows} == FAMILIES.keys()
    generations = PROMPTS * len(TEMPERATURES) * len(TREES) * len(INSERTIONS)
    for name, (tree, insertions, training, identical, convert, _) in rows.items():
        assert max(float(tree), float(insertions), float(training)) <= TOLERANCE
        assert identical == f"{generations} of {generations}"
        assert convert == ("yes" if converts(name) else "no")


def test_every_model_of_mlx_lm_is_run_or_refused():
    """Names the models of a new mlx-lm that have neither a family nor a reason."""
    assert model_types() | {"opt"} == FAMILIES.keys() | REFUSED.keys()
    assert not FAMILIES.keys() & REFUSED.keys()


@pytest.mark.parametrize("name", sorted(reasons()))
def test_every_refusal_is_a_row_and_is_given_before_a_download(name):
    assert f"| {name} | {reasons()[name]} |" in TEXT
    model_type, config = PARTS.get(name, (name, {}))
    with pytest.raises(UnsupportedError) as refused:
        check_supported(config | {"model_type": model_type}, "config.json")
    assert reasons()[name] in str(refused.value)
    assert "\n" not in str(refused.value)
