"""A slice of the fuzzer; the whole is a command (see ``convert_fuzz.py``)."""

from pathlib import Path

from convert_cases import make_case
from convert_fuzz import run_one


def test_damaged_checkpoints(tmp_path: Path) -> None:
    """Every damaged checkpoint is refused or converted; most are refused."""
    pristine = make_case(tmp_path / "pristine", shards=2)
    outcomes = [run_one(pristine, tmp_path / str(seed), seed) for seed in range(150)]
    assert outcomes.count("InvalidInputError") > 75
