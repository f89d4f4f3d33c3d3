"""Families of our own and the seam they share with mlx-lm's: OPT's shape, learned positions and where they end."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.models.llama
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import BatchKVCache
from mlx_lm.utils import load_model, quantize_model

from specstream_mlx import DraftOptions, families, load, stream_generate
from specstream_mlx.errors import InvalidInputError, UnsupportedError
from specstream_mlx.families import FAMILIES, RECURRENT, model_classes
from specstream_mlx.families.opt import OPTFamily
from specstream_mlx.formats.config import CONFIG_NAME, WEIGHTS_NAME
from specstream_mlx.formats.fingerprint import tensor_sha256
from specstream_mlx.target.tree import DraftTree
from tests.passes import stream_logits, verify
from tests.tiny import (
    LEARNED,
    NumberTokenizer,
    base_config,
    drafter,
    make_base,
    make_model,
    our_tokens,
    plain_tokens,
    random_prompt,
    save_directory,
)
from tests.tolerances import CLOSE_LOGITS, LOGITS

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:transformers.*")

ROOT = Path(__file__).parents[2]
CONTEXT = 24
SHAPES = {
    "pre-norm": {},
    "post-norm": {"do_layer_norm_before": False},
    "projected": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "projected-pre-norm-untied": {"word_embed_proj_dim": 16, "tie_word_embeddings": False},
    "no-final-norm": {"_remove_final_layer_norm": True},
    "no-biases": {"enable_bias": False},
    "norms-without-weights": {"layer_norm_elementwise_affine": False},
    "untied": {"tie_word_embeddings": False},
}


@pytest.mark.parity
@pytest.mark.parametrize("shape", SHAPES)
def test_opt_gives_the_logits_of_transformers(shape, tmp_path):
    """Red when: a norm sits elsewhere, positions start at another row, a projection or a bias is left out."""
    torch = pytest.importorskip("torch", reason="the parity tests need the torch extra")
    from transformers import OPTConfig, OPTForCausalLM

    config = base_config("opt", **SHAPES[shape])
    theirs = OPTForCausalLM(OPTConfig(**{name: value for name, value in config.items() if name != "model_type"})).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.2, generator=generator)
    theirs.save_pretrained(tmp_path)
    ours, _ = load_model(tmp_path, get_model_classes=model_classes)
    tokens = random_prompt(23, seed=4)
    expected = theirs(torch.tensor([tokens])).logits[0].detach().numpy()
    assert np.abs(np.array(ours(mx.array([tokens]))[0]) - expected).max() <= LOGITS
    assert np.abs(expected).max() > 0.5, "logits too small to prove anything"


def test_recurrent_models_are_told_from_unknown_ones():
    """Names the models of mlx-lm that keep a recurrent state now, and the supported ones that do from now on."""
    sources = {path.stem: path.read_text() for path in Path(mlx_lm.models.llama.__file__).parent.glob("*.py")}
    users = {name for name, text in sources.items() if re.search(r"\bArraysCache\(", text)} - {"cache", "gear"}
    heirs = {"falcon_mamba", "gear", "lfm2-vl", "longcat_flash_ngram", "prism_hadamard_qwen35", "qwen3_5_moe"}
    assert users | heirs == RECURRENT
    assert not RECURRENT & FAMILIES.keys()


def test_names_of_families_are_read_without_mlx():
    """Red when: a family's file imports MLX at its top, so that the PyTorch method would start it for a name."""
    code = (
        "import sys, specstream_mlx.families as f; assert f.CONVERTED['opt'].name('decoder.x') == 'model.decoder.x'; "
        "print([name for name in sys.modules if name.partition('.')[0] in ('mlx', 'mlx_lm', 'torch', 'peft')])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.stdout == "[]\n", ran.stderr


def test_a_family_is_one_file(tmp_path, monkeypatch):
    """A new file in the directory is found by itself, for running and for converting; no list is edited."""
    (tmp_path / "new_kind.py").write_text(
        "from specstream_mlx.families.decoder import DecoderFamily\n"
        "from specstream_mlx.families.hugging_face import HuggingFace\n\n\n"
        "class NewKindFamily(DecoderFamily):\n"
        "    MODEL_TYPES = ('new_kind', 'new_kind_text')\n"
        "    HUGGING_FACE = HuggingFace()\n"
    )
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    found = dict(families._found())
    assert found.keys() == FAMILIES.keys() | {"new_kind", "new_kind_text"}
    assert found["new_kind"].HUGGING_FACE is not None
    del sys.modules["specstream_mlx.families.new_kind"]


@pytest.mark.parametrize("hidden_size", [1, 32, 640, 1152, 2048, 2304, 2560, 3072, 3840, 5376])
def test_the_scale_of_gemma3_is_rounded_as_mlx_rounds(hidden_size):
    args = SimpleNamespace(hidden_size=hidden_size)
    scale = FAMILIES["gemma3_text"].embedding_scale(args)
    assert scale == mx.array(hidden_size**0.5, mx.bfloat16).astype(mx.float32).item()


def test_other_activations_are_refused():
    with pytest.raises(ValueError, match="activation_function 'gelu' is not supported"):
        make_base("opt", activation_function="gelu")


@pytest.mark.parametrize("family", LEARNED)
def test_batches_padded_on_the_left(family):
    """Red when a row's positions count its padding (mlx-lm's batch generation)."""
    base = make_base(family, seed=2)
    long, short = random_prompt(9, seed=1), random_prompt(5, seed=2)
    caches = [BatchKVCache([0, 4]) for _ in base.layers]
    logits = base(mx.array([long, [0] * 4 + short]), cache=caches)
    assert mx.allclose(logits[0, -1], base(mx.array([long]))[0, -1], atol=CLOSE_LOGITS)
    assert mx.allclose(logits[1, -1], base(mx.array([short]))[0, -1], atol=CLOSE_LOGITS)


def test_files_of_the_inner_model_load(tmp_path):
    """Names without the ``model.`` prefix, and a tied head's copy, as some OPT files on the hub have them."""
    base = make_base("opt-projected", seed=3)
    held = dict(tree_flatten(base.parameters()))
    renamed = {name.removeprefix("model."): value for name, value in held.items()}
    renamed["lm_head.weight"] = held["model.decoder.embed_tokens.weight"]
    mx.save_safetensors(str(tmp_path / "model.safetensors"), renamed)
    (tmp_path / "config.json").write_text(json.dumps(vars(base.args)))
    loaded, _ = load_model(tmp_path, get_model_classes=model_classes)
    assert all(mx.array_equal(value, held[name]) for name, value in tree_flatten(loaded.parameters()))


def test_quantised_opt_keeps_its_positions_and_its_text(tmp_path):
    """Red when the position table is quantised, or drafting changes a token of a quantised model."""
    model = make_model("opt-post-norm", seed=6)
    path = save_directory(model, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    base, quantised = quantize_model(make_base("opt-post-norm", seed=6), config, group_size=32, bits=8)
    assert isinstance(base.model.decoder.layers[0].fc1, nn.QuantizedLinear)
    assert isinstance(base.model.decoder.embed_tokens, nn.QuantizedEmbedding)
    (path / "config.json").write_text(json.dumps(quantised))
    (path / "model.safetensors").unlink()
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(base.parameters())))
    loaded, _ = load(path)
    positions = loaded.base.model.decoder.embed_positions.weight
    assert mx.array_equal(positions, model.base.model.decoder.embed_positions.weight)
    prompt = random_prompt(9, seed=5)
    expected = plain_tokens(base, prompt, 20)
    assert our_tokens(loaded, prompt, 20, draft="tree", tokenizer=NumberTokenizer()) == expected


@pytest.mark.parametrize("family", [*LEARNED, "gemma2", "gemma3", "gpt_neox", "gpt_oss", "phi", "qwen3_moe"])
def test_directories_come_back(family, tmp_path):
    """Red when: a size is read under llama's name, the norm of the fingerprint is not found, or LoRA paths differ."""
    model = make_model(family, seed=7)
    path = save_directory(model, tmp_path / "model")
    layers = model.family.LAYERS
    linears = ((name, part) for name, part in model.layers[3].named_modules() if isinstance(part, nn.Linear))
    module, linear = min(linears, key=lambda found: found[0])
    width = linear.weight.shape[0]
    tensors = mx.load(str(path / WEIGHTS_NAME))
    tensors |= {
        f"lora.{layers}.3.{module}.lora_a": mx.random.normal((linear.weight.shape[1], 2), key=mx.random.key(1)),
        f"lora.{layers}.3.{module}.lora_b": mx.random.normal((2, width), key=mx.random.key(2)),
    }
    mx.eval(tensors)
    (path / WEIGHTS_NAME).unlink()
    mx.save_safetensors(str(path / WEIGHTS_NAME), tensors)
    tensor = model.family.fingerprint_tensor(vars(model.args))
    weight = dict(tree_flatten(model.base.parameters()))[tensor]

    def record(**base):
        stream_config = json.loads((path / CONFIG_NAME).read_text())
        lossless = {"mode": "lossless", "lora_rows": "streams", "lora": {"rank": 2, "scale": 2.0}}
        (path / CONFIG_NAME).write_text(json.dumps(stream_config | lossless | {"base_model": base}))

    digest = {"tensor": tensor, "sha256": tensor_sha256(weight)}
    record(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, fingerprint=digest)
    loaded, _ = load(path)
    prompt = random_prompt(9, seed=5)
    tokens = mx.array([prompt])
    assert mx.array_equal(loaded(tokens), model(tokens)), "stream-only LoRA reached a main row"
    expected = plain_tokens(model.base, prompt, 16)
    for insertion in ("deferred", "parallel"):
        options = DraftOptions(tree="cartesian:3x2x2x1", insertion=insertion)
        drafted = our_tokens(loaded, prompt, 16, draft="tree", draft_options=options, tokenizer=NumberTokenizer())
        assert drafted == expected
    record(hidden_size=64, num_hidden_layers=5, fingerprint=digest)
    with pytest.raises(InvalidInputError, match=r"hidden_size is 64, this base has 32; .*\n.*num_hidden_layers is 5"):
        load(path)
    record(fingerprint=digest | {"sha256": "0" * 64})
    with pytest.raises(InvalidInputError, match=f"fingerprint of {tensor} differs"):
        load(path)


def test_stream_lora_on_experts_is_refused_by_name(tmp_path):
    model = make_model("mixtral", seed=7)
    path = save_directory(model, tmp_path / "model")
    name = "lora.model.layers.3.block_sparse_moe.switch_mlp.up_proj"
    tensors = mx.load(str(path / WEIGHTS_NAME))
    tensors |= {f"{name}.lora_a": mx.zeros((32, 2)), f"{name}.lora_b": mx.zeros((2, 64))}
    mx.eval(tensors)
    (path / WEIGHTS_NAME).unlink()
    mx.save_safetensors(str(path / WEIGHTS_NAME), tensors)
    lossless = {"mode": "lossless", "lora_rows": "streams", "lora": {"rank": 2, "scale": 2.0}}
    config = json.loads((path / CONFIG_NAME).read_text())
    (path / CONFIG_NAME).write_text(json.dumps(config | lossless))
    with pytest.raises(InvalidInputError, match=f"{name}: LoRA on stream rows needs a linear layer, .* a SwitchLinear"):
        load(path)


def test_the_tensor_of_the_fingerprint():
    """The last layer norm with weights, under the name that trainers write; a model without any has none."""
    names = {
        "opt": "model.decoder.final_layer_norm.weight",
        "opt-post-norm": "model.decoder.layers.3.final_layer_norm.weight",
        "gpt2": "model.ln_f.weight",
        "gpt_neox": "model.final_layer_norm.weight",
        "phi": "model.final_layernorm.weight",
        "llama": "model.norm.weight",
    }
    for family, name in names.items():
        config = base_config(family)
        assert FAMILIES[config["model_type"]].fingerprint_tensor(config) == name
    bare = {"_remove_final_layer_norm": True}
    assert OPTFamily.fingerprint_tensor(base_config("opt", **bare)) == names["opt-post-norm"]
    assert OPTFamily.fingerprint_tensor(base_config("opt", layer_norm_elementwise_affine=False)) is None


def test_stock_mlx_lm_has_no_opt(tmp_path):
    """Says when to hand the family over: mlx-lm has an OPT of its own now."""
    path = save_directory(make_model("opt", seed=8), tmp_path / "model")
    with pytest.raises(ValueError, match="opt not supported"):
        mlx_lm.load(str(path))


@pytest.mark.parametrize("family", LEARNED)
def test_stream_position_has_no_effect(family):
    """Streams pass no embedding and attention knows no position (the trainer's twin agrees, see the parity tests)."""
    results = []
    for position in ("anchor", "anchor_plus_j"):
        model = make_model(family, seed=9, stream_position=position)
        caches = model.make_cache()
        model(mx.array([random_prompt(5, seed=1)]), cache=caches)
        run = verify(model, mx.array([7]), DraftTree.chain(0), caches)
        model.commit(run, [0], caches)
        results.append(stream_logits(model, run, 0, caches))
    assert mx.array_equal(*results)
    assert not mx.allclose(results[0][0], results[0][1], atol=100 * LOGITS)


@pytest.fixture(scope="module", params=LEARNED)
def short_model(request):
    size = "n_positions" if request.param == "gpt2" else "max_position_embeddings"
    return make_model(request.param, seed=10, base_changes={size: CONTEXT})


@pytest.mark.parametrize(
    ("draft", "insertion"),
    [("off", None), *((draft, how) for draft in ("chain", "tree") for how in ("deferred", "parallel")), ("auto", None)],
)
def test_text_ends_where_the_positions_end(short_model, draft, insertion):
    """Red when: a token beyond the table is emitted, the last one within it is not, or drafts beyond it count."""
    prompt = random_prompt(10, seed=6)
    left = CONTEXT - len(prompt)
    expected = plain_tokens(short_model.base, prompt, left, end_of_text=())
    tokenizer = NumberTokenizer(end_of_text=())
    options = DraftOptions(insertion=insertion)
    limits = {1.0: (-1, left - 1, left, 100)} | ({0.6: (left - 1, -1)} if draft != "off" else {})
    for accuracy, limit in limits.items():
        for max_tokens in limit:
            caches = short_model.make_cache()
            with drafter(short_model, expected, len(prompt), accuracy, seed=1):
                responses = list(
                    stream_generate(
                        short_model,
                        tokenizer,
                        prompt,
                        max_tokens,
                        draft=draft,
                        draft_options=options,
                        prompt_cache=caches,
                    )
                )
            tokens = [token for response in responses for token in response.tokens]
            assert tokens == expected[: len(tokens)]
            assert len(tokens) == (left - 1 if max_tokens == left - 1 else left)
            assert responses[-1].finish_reason == "length"
            assert {cache.offset for cache in caches} == {len(prompt) + len(tokens)}
    with pytest.raises(InvalidInputError, match=f"prompt has 1 tokens after {CONTEXT} cached ones, .* {CONTEXT};"):
        our_tokens(short_model, [3], 5, prompt_cache=caches)


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 5])
def test_prompts_beyond_the_positions_are_refused(short_model, length):
    message = f"prompt has {length} tokens, the model's context holds {CONTEXT}; shorten the prompt"
    with pytest.raises(InvalidInputError, match=message):
        our_tokens(short_model, random_prompt(length, seed=1), 5)


def test_rotary_models_go_on_beyond_their_context():
    """As plain decoding does: nothing ends there."""
    model = make_model("llama", seed=10, base_changes={"max_position_embeddings": CONTEXT})
    prompt = random_prompt(10, seed=6)
    expected = plain_tokens(model.base, prompt, 30, end_of_text=())
    assert our_tokens(model, prompt, 30, tokenizer=NumberTokenizer(end_of_text=()), draft="tree") == expected
    assert len(expected) == 30


def test_a_root_beyond_the_positions_is_refused(short_model):
    caches = short_model.make_cache()
    short_model(mx.array([random_prompt(CONTEXT, seed=1)]), cache=caches)
    with pytest.raises(InvalidInputError, match=f"position {CONTEXT} is beyond the model's {CONTEXT} learned"):
        verify(short_model, mx.array([7]), DraftTree.chain(0), caches)


def test_plain_decoding_of_opt_beyond_its_positions_is_an_error():
    """mlx-lm's own loop, which knows no limit, would read past the table."""
    base = make_base("opt", max_position_embeddings=CONTEXT)
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens, the model has {CONTEXT} learned positions"):
        plain_tokens(base, random_prompt(10, seed=6), 30, end_of_text=())


def test_unsupported_settings_are_named_on_loading(tmp_path):
    path = save_directory(make_model("opt", seed=8), tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"activation_function": "gelu"}))
    with pytest.raises(UnsupportedError, match="activation_function 'gelu' is not supported"):
        load(path)


def test_settings_that_transformers_refuses_are_one_line(tmp_path):
    """Red when: its error, which is none of the usual ones, comes through as a bug of ours."""
    path = save_directory(make_model("gemma2", seed=8), tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"query_pre_attn_scalar": 8.5}))
    with pytest.raises(InvalidInputError, match=r"tokenizer files cannot be loaded .*query_pre_attn_scalar"):
        load(path)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("gemma2", "attention of gemma2 cannot read a quantised cache"), ("gemma3", "a layer with a sliding window")],
)
def test_caches_that_a_family_cannot_have_quantised(family, reason):
    """Red when: mlx-lm's own failure on quantised rows comes through as a bug of ours."""
    model = make_model(family, seed=8, base_changes={"head_dim": 32})
    with pytest.raises(UnsupportedError, match=f"kv_bits: .*{reason}.*; drop it"):
        our_tokens(model, random_prompt(5, seed=1), 4, kv_bits=8, kv_group_size=32, quantized_kv_start=0)
