"""Every wrong flag and file: the exit code and the line, exactly; nothing on standard output, nothing loaded."""

import os
import sys

import pytest

from specstream_mlx.errors import InvalidInputError, UnsupportedError, UsageError, VerificationError

NUMBER = "expected a number"
BIAS = """expected a JSON object of token ids and numbers, such as '{"42": -5}'"""
TREE = "expected chain:DEPTH, cartesian:K1xK2x... or best-first:NODES, such as 'best-first:8'"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--temp", "-1"], f"--temp: got -1.0, {NUMBER} of at least 0"),
        (["--temp", "nan"], f"--temp: got nan, {NUMBER} of at least 0"),
        (["--temp", "inf"], f"--temp: got inf, {NUMBER} of at least 0"),
        (["--top-p", "0"], f"--top-p: got 0.0, {NUMBER} above 0 and at most 1"),
        (["--top-p", "1.5"], f"--top-p: got 1.5, {NUMBER} above 0 and at most 1"),
        (["--top-k", "-1"], f"--top-k: got -1, {NUMBER} of at least 0"),
        (["--min-p", "2"], f"--min-p: got 2.0, {NUMBER} of at least 0 and at most 1"),
        (["--xtc-probability", "2"], f"--xtc-probability: got 2.0, {NUMBER} of at least 0 and at most 1"),
        (["--xtc-threshold", "0.6"], f"--xtc-threshold: got 0.6, {NUMBER} of at least 0 and at most 0.5"),
        (["--min-tokens-to-keep", "0"], f"--min-tokens-to-keep: got 0, {NUMBER} of at least 1"),
        (["--repetition-penalty", "-0.1"], f"--repetition-penalty: got -0.1, {NUMBER} of at least 0"),
        (["--repetition-context-size", "-1"], f"--repetition-context-size: got -1, {NUMBER} of at least 0"),
        (["--presence-penalty", "inf"], "--presence-penalty: got inf, expected a finite number"),
        (["--presence-context-size", "-1"], f"--presence-context-size: got -1, {NUMBER} of at least 0"),
        (["--frequency-penalty", "nan"], "--frequency-penalty: got nan, expected a finite number"),
        (["--frequency-context-size", "-1"], f"--frequency-context-size: got -1, {NUMBER} of at least 0"),
        (["--logit-bias", "[1]"], f"--logit-bias: got [1], {BIAS}"),
        (["--logit-bias", '{"a": 1}'], f'--logit-bias: got {{"a": 1}}, {BIAS}'),
        (["--logit-bias", '{"-1": 1}'], f'--logit-bias: got {{"-1": 1}}, {BIAS}'),
        (["--logit-bias", '{"1": true}'], f'--logit-bias: got {{"1": true}}, {BIAS}'),
        (["--logit-bias", '{"1": NaN}'], f'--logit-bias: got {{"1": NaN}}, {BIAS}'),
        (
            ["--logit-bias", "{"],
            "--logit-bias: not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
            f"(char 1)); {BIAS}",
        ),
        (["--max-tokens", "0"], f"--max-tokens: got 0, {NUMBER} of at least 1"),
        (["-m", "-5"], f"--max-tokens: got -5, {NUMBER} of at least 1"),
        (["--seed", "-1"], f"--seed: got -1, {NUMBER} of at least 0 and at most 18446744073709551615"),
        (["--prune-threshold", "1.1"], f"--prune-threshold: got 1.1, {NUMBER} of at least 0 and at most 1"),
        (["--prefill-step-size", "0"], f"--prefill-step-size: got 0, {NUMBER} of at least 1"),
        (["--tree", "oak:3"], f"--tree: got 'oak:3', {TREE}"),
        (["--tree", "chain:0"], f"--tree: got 'chain:0', {TREE}"),
        (["--tree", "cartesian:2x"], f"--tree: got 'cartesian:2x', {TREE}"),
        (["--stop", ""], "--stop: the text is empty"),
        (["--extra-eos-token", ""], "--extra-eos-token: the text is empty"),
        (["-p", "a\udcff"], "--prompt: the text is not valid UTF-8"),
        (["--frobnicate"], "No such option: --frobnicate"),
        (["surplus"], "Got unexpected extra argument(s) (surplus)"),
    ],
)
def test_generate_refuses_values_before_loading(run, library, words, line):
    result = run("generate", *words)
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr == f"error: {line}; see 'specstream-mlx generate --help'\n"
    assert library.loaded is None


def test_values_that_do_not_fit_the_vocabulary_are_reported_together(run, library):
    """mlx-lm would end in a traceback, or write outside the logits."""
    words = ["--top-k", "50", "--min-tokens-to-keep", "51", "--logit-bias", '{"49": 1, "50": 1}']
    result = run("generate", "--temp", "1", *words)
    assert (result.code, result.stdout) == (3, "")
    size = "the model's vocabulary has 50 tokens"
    assert result.stderr.splitlines()[-3:] == [
        f"error: --top-k: got 50, {size}; give fewer, or 0 to sample among all",
        f"error: --min-tokens-to-keep: got 51, {size}; give fewer",
        f"error: --logit-bias: token id 50: {size}; give an id below",
    ]
    assert library.call == {}


@pytest.mark.parametrize("words", [["--temp", "warm"], ["--draft", "twig"], ["--insertion", "late"], ["-m", "1.5"]])
def test_values_of_the_wrong_kind_name_the_option_in_one_line(run, library, words):
    """The wording is typer's."""
    result = run("generate", *words)
    option = "--max-tokens" if words[0] == "-m" else words[0]
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {option}: ")
    assert result.stderr.count("\n") == 1
    assert library.loaded is None


@pytest.mark.parametrize(
    ("code", "words", "line"),
    [
        (2, ["--draft", "off", "--tree", "chain:2"], "--tree: has no meaning with --draft off; drop one"),
        (2, ["--draft", "off", "--insertion", "parallel"], "--insertion: has no meaning with --draft off; drop one"),
        (2, ["--draft", "chain", "--tree", "chain:2"], "--tree: has no meaning with --draft chain; drop one"),
        (
            2,
            ["--draft", "chain", "--prune-threshold", "0.1"],
            "--prune-threshold: has no meaning with --draft chain; drop one",
        ),
        (2, ["--model", "org/name"], "--prompt: missing; --model needs a prompt ('-' reads standard input)"),
        (
            2,
            ["--system-prompt", "x", "--ignore-chat-template"],
            "--system-prompt: contradicts --ignore-chat-template; drop one",
        ),
        (2, ["--chat-template-config", "[1]"], "--chat-template-config: got [1], expected a JSON object"),
        (
            2,
            ["--chat-template-config", "{"],
            "--chat-template-config: not valid JSON (Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1)); give an object",
        ),
        (3, ["-p", ""], "the prompt is empty; give --prompt TEXT, or '-' and text on standard input"),
        (3, ["--model", "", "-p", "a"], "--model: empty; give a directory or a repository id"),
        (
            3,
            ["--model", "./nowhere", "-p", "a"],
            "--model: ./nowhere: no such directory; give a model directory, or a repository id such as org/name",
        ),
        (
            3,
            ["--model", "nowhere", "-p", "a"],
            "--model: nowhere: no such directory; give a model directory, or a repository id such as org/name",
        ),
        (
            3,
            ["--model", "here/nowhere", "-p", "a"],
            "--model: here/nowhere: no such directory; give a model directory, or a repository id such as org/name",
        ),
        (
            3,
            ["--adapter", "/no/where"],
            "--adapter: /no/where: no such directory; give a model directory, or a repository id such as org/name",
        ),
        (
            3,
            ["--model", "file.txt", "-p", "a"],
            "--model: file.txt is not a directory; give the directory that holds config.json",
        ),
    ],
)
def test_generate_refuses_contradictions_and_paths(run, library, tmp_path, monkeypatch, code, words, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "file.txt").write_text("")
    result = run("generate", *words)
    assert (result.code, result.stdout, result.stderr) == (code, "", f"error: {line}\n")
    assert library.loaded is None


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (UsageError("a: x"), 2, ["error: a: x"]),
        (InvalidInputError("f:t: wrong\nf:u: wrong"), 3, ["error: f:t: wrong", "error: f:u: wrong"]),
        (UnsupportedError("phi9 is not supported"), 4, ["error: phi9 is not supported"]),
        (VerificationError("differs"), 5, ["error: differs"]),
        (PermissionError(13, "Permission denied", "m/config.json"), 3, ["error: m/config.json: Permission denied"]),
    ],
)
def test_each_kind_of_error_has_its_exit_code(run, library, error, code, lines):
    library.load_error = error
    result = run("generate", "--quiet")
    assert (result.code, result.stdout) == (code, "")
    assert result.stderr.splitlines() == ["library noise", *lines]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "no command given; try 'specstream-mlx generate', or 'specstream-mlx --help'"),
        (["frob"], "No such command 'frob'; see 'specstream-mlx --help'"),
        (["--frob"], "No such option: --frob; see 'specstream-mlx --help'"),
    ],
)
def test_the_program_itself(run, words, line):
    result = run(*words)
    assert (result.code, result.stdout, result.stderr) == (2, "", f"error: {line}\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "nothing to convert: give --adapter-path (a PEFT directory), --streams-path or --heads"),
        (["--q-bits", "4"], "--q-bits: has no effect without --quantize; add -q or drop it"),
        (["--q-group-size", "64"], "--q-group-size: has no effect without --quantize; add -q or drop it"),
        (["--q-mode", "mxfp4"], "--q-mode: has no effect without --quantize; add -q or drop it"),
        (
            ["--adapter-path", "a", "--dry-run", "--upload-repo", "o/n"],
            "--upload-repo: nothing is uploaded with --dry-run; drop one",
        ),
    ],
)
def test_convert_refuses_contradictions(run, words, line):
    result = run("convert", *words)
    assert (result.code, result.stdout, result.stderr) == (2, "", f"error: {line}\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["-q", "--q-bits", "9"], f"--q-bits: got 9, {NUMBER} of at least 2 and at most 8"),
        (["-q", "--q-group-size", "0"], f"--q-group-size: got 0, {NUMBER} of at least 1"),
        (
            ["--ignore-keys", "("],
            "--ignore-keys: got '(', not a regular expression (missing ), unterminated subpattern at position 0)",
        ),
        (["--upload-repo", "name"], "--upload-repo: got 'name', expected a repository id such as org/name"),
    ],
)
def test_convert_refuses_values(run, words, line):
    result = run("convert", "--adapter-path", "a", *words)
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr == f"error: {line}; see 'specstream-mlx convert --help'\n"


def test_convert_refuses_a_base_that_is_not_there(run):
    result = run("convert", "--adapter-path", "a", "--hf-path", "/no/where")
    assert (result.code, result.stdout) == (3, "")
    line = "--hf-path: /no/where: no such directory; give a model directory, or a repository id such as org/name"
    assert result.stderr == f"error: {line}\n"


def test_inspect_takes_one_path(run):
    result = run("inspect", "a", "--model", "b")
    assert (result.code, result.stdout, result.stderr) == (2, "", "error: --model: PATH is given already; drop one\n")


def test_closed_stdin_is_one_line(run, library, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    result = run("generate", "-p", "-")
    assert (result.code, result.stdout) == (3, "")
    assert result.stderr == "error: standard input is closed; pipe the prompt in, or give --prompt TEXT\n"


def test_unreadable_stdin_is_one_line(child, tmp_path):
    write_only = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    process = child("import fake_library as f, sys; sys.exit(f.run(['generate', '-p', '-']))", stdin=write_only)
    stdout, stderr = process.communicate(timeout=600)
    os.close(write_only)
    line = b"error: standard input: cannot be read (Bad file descriptor)\n"
    assert (process.returncode, stdout, stderr) == (3, b"", line)
