"""The side-by-side script: no figure before equal tokens, arms in turn, one JSON document on the last line."""

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


@pytest.fixture
def compare(script, tmp_path, monkeypatch, capsys):
    """Run the script with arms that speak the given tokens; records the order in which they are asked."""
    calls = []

    def run(tokens_by_arm, *arguments):
        def arm(name, groups):
            def start(prompt):
                calls.append(name)
                return ((tokens, str(tokens), count + 1) for count, tokens in enumerate(groups))

            return script.Arm(name, start)

        arms = [arm(name, groups) for name, groups in tokens_by_arm.items()]
        tokenizer = type("T", (), {"has_chat_template": False, "bos_token": None, "encode": lambda *_, **__: [1]})()
        monkeypatch.setattr(script, "load_arms", lambda *_: (arms, tokenizer))
        monkeypatch.setattr(script, "weights_dtype", lambda _: "F32")
        (tmp_path / "samples.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
        code = script.main(["--model", str(tmp_path), "--repeats", "2", *arguments])
        return code, *capsys.readouterr()

    run.calls = calls
    return run


def test_different_tokens_give_no_figure(compare):
    code, stdout, stderr = compare({"mlx-lm": [[1], [2], [3]], "auto": [[1], [2, 4]]})
    assert code == 5
    assert "auto: other tokens than mlx-lm on prompts 0, 1" in stderr
    assert "speed-up" not in stdout
    assert "{" not in stdout


def test_differences_can_be_counted_instead(compare):
    code, stdout, _ = compare({"mlx-lm": [[1], [2]], "auto": [[1], [4]]}, "--allow-differences")
    assert code == 0
    assert "0 of 2" in stdout


def test_the_last_line_is_one_json_document(compare, tmp_path):
    file = tmp_path / "out.json"
    code, stdout, _ = compare({"mlx-lm": [[1], [2], [3]], "chain": [[1], [2], [3]]}, "--json", str(file))
    document = json.loads(stdout.splitlines()[-1])
    assert (code, document) == (0, json.loads(file.read_text()))
    arms = {arm["arm"]: arm for arm in document["arms"]}
    assert arms["chain"]["tokens"] == arms["mlx-lm"]["tokens"] == 6
    assert arms["chain"]["prompts_with_equal_tokens"] == 2
    assert len(arms["chain"]["decode_seconds"]["all"]) == 2


def test_arms_take_turns_after_a_warm_up(compare):
    compare({"mlx-lm": [[1]], "auto": [[1]]})
    warm_up, rounds = compare.calls[:4], compare.calls[4:]
    assert warm_up == ["mlx-lm", "mlx-lm", "auto", "auto"]
    assert rounds == ["mlx-lm", "auto", "auto", "mlx-lm", "auto", "mlx-lm", "mlx-lm", "auto"]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "No such file or directory; give --prompts-file"),
        ("", "no prompts in it"),
        ("[1]\n", "expected lines of JSON objects with a 'prompt'"),
    ],
)
def test_bad_prompts_are_one_line(script, tmp_path, capsys, content, line):
    if content is not None:
        (tmp_path / "samples.jsonl").write_text(content)
    assert script.main(["--model", str(tmp_path)]) == 3
    assert line in capsys.readouterr().err
