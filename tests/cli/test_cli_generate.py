"""``generate``: what reaches the library, what reaches standard output, and nothing else doing so."""

import errno
import io
import json
import os
import runpy
import signal
import sys
from pathlib import Path

import pytest
from mlx_lm import sample_utils

JSON_FIELDS = [
    "text",
    "token_ids",
    "finish_reason",
    "prompt_tokens",
    "generation_tokens",
    "target_passes",
    "stream_passes",
    "tokens_per_pass",
    "drafted_by_depth",
    "accepted_by_depth",
    "prompt_tps",
    "generation_tps",
    "peak_memory_gb",
    "draft",
]
RUN = "import sys, fake_library as f; sys.exit(f.run(sys.argv[1:], pause={pause}, script={script}))"
STATISTICS = (
    "4 tokens in 4 passes (1.00 per pass), 50.0 tok/s, prompt 5 at 100.0 tok/s, "
    "accepted by depth 2/2 1/2 0/1, peak 250 MB\n"
)


@pytest.fixture
def model(tmp_path, library):
    directory = tmp_path / "model"
    directory.mkdir()
    return str(directory)


@pytest.fixture
def stdin(monkeypatch):
    def give(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))

    return give


def test_the_answer_is_all_that_reaches_stdout(run, model):
    result = run("generate", "--model", model, "-p", "hi")
    assert (result.code, result.stdout) == (0, "SELECT name\n")
    assert result.stderr == "library noise\n" + STATISTICS


def test_quiet_hides_the_statistics(run, model):
    assert run("generate", "--model", model, "-p", "hi", "--quiet").stderr == "library noise\n"


def test_without_a_prompt_the_sample_question_is_shown_and_answered(run, library):
    result = run("generate")
    assert (result.code, result.stdout) == (0, "SELECT name\n")
    assert result.stderr.startswith("a sample question\n")
    assert library.prompt == "a sample question"
    assert library.loaded == (None, None)


def test_json_is_one_object_with_the_fields_of_the_contract(run, model):
    result = run("generate", "--model", model, "-p", "hi", "--json")
    assert result.stdout.count("\n") == 1
    document = json.loads(result.stdout)
    assert list(document) == JSON_FIELDS
    assert document["text"] == "SELECT name"
    assert document["token_ids"] == [10, 11, 12, 2]
    assert document["finish_reason"] == "stop"
    assert document["generation_tokens"] == 4
    assert document["peak_memory_gb"] == 0.25
    draft = {"mode": "tree", "gamma": 4, "nodes": 6, "insertion": "deferred", "plan": "default"}
    assert document["draft"] == {"drafter": "streams"} | draft


def test_every_flag_reaches_the_library(run, library, model, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    words = "-p hi -m 7 --draft tree --tree cartesian:2x2 --seed 3"
    words += " --insertion parallel --prune-threshold 0.25 --stop ; --stop END --prefill-step-size 16"
    words += " --extra-eos-token END --extra-eos-token 2 --temp 0.5 --top-p 0.9 --top-k 5 --min-p 0.1"
    words += ' --min-tokens-to-keep 2 --xtc-probability 0.5 --xtc-threshold 0.2 --logit-bias {"3":-1.5}'
    words += " --repetition-penalty 1.1 --repetition-context-size 8 --presence-penalty 0.2 --presence-context-size 0"
    words += " --frequency-penalty -0.1 --frequency-context-size 9"
    words += " --kv-bits 4 --kv-group-size 32 --quantized-kv-start 9 --max-kv-size 50"
    assert run("generate", "--model", model, "--adapter", str(adapter), *words.split()).code == 0
    assert library.loaded == (model, str(adapter))
    assert library.prompt == "hi"
    assert library.tokenizer.added == ["7", "2"]
    call = library.call
    assert callable(call.pop("sampler"))
    assert [processor.__name__ for processor in call.pop("logits_processors")] == [
        "logit_bias_processor",
        "repetition_penalty_processor",
        "presence_penalty_processor",
        "frequency_penalty_processor",
    ]
    assert callable(call.pop("prompt_progress_callback"))
    assert call == {
        "max_tokens": 7,
        "draft": "tree",
        "draft_options": {"tree": "cartesian:2x2", "insertion": "parallel", "prune_threshold": 0.25},
        "seed": 3,
        "stop": (";", "END"),
        "prefill_step_size": 16,
        "prompt_cache": None,
        "kv_bits": 4,
        "kv_group_size": 32,
        "quantized_kv_start": 9,
        "max_kv_size": 50,
    }


def test_temperature_zero_is_greedy(run, library, model):
    run("generate", "--model", model, "-p", "hi")
    assert library.call["sampler"] is None
    assert library.call["logits_processors"] is None


def test_sampling_flags_mean_what_they_mean_in_mlx_lm(run, library, model, monkeypatch):
    """Red when: a flag is handed to another argument of mlx-lm, or a default differs."""
    calls = {}
    monkeypatch.setattr(sample_utils, "make_sampler", lambda *a, **k: calls.update(sampler=(a, k)))
    monkeypatch.setattr(sample_utils, "make_logits_processors", lambda *a: calls.update(processors=a) or [])
    run("generate", "--model", model, "-p", "hi", "--temp", "0.5", "--presence-penalty", "0.25")
    defaults = {"top_p": 1.0, "min_p": 0.0, "min_tokens_to_keep": 1, "top_k": 0}
    defaults |= {"xtc_probability": 0.0, "xtc_threshold": 0.1, "xtc_special_tokens": []}
    assert calls == {"sampler": ((0.5,), defaults), "processors": ({}, 0.0, 20, 0.25, 20, 0.0, 20)}
    words = "--temp 1 --top-p 0.9 --min-p 0.1 --min-tokens-to-keep 3 --top-k 4 --xtc-probability 0.3 "
    words += '--xtc-threshold 0.2 --logit-bias {"3":1,"4":-2.5} --repetition-penalty 1.1 --repetition-context-size 1 '
    words += "--presence-penalty 1.2 --presence-context-size 2 --frequency-penalty 1.3 --frequency-context-size 0"
    run("generate", "--model", model, "-p", "hi", *words.split())
    own = {"top_p": 0.9, "min_p": 0.1, "min_tokens_to_keep": 3, "top_k": 4}
    own |= {"xtc_probability": 0.3, "xtc_threshold": 0.2, "xtc_special_tokens": [1, 10, 2]}
    assert calls == {"sampler": ((1.0,), own), "processors": ({3: 1.0, 4: -2.5}, 1.1, 1, 1.2, 2, 1.3, 0)}


def test_prompt_escapes_are_those_of_mlx_lm(run, library, model):
    run("generate", "--model", model, "-p", r"a\nb\tc")
    assert library.prompt == "a\nb\tc"


def test_dash_reads_stdin_as_utf8_and_unchanged(run, library, model, stdin):
    stdin("schema \u00e9\\n\n".encode())
    assert run("generate", "--model", model, "-p", "-").code == 0
    assert library.prompt == "schema \u00e9\\n\n"


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", "error: the prompt is empty; give --prompt TEXT, or '-' and text on standard input\n"),
        (b"ab\xff", "error: standard input: not valid UTF-8 (byte 2)\n"),
    ],
)
def test_bad_stdin(run, model, stdin, data, line):
    stdin(data)
    result = run("generate", "--model", model, "-p", "-")
    assert (result.code, result.stdout, result.stderr) == (3, "", line)


def test_the_chat_template_is_applied_once(run, library, model):
    library.tokenizer.has_chat_template = True
    words = ("--system-prompt", "be brief", "--chat-template-config", '{"think": false}')
    assert run("generate", "--model", model, "-p", "hi", *words).code == 0
    assert library.prompt == [ord(c) for c in "<system>be brief<user>hithink"]
    run("generate", "--model", model, "-p", "hi", "--ignore-chat-template")
    assert library.prompt == "hi"


def test_a_template_that_refuses_is_one_line(run, library, model):
    library.tokenizer.has_chat_template = True
    result = run("generate", "--model", model, "-p", "hi", "--chat-template-config", '{"fail": true}')
    assert result.code == 3
    assert result.stderr.endswith("error: chat template: refused the messages (roles must alternate)\n")


@pytest.mark.parametrize(("option", "value"), [("--system-prompt", "x"), ("--chat-template-config", '{"a": 1}')])
def test_template_options_need_a_template(run, model, option, value):
    result = run("generate", "--model", model, "-p", "hi", option, value)
    assert result.code == 2
    line = f"error: {option}: this tokenizer has no chat template; put everything into the prompt\n"
    assert result.stderr.endswith(line)


def test_unknown_eos_tokens_are_reported_together(run, library, model):
    words = ("--extra-eos-token", "nope", "--extra-eos-token", "END", "--extra-eos-token", "99")
    result = run("generate", "--model", model, "-p", "hi", *words)
    assert result.code == 3
    assert result.stderr.splitlines()[1:] == [
        "error: --extra-eos-token: 'nope' is not a token of this tokenizer",
        "error: --extra-eos-token: '99' is not a token of this tokenizer",
    ]
    assert library.tokenizer.added == []


def test_a_failure_in_the_middle_keeps_the_text_and_ends_the_line(run, library, model):
    library.script = [("SELECT ", [10]), RuntimeError("no\nmemory")]
    result = run("generate", "--model", model, "-p", "hi")
    assert (result.code, result.stdout) == (1, "SELECT \n")
    assert result.stderr.splitlines()[-1] == (
        "error: RuntimeError: no memory (this is a bug of specstream-mlx; run again with --debug for the traceback)"
    )
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(run, library, model):
    library.script = [RuntimeError("no memory")]
    result = run("generate", "--model", model, "-p", "hi", "--debug")
    assert result.code == 1
    assert "Traceback (most recent call last)" in result.stderr


def test_interrupt_keeps_the_partial_text(run, library, model):
    library.script = [("SELECT ", [10]), KeyboardInterrupt()]
    result = run("generate", "--model", model, "-p", "hi")
    assert (result.code, result.stdout, result.stderr) == (130, "SELECT \n", "library noise\ninterrupted\n")


def test_interrupt_with_json_prints_what_there_is(run, library, model):
    library.script = [("SELECT ", [10]), KeyboardInterrupt()]
    result = run("generate", "--model", model, "-p", "hi", "--json")
    assert result.code == 130
    document = json.loads(result.stdout)
    assert (document["text"], document["token_ids"], document["finish_reason"]) == ("SELECT ", [10], None)


def test_interrupt_before_the_first_token_prints_nothing(run, library, model):
    library.load_error = KeyboardInterrupt()
    result = run("generate", "--model", model, "-p", "hi")
    assert (result.code, result.stdout) == (130, "")


def test_the_text_arrives_piece_by_piece_and_ctrl_c_ends_it(child, tmp_path):
    """Catches a missing flush: the first piece must be readable while the process is still generating."""
    # A parent that ignores Ctrl-C, as a background job does, hands that down; here it must not.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += RUN.format(pause=600, script="None")
    with child(code, "generate", "--model", str(tmp_path), "-p", "hi") as process:
        assert os.read(process.stdout.fileno(), 100) == b"SELECT "
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=600)
    assert (process.returncode, stdout) == (130, b"\n")
    assert stderr == b"library noise\ninterrupted\n"


def test_a_reader_that_goes_away_is_no_error(child, tmp_path):
    code = RUN.format(pause=0.01, script="[('x' * 1000, [1])] * 1000")
    with child(code, "generate", "--model", str(tmp_path), "-p", "hi") as process:
        assert os.read(process.stdout.fileno(), 10) == b"x" * 10
        process.stdout.close()
        stderr = process.stderr.read()
        process.wait(timeout=600)
    assert (process.returncode, stderr) == (141, b"library noise\n")


@pytest.mark.parametrize("extra", [(), ("--json",)])
def test_an_answer_that_cannot_be_written_is_one_line(child, tmp_path, extra):
    """A full disk where the system has one to offer, a descriptor that only reads elsewhere."""
    full, read_only = Path("/dev/full"), tmp_path / "read-only"
    read_only.touch()
    out = os.open(full, os.O_WRONLY) if full.exists() else os.open(read_only, os.O_RDONLY)
    reason = os.strerror(errno.ENOSPC if full.exists() else errno.EBADF)
    process = child(
        RUN.format(pause=0, script="None"), "generate", "--model", str(tmp_path), "-p", "hi", *extra, stdout=out
    )
    stderr = process.communicate(timeout=600)[1]
    os.close(out)
    line = f"error: standard output: the answer cannot be written ({reason})\n"
    assert (process.returncode, stderr.decode()) == (2, "library noise\n" + line)


def test_closed_stdout_is_one_line(child, tmp_path):
    code = "import os; os.close(1)\nimport sys; sys.stdout = None\n" + RUN.format(pause=0, script="None")
    process = child(code, "generate", "--model", str(tmp_path), "-p", "hi")
    stderr = process.communicate(timeout=600)[1]
    assert (process.returncode, stderr) == (2, b"error: standard output is closed; the answer has nowhere to go\n")


def test_closed_stderr_does_not_spill_into_the_answer(child, tmp_path):
    code = "import sys; sys.stderr = None\n" + RUN.format(pause=0, script="None")
    process = child(code, "generate", "--model", str(tmp_path), "-p", "hi")
    assert process.communicate(timeout=600)[0] == b"SELECT name\n"
    assert process.returncode == 0


def test_a_terminal_without_utf8_loses_a_character_and_not_the_answer(child, tmp_path):
    code = "import sys; sys.stdout.reconfigure(encoding='ascii')\n" + RUN.format(pause=0, script=r"[('\u00e9!', [1])]")
    process = child(code, "generate", "--model", str(tmp_path), "-p", "hi")
    assert process.communicate(timeout=600)[0] == b"?!\n"
    assert process.returncode == 0


def test_help_and_version_import_nothing_heavy(child):
    """Catches a heavy import at the top of a command's module, which would cost seconds on every call."""
    code = (
        "import sys; from specstream_cli.app import main\n"
        "for words in (['--help'], ['generate', '--help'], ['convert', '--help'], ['inspect', '--help'],"
        " ['chat', '--help'], ['cache_prompt', '--help'],"
        " ['generate', '--temp', 'x']): main(words)\n"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'torch', 'numpy', 'specstream_convert', 'specstream_mlx.engine'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    process = child(code)
    stdout, stderr = process.communicate(timeout=600)
    assert b"Usage: specstream-mlx generate" in stdout
    assert stderr.splitlines()[-1] == b"[]"


def test_offline_unless_a_repository_is_named(run, library, model, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    run("generate", "--model", "org/name", "-p", "hi")
    assert (library.loaded, os.environ.get("HF_HUB_OFFLINE")) == (("org/name", None), None)
    run("generate", "--model", model, "-p", "hi")
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_python_m_is_the_same_program(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["specstream_mlx", "generate", "--max-tokens", "0"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("specstream_mlx", run_name="__main__", alter_sys=True)
    line = "error: --max-tokens: got 0, expected a number of at least 1; see 'specstream-mlx generate --help'\n"
    assert (ended.value.code, *capsys.readouterr()) == (2, "", line)
