"""``cache_prompt`` and ``generate --prompt-cache-file``: the same files, flags and tokens as mlx-lm's two commands."""

import importlib
import json
import sys

import pytest
from mlx_lm.models.cache import load_prompt_cache

from specstream_mlx import default_model_path, load
from tests.tiny import make_model, plain_tokens, save_directory

TEMPLATE = (
    "{% for m in messages %}{{ 'w90' if m.role == 'user' else 'w91' }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}w92{% endif %}"
)
WIDE = {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
KEPT, QUERY = "w7 w8 w9 w10 w11", "w30 w31"


@pytest.fixture(scope="module", params=["template", "raw"])
def directory(request, tmp_path_factory):
    path = save_directory(make_model("llama", 2, WIDE), tmp_path_factory.mktemp("model") / "model")
    if request.param == "template":
        (path / "chat_template.jinja").write_text(TEMPLATE)
    return str(path)


def stock(monkeypatch, capsys, command, *words):
    """Run one of mlx-lm's own commands; its standard output."""
    monkeypatch.setattr(sys, "argv", [command, *words])
    capsys.readouterr()
    importlib.import_module(f"mlx_lm.{command}").main()
    return capsys.readouterr().out


@pytest.mark.parametrize("quantised", ["", "--kv-bits 4 --kv-group-size 32 --quantized-kv-start 2"])
def test_either_program_goes_on_from_the_others_file(run, directory, tmp_path, monkeypatch, capsys, quantised):
    """Red when: the text behind a cache begins elsewhere, or the cache holds other tokens than mlx-lm's."""
    words = ["--model", directory, "--prompt", KEPT, *quantised.split()]
    files = {name: str(tmp_path / f"{name}.safetensors") for name in ("ours", "theirs")}
    result = run("cache_prompt", *words, "--prompt-cache-file", files["ours"])
    assert (result.code, result.stdout) == (0, "")
    stock(monkeypatch, capsys, "cache_prompt", *words, "--prompt-cache-file", files["theirs"])
    offsets = {name: load_prompt_cache(file)[0].offset for name, file in files.items()}
    assert offsets["ours"] == offsets["theirs"] in (5, 6)
    words = [*quantised.split()[:4], "--prompt", QUERY, "--max-tokens", "9", "--prompt-cache-file"]
    texts = []
    for file in files.values():
        texts.append(stock(monkeypatch, capsys, "generate", *words, file, "--verbose", "F").strip())
        for draft in ("off", "tree"):
            result = run("generate", *words, file, "--draft", draft)
            assert result.code == 0, result.stderr
            texts.append(result.stdout.strip())
    assert len(set(texts)) == 1
    assert texts[0]


def test_a_prefilled_answer_goes_on_as_in_mlx_lm(run, directory, monkeypatch, capsys):
    words = ["--model", directory, "--prompt", QUERY, "--max-tokens", "9", "--prefill-response", "w50 w51"]
    result = run("generate", *words)
    if result.code == 2:
        assert "--prefill-response: this tokenizer has no chat template" in result.stderr
        assert not load(directory)[1].has_chat_template
    else:
        assert result.stdout.strip() == stock(monkeypatch, capsys, "generate", *words, "--verbose", "F").strip()
        model, tokenizer = load(directory)
        prompt = tokenizer.encode(f"w90 {QUERY} w91 w50 w51")
        assert result.stdout.strip() == tokenizer.decode(plain_tokens(model.base, prompt, 9), skip_special_tokens=True)


def test_a_prompt_cache_knows_its_model(run, tmp_path):
    """Without --model it is the file's; the bundled one here."""
    file = str(tmp_path / "prompt.safetensors")
    assert run("cache_prompt", "--prompt", "CREATE TABLE lamp", "--prompt-cache-file", file, "--quiet").stderr == ""
    result = run("generate", "--prompt-cache-file", file, "-p", " ( lamp_id INT );", "-m", "3", "--json")
    assert (result.code, json.loads(result.stdout)["prompt_tokens"]) == (0, 9), result.stdout
    again = run("generate", "--prompt-cache-file", file, "-p", "x", "--model", str(default_model_path()), "-m", "3")
    assert again.code == 0


def test_what_does_not_go_together_is_one_line(run, directory, tmp_path):
    file = tmp_path / "prompt.safetensors"
    cached = ("--prompt-cache-file", str(file))
    assert run("cache_prompt", "--model", directory, "-p", KEPT, *cached).code == 0
    whole, other = file.read_bytes(), save_directory(make_model("llama", 3, WIDE), tmp_path / "other")
    missing, weights = str(tmp_path / "missing.safetensors"), str(other / "model.safetensors")
    small = save_directory(make_model("llama", 3), tmp_path / "small")
    ask = ("generate", "-p", "w7")
    question = ("generate", "--model", str(small), "-p", "w7")
    cases = [
        ((*ask, *cached, "--model", str(other)), 3, f"{file}: made with model {directory}, not {other}"),
        ((*ask, "--prompt-cache-file", missing), 3, f"{missing}: file not found"),
        ((*ask, "--prompt-cache-file", weights), 3, f"{weights}: not a prompt cache"),
        ((*ask, *cached, "--max-kv-size", "40"), 2, "max_kv_size goes with a fresh cache"),
        ((*ask, *cached, "--check-exact"), 2, "--prompt-cache-file: an answer uses the cache up, which --check-exact"),
        (("generate", *cached), 2, "--prompt: missing; --prompt-cache-file needs a prompt"),
        (("cache_prompt", "--model", directory, "-p", "w7", "--prompt-cache-file", weights), 2, f"{weights}: exists"),
        ((*question, "--kv-bits", "4"), 4, "kv_group_size is 64: heads of 8 numbers cannot be quantised"),
        ((*question, "--kv-bits", "1"), 2, "kv_bits is 1, expected one of 2, 3, 4, 5, 6, 8"),
        ((*question, "--max-kv-size", "9"), 4, "max_kv_size is 9, for a text of up to 257 tokens"),
        ((*question, "--max-kv-size", "3"), 2, "--max-kv-size: got 3, expected a number of at least 5"),
    ]
    for words, code, message in cases:
        result = run(*words)
        assert (result.code, result.stdout, result.stderr.count("\n")) == (code, "", 1), result.stderr
        assert message in result.stderr
    file.write_bytes(whole[:-200])
    result = run(*ask, *cached)
    assert (result.code, result.stdout, result.stderr.count("\n")) == (3, "", 1)
    assert (
        f"{file}: expected {len(whole)} bytes, the file has {len(whole) - 200}; the file is incomplete" in result.stderr
    )
