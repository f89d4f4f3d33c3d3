"""The ablations command: one budget for all arms, figures kept arm by arm."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import train_ablations


def test_arms_are_trained_once_on_one_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Red when: an arm's own setting is lost, an arm is trained again, or figures of two budgets are mixed."""
    out = tmp_path / "figures.json"
    words = ["--out", str(out), "--prompts", "8", "--heldout", "3", "--iters", "2", "--batch-size", "4"]
    assert train_ablations.main([*words, "--only", "gamma 2", "--plot", str(tmp_path / "figures.png")]) == 0
    assert (tmp_path / "figures.png").stat().st_size > 10_000
    arm = json.loads(capsys.readouterr().out.splitlines()[-1])["arms"]["gamma 2"][0]
    assert (arm["settings"]["gamma"], len(arm["acceptance"]), arm["settings"]["rank"]) == (2, 2, 32)
    assert arm["tokens_per_pass"] >= 1
    answers = (tmp_path / "figures.answers.jsonl").read_text()
    assert len(answers.splitlines()) == 11

    def fail(*_: Any) -> None:
        raise AssertionError("trained again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ablations, "measure", fail)
        assert train_ablations.main([*words, "--only", "gamma 2"]) == 0
        with pytest.raises(AssertionError, match="trained again"):
            train_ablations.main([*words, "--only", "rank 8"])
        with pytest.raises(AssertionError, match="trained again"):
            train_ablations.main([*words, "--only", "gamma 2", "--seeds", "2"])
    assert "gamma 2" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="made with other settings"):
        train_ablations.main([*words, "--iters", "3", "--only", "gamma 2"])
