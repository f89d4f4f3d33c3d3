"""``specstream-mlx train`` from the shell's side: what it writes, says and refuses."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from typer.main import get_command

from specstream_cli.app import app
from specstream_cli.train import _types_in_file, event_line
from specstream_mlx import load
from specstream_mlx.formats.adapter_directory import read_adapter
from specstream_mlx.training.settings import TrainSettings
from tests.training.training_cases import same, save_base, write_rows

QUICK = ["--gamma", "2", "--rank", "2", "--iters", "6", "--batch-size", "4", "--steps-per-report", "2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_base(tmp_path_factory.mktemp("tiny") / "base"))


@pytest.fixture
def data(tmp_path):
    return str(write_rows(tmp_path / "rows.jsonl", 24))


@pytest.fixture
def train(run, base, data, tmp_path):
    """The command with a tiny model, data and settings; later words win."""

    def invoke(*words, out="out", source=("--data", data)):
        words = ["--model", base, *source, "--adapter-path", str(tmp_path / out), *QUICK, *words]
        return run("train", *map(str, words))

    return invoke


def test_an_adapter_is_written_and_generates(run, train, base, tmp_path):
    result = train("--json", "--export-peft", tmp_path / "peft")
    assert result.code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["adapter_bytes"] == (tmp_path / "out" / "specstream.safetensors").stat().st_size
    assert document["validation"]["num_answers"] == 1
    assert "iter 6/6  loss" in result.stderr
    assert "tokens per pass" in result.stderr
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "specstream_config.json",
    ]
    words = ["generate", "--model", base, "-p", "w10 w11 w12", "-m", "8", "--json"]
    plain = json.loads(run(*words, "--draft", "off").stdout)
    drafted = json.loads(run(*words, "--adapter", str(tmp_path / "out"), "--draft", "chain").stdout)
    assert drafted["token_ids"] == plain["token_ids"]
    assert drafted["draft"]["gamma"] == 2
    again = run(
        "convert", "--adapter-path", str(tmp_path / "peft"), "--adapter-only", "--mlx-path", str(tmp_path / "b")
    )
    assert again.code == 0, again.stderr
    assert same(read_adapter(tmp_path / "b")[1], read_adapter(tmp_path / "out")[1])


def test_self_distillation_needs_no_data_and_keeps_answers(train, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"w{10 + i} w{20 + i}\n" for i in range(12)))
    words = ["--self-distill", "--prompts", prompts, "--max-tokens", "6", "--samples", "1"]
    first = train(*words, source=(), out="first")
    assert first.code == 0, first.stderr
    answers = tmp_path / "first.answers.jsonl"
    assert len(answers.read_text().splitlines()) == 24
    before = answers.stat().st_mtime_ns
    second = train(*words, "--answers", answers, source=(), out="second")
    assert second.code == 0, second.stderr
    assert answers.stat().st_mtime_ns == before
    assert same(read_adapter(tmp_path / "first")[1], read_adapter(tmp_path / "second")[1])


def test_a_model_answers_the_prompts_in_its_directory_unless_given_others(train, base, tmp_path):
    """Red when: they are passed over, or asked in place of those that were given."""
    model = Path(shutil.copytree(base, tmp_path / "model"))
    (model / "prompts.jsonl").write_text("".join(f'{{"prompt": "w{10 + i}"}}\n' for i in range(9)))
    words = ["--model", model, "--self-distill", "--max-tokens", "4", "--samples", "0"]
    result = train(*words, source=(), out="own")
    assert result.code == 0, result.stderr
    assert f"own answers to {model / 'prompts.jsonl'}: " in result.stderr
    assert len((tmp_path / "own.answers.jsonl").read_text().splitlines()) == 9
    others = tmp_path / "others.txt"
    others.write_text("".join(f"w{10 + i} w20\n" for i in range(7)))
    result = train(*words, "--prompts", others, source=(), out="given")
    assert f"own answers to {others}: " in result.stderr
    assert len((tmp_path / "given.answers.jsonl").read_text().splitlines()) == 7


def test_a_configuration_file_gives_what_the_command_line_does_not(train, data, base, run, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        f"model: {base}\ntrain: true\nfine_tune_type: lora\ndata: {data}\niters: 4\nlearning_rate: 1e-3\nmode: shared\n"
        "lora_parameters: {rank: 3, scale: 4.0, dropout: 0.0}\n"
        "lr_schedule: {name: cosine_decay, arguments: [1e-3, 4]}\noptimizer_config: {adamw: {weight_decay: 0.1}}\n"
    )
    result = run("train", "-c", str(file), "--iters", "3", "--gamma", "3", "--adapter-path", str(tmp_path / "out"))
    assert result.code == 0, result.stderr
    config, tensors = read_adapter(tmp_path / "out")
    assert (config.mode, config.gamma, config.training["iters"]) == ("shared", 3, 3)
    assert config.lora == {"rank": 3, "scale": 4.0, "placement": "live", "num_modules": 28}
    assert config.training["optimizer_config"] == {"adamw": {"weight_decay": 0.1}}
    assert tensors["lora.model.layers.0.self_attn.q_proj.lora_a"].shape == (32, 3)


EXAMPLE = """\
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adamw: {betas: [0.9, 0.98], eps: 1e-6, weight_decay: 0.05, bias_correction: true}
  sgd: {nonsense: 1}
seed: 0
num_layers: 3
batch_size: 4
iters: 2
val_batches: 25
learning_rate: 1e-5
resume_adapter_file: null
test: false
test_batches: 100
max_seq_length: 2048
grad_checkpoint: false
prompt_feature: question
completion_feature: answer
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0
lr_schedule: {name: cosine_decay, warmup: 1, warmup_init: 1e-7, arguments: [1e-5, 1000, 1e-7]}
"""


@pytest.mark.parametrize("mode", ["shared", "lossless"])
def test_the_example_file_of_mlx_lm_works(mode, base, data, run, tmp_path):
    rows = Path(data).read_text().replace('"prompt"', '"question"').replace('"completion"', '"answer"')
    Path(data).write_text(rows)
    file = tmp_path / "lora_config.yaml"
    file.write_text(EXAMPLE + f"model: {base}\ndata: {data}\nadapter_path: {tmp_path / 'out'}\n")
    result = run("train", "-c", str(file), "--mode", mode, "--gamma", "2", "--export-peft", str(tmp_path / "peft"))
    assert result.code == 0, result.stderr
    assert "test_batches has no effect here: nothing is tested after a training" in result.stderr
    assert ("num_layers has no effect in lossless mode" in result.stderr) == (mode == "lossless")
    names = {name for name in read_adapter(tmp_path / "out")[1] if name.startswith("lora.")}
    layers = (1, 2, 3) if mode == "shared" else (2, 3)
    assert names == {
        f"lora.model.layers.{layer}.self_attn.{part}_proj.lora_{side}"
        for layer in layers
        for part in "qv"
        for side in "ab"
    }
    more = ["--model", base, "--data", data, "-c", str(file), "--adapter-path", str(tmp_path / "more")]
    further = run("train", *more, "--resume-adapter-file", str(tmp_path / "out"), "--mode", mode, "--gamma", "2")
    assert further.code == 0, further.stderr
    words = ["--adapter-path", str(tmp_path / "peft"), "--adapter-only", "--mlx-path", str(tmp_path / "back")]
    again = run("convert", *words)
    assert again.code == 0, again.stderr
    assert same(read_adapter(tmp_path / "back")[1], read_adapter(tmp_path / "out")[1])


def test_a_lora_key_that_names_nothing_is_one_line(train, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("lora_parameters: {keys: [q_proj]}")
    result = train("--config", file)
    assert (result.code, result.stderr.count("\n")) == (2, 1)
    assert "lora_parameters.keys: 'q_proj' is no linear layer of the blocks: mlp.up_proj, " in result.stderr


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("gama: 4", "gama: unknown; known: "),
        ("gamma: four", "gamma: got 'four', expected int"),
        ("self_distill: 1", "self_distill: got 1, expected bool"),
        ("lora_parameters: {alpha: 3}", "lora_parameters.alpha: unknown"),
        ("lora_parameters: {dropout: 0.1}", "lora_parameters.dropout: not supported"),
        ("fine_tune_type: dora", "fine_tune_type: got 'dora', only lora is supported"),
        ("- a\n- b", "expected 'key: value' lines"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_bad_configuration_file_is_one_line(text, reason, train, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    result = train("--config", file)
    assert (result.code, result.stdout, result.stderr.count("\n")) == (3, "", 1)
    assert f"{file}: {reason}" in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["--gamma", "0"], 2, "--gamma: got 0, expected 1..32"),
        (["--iters", "0"], 2, "--iters: got 0"),
        (["--learning-rate", "-1"], 2, "--learning-rate: got -1.0"),
        (["--warmup", "9"], 2, "--warmup: got 9"),
        (["--num-stream-layers", "9"], 2, "--num-stream-layers: got 9, the model has 4 layers"),
        (["--num-layers", "2"], 2, "--num-layers: has no meaning in lossless mode"),
        (["--mode", "shared", "--num-layers", "9"], 2, "--num-layers: got 9, expected 1..4"),
        (["--mode", "both"], 2, "--mode"),
        (["--prune-rank", "2", "--num-stream-layers", "4"], 2, "--prune-rank: a pruner reads below"),
        (["--pruner-only", "--prune-rank", "2"], 2, "--pruner-only: needs streams that are trained"),
        (["--samples", "2"], 2, "--samples: has no effect without --self-distill"),
        (["--self-distill", "--mode", "shared"], 2, "--self-distill: goes with --mode lossless"),
        (["--self-distill", "--prompts", "x"], 2, "--prompts: --data gives the prompts already"),
        (["--resume-adapter-file", "/nowhere"], 2, "--resume-adapter-file: /nowhere: no such directory"),
        (
            ["--export-peft", f"{__file__}/peft"],
            2,
            f"--export-peft: {__file__}/peft cannot be made, {__file__} is no dir",
        ),
        (["--grad-accumulation-steps", "7"], 2, "--grad-accumulation-steps: got 7, more than the 6 iterations"),
        (["--warmup", "-1"], 2, "--warmup: got -1, expected at least 0 and less than the 6 updates"),
        (["--data", "/nowhere/at/all"], 3, "--data: /nowhere/at/all: neither a file or directory nor a data set"),
        (["--model", "/nowhere/at/all"], 3, "--model: /nowhere/at/all: no such directory"),
        (["--upload-repo", "x y"], 2, "--upload-repo"),
        (["--train"], 2, "--train: an option of mlx_lm lora alone: this command only trains; drop it"),
        (["--fine-tune-type=full"], 2, "--fine-tune-type=full: an option of mlx_lm lora alone: streams are trained"),
        (["--report-to", "wandb"], 2, "--report-to: an option of mlx_lm lora alone: every figure is in the adapter's"),
        (["--test-batches", "3"], 2, "--test-batches: an option of mlx_lm lora alone: nothing is tested"),
    ],
)
def test_what_cannot_be_done_is_one_line(words, code, reason, train, tmp_path):
    result = train(*words)
    assert (result.code, result.stdout, result.stderr.count("\n")) == (code, "", 1), result.stderr
    assert reason in result.stderr
    assert not (tmp_path / "out").exists()


def test_rows_that_do_not_fill_a_batch_are_one(train):
    """Red when: few rows are refused, or trained on without a word."""
    result = train("--batch-size", "24", "--iters", "2")
    assert result.code == 0, result.stderr
    assert "note: 23 rows do not fill a batch of 24; each batch is all of them" in result.stderr


def test_numbers_are_judged_before_anything_is_loaded(train, tmp_path, monkeypatch):
    """Red when: a flag, or a key of a file, that is wrong by itself costs the loading of a model."""
    from specstream_mlx.training import run as run_module

    monkeypatch.setattr(run_module, "load", lambda *_, **__: pytest.fail("loaded"))
    adamw, cosine = "optimizer_config: {adamw: {%s}}", "lr_schedule: {name: cosine_decay, arguments: [%s, 6]}"
    for text, reason in {
        "samples: -1": "--samples: got -1, expected at least 0",
        "temp: 0": "--temp: got 0.0, expected a number above 0",
        "temp: .nan": "--temp: got nan, expected a number above 0",
        "max_tokens: 1": "--max-tokens: got 1, expected at least 2",
        "value_rotation: .nan": "--value-rotation: got nan, expected a finite number",
        "learning_rate: .nan": "--learning-rate: got nan, expected a number above 0",
        "num_layers: 0\nmode: shared": "--num-layers: got 0, expected at least 1, or -1 for all",
        adamw % "weight_decay: a": "optimizer_config: adamw refuses it (Cannot perform multiplication on an mlx",
        adamw % "betas: [0.9]": "optimizer_config: adamw refuses it (not enough values",
        adamw % "weight_decay: .nan": "optimizer_config: an update of adamw is not a number",
        cosine % ".nan": "lr_schedule: gives a learning rate of nan",
        cosine % "-1.0": "lr_schedule: gives a learning rate of -1.0",
        "answers: .": "--answers: . is no file; choose another place",
        "prompts: /nowhere": "--prompts: /nowhere: no such file or directory",
        "data: ''": "--data: empty; give a value or drop it",
    }.items():
        key, _, value = text.partition("\n")[0].partition(": ")
        answers = key in ("samples", "temp", "max_tokens", "answers", "prompts")
        source = {"source": ("--self-distill",)} if answers else {"source": ()} if key == "data" else {}
        file = tmp_path / "config.yaml"
        file.write_text(text)
        result = train("--config", file, **source)
        assert result.stderr.count("\n") == 1, result.stderr
        assert f"error: {reason}" in result.stderr
        assert result.code == (3 if key == "prompts" else 2)
        if key in ("samples", "temp", "max_tokens", "value_rotation"):
            flag = train("--" + key.replace("_", "-"), value.replace(".nan", "nan"), **source)
            assert (flag.code, flag.stderr) == (2, result.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "rows.jsonl"]


@pytest.mark.parametrize("source", ["rows", "answers", "directory"])
def test_without_validation_all_rows_are_trained_on(source, train, data, tmp_path):
    """Red when: ``--val-batches 0`` holds rows out, reads the rows to validate on, or stumbles over having none."""
    words, given = [], ("--data", data)
    if source == "answers":
        (tmp_path / "prompts.txt").write_text("".join(f"w{10 + i}\n" for i in range(12)))
        given = ("--self-distill", "--prompts", tmp_path / "prompts.txt")
        words = ["--max-tokens", "4", "--samples", "0"]
    if source == "directory":
        (tmp_path / "rows").mkdir()
        shutil.copy(data, tmp_path / "rows" / "train.jsonl")
        (tmp_path / "rows" / "valid.jsonl").write_text("not read")
        given = ("--data", tmp_path / "rows")
    result = train("--val-batches", "0", "--json", *words, source=given)
    assert result.code == 0, result.stderr
    assert f"{12 if source == 'answers' else 24} rows to train on, none to validate on" in result.stderr
    assert "held out" not in result.stderr
    assert "validation:" not in result.stderr
    document = json.loads(result.stdout)
    assert document["validation"] is None
    events = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    assert {event["event"] for event in events} == {"start", "train"}
    assert document["plot"] is None or Path(document["plot"]).exists()


def test_an_output_that_a_kill_hid_comes_back(train, tmp_path):
    """Red when: a kill between the two renames of a replacement leaves the old output under its hidden name."""
    assert train().code == 0
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from specstream_mlx.formats import atomic\n"
        "from specstream_mlx.formats.output import replaced_directory\n"
        "atomic._exchange = lambda *_: False\n"
        "rename = Path.rename\n"
        "def renamed(path, goal):\n"
        "    rename(path, goal)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Path.rename = renamed\n"
        "with replaced_directory(Path(sys.argv[1])) as temporary:\n"
        "    (temporary / 'new').write_text('new')\n"
    )
    paths = {"PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", code, str(out)], env=os.environ | paths, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert [path.name.rpartition("-")[0] for path in sorted(tmp_path.glob(".*"))] == [".out.partial", ".out.replaced"]
    again = train()
    assert (again.code, "already exists" in again.stderr) == (2, True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "holds no rows; expected one JSON object a line"),
        (b'{"text": "w10 w11 w12"}\nno\n', ":2: not JSON ("),
        (b"[" * 9999, ":1: not JSON ("),
        (b'{"text": "caf\xe9"}\n', "cannot be read ('utf-8' codec can't decode byte 0xe9"),
        (b'{"text": "w10 \\ud800 w11"}\n' * 9, ":1: \\ud800 alone is no character; drop the row"),
        (b'{"prompt": "w10", "completion": ""}\n' * 9, "no answer to train on has more than one token"),
    ],
    ids=["empty", "not JSON", "deep", "latin-1", "surrogate", "no answers"],
)
def test_rows_that_nothing_is_learned_from_are_one_line(content, reason, train, tmp_path):
    """Red when: a bad file of rows is a traceback, many lines, or an adapter that nothing was trained into."""
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    result = train("--data", file)
    assert (result.code, result.stderr.count("\n")) == (3, 1), result.stderr
    assert reason in result.stderr
    assert (f"error: {file}" in result.stderr) != ("no answer" in reason)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "rows.jsonl"]


def test_places_that_cannot_be_written_are_refused_before_anything_is_loaded(train, tmp_path, monkeypatch):
    """Red when: hours of training end with an output that cannot be put in its place."""
    from specstream_mlx.training import run as run_module

    monkeypatch.setattr(run_module, "load", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file.checkpoints").write_text("mine")
    if sys.platform == "linux":
        unwritable = train(out="/proc/out")
        assert (unwritable.code, "--adapter-path: /proc/out cannot be made (" in unwritable.stderr) == (2, True)
    for out, reason in {
        "x" * 250: "cannot be made (File name too long); choose another place",
        "link": "is a symbolic link; give the place it points to",
        "file": "no directory, and restart points go there; choose another --adapter-path",
        "rows.jsonl/out": "rows.jsonl is no directory; choose another place",
    }.items():
        result = train(out=out)
        assert (result.code, result.stderr.count("\n")) == (2, 1), result.stderr
        assert reason in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.checkpoints", "link", "rows.jsonl"]


def test_nothing_to_train_on_and_places_that_are_taken(train, base, run, tmp_path):
    nothing = run("train", "--model", base)
    assert (nothing.code, nothing.stderr.count("\n")) == (2, 1)
    assert "give --data, or --self-distill" in nothing.stderr
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "already exists" in train().stderr
    foreign = train("--overwrite")
    assert (foreign.code, "replaces only an earlier output" in foreign.stderr) == (2, True)
    assert (tmp_path / "out" / "mine.txt").exists()
    assert train(out="own").code == 0
    assert train(out="own").code == 2
    assert train("--overwrite", out="own").code == 0
    assert "already exists" in train("--export-peft", tmp_path / "own", out="new").stderr


def test_nothing_that_train_did_not_write_is_deleted(train, tmp_path):
    out, checkpoints = tmp_path / "out", tmp_path / "out.checkpoints"
    checkpoints.mkdir()
    (checkpoints / "mine.txt").write_text("mine")
    assert train().code == 0
    assert [path.name for path in checkpoints.iterdir()] == ["mine.txt"]
    assert train("--overwrite").code == 0
    assert (checkpoints / "mine.txt").read_text() == "mine"
    (out / "notes.txt").write_text("mine")
    foreign = train("--overwrite")
    assert (foreign.code, foreign.stderr.count("\n")) == (2, 1)
    assert f"{out}: holds what train did not write (notes.txt)" in foreign.stderr
    assert (out / "notes.txt").exists()


@pytest.mark.parametrize(
    ("flag", "place"),
    [("--export-peft", "out"), ("--answers", "out/answers.jsonl"), ("--answers", "out.checkpoints/answers.jsonl")],
)
def test_two_outputs_in_one_place_are_one_line(flag, place, train, tmp_path):
    source = ("--self-distill",) if flag == "--answers" else ("--data", str(tmp_path / "rows.jsonl"))
    result = train(flag, tmp_path / place, source=source)
    assert (result.code, result.stderr.count("\n")) == (2, 1), result.stderr
    assert f"{flag}: {tmp_path / place} lies where --adapter-path" in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_no_training_goes_on_from_is_one_line(train, tmp_path, base):
    def refusal(start, *words):
        result = train("--resume-adapter-file", start, *words, out="more")
        assert result.stderr.count("\n") == 1, result.stderr
        assert not (tmp_path / "more").exists()
        return result.code, result.stderr

    assert train("--mode", "shared", "--export-peft", tmp_path / "peft").code == 0
    shared = ["--mode", "shared"]
    code, line = refusal(tmp_path / "peft", *shared)
    assert (code, "in PEFT's form; bring it here with `convert --adapter-only`" in line) == (3, True)
    code, line = refusal(tmp_path / "out" / "adapters", *shared)
    assert (code, "no stream adapter, it has no specstream_config.json" in line) == (3, True)
    wider = save_base(tmp_path / "wider", hidden_size=64, head_dim=16)
    code, line = refusal(tmp_path / "out", *shared, "--model", wider)
    assert (code, "base_model.hidden_size is 32, this base has 64" in line) == (3, True)
    shutil.copytree(base, tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    weights = mx.load(str(file))
    mx.save_safetensors(str(file), {name: value + 0.5 for name, value in weights.items()})
    code, line = refusal(tmp_path / "out", *shared, "--model", tmp_path / "other")
    assert (code, "this is another base" in line) == (3, True)
    kept = tmp_path / "more.checkpoints" / "step-0000002"
    shutil.copytree(tmp_path / "out", kept)
    code, line = refusal(kept, *shared, "--overwrite")
    assert (code, "discards the restart points" in line, kept.exists()) == (2, True, True)


def test_an_adapter_can_be_trained_further_and_gives_its_settings(run, train, base, data, tmp_path):
    assert train("--scale", "3", "--mode", "shared").code == 0
    more = ["--model", base, "--data", data, "--adapter-path", str(tmp_path / "more"), "--iters", "2"]
    start = ["--resume-adapter-file", str(tmp_path / "out" / "specstream.safetensors")]
    assert run("train", *more, *start).code == 0
    config, tensors = read_adapter(tmp_path / "more")
    assert (config.mode, config.gamma, config.lora["rank"], config.lora["scale"]) == ("shared", 2, 2, 3.0)
    before = read_adapter(tmp_path / "out")[1]
    moved = [abs(tensors[name] - before[name]).max().item() for name in before if name.startswith("lora.")]
    assert 0 < max(moved) < 0.01
    other = run("train", *more, *start, "--scale", "2", "--overwrite")
    assert (other.code, "--scale 2.0 differs from its 3.0" in other.stderr) == (2, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_being_stopped_saves_and_resume_goes_on(number, train, base, data, tmp_path):
    words = ["--model", base, "--data", data, *QUICK, "--iters", "2000", "--seed", "4"]
    command = [sys.executable, "-m", "specstream_cli.app", "train", *words, "--adapter-path", str(tmp_path / "out")]
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(str(root / name) for name in (".", "convert", "cli"))
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths}, text=True
    )
    checkpoints = tmp_path / "out.checkpoints"
    assert process.stderr is not None
    assert any(line.startswith("iter 2/2000  loss") for line in process.stderr)
    process.send_signal(number)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (130, "")
    goes_on = f"the training so far is in {checkpoints}; the same command with --resume goes on\ninterrupted\n"
    assert stderr.endswith(goes_on)
    assert "stopping after this step, and saving it" in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "out").exists()
    (point,) = checkpoints.glob("step-*")
    assert load(base, point)[0].gamma == 2
    again = train("--iters", "2000", "--seed", "4")
    assert (again.code, "--resume goes on" in again.stderr) == (2, True)
    changed = train("--iters", "1999", "--seed", "4", "--resume")
    assert (changed.code, "iters 2000 -> 1999" in changed.stderr) == (2, True)


def test_ctrl_c_while_answering_keeps_the_answers_and_the_same_command_goes_on(base, run, tmp_path, monkeypatch):
    from specstream_mlx.training import distill

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"w{10 + i}\n" for i in range(40)))
    words = ["train", "--model", base, "--self-distill", "--prompts", str(prompts), *QUICK]
    words += ["--max-tokens", "4", "--samples", "0", "--adapter-path", str(tmp_path / "out")]
    answers = tmp_path / "out.answers.jsonl"
    append = distill._append

    def append_and_interrupt(*arguments):
        append(*arguments)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(distill, "_append", append_and_interrupt)
        cut = run(*words)
    assert (cut.code, cut.stdout) == (130, "")
    assert cut.stderr == f"the answers so far are in {answers}; the same command goes on\ninterrupted\n"
    before = answers.read_bytes()
    assert len(before.splitlines()) == 16
    again = run(*words)
    assert again.code == 0, again.stderr
    assert answers.read_bytes().startswith(before)
    assert len(answers.read_text().splitlines()) == 40


def test_the_chat_template_of_prompts_takes_flags(base, run, tmp_path):
    model = tmp_path / "chatty"
    shutil.copytree(base, model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }} {% endfor %}{{ 'w64' if enable_thinking else 'w65' }}"
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w10\nw11\n")
    words = ["train", "--model", str(model), *QUICK, "--adapter-path", str(tmp_path / "out"), "--max-tokens", "4"]
    words += ["--self-distill", "--prompts", str(prompts), "--samples", "0", "--batch-size", "2"]
    result = run(*words, "--chat-template-config", '{"enable_thinking": true}')
    assert result.code == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [[10, 64], [11, 64]]
    broken = run(*words, "--overwrite", "--chat-template-config", "{")
    assert (broken.code, "--chat-template-config: not valid JSON" in broken.stderr) == (2, True)
    none = run(*[base if word == str(model) else word for word in words], "--overwrite", "--chat-template-config", "{}")
    assert (none.code, "--chat-template-config: this tokenizer has no chat template" in none.stderr) == (2, True)


def test_options_of_the_file_are_options_of_the_command_line():
    types = _types_in_file()
    assert types["gamma"] is int
    assert types["mode"] is str
    assert types["self_distill"] is bool
    assert not {"config", "overwrite", "resume", "debug", "as_json", "quiet", "upload_repo"} & types.keys()
    only_in_file = {"optimizer_config", "lr_schedule", "lora_keys"}
    from dataclasses import fields

    assert {field.name for field in fields(TrainSettings)} - types.keys() == only_in_file


def test_the_walk_through_names_options_that_exist():
    text = (Path(__file__).parents[2] / "docs" / "train.md").read_text(encoding="utf-8")
    text = text.replace("\\\n", " ")  # a command over several lines
    commands = get_command(app).commands
    known = {option for command in commands.values() for p in command.params for option in [*p.opts, *p.secondary_opts]}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert len(named) > 25
    assert named - known == set()
    for line in re.findall(r"^specstream-mlx (.+)$", text, re.M):
        words = shlex.split(line)
        options = {option for parameter in commands[words[0]].params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options


def test_events_read_well():
    event = {"event": "train", "iteration": 3, "loss": None, "agreement": [0.5, 0.25], "learning_rate": 1e-4}
    event |= {"tokens_per_second": 12.3, "peak_memory_gb": 0.5, "main_loss": 1.0}
    assert event_line(event, 9) == (
        "iter 3/9  loss nan  main 1.000  right by depth 0.500 0.250  lr 1.00e-04  12 tok/s  peak 0.50 GB"
    )
