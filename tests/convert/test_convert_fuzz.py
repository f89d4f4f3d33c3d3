"""A slice of the fuzzer; the whole is a command (see ``convert_fuzz.py``)."""

import json
import random
import time
from pathlib import Path

import pytest
from convert_cases import Case
from convert_fuzz import JSON_FILES, TENSOR_FILES, TooSlow, check_complete, damage, limited, make_pristine, run_one

from specstream_convert import convert


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    return make_pristine(tmp_path_factory.mktemp("fuzz"))


def test_damaged_checkpoints(sound: list[Case], tmp_path: Path) -> None:
    """Every damaged checkpoint is refused or converted; most are refused."""
    outcomes = [run_one(sound, tmp_path / str(seed), seed, seconds=120) for seed in range(150)]
    assert outcomes.count("InvalidInputError") > 75
    assert "UnsupportedError" in outcomes
    assert "converted" in outcomes


def test_undamaged_they_convert(sound: list[Case], tmp_path: Path) -> None:
    for i, pristine in enumerate(sound):
        case = pristine.copy(tmp_path / str(i))
        key_map = case.root / "map.json"
        convert(case.options(key_map=key_map if key_map.exists() else None))
        check_complete(case.out)


def test_every_file_is_damaged(sound: list[Case], tmp_path: Path) -> None:
    seen: set[str] = set()
    for seed in range(80):
        rng = random.Random(seed)
        seen |= set(damage(rng.choice(sound).copy(tmp_path / str(seed)), rng).split(" and "))
    assert seen - {"nothing"} == {*JSON_FILES, *TENSOR_FILES}


def test_the_fuzzer_sees_half_an_output(sound: list[Case], tmp_path: Path) -> None:
    case = sound[0].copy(tmp_path / "case")
    convert(case.options(verify=False))
    file = case.out / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    with pytest.raises(AssertionError, match=r"config\.json"):
        check_complete(case.out)
    file.unlink()
    with pytest.raises(AssertionError):
        check_complete(case.out)


def test_the_fuzzer_sees_a_hang() -> None:
    with pytest.raises(TooSlow), limited(0.02):
        time.sleep(10)
