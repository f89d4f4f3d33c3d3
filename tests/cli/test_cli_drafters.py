"""``--drafter``, ``--draft-model`` and ``--num-draft-tokens`` of every command, and ``generate --show-passes``."""

import io
import json
import sys
from typing import get_args

import pytest

from specstream_mlx.drafters import prompt_lookup, two_model
from specstream_mlx.options import DrafterName
from tests.tiny import make_model, save_directory

PROMPT = "w7 w8 w9 w7 w8"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = save_directory(make_model("llama", seed=41), tmp_path_factory.mktemp("model") / "tiny")
    (path / "samples.jsonl").write_text('{"prompt": "w7 w8 w9 w10"}\n')
    return str(path)


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECSTREAM_MLX_CACHE", str(tmp_path / "cache"))


def generate(run, directory, *more):
    result = run("generate", "--model", directory, "-p", PROMPT, "-m", "24", "--json", "--quiet", *more)
    assert (result.code, result.stderr) == (0, "")
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def drafting(directory):
    """The flags of every drafter of which a model of these tests has the weights."""
    return {
        "streams": [],
        "two-model": ["--draft-model", directory],
        "prompt-lookup": ["--num-draft-tokens", "3"],
        "none": [],
    }


@pytest.mark.parametrize("draft", ["auto", "tree", "chain", "off"])
def test_every_drafter_gives_the_same_tokens(run, directory, drafting, draft):
    """Red when: a flag is lost on its way, or a drafter changes a token."""
    plain = generate(run, directory, "--draft", "off")
    assert set(drafting) <= set(get_args(DrafterName))
    for name, flags in drafting.items():
        if name == "none" and draft in ("tree", "chain"):
            continue
        found = generate(run, directory, "--drafter", name, *flags, "--draft", draft)
        assert found["token_ids"] == plain["token_ids"]
        assert (found["draft"]["drafter"], found["draft"]["mode"]) == (name, draft)
        assert "passes" not in found
        if name == "prompt-lookup":
            assert found["draft"]["gamma"] == 3
            assert found["draft"]["insertion"] is None
        if name == "two-model" and draft == "chain":
            assert found["tokens_per_pass"] > 3, "the draft model is the model itself"


def test_a_draft_model_is_enough_to_choose_its_drafter(run, directory):
    found = generate(run, directory, "--draft-model", directory, "--num-draft-tokens", "2", "--draft", "chain")
    assert (found["draft"]["drafter"], found["draft"]["gamma"]) == ("two-model", 2)
    assert generate(run, directory)["draft"]["drafter"] == "streams"


def test_the_help_says_the_default_lengths(run):
    for command in ("generate", "chat", "calibrate", "benchmark"):
        help_text = " ".join(run(command, "--help").stdout.split())
        assert f"Default: {two_model.NUM_DRAFT_TOKENS} and {prompt_lookup.NUM_DRAFT_TOKENS}." in help_text
        assert "|".join(get_args(DrafterName)) in help_text


REFUSALS = [
    (["--drafter", "magic"], 2, "--drafter"),
    (["--drafter", "two-model"], 2, "--draft-model is missing; drafter 'two-model' needs a second, smaller model"),
    (["--drafter", "prompt-lookup", "--draft-model", "DIRECTORY"], 2, "--draft-model does not go with drafter"),
    (["--num-draft-tokens", "3"], 2, "--num-draft-tokens goes with the drafters 'two-model' and 'prompt-lookup'"),
    (["--drafter", "prompt-lookup", "--num-draft-tokens", "0"], 2, "--num-draft-tokens: got 0, expected a number of"),
    (["--draft-model", "./nowhere"], 3, "--draft-model: ./nowhere: no such directory"),
]


@pytest.mark.parametrize("command", ["generate", "chat", "calibrate"])
@pytest.mark.parametrize(("arguments", "code", "message"), REFUSALS)
def test_refusals_are_one_line_and_name_the_flag(run, monkeypatch, directory, command, arguments, code, message):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    words = [directory if word == "DIRECTORY" else word for word in arguments]
    more = ["-p", PROMPT] if command == "generate" else []
    result = run(command, "--model", directory, *more, *words)
    assert (result.code, result.stdout) == (code, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--drafter", "none", "--draft", "tree"], "--draft tree: has no meaning with --drafter none; drop one"),
        (["--drafter", "none", "--tree", "chain:2"], "--tree: has no meaning with --drafter none; drop one"),
        (["--drafter", "prompt-lookup", "--prune-threshold", "0.1"], "--prune-threshold does not go with this drafter"),
        (["--drafter", "prompt-lookup", "--tree", "chain:99"], "tree is 'chain:99': depth 99 exceeds"),
        (["--drafter", "magic"], "--drafter: 'magic' is not one of"),
        (["--drafter", "prompt-lookup", "--insertion", "leaf"], "insertion 'leaf' goes with the drafter 'streams'"),
        (["--show-passes", "--quiet"], "--show-passes: contradicts --quiet"),
    ],
)
def test_contradictions_of_generate(run, directory, arguments, message):
    result = run("generate", "--model", directory, "-p", PROMPT, *arguments)
    assert (result.code, result.stdout) == (2, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_draft_model_of_another_vocabulary_is_refused(run, directory):
    from specstream_mlx import default_model_path

    result = run("generate", "--model", directory, "-p", PROMPT, "--draft-model", str(default_model_path()))
    assert (result.code, result.stdout) == (3, "")
    assert "--draft-model: vocabulary of 2048 tokens, the model has 97" in result.stderr


def test_a_model_without_streams_says_so_when_it_is_asked_for_them(run, directory, tmp_path):
    plain = save_directory(make_model("llama", seed=41), tmp_path / "plain")
    for name in ("specstream_config.json", "specstream.safetensors"):
        (plain / name).unlink()
    result = run("generate", "--model", str(plain), "-p", PROMPT, "--drafter", "streams")
    assert (result.code, result.stdout) == (2, "")
    assert "drafter 'streams' is asked for, and the model and its adapter have none" in result.stderr
    assert generate(run, str(plain), "--drafter", "prompt-lookup")["draft"]["drafter"] == "prompt-lookup"
    assert generate(run, str(plain))["draft"]["drafter"] == "none"
    assert run("calibrate", "--model", str(plain)).stderr.startswith("error: this model has no streams, so")


def test_chat_drafts_as_it_is_told(run, monkeypatch, directory):
    texts = set()
    for flags in (["--drafter", "prompt-lookup"], ["--draft-model", directory], ["--drafter", "none"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"w7 w8 w9\nw8 w9\n")))
        result = run("chat", "--model", directory, "--json", "--quiet", "-m", "9", *flags)
        assert (result.code, result.stderr) == (0, "")
        turns = json.loads(result.stdout)["turns"]
        names = {turn["draft"]["drafter"] for turn in turns}
        assert names == {flags[1] if flags[0] == "--drafter" else "two-model"}
        texts.add(tuple(turn["text"] for turn in turns))
    assert len(texts) == 1


def test_a_stored_plan_belongs_to_its_drafter(run, directory, drafting, tmp_path):
    """Red when: a plan is used for another drafter, another draft model, or another number of draft tokens."""
    other = str(save_directory(make_model("llama", seed=42), tmp_path / "other"))
    words = ["--context", "16", "--repeats", "1", "--max-tokens", "12"]
    labels = {"two-model": "+ drafting ms", "prompt-lookup": "+ drafting ms", "streams": "+ leaf streams ms"}
    ways = {name: ["--drafter", name, *drafting[name]] for name in labels}
    for name, flags in ways.items():
        assert generate(run, directory, *flags)["draft"]["plan"] == "default"
        result = run("calibrate", "--model", directory, *words, *flags)
        assert result.code == 0, result.stderr
        assert labels[name] in result.stdout
        assert ("leaf" in result.stdout) == (name == "streams")
        assert generate(run, directory, *flags)["draft"]["plan"] == "calibrated"
    assert len(list((tmp_path / "cache" / "calibrations").iterdir())) == 3
    for flags in (["--drafter", "prompt-lookup"], ["--draft-model", other]):
        found = generate(run, directory, *flags)
        assert found["draft"]["plan"] == "default"
    result = run("calibrate", "--model", directory, "--drafter", "none")
    assert (result.code, result.stderr.count("\n")) == (2, 1)
    assert "plain decoding needs no plan" in result.stderr


@pytest.mark.parametrize("flags", [[], ["--drafter", "prompt-lookup"], ["--draft", "tree", "--tree", "cartesian:2x2"]])
def test_passes_in_json_are_the_answer(run, directory, flags):
    found = generate(run, directory, "--show-passes", *flags)
    passes = found["passes"]
    assert len(passes) == found["target_passes"]
    assert [token for one in passes for token in one["tokens"]] == found["token_ids"]
    for one in passes:
        assert one["tokens"][: len(one["accepted"])] == one["accepted"]
        assert not one["accepted"] or any(path[: len(one["accepted"])] == one["accepted"] for path in one["drafted"])
    assert sum(bool(one["drafted"]) for one in passes) == found["drafted_by_depth"][0]
    assert sum(len(one["accepted"]) for one in passes) == sum(found["accepted_by_depth"])
    if "--tree" in flags:
        assert {len(one["drafted"]) for one in passes} == {0, 4}


def test_passes_are_lines_on_standard_error(run, directory):
    result = run(
        "generate", "--model", directory, "-p", PROMPT, "-m", "24", "--draft-model", directory, "--show-passes"
    )
    legend, *lines, statistics = result.stderr.splitlines()
    assert result.code == 0
    assert legend == "passes: [drafted and accepted], the model's own token, {drafted and rejected}"
    assert [int(line[:3]) for line in lines] == list(range(1, len(lines) + 1))
    assert f"in {len(lines)} passes" in statistics
    assert lines[1].startswith("  2  [ w")
    drawn = " ".join(line[5:].partition("  {")[0] for line in lines)
    assert drawn.replace("[", "").replace("]", "").split() == result.stdout.split()


def test_passes_of_a_file_name_the_prompt(run, directory, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "w7 w8 w9"}\n\n{"prompt": "w17 w18"}\n')
    result = run("generate", "--model", directory, "--prompts-file", str(file), "-m", "5", "--show-passes")
    headings = [line for line in result.stderr.splitlines() if "passes: [" in line]
    assert [line.partition(": passes")[0] for line in headings] == [f"{file}:1", f"{file}:3"]
    result = run("generate", "--model", directory, "--prompts-file", str(file), "-m", "5", "--show-passes", "--json")
    assert all(answer["passes"] for answer in json.loads(result.stdout)["answers"])


def test_passes_on_a_terminal_have_colours_and_the_text_follows(run, directory, monkeypatch):
    """Red when: text and passes are written into one line of a terminal."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    words = ["generate", "--model", directory, "-p", PROMPT, "-m", "12", "--show-passes"]
    plain = run(*words)
    written: list[str] = []
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
        write = stream.write
        monkeypatch.setattr(stream, "write", lambda text, write=write: (written.append(text), write(text))[1])
    result = run(*words)
    assert result.code == 0
    assert "\x1b[32m" in result.stderr
    assert result.stdout == plain.stdout
    assert written.index(result.stdout) > max(i for i, text in enumerate(written) if "\x1b[1m" in text)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[drafted and accepted]" in run(*words).stderr


def test_a_pass_is_drawn_before_the_next_is_made(run, library, monkeypatch):
    """Red when: lines wait for the end of the answer."""
    events: list[str] = []
    monkeypatch.setattr("specstream_cli.generate.to_stderr", lambda line: events.append(line.strip()[:1]))
    library.on_step = lambda index: events.append(f"made {index}")
    assert run("generate", "-p", "hi", "--show-passes").code == 0
    assert events[:7] == ["p", "made 0", "1", "made 1", "2", "made 2", "3"]
