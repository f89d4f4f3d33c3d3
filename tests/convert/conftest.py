"""Tiny checkpoints shared by the converter's tests."""

from pathlib import Path

import pytest
from convert_cases import Case, make_case


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """One case of each mode; tests copy them."""
    root = tmp_path_factory.mktemp("cases")
    return {mode: make_case(root / mode, mode=mode) for mode in ("shared", "lossless")}


@pytest.fixture
def case(pristine: dict[str, Case], tmp_path: Path) -> Case:
    """A copy of the shared-mode case that the test may damage."""
    return pristine["shared"].copy(tmp_path / "case")


@pytest.fixture
def lossless_case(pristine: dict[str, Case], tmp_path: Path) -> Case:
    """A copy of the lossless-mode case that the test may damage."""
    return pristine["lossless"].copy(tmp_path / "case")
