"""The side-by-side script: the benchmark's measurement, its first answer, and one JSON document on the last line."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("side_by_side", ROOT / "benchmarks" / "side_by_side.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "side_by_side", module)
    spec.loader.exec_module(module)
    return module


def test_the_last_line_is_one_json_document(script, tmp_path, capsys):
    file = tmp_path / "out.json"
    arguments = ["--prompts", "2", "--repeats", "2", "--max-tokens", "24", "--draft", "chain", "--json", str(file)]
    assert script.main(arguments) == 0
    stdout = capsys.readouterr().out
    document = json.loads(stdout.splitlines()[-1])
    assert document == json.loads(file.read_text())
    stock, chain = document["workloads"][0]["arms"]
    assert (stock["arm"], chain["arm"]) == ("mlx-lm", "chain")
    assert stock["tokens"] == chain["tokens"] == stock["passes"]
    assert chain["prompts_with_equal_tokens"] == 2
    assert len(chain["decode_seconds"]["all"]) == 2
    assert stdout.startswith("prompt 1:\nCREATE TABLE")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "no samples.jsonl beside the model; give --prompts-file"),
        ("", "no prompts in it"),
        ("[1]\n", "expected a JSON object with a 'prompt'"),
    ],
)
def test_bad_prompts_are_one_line(script, tmp_path, capsys, content, line):
    from tests.tiny import make_model, save_directory

    directory = save_directory(make_model("llama", seed=1), tmp_path / "model")
    if content is not None:
        (directory / "samples.jsonl").write_text(content)
    assert script.main(["--model", str(directory)]) == 3
    assert line in capsys.readouterr().err
