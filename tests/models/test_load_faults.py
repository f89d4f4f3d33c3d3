"""Directories as users have them: what loads, loads right; what cannot is one line that names the file."""

import json
import sys
import threading
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from specstream_mlx import InvalidInputError, UnsupportedError, generate, load, stream_generate
from specstream_mlx.engine.exactness import plain_model
from specstream_mlx.formats import notes
from specstream_mlx.formats.chat_template import ChatTemplate
from tests.tiny import base_config, make_model, our_tokens, plain_tokens, random_prompt, save_directory


def change(path: Path, **changes):
    raw = json.loads(path.read_text())
    raw |= changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value != "absent"}))


NESTED = {
    "cohere": {},
    "cohere2": {},
    "gemma": {},
    "gemma2": {},
    "glm": {"partial_rotary_factor": 1.0},
    "glm4": {"partial_rotary_factor"},
    "gpt_neox": {"rotary_pct"},
    "gpt_oss": {},
    "granite": {},
    "llama": {},
    "llama-llama3": {},
    "llama-linear": {},
    "llama-yarn": {},
    "mistral": {},
    "mixtral": {},
    "olmo2": {},
    "phi": {"partial_rotary_factor"},
    "phi3": {},
    "phi3-longrope": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {"partial_rotary_factor"},
    "starcoder2": {},
}
FLAT = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}


def nest(config):
    """A configuration as transformers 5 writes it: what says where a token is, in one object."""
    config = dict(config)
    nested = {"rope_type": "default"}
    for name in ("rope_theta", "rotary_emb_base", "partial_rotary_factor", "rotary_pct"):
        if name in config:
            nested[FLAT.get(name, name)] = config.pop(name)
    scaling = config.pop("rope_scaling", None)
    if scaling:
        nested |= {key: value for key, value in scaling.items() if key != "type"}
        nested["rope_type"] = scaling.get("rope_type", scaling.get("type"))
    return config | {"rope_parameters": nested}


@pytest.mark.parametrize("family", NESTED)
def test_directories_of_transformers_5_load_as_those_of_transformers_4(family, tmp_path, capsys):
    """Red when: a family's rotary settings are dropped, which gives other tokens from the first one on."""
    theta = "rotary_emb_base" if family == "gpt_neox" else "rope_theta"
    flat = make_model(family, seed=3, base_changes={theta: 777.0})
    path = save_directory(flat, tmp_path / "model")
    file = path / "config.json"
    file.write_text(json.dumps(nest(json.loads(file.read_text()))))
    notes._said.clear()
    capsys.readouterr()
    model, _ = load(path)
    assert capsys.readouterr().err == (
        f"note: {file}: rope_parameters lifted to rope_theta and rope_scaling, where mlx-lm reads them\n"
    )
    tokens = mx.array([random_prompt(40, seed=2)])
    assert mx.array_equal(model.base(tokens), flat.base(tokens))
    assert mx.array_equal(plain_model(model, path)(tokens), flat.base(tokens))
    assert capsys.readouterr().err == ""


def test_nested_yarn_of_qwen3_and_sets_per_kind_of_layer(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    sliding = {"rope_theta": 55.0, "rope_type": "default"}
    cases = [
        ("qwen3", {"rope_theta": 777.0, "rope_scaling": yarn}, yarn | {"rope_theta": 777.0}),
        (
            "gemma3_text",
            {"rope_theta": 777.0, "rope_local_base_freq": 55.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            {
                "full_attention": {"rope_theta": 777.0, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": sliding,
            },
        ),
        (
            "olmo3",
            {"rope_theta": 55.0, "rope_scaling": yarn},
            {"full_attention": yarn | {"rope_theta": 55.0}, "sliding_attention": sliding},
        ),
    ]
    tokens = mx.array([random_prompt(40, seed=2)])
    for family, changes, nested in cases:
        flat = make_model(family, seed=3, base_changes=changes)
        path = save_directory(flat, tmp_path / family)
        change(path / "config.json", **dict.fromkeys(changes, "absent"), rope_parameters=nested)
        assert mx.array_equal(load(path)[0].base(tokens), flat.base(tokens)), family


@pytest.mark.parametrize(
    ("family", "changes", "error", "reason"),
    [
        ("llama", {"rope_theta": 5.0}, InvalidInputError, "rope_theta is 5.0, but 9.0 in rope_parameters"),
        ("qwen3_moe", {"rope_type": "yarn", "factor": 2.0}, UnsupportedError, "rope type 'yarn' .* for qwen3_moe"),
        ("llama", {"full_attention": {"rope_theta": 9.0}}, UnsupportedError, "one set for all layers expected"),
        ("llama", {"rope_type": "mystery"}, UnsupportedError, "rope type 'mystery' in rope_parameters"),
    ],
)
def test_rotary_settings_that_have_no_place_are_refused(family, changes, error, reason, tmp_path):
    path = save_directory(make_model(family, seed=3), tmp_path / "model")
    top = {"rope_theta": changes.pop("rope_theta", "absent")}
    nested = changes if "full_attention" in changes else {"rope_theta": 9.0, "rope_type": "default"} | changes
    change(path / "config.json", **top, rope_parameters=nested)
    with pytest.raises(error, match=rf"config\.json: .*{reason}"):
        load(path)


@pytest.mark.parametrize("family", ["llama-llama3", "llama-yarn", "phi3-longrope", "llama-dynamic"])
def test_a_model_loaded_in_one_thread_generates_in_another(family, tmp_path):
    """Red when: an array that is no parameter stays lazy, bound to the stream of the thread that loaded it."""
    path = save_directory(make_model(family, seed=3), tmp_path / "model")
    prompt = random_prompt(9, seed=1)
    expected = our_tokens(load(path)[0], prompt, 12, draft="tree")
    found = []
    thread = threading.Thread(target=lambda: found.append(load(path)[0]))
    thread.start()
    thread.join()
    assert our_tokens(found[0], prompt, 12, draft="tree") == expected


def with_head(path, *, equal=False):
    """Put an LM head into the files of a model whose embedding is its head."""
    file = path / "model.safetensors"
    tensors = mx.load(str(file))
    embedding = tensors["model.embed_tokens.weight"]
    mx.random.seed(9)
    tensors["lm_head.weight"] = embedding if equal else mx.random.normal(embedding.shape) * 0.3
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "granite", "mistral"]
)
def test_a_head_in_the_files_is_the_head_or_is_refused(family, tmp_path):
    """Red when: a distinct head is dropped without a word, and another text comes out."""
    untied = make_model(family, seed=3, base_changes={"tie_word_embeddings": False})
    tied = make_model(family, seed=3, base_changes={"tie_word_embeddings": True})
    path = save_directory(tied, tmp_path / "model")
    tokens = mx.array([random_prompt(9, seed=2)])
    with_head(path)
    change(path / "config.json", tie_word_embeddings=True)
    with pytest.raises(InvalidInputError, match=r"model\.safetensors:lm_head\.weight: differs from the embedding"):
        load(path)
    reference = load_with(untied, path)
    for tie in ("absent", False):
        change(path / "config.json", tie_word_embeddings=tie)
        model, _ = load(path)
        assert mx.array_equal(model.base(tokens), reference(tokens))
        assert mx.array_equal(plain_model(model, path)(tokens), reference(tokens))
    path = save_directory(tied, tmp_path / "equal")
    with_head(path, equal=True)
    for tie in ("absent", True):
        change(path / "config.json", tie_word_embeddings=tie)
        assert mx.array_equal(load(path)[0].base(tokens), tied.base(tokens))


def load_with(model, path):
    base = model.base
    tensors = mx.load(str(path / "model.safetensors"))
    base.load_weights(list(base.sanitize(tensors).items()))
    return base


def byte_level(path, decoder):
    """A tokenizer with a byte-level vocabulary, and that decoder, in a model's directory."""
    words = ["the", "Ġlazy", "Ġdog", "Ġ", "Ċ", "fox", "Ã©"]
    vocab = {word: number for number, word in enumerate([*words, *(f"Ġx{n}" for n in range(97 - len(words)))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="Ġx0"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.Metaspace(), decoders.ByteLevel()])
def test_a_byte_level_vocabulary_shows_spaces_whatever_its_decoder(decoder, tmp_path):
    """Red when: the text shows Ġ, or a stop string with a space is never found."""
    path = save_directory(make_model("llama", seed=3), tmp_path / "model")
    byte_level(path, decoder)
    _, tokenizer = load(path)
    assert tokenizer.decode([0, 1, 2, 4, 5, 6]) == "the lazy dog\nfoxé"
    detokenizer = tokenizer.detokenizer
    for token in (0, 1, 2, 4, 5, 6):
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text == "the lazy dog\nfoxé"
    assert isinstance(detokenizer, BPEStreamingDetokenizer)


def test_a_stop_string_with_a_space_is_found_in_a_byte_level_text(tmp_path):
    path = save_directory(make_model("llama", seed=3), tmp_path / "model")
    byte_level(path, None)
    model, tokenizer = load(path)
    free = generate(model, tokenizer, [0], 8)
    words = free.split(" ")
    stop = f"{words[3]} {words[4]}"
    assert generate(model, tokenizer, [0], 8, stop=stop) == free[: free.index(stop)]


PARTS = ["model", "pre_tokenizer", "normalizer", "decoder", "post_processor"]


@pytest.mark.parametrize("part", PARTS)
def test_an_unknown_part_of_tokenizer_json_is_named(part, tmp_path):
    path = save_directory(make_model("llama", seed=3), tmp_path / "model")
    change(path / "tokenizer.json", **{part: {"type": "Mystery"}})
    with pytest.raises(InvalidInputError, match=r"model/tokenizer\.json: tokenizer cannot be loaded") as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[1]"),
        ("tokenizer.json", ""),
        ("tokenizer.json", None),
        ("special_tokens_map.json", "{"),
        ("added_tokens.json", "{"),
    ],
)
def test_a_broken_tokenizer_file_is_named(name, content, tmp_path):
    path = save_directory(make_model("llama", seed=3), tmp_path / "model")
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_text(content)
    with pytest.raises(InvalidInputError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path / name}: tokenizer cannot be loaded (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [[7], "w9", {"a": 7}, [["w9"]]])
def test_extra_special_tokens_that_are_none_are_named(value, tmp_path):
    path = save_directory(make_model("llama", seed=3), tmp_path / "model")
    change(path / "tokenizer_config.json", extra_special_tokens=value)
    with pytest.raises(InvalidInputError, match=r"tokenizer_config\.json: tokenizer cannot be loaded"):
        load(path)


@pytest.mark.parametrize("installed", [True, False])
def test_a_sentencepiece_model_that_cannot_be_read(installed, tmp_path, monkeypatch):
    path = save_directory(make_model("llama", seed=3), tmp_path / "model")
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (path / "tokenizer.model").write_bytes(b"junk")
    if not installed:
        monkeypatch.setitem(sys.modules, "sentencepiece", None)
    reason = "tokenizer cannot be loaded" if installed else "read by the package sentencepiece, which is missing"
    with pytest.raises(InvalidInputError, match=rf"tokenizer\.model: {reason}"):
        load(path)


def test_a_chat_template_with_a_syntax_error_is_named(tmp_path):
    """The model loads, and answers raw prompts; only the template is refused."""
    path = save_directory(make_model("llama", seed=3), tmp_path / "model")
    (path / "chat_template.jinja").write_text("ok\n{% for m in %}")
    _, tokenizer = load(path)
    with pytest.raises(InvalidInputError, match=r"chat_template\.jinja: chat template: line 2: Expected an expression"):
        ChatTemplate().render(tokenizer, [{"role": "user", "content": "w9"}])


def test_a_lora_without_a_tensor_is_refused(tmp_path):
    """Red when: an adapter that changes nothing is accepted as one."""
    path = save_directory(make_model("llama", seed=3), tmp_path / "model")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    (adapter / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": settings})
    )
    mx.save_safetensors(str(adapter / "adapters.safetensors"), {})
    with pytest.raises(InvalidInputError, match=r"adapters\.safetensors: holds no tensor, so it would change nothing"):
        load(path, adapter=adapter)


def test_code_that_is_asked_for_names_the_flag(tmp_path):
    path = save_directory(make_model("llama", seed=3), tmp_path / "model")
    change(
        path / "tokenizer_config.json",
        tokenizer_class="Mine",
        auto_map={"AutoTokenizer": ["tokenization_mine.Mine", None]},
    )
    (path / "tokenizer.json").unlink()
    (path / "tokenization_mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(
        UnsupportedError, match="needs code that comes with the checkpoint; trust_remote_code lets it run"
    ):
        load(path)


def test_lossless_on_a_directory_of_transformers_5(tmp_path):
    model = make_model("llama-llama3", seed=5)
    path = save_directory(model, tmp_path / "model")
    (path / "config.json").write_text(json.dumps(nest(json.loads((path / "config.json").read_text()))))
    prompt = random_prompt(9, seed=1)
    expected = plain_tokens(model.base, prompt, 16, end_of_text=())
    loaded, tokenizer = load(path)
    tokenizer.eos_token_ids = set()
    for draft in ("tree", "auto"):
        responses = stream_generate(loaded, tokenizer, prompt, 16, draft=draft)
        assert [token for response in responses for token in response.tokens] == expected
    assert base_config("llama-llama3")["rope_scaling"]["rope_type"] == "llama3"
