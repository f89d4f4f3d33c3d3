"""Loading: what was saved comes back, and every damaged or mismatched file is named in one line."""

import hashlib
import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

from specstream_mlx import generate, load
from specstream_mlx.errors import InvalidInputError, UnsupportedError, UsageError
from specstream_mlx.formats.config import CONFIG_NAME, WEIGHTS_NAME
from specstream_mlx.formats.places import resolve
from specstream_mlx.target.tree import DraftTree
from tests.passes import stream_logits, verify
from tests.tiny import make_model, our_tokens, random_prompt, save_directory, save_streams
from tests.tolerances import LOGITS

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:transformers.*")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = make_model("llama", seed=21)
    return model, save_directory(model, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved[1], tmp_path / "copy"))


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_streams(directory, change):
    file = directory / WEIGHTS_NAME
    tensors = mx.load(str(file))
    change(tensors)
    mx.eval(tensors)
    file.unlink()
    mx.save_safetensors(str(file), tensors)


def test_what_was_saved_comes_back(saved):
    model, path = saved
    loaded, tokenizer = load(path)
    before, after = (dict(tree_flatten(each.parameters())) for each in (model, loaded))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(value, after[name]) for name, value in before.items())
    assert loaded.stream_config == model.stream_config
    assert tokenizer.eos_token_ids == {5}
    prompt = random_prompt(7, seed=1)
    assert our_tokens(loaded, prompt, 12, draft="tree") == our_tokens(model, prompt, 12, draft="off")


def test_stock_mlx_lm_opens_the_directory_and_gives_the_same_text(saved):
    _, path = saved
    stock, stock_tokenizer = mlx_lm.load(str(path))
    model, tokenizer = load(path)
    prompt = "w9 w10 w44 w13"
    expected = mlx_lm.generate(stock, stock_tokenizer, prompt, max_tokens=12)
    for draft in ("off", "chain", "tree", "auto"):
        assert generate(model, tokenizer, prompt, 12, draft=draft) == expected


def test_a_sidecar_over_a_plain_base(saved, copy, tmp_path):
    model, _ = saved
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (copy / name).unlink()
    plain, _ = load(copy)
    prompt = random_prompt(7, seed=1)
    expected = our_tokens(model, prompt, 12, draft="off")
    assert plain.gamma == 0
    assert our_tokens(plain, prompt, 12) == expected
    with pytest.raises(UsageError, match="needs streams and this model has none"):
        our_tokens(plain, prompt, 12, draft="chain")
    save_streams(model, tmp_path / "sidecar")
    adapted, _ = load(copy, adapter=tmp_path / "sidecar")
    assert adapted.gamma == 4
    assert our_tokens(adapted, prompt, 12, draft="tree") == expected
    with pytest.raises(InvalidInputError, match="give a converted stream adapter"):
        load(copy, adapter=copy)


def test_stream_only_lora_leaves_the_main_stream_bit_for_bit(copy):
    """Red when stream LoRA reaches a main row, or does not reach the streams."""
    plain, _ = load(copy)
    lora = {
        f"lora.model.layers.{layer}.self_attn.{name}.lora_{part}": mx.random.normal(shape, key=mx.random.key(layer))
        for layer in (2, 3)
        for name, size in (("q_proj", 32), ("v_proj", 16))
        for part, shape in (("a", (32, 4)), ("b", (4, size)))
    }
    change_streams(copy, lambda tensors: tensors.update(lora))
    change_json(copy / CONFIG_NAME, mode="lossless", lora_rows="streams", lora={"rank": 4, "scale": 2.0})
    model, _ = load(copy)
    tokens = mx.array([random_prompt(9, seed=2)])
    assert mx.array_equal(model(tokens), plain(tokens))
    tree, node_tokens = DraftTree.cartesian([2, 1]), mx.array(random_prompt(5, seed=3))
    results = []
    for each, insertion in ((plain, "deferred"), (model, "deferred"), (model, "parallel")):
        caches = each.make_cache()
        each(tokens, cache=caches)
        run = verify(each, node_tokens, tree, caches, insertion=insertion)
        each.commit(run, [0, 1], caches)
        results.append((run.logits, stream_logits(each, run, 1, caches)))
    (base, base_streams), (deferred, deferred_streams), (parallel, parallel_streams) = results
    assert mx.array_equal(base, deferred)
    assert mx.allclose(base, parallel, atol=LOGITS)
    assert mx.allclose(deferred_streams, parallel_streams, atol=LOGITS)
    assert not mx.allclose(base_streams, deferred_streams, atol=1000 * LOGITS)


def test_half_precision_streams_follow_the_base(saved, copy):
    change_streams(copy, lambda tensors: tensors.update({k: v.astype(mx.bfloat16) for k, v in tensors.items()}))
    model, _ = load(copy)
    assert {value.dtype for _, value in tree_flatten(model.parameters())} == {mx.float32}


def drop_embeddings(tensors):
    del tensors["specstream.stream_embeddings"]


def add_stranger(tensors):
    tensors["specstream.other"] = mx.zeros((2,))


def drop_row(tensors):
    tensors["specstream.stream_embeddings"] = tensors["specstream.stream_embeddings"][:3]


def make_integer(tensors):
    tensors["specstream.stream_embeddings"] = mx.zeros((4, 32), dtype=mx.int32)


def make_nan(tensors):
    tensors["specstream.prune.up.weight"] = mx.full((32, 4), float("nan"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_embeddings, f"{WEIGHTS_NAME}:specstream.stream_embeddings: missing"),
        (add_stranger, f"{WEIGHTS_NAME}:specstream.other: not expected by {CONFIG_NAME}"),
        (drop_row, r"specstream.stream_embeddings: shape \(3, 32\), .* need \(4, 32\)"),
        (make_integer, "specstream.stream_embeddings: dtype I32, expected one of F32, BF16, F16"),
        (make_nan, "specstream.prune.up.weight: holds NaN or infinite values"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrong_stream_tensors_are_named(copy, change, message):
    change_streams(copy, change)
    with pytest.raises(InvalidInputError, match=message):
        load(copy)


def fingerprint(norm):
    weight = np.array(norm).astype("<f4")
    return {"tensor": "model.norm.weight", "sha256": hashlib.sha256(weight.tobytes()).hexdigest()}


def test_streams_of_another_base_are_refused(saved, copy):
    model, _ = saved
    right = fingerprint(model.base.model.norm.weight)
    change_json(copy / CONFIG_NAME, base_model={"fingerprint": right, "hidden_size": 32, "model_type": "llama"})
    load(copy)
    wrong = fingerprint(model.base.model.norm.weight + 1)
    change_json(copy / CONFIG_NAME, base_model={"fingerprint": wrong, "name_or_path": "org/other"})
    with pytest.raises(InvalidInputError, match="same shapes, but this is another base or revision than 'org/other'"):
        load(copy)
    change_json(copy / CONFIG_NAME, base_model={"hidden_size": 64, "vocab_size": 98})
    with pytest.raises(InvalidInputError) as caught:
        load(copy)
    assert [line.split("base_model.")[1].split(",")[0] for line in str(caught.value).splitlines()] == [
        "hidden_size is 64",
        "vocab_size is 98",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_stream_layers": 5}, "num_stream_layers is 5, the base has 4 layers"),
        ({"prune": {"type": "low_rank", "rank": 4, "layer": 5}}, "prune.layer is 5, the base has 4 layers"),
        ({"gamma": 5}, r"shape \(4, 32\), .* need \(5, 32\)"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(copy, changes, message):
    change_json(copy / CONFIG_NAME, **changes)
    with pytest.raises(InvalidInputError, match=message):
        load(copy)


def damage_truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damage_empty(path):
    (path / WEIGHTS_NAME).write_bytes(b"")


def damage_pointer(path):
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")


def damage_no_weights(path):
    (path / "model.safetensors").unlink()


def damage_no_streams(path):
    (path / WEIGHTS_NAME).unlink()


def damage_no_stream_config(path):
    (path / CONFIG_NAME).unlink()


def damage_config(path):
    (path / "config.json").write_text("{")


def damage_missing_tensor(path):
    file = path / "model.safetensors"
    tensors = mx.load(str(file))
    tensors.pop("model.norm.weight")
    mx.eval(tensors)
    file.unlink()
    mx.save_safetensors(str(file), tensors)


def damage_directory_for_file(path):
    (path / WEIGHTS_NAME).unlink()
    (path / WEIGHTS_NAME).mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, r"model.safetensors: expected \d+ bytes, the file has \d+; the file is incomplete"),
        (damage_empty, f"{WEIGHTS_NAME}: the file is empty"),
        (damage_pointer, "model.safetensors: this is a Git LFS pointer, not the file itself; run `git lfs pull`"),
        (damage_no_weights, r"no model\*.safetensors"),
        (damage_no_streams, f"{WEIGHTS_NAME}: file not found"),
        (damage_no_stream_config, f"{CONFIG_NAME}: file not found"),
        (damage_config, "config.json: not valid JSON"),
        (damage_missing_tensor, "model cannot be loaded .*model.norm.weight"),
        (damage_directory_for_file, f"{WEIGHTS_NAME}: not a regular file"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_directories_are_named(copy, damage, message):
    damage(copy)
    with pytest.raises(InvalidInputError, match=message) as caught:
        load(copy)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("no_such_family", "is not supported; supported: cohere, "),
        ("mamba", "has layers that fold the past into one state, from which rejected tokens cannot be taken back"),
        ("qwen3_next", "has layers that fold the past into one state"),
    ],
)
def test_unsupported_families(copy, model_type, reason):
    change_json(copy / "config.json", model_type=model_type)
    with pytest.raises(UnsupportedError, match=f"config.json: model_type: '{model_type}' {reason}"):
        load(copy)


def test_code_in_a_checkpoint_is_not_run(copy):
    (copy / "evil.py").write_text("raise SystemExit('ran')")
    change_json(copy / "config.json", model_file="evil.py")
    with pytest.raises(UnsupportedError, match="custom module"):
        load(copy)


@pytest.mark.parametrize("path", ["./no/such", "no_such_model", "/no/such/model", "a/b/c", "../x", Path("org/name")])
def test_a_local_looking_path_is_not_downloaded(path, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InvalidInputError, match="no such directory"):
        resolve(path)


def test_a_mistyped_name_in_an_existing_directory_is_not_downloaded(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError, match="no such directory"):
        resolve("runs/modle")


def test_an_adapter_is_not_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidInputError, match="a PEFT adapter, not a model; run specstream-mlx convert"):
        load(tmp_path)


def test_a_file_is_not_a_model(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match="file is not a directory; give the directory that holds config"):
        resolve(tmp_path / "file")


def test_a_repository_that_cannot_be_had(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("connection refused")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(InvalidInputError, match=r"org/name: neither a directory nor a repository .*connection refused"):
        resolve("org/name")


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "error", "message"),
    [
        ([], 5, InvalidInputError, "prompt is empty"),
        ("", 5, InvalidInputError, "prompt is empty"),
        ([3, 97], 5, InvalidInputError, "token id 97 is outside the model's vocabulary 0..96"),
        ([3, -1], 5, InvalidInputError, "token id -1 is outside"),
        ([3] * 512, 5, InvalidInputError, "prompt has 512 tokens, the model's context holds 512"),
        ([3], 0, UsageError, "max_tokens is 0"),
        ([3], -2, UsageError, "max_tokens is -2"),
    ],
)
def test_prompts_that_cannot_be_answered(saved, prompt, max_tokens, error, message):
    with pytest.raises(error, match=message):
        our_tokens(saved[0], prompt, max_tokens)
