"""Tiny checkpoints shared by the converter's tests."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from convert_cases import Case, make_case
from float64_check import check_in_float64

from specstream_convert import pipeline
from specstream_convert.verification.comparison import Expected


@pytest.fixture(scope="session", autouse=True)
def float64_oracle() -> Iterator[None]:
    """Every conversion that verifies its output is also held beside the float64 reference, which is not shipped."""
    verify = pipeline.verify_output

    def verify_twice(directory: Path, expected: Expected, progress: Any = None) -> dict[str, Any]:
        figures = verify(directory, expected, progress)
        found = check_in_float64(directory, expected)
        if "tensors" in figures:
            figures["tensors"] |= found
        return figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "verify_output", verify_twice)
        yield


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
