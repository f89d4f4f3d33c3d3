"""The program on real checkpoints: the bundled model, and a PyTorch fine-tune on its way to an answer."""

import json
import shutil

import mlx.core as mx
import mlx_lm
import pytest

from specstream_mlx import default_model_path, load
from specstream_mlx.bundled import samples


def test_the_bundled_model_answers_its_sample_question(run):
    result = run("generate")
    question = samples()[0]
    assert result.code == 0
    assert result.stdout.strip() == question["answer"]
    assert result.stderr.startswith(question["prompt"])
    assert " tokens in " in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("words", [[], ["--temp", "0.8", "--seed", "5"]])
def test_drafting_changes_the_passes_and_not_the_tokens(run, words):
    def generate(*draft):
        result = run("generate", "-p", samples()[1]["prompt"], "--json", *words, *draft)
        assert result.code == 0, result.stderr
        return json.loads(result.stdout)

    plain = generate("--draft", "off")
    assert plain["target_passes"] == plain["generation_tokens"] == len(plain["token_ids"])
    for draft in (["auto"], ["tree"], ["chain"], ["tree", "--tree", "cartesian:2x2", "--insertion", "parallel"]):
        drafted = generate("--draft", *draft)
        assert (drafted["token_ids"], drafted["text"]) == (plain["token_ids"], plain["text"])
        assert drafted["target_passes"] < plain["target_passes"]


def test_the_tokens_are_those_of_stock_mlx_lm(run):
    prompt = samples()[2]["prompt"]
    model, tokenizer, *_ = mlx_lm.load(str(default_model_path()))
    expected = list(mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=64))
    document = json.loads(run("generate", "-p", prompt, "-m", "64", "--json").stdout)
    assert document["token_ids"] == [response.token for response in expected]
    assert document["text"] == "".join(response.text for response in expected)


def test_inspect_knows_the_bundled_model(run):
    result = run("inspect", "--json")
    assert (result.code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["kind"] == "specstream model"


@pytest.fixture(scope="module")
def fine_tune(tmp_path_factory):
    """A tiny random base and PEFT adapter with streams and a pruner, as the PyTorch trainer saves them."""
    from specstream_torch.testing import make_tiny_checkpoint

    return make_tiny_checkpoint("llama", tmp_path_factory.mktemp("fine-tune"), prune=True)


@pytest.mark.parity
def test_a_fine_tune_is_inspected_converted_and_answers(run, fine_tune, tmp_path):
    found = run("inspect", str(fine_tune.adapter), "--json")
    assert json.loads(found.stdout)["kind"] == "peft adapter"
    words = ["convert", "--adapter-path", str(fine_tune.adapter), "--hf-path", str(fine_tune.base), "--quiet"]
    out = tmp_path / "out"
    planned = run(*words, "--mlx-path", str(out), "--dry-run")
    assert planned.code == 0, planned.stderr
    assert "lora_A" in planned.stdout
    assert not out.exists()
    converted = run(*words, "--mlx-path", str(out), "--json")
    assert converted.code == 0, converted.stderr
    assert json.loads(converted.stdout)["placement"] == "merged"
    answer = ["generate", "--model", str(out), "-p", "a b c", "-m", "12", "--json"]
    drafted, plain = (json.loads(run(*answer, "--draft", mode).stdout) for mode in ("auto", "off"))
    assert drafted["token_ids"] == plain["token_ids"]
    assert run(*words, "--mlx-path", str(out)).code == 2  # exists; --overwrite replaces it
    assert run(*words, "--mlx-path", str(out), "--overwrite").code == 0


@pytest.fixture(scope="module")
def lossless_fine_tune(tmp_path_factory):
    """The same in lossless mode: LoRA in the stream layers, for stream rows alone."""
    from specstream_torch.testing import make_tiny_checkpoint

    path = tmp_path_factory.mktemp("lossless")
    return make_tiny_checkpoint("llama", path, mode="lossless", num_stream_layers=2, prune=True)


@pytest.mark.parity
@pytest.mark.parametrize("quantised", [False, True])
def test_a_lossless_fine_tune_answers_as_its_base_does(run, lossless_fine_tune, tmp_path, quantised):
    """Red when: the LoRA of a lossless checkpoint is merged, dropped, or reaches the text on its way to an answer.

    The converted directory and a sidecar over the base both decode mlx-lm's own tokens of the base. Over a quantised
    base, whose rounding depends on the number of rows, logits of the prompt are compared, and they are the base's bits.
    """
    words = ["convert", "--adapter-path", str(lossless_fine_tune.adapter), "--hf-path", str(lossless_fine_tune.base)]
    out, sidecar, base = tmp_path / "out", tmp_path / "sidecar", tmp_path / "base"
    more = ["-q", "--q-group-size", "32"] if quantised else []
    for extra in (["--mlx-path", str(out), *more], ["--mlx-path", str(sidecar), "--adapter-only"]):
        result = run(*words, "--quiet", *extra)
        assert result.code == 0, result.stderr
    shutil.copytree(out, base)
    for name in ("specstream.safetensors", "specstream_config.json"):
        (base / name).unlink()
    stock, tokenizer, *_ = mlx_lm.load(str(base))
    tokens = mx.array([tokenizer.encode("a b c d")])
    for adapted in (load(out)[0], load(base, adapter=sidecar)[0]):
        assert adapted.stream_config.mode == "lossless"
        assert len(adapted.adapters[adapted.adapter].mount.layers) == 14
        assert mx.array_equal(adapted(tokens), stock(tokens))
    if quantised:
        return
    expected = [response.token for response in mlx_lm.stream_generate(stock, tokenizer, "a b c", max_tokens=16)]
    for place in (["--model", str(out)], ["--model", str(base), "--adapter", str(sidecar)]):
        for how in (["off"], ["auto"], ["chain", "--insertion", "parallel"], ["tree", "--insertion", "deferred"]):
            answer = run("generate", *place, "-p", "a b c", "-m", "16", "--json", "--draft", *how)
            assert json.loads(answer.stdout)["token_ids"] == expected


@pytest.mark.parity
def test_files_and_prompts_that_do_not_fit_are_one_line(run, fine_tune, tmp_path):
    out = tmp_path / "out"
    run("convert", "--adapter-path", str(fine_tune.adapter), "--hf-path", str(fine_tune.base), "--mlx-path", str(out))
    too_deep = run("generate", "--model", str(out), "-p", "a", "--tree", "chain:9")
    assert (too_deep.code, too_deep.stderr.count("\n")) == (2, 1)
    too_long = run("generate", "--model", str(out), "-p", "a" * 2000)
    assert (too_long.code, too_long.stdout, too_long.stderr.count("\n")) == (3, "", 1)
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:1000])
    damaged = run("generate", "--model", str(out), "-p", "a")
    assert (damaged.code, damaged.stderr.count("\n")) == (3, 1)
    assert "model.safetensors" in damaged.stderr
    elsewhere = run("generate", "--model", str(fine_tune.adapter), "-p", "a")
    assert (elsewhere.code, elsewhere.stderr.count("\n")) == (3, 1)
