"""``chat``: every answer is the one of its whole prompt, and the conversation survives what users do to it."""

import io
import json
import os
import pty
import signal
import sys

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from specstream_mlx import load, stream_generate
from tests.tiny import END_OF_TEXT, make_model, save_directory

# Earlier answers are rendered otherwise than the newest turn, as templates do that strip a model's thinking.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}w91 {{ m.content.split(' ')[:3] | join(' ') }} "
    "{% else %}{{ {'system': 'w93', 'user': 'w90'}[m.role] }} {{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w92{% endif %}{{ ' w94' if formal else '' }}"
)
QUESTIONS = ["w7 w8 w9", "w30 w31", "w32 w33 w34 w35 w36"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = save_directory(make_model("qwen3", seed=2), tmp_path_factory.mktemp("chat") / "model")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return str(path)


@pytest.fixture(scope="module")
def raw_directory(tmp_path_factory):
    return str(save_directory(make_model("qwen3", seed=2), tmp_path_factory.mktemp("raw") / "model"))


@pytest.fixture
def say(run, monkeypatch):
    def invoke(lines, *arguments):
        text = "".join(f"{line}\n" for line in lines)
        data = text if isinstance(lines, str) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return run("chat", *arguments)

    return invoke


def rendered(tokenizer, messages, **arguments):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments)
    return tokenizer.encode(text, add_special_tokens=False)


def stock(model, prompt, max_tokens, **more):
    tokens = []
    for token, _ in generate_step(mx.array(prompt), model.base, max_tokens=max_tokens, **more):
        tokens.append(token)
        if token == END_OF_TEXT:
            break
    return tokens


@pytest.mark.parametrize(
    ("words", "more"),
    [
        ("--draft off", {}),
        ("--draft tree", {}),
        ("--draft auto --prefill-step-size 3", {"prefill_step_size": 3}),
        ("--draft tree --temp 0.9 --seed 4", {"sampler": make_sampler(0.9)}),
        ("--max-kv-size 30", {"max_kv_size": 30}),
        ("--repetition-penalty 1.7", {"logits_processors": make_logits_processors(repetition_penalty=1.7)}),
    ],
)
def test_every_answer_is_that_of_the_whole_prompt(say, directory, words, more):
    """Red when: rows of the last turn survive where the template renders it otherwise."""
    words = [*words.split(), "--system-prompt", "w40 w41", "--chat-template-config", '{"formal": true}', "-m", "9"]
    result = say(QUESTIONS, "--model", directory, "--json", *words)
    assert result.code == 0, result.stderr
    turns = json.loads(result.stdout)["turns"]
    model, tokenizer = load(directory)
    messages = [{"role": "system", "content": "w40 w41"}]
    mx.random.seed(4)
    for question, turn in zip(QUESTIONS, turns, strict=True):
        messages.append({"role": "user", "content": question})
        prompt = rendered(tokenizer, messages, formal=True)
        assert turn["prompt"] == question
        assert turn["reused_tokens"] + turn["prompt_tokens"] == len(prompt)
        if "sampler" in more:  # every turn goes on with the noise where the last one ended
            fresh = stream_generate(model, tokenizer, prompt, 9, draft="off", **more)
            assert turn["token_ids"] == [token for response in fresh for token in response.tokens]
        else:
            assert turn["token_ids"] == stock(model, prompt, 9, **more)
        messages.append({"role": "assistant", "content": turn["text"]})
    reused = [turn["reused_tokens"] for turn in turns]
    if "--repetition-penalty" in words:  # which looks at the whole conversation
        assert reused == [0, 0, 0]
    elif "--max-kv-size" in words:
        assert reused[0] == 0 == reused[2] < reused[1]
    else:
        assert 0 == reused[0] < reused[1] < reused[2]


def test_the_answers_are_all_that_reaches_stdout(say, directory):
    """And a reset conversation answers like a new one."""
    result = say([QUESTIONS[0], "r", "", QUESTIONS[0], "h", "q", QUESTIONS[1]], "--model", directory, "-m", "5")
    first, second = result.stdout.splitlines()
    assert (result.code, first) == (0, second)
    lines = result.stderr.splitlines()
    assert [line.split(" ")[1] for line in (lines[0], lines[2])] == ["tokens", "tokens"]
    assert lines[1] == "reset, the conversation is forgotten"
    assert lines[3].startswith("q: quit")
    assert len(lines) == 4
    assert say([QUESTIONS[0]], "--model", directory, "-m", "5", "--quiet").stderr == ""


def test_stop_strings_end_an_answer_across_tokens(say, directory):
    free = json.loads(say(QUESTIONS[:1], "--model", directory, "-m", "8", "--json").stdout)["turns"][0]["text"]
    words = free.split()
    stop = f"{words[3]} {words[4]}"[1:-1]
    result = say(QUESTIONS[:2], "--model", directory, "-m", "8", "--stop", stop, "--draft", "tree")
    assert result.stdout.splitlines()[0] == free[: free.index(stop)]


def test_without_a_template_turns_are_plain_text(say, raw_directory):
    result = say(["w7 w8", r"w9\nw10"], "--model", raw_directory, "--json", "-m", "4")
    assert result.stderr.startswith("note: no chat template; turns are plain text")
    first, second = json.loads(result.stdout)["turns"]
    model, tokenizer = load(raw_directory)
    assert second["prompt"] == "w9\nw10"
    prompt = tokenizer.encode(f"w7 w8{first['text']}\nw9\nw10")
    assert second["token_ids"] == stock(model, prompt, 4)
    refused = say([], "--model", raw_directory, "--system-prompt", "x")
    assert (refused.code, refused.stdout) == (2, "")
    assert (
        refused.stderr
        == "error: --system-prompt: this tokenizer has no chat template; put everything into the prompt\n"
    )


def test_the_template_can_be_left_out(say, directory):
    lines = ["w7 w8"]
    result = say(lines, "--model", directory, "--ignore-chat-template", "--json", "-m", "4")
    model, tokenizer = load(directory)
    assert json.loads(result.stdout)["turns"][0]["token_ids"] == stock(model, tokenizer.encode("w7 w8"), 4)


def test_no_questions_no_answers(say, directory, monkeypatch, run):
    assert (say([], "--model", directory).code, say([], "--model", directory).stdout) == (0, "")
    assert json.loads(say([], "--model", directory, "--json").stdout) == {"turns": []}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n")))
    result = run("chat", "--model", directory)
    assert (result.code, result.stderr) == (3, "error: standard input: not valid UTF-8 (byte 0 of the line)\n")
    monkeypatch.setattr(sys, "stdin", None)
    assert run("chat", "--model", directory).stderr.startswith("error: standard input is closed")


def until(stream, text):
    found = b""
    while text not in found:
        piece = os.read(stream.fileno(), 1000)
        assert piece, f"ended with {found!r}"
        found += piece
    return found


def test_ctrl_c_stops_the_answer_and_then_the_program(child, directory):
    """Red when: Ctrl-C ends the conversation, or leaves rows of the pass under way in the cache."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from specstream_cli.app import main; sys.exit(main(sys.argv[1:]))"
    )
    ours, theirs = pty.openpty()
    with child(code, "chat", "--model", directory, "--extra-eos-token", "w7", "-m", "1000000", stdin=theirs) as process:
        os.close(theirs)
        until(process.stderr, b"> ")
        os.write(ours, b"w7 w8 w9\n")
        os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        assert b"stopped\n" in until(process.stderr, b"> ")
        os.write(ours, b"r\nw30 w31\n")
        until(process.stderr, b"forgotten\n> ")
        until(process.stdout, b"\n")
        os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        assert b"stopped\n" in until(process.stderr, b"> ")
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=600)[1].endswith(b"interrupted\n")
    os.close(ours)
    assert process.returncode == 130


def test_interrupted_without_a_terminal_keeps_what_was_said(say, directory, monkeypatch):
    import specstream_mlx

    original = specstream_mlx.stream_generate

    def interrupted(*arguments, **options):
        yield from list(original(*arguments, **options))[:2]
        raise KeyboardInterrupt

    monkeypatch.setattr(specstream_mlx, "stream_generate", interrupted)
    result = say(QUESTIONS, "--model", directory, "-m", "9", "--draft", "off")
    assert (result.code, len(result.stdout.split())) == (130, 2)
    assert result.stdout.endswith("\n")
    turns = json.loads(say(QUESTIONS, "--model", directory, "-m", "9", "--draft", "off", "--json").stdout)["turns"]
    assert [turn["finish_reason"] for turn in turns] == [None]
