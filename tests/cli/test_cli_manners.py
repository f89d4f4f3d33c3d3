"""Names and habits of mlx-lm on the command line, and what users of similar programs reported."""

import io
import json
import os
import pty
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from specstream_mlx import load
from tests.tiny import make_model, plain_tokens, save_directory

# Shows what was said behind names of roles; a question of the user follows w90.
TEMPLATE = (
    "{% for m in messages %}{{ {'system': 'w93', 'user': 'w90', 'assistant': 'w91'}[m.role] }} {{ m.content }} "
    "{% endfor %}{% if add_generation_prompt %}w92{% endif %}"
)
CHANNELS = (
    "{% for m in messages %}{% if '<|channel|>' in m.content %}{{ raise_exception('channels') }}{% endif %}"
    "{{ m.role[0] }} {{ m.content }} {% endfor %}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = save_directory(make_model("qwen3", seed=2), tmp_path_factory.mktemp("manners") / "model")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def cached_prompt(run, directory, tmp_path, text="w60 w61 w62"):
    file = str(tmp_path / "prompt.safetensors")
    assert run("cache_prompt", "--model", str(directory), "-p", text, "--prompt-cache-file", file).code == 0
    return file


@pytest.mark.parametrize("more", [[], ["--prefill-response", "w50 w51"], ["--system-prompt", "w70 <query> w71"]])
def test_the_question_follows_a_prompt_cache(run, directory, tmp_path, more):
    """Red when: the question is dropped before the beginning of an answer, or a system prompt moves the cut."""
    file = cached_prompt(run, directory, tmp_path)
    result = run("generate", "--prompt-cache-file", file, "-p", "w7 w8", "-m", "6", "--json", *more)
    assert result.code == 0, result.stderr
    model, tokenizer = load(directory)
    answer = "w91 w50 w51" if "--prefill-response" in more else "w92"
    prompt = tokenizer.encode(f"w90 w60 w61 w62 w7 w8 {answer}")
    document = json.loads(result.stdout)
    assert document["prompt_tokens"] == len(tokenizer.encode(f"w7 w8 {answer}"))
    assert document["token_ids"] == plain_tokens(model.base, prompt, 6)
    assert ("--system-prompt has no effect: the prompt cache holds" in result.stderr) == ("--system-prompt" in more)


def test_stop_takes_the_escapes_of_the_prompt(run, library, tmp_path):
    result = run("generate", "--model", str(tmp_path), "-p", "hi", "--stop", r"\n\n", "--stop", r"a\tb")
    assert result.code == 0
    assert library.call["stop"] == ("\n\n", "a\tb")


def test_names_of_mlx_lm(run, library, tmp_path, monkeypatch):
    calls = []

    def load(path_or_repo=None, adapter=None, **more):
        calls.append((path_or_repo, adapter, more))
        return SimpleNamespace(args=SimpleNamespace(vocab_size=50)), library.tokenizer

    monkeypatch.setattr("specstream_mlx.load", load)
    (tmp_path / "adapter").mkdir()
    adapter = str(tmp_path / "adapter")
    run("generate", "--model", "org/name", "--adapter-path", adapter, "-p", "hi", "--revision", "v1")
    run("generate", "--model", "org/name@v1", "-p", "hi", "--trust-remote-code")
    assert calls == [
        ("org/name", adapter, {"revision": "v1"}),
        ("org/name@v1", None, {"trust_remote_code": True}),
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["generate", "--revision", "v1", "-p", "a"], "--revision: is of the repository that --model names"),
        (
            ["generate", "--model", ".", "--revision", "v1", "-p", "a"],
            "--model: revision is 'v1', and . is a directory",
        ),
        (["chat", "--model", "a/b@v1", "--revision", "v2"], "--model: revision is 'v2', and a/b@v1 names 'v1'"),
        (["calibrate", "--revision", "v1"], "--revision: is of the repository that --model names"),
        (["benchmark", "--revision", "v1"], "--revision: is of the repository that --model names"),
        (["train", "--self-distill", "--revision", "v1"], "--revision: is of the repository that --model names"),
        (
            ["cache_prompt", "--prompt-cache-file", "x", "-p", "a", "--revision", "v"],
            "--revision: is of the repository",
        ),
        (
            ["convert", "--adapter-path", ".", "--revision", "v1"],
            "--revision is of the repository that --hf-path names",
        ),
    ],
)
def test_a_revision_needs_a_repository(run, words, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert (result.code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert line in result.stderr


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "continue_final_message", "return_dict"])
@pytest.mark.parametrize("command", [["generate", "-p", "a"], ["chat"], ["train", "--self-distill"]])
def test_a_template_argument_that_is_decided_here_is_a_usage_error(run, command, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*command, "--chat-template-config", json.dumps({name: True}))
    line = f"error: --chat-template-config: '{name}' is decided by this program; leave it out\n"
    assert (result.code, result.stdout, result.stderr) == (2, "", line)


def asked(run, monkeypatch, lines, directory, *more):
    """The questions that chat understood."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in lines).encode())))
    result = run("chat", "--model", str(directory), "-m", "2", "--json", *more)
    assert result.code == 0, result.stderr
    return [turn["prompt"] for turn in json.loads(result.stdout)["turns"]]


def test_a_question_of_several_lines_and_one_that_is_a_command(run, monkeypatch, directory):
    lines = ['"""w7', "w8", "", 'w9"""', '"""q"""', '"""h', '"""', "w10", '"""', '"""', '"""w11', "w12"]
    assert asked(run, monkeypatch, lines, directory) == ["w7\nw8\n\nw9", "q", "h", "w10", "w11\nw12"]
    assert asked(run, monkeypatch, ["w7", "q", "w8"], directory) == ["w7"]
    assert asked(run, monkeypatch, ["w7", "w8"], directory) == ["w7", "w8"]


def test_pasted_lines_are_one_question_on_a_terminal(child, directory):
    """Red when: a paste of three lines becomes three questions."""
    code = "import sys; from specstream_cli.app import main; sys.exit(main(sys.argv[1:]))"
    ours, theirs = pty.openpty()
    with child(code, "chat", "--model", str(directory), "-m", "2", "--json", stdin=theirs) as process:
        os.close(theirs)
        found = b""
        while not found.endswith(b"> "):
            found += os.read(process.stderr.fileno(), 1000)
        os.write(ours, b"w7 w8\nw9\nw10\n")
        while b"tokens in" not in found:
            found += os.read(process.stderr.fileno(), 1000)
        os.write(ours, b"q\n")
        stdout, _ = process.communicate(timeout=600)
    os.close(ours)
    assert [turn["prompt"] for turn in json.loads(stdout)["turns"]] == ["w7 w8\nw9\nw10"]


def test_the_second_turn_after_channels(tmp_path):
    """Red when: the template refuses what the model said in the first turn."""
    from specstream_cli.chat import Conversation
    from specstream_mlx.formats.chat_template import ChatTemplate, answer_message

    path = save_directory(make_model("qwen3", seed=2), tmp_path / "model")
    (path / "chat_template.jinja").write_text(CHANNELS)
    model, tokenizer = load(path)
    options = {"logits_processors": None}
    talk = Conversation(model, tokenizer, ChatTemplate(), 4, None, options)
    said = "<|channel|>analysis<|message|>w8<|end|><|start|>assistant<|channel|>final<|message|>w9"
    talk.messages += [{"role": "user", "content": "w7"}, answer_message(said)]
    assert talk.prompt("w10") == tokenizer.encode("u w7 a w9 u w10")


def test_generation_config_is_opt_in_and_flags_come_first(run, directory, tmp_path, monkeypatch):
    """mlx-lm decodes greedily whatever the file says; transformers samples as it says."""
    import shutil

    from mlx_lm import sample_utils

    copy = Path(shutil.copytree(directory, tmp_path / "model"))
    calls = []
    original = sample_utils.make_sampler
    monkeypatch.setattr(sample_utils, "make_sampler", lambda t, **k: calls.append((t, k)) or original(t, **k))
    file = copy / "generation_config.json"
    words = ["generate", "--model", str(copy), "-p", "w7", "-m", "2", "--seed", "1", "--quiet"]
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 7, "eos_token_id": 5}))
    assert (run(*words).code, calls) == (0, [])
    assert run(*words, "--use-generation-config").code == 0
    assert run(*words, "--use-generation-config", "--temp", "0.5", "--top-k", "0").code == 0
    assert [(t, k["top_p"], k["top_k"]) for t, k in calls] == [(0.6, 0.9, 7), (0.5, 0.9, 0)]
    calls.clear()
    file.write_text(json.dumps({"temperature": 0.6}))  # transformers decodes greedily too
    assert (run(*words, "--use-generation-config").code, calls) == (0, [])
    for said, reason in (({"temperature": "hot"}, "temperature is 'hot'"), ({"top_p": 7}, "top_p is 7")):
        file.write_text(json.dumps({"do_sample": True} | said))
        result = run(*words, "--use-generation-config")
        assert (result.code, result.stdout, result.stderr.count("\n")) == (3, "", 1)
        assert f"{file}: {reason}, expected a number from 0 to" in result.stderr
    file.unlink()
    result = run(*words, "--use-generation-config")
    assert (result.code, result.stderr) == (3, f"error: {file}: file not found\n")


def test_inspect_downloads_a_repository(run, directory, tmp_path, monkeypatch):
    calls = []

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns):
        calls.append((name, revision))
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    for words in (["org/name@v1"], ["--model", "org/name", "--revision", "v1"]):
        result = run("inspect", *words, "--json")
        assert (result.code, json.loads(result.stdout)["kind"]) == (0, "specstream model")
    assert set(calls) == {("org/name", "v1")}
    refused = run("inspect", str(directory), "--revision", "v1")
    assert (refused.code, refused.stdout) == (2, "")
    assert "which has none; drop it" in refused.stderr
    assert run("inspect", "--revision", "v1").code == 2
    assert run("inspect", "org/na me").code == 3


def test_inspect_and_generate_on_a_directory_of_transformers_5(run, tmp_path):
    path = save_directory(make_model("llama", seed=3), tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    (path / "config.json").write_text(json.dumps(config))
    result = run("inspect", str(path), "--json")
    notes = json.loads(result.stdout)["notes"]
    assert "config.json: rope_parameters lifted to rope_theta and rope_scaling, where mlx-lm reads them" in notes
    result = run("generate", "--model", str(path), "-p", "w7", "-m", "2", "--check-exact")
    assert result.code == 0, result.stderr
    assert result.stderr.count("rope_parameters lifted") == 1
