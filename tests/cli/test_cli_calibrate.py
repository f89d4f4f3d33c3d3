"""``specstream-mlx calibrate`` on a tiny model: tables, JSON, the stored plan, and refusals before measuring."""

import importlib.util
import json

import pytest

from tests.tiny import make_model, save_directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = save_directory(make_model("llama", seed=41), tmp_path_factory.mktemp("model") / "tiny")
    lines = [json.dumps({"prompt": " ".join(f"w{word}" for word in range(start, start + 9))}) for start in (7, 20)]
    (path / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECSTREAM_MLX_CACHE", str(tmp_path / "cache"))


def calibrate(run, directory, *more):
    arguments = ("--context", "16", "--repeats", "1", "--max-tokens", "12", *more)
    return run("calibrate", "--model", str(directory), *arguments)


def test_the_plan_is_stored_and_used(run, directory, tmp_path):
    """Red when: the file is written under another key than generate looks for."""
    result = calibrate(run, directory)
    assert result.code == 0
    assert "context 16: plain step" in result.stdout
    assert "acceptance on samples.jsonl, 2 prompts" in result.stdout
    (stored,) = (tmp_path / "cache" / "calibrations").iterdir()
    assert str(stored) in result.stderr
    answer = run("generate", "--model", str(directory), "--prompt", "w7 w8 w9", "--json", "-m", "5")
    assert json.loads(answer.stdout)["draft"]["plan"] == "calibrated"
    stored.write_text("{")
    answer = run("generate", "--model", str(directory), "--prompt", "w7 w8 w9", "--json", "--quiet", "-m", "5")
    assert (answer.code, json.loads(answer.stdout)["draft"]["plan"]) == (0, "default")
    (line,) = answer.stderr.splitlines()
    assert line.startswith(f"warning: {stored}: damaged calibration")


def test_json_is_the_calibration(run, directory, tmp_path):
    result = calibrate(run, directory, "--json", "--no-store", "--quiet")
    document = json.loads(result.stdout)
    assert (result.code, result.stderr) == (0, "")
    assert [costs["context"] for costs in document["costs"]] == [16]
    assert document["plans"][0]["expected_speedup"] >= 1
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--prompts-file", "nowhere.jsonl"], 3, "nowhere.jsonl: cannot be read"),
        (["--plot", "curve.pdf"], 2, "plots are PNG files"),
        (["--plot", "nowhere/curve.png"], 2, "no such directory"),
        (["--context", "0"], 2, "got 0, expected a number of at least 1"),
        (["--repeats", "0"], 2, "--repeats"),
    ],
)
def test_refusals_are_one_line(run, directory, arguments, code, message):
    result = run("calibrate", "--model", str(directory), *arguments)
    assert (result.code, result.stdout) == (code, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_missing_matplotlib_is_said_before_measuring(run, directory, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run("calibrate", "--model", str(directory), "--plot", "curve.png")
    assert result.code == 2
    assert "pip install 'specstream-mlx[plots]'" in result.stderr


def test_a_plot_is_a_png(run, directory, tmp_path):
    pytest.importorskip("matplotlib")
    result = calibrate(run, directory, "--plot", str(tmp_path / "curve.png"), "--no-store")
    assert result.code == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
