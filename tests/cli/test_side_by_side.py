"""The side-by-side script: the first answer pass by pass, a line of the benchmark's measurement, or all in JSON."""

import importlib.util
import json
import re
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


SHORT = ["--prompts", "2", "--repeats", "2", "--max-tokens", "24", "--draft", "chain"]


def test_json_is_one_document(script, capsys):
    assert script.main([*SHORT, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    stock, chain = document["workloads"][0]["arms"]
    assert (stock["arm"], chain["arm"]) == ("mlx-lm", "chain")
    assert stock["tokens"] == chain["tokens"] == stock["passes"]
    assert chain["prompts_with_equal_tokens"] == 2
    assert len(chain["decode_seconds"]["all"]) == 2


def test_question_passes_answer_and_one_line_of_comparison(script, capsys):
    """Red when: the question comes twice, the passes do not make the answer, or a pipe gets colours."""
    assert script.main(SHORT) == 0
    stdout = capsys.readouterr().out
    assert "\x1b" not in stdout
    question, passes, answer, comparison = re.split("\n\n", stdout.rstrip("\n"))
    assert question.startswith("Question\n  CREATE TABLE")
    assert stdout.count("-- question:") == 1
    heading, *lines = passes.splitlines()
    assert heading == "Passes: [drafted and accepted], the model's own token, {drafted and rejected}"
    assert [int(line[:3]) for line in lines] == list(range(1, len(lines) + 1))
    kept, *rejected = zip(*(re.fullmatch(r"(.*?)((?:  \{.*?\})*)", line[5:]).groups() for line in lines), strict=True)
    assert any(rejected[0])
    drawn = "".join(re.sub(r"^\[(.*)\]", r"\1", part) for part in kept)
    title, text = answer.split("\n  ")
    assert title == f"Answer: 24 tokens in {len(lines)} passes"
    assert drawn == text
    assert re.fullmatch(
        r"Beside stock mlx-lm: the same text on 2 questions, [\d.]+x as fast \([\d.]+ s instead of [\d.]+ s; "
        r"decoding alone [\d.]+x; --draft chain, median of 2 rounds\)",
        comparison,
    )


def test_colours_on_a_terminal_only(script, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    short = ["--prompts", "1", "--repeats", "1", "--max-tokens", "9", "--draft", "chain"]
    assert script.main(short) == 0
    assert "\x1b[32mdrafted and accepted\x1b[0m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert script.main(short) == 0
    assert "\x1b" not in capsys.readouterr().out


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
