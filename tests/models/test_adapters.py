"""Several adapters on one base: each is exactly itself, the base stays as it was, and a refusal changes nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten

from specstream_mlx import load, stream_generate
from specstream_mlx.errors import InvalidInputError, SpecStreamError, UnsupportedError, UsageError
from specstream_mlx.formats.config import CONFIG_NAME, WEIGHTS_NAME
from specstream_mlx.models.adapters import OWN
from specstream_mlx.models.identity import calibration_key, stored_calibration
from specstream_mlx.planning.calibration import Calibration
from specstream_mlx.planning.planner import Curve, PassCosts
from specstream_mlx.planning.store import save
from specstream_mlx.target.tree import DraftTree
from tests.adapter_cases import mark_of, save_base, save_every_kind, save_live_lora
from tests.passes import stream_logits, verify
from tests.tiny import NumberTokenizer, active_memory, make_base, our_tokens, plain_tokens, random_prompt

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:transformers.*")

OTHERS = 512  # bytes of scalars and keys that a process may take or drop meanwhile; every adapter has more
KINDS = ("lossless", "shared", "streams", "at-anchor", "plain")


@pytest.fixture(scope="module")
def base_path(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def quantised_path(base_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantised") / "base"
    mlx_lm.convert(str(base_path), str(path), quantize=True, q_bits=4, q_group_size=32)
    return path


@pytest.fixture(scope="module")
def kinds(base_path, tmp_path_factory):
    return save_every_kind(tmp_path_factory.mktemp("adapters"), load(base_path)[0].base)


def outcome(model: Any) -> list[Any]:
    """Everything that an adapter can change: logits of main rows and streams, and tokens."""
    prompt = random_prompt(9, seed=2)
    tree = DraftTree.cartesian([2, 1] if model.gamma > 1 else [])
    caches = model.make_cache()
    model(mx.array([prompt[:-1]]), cache=caches)
    run = verify(model, mx.array(random_prompt(tree.size, seed=3)), tree, caches)
    model.commit(run, [0], caches)
    arrays = [model(mx.array([prompt])), run.logits]
    if model.gamma:
        arrays.append(stream_logits(model, run, 0, caches))
    drafts = ("off", "chain", "tree") if model.gamma else ("off", "auto")
    return [*arrays, *(our_tokens(model, prompt, 16, draft=draft) for draft in drafts)]


def same(one: list[Any], other: list[Any]) -> bool:
    """Bit for bit."""
    assert len(one) == len(other)
    return all(
        a.shape == b.shape and mx.array_equal(a, b).item() if isinstance(a, mx.array) else a == b
        for a, b in zip(one, other, strict=True)
    )


def base_arrays(model: Any) -> dict[str, mx.array]:
    """The base's own weights, wherever an adapter has put them."""
    return {
        name.replace(".linear.", "."): value
        for name, value in tree_flatten(model.base.parameters())
        if "lora_" not in name
    }


@pytest.mark.parametrize("quantised", [False, True])
def test_every_adapter_is_as_if_it_were_alone_and_the_base_is_never_touched(
    base_path, quantised_path, kinds, quantised
):
    """Red when: a switch leaves a layer of the last adapter in place, or its streams, or changes or copies a weight."""
    path = quantised_path if quantised else base_path
    alone = {name: outcome(load(path, adapter=directory)[0]) for name, directory in kinds.items()}
    bare = outcome(load(path)[0])
    model, _ = load(path)
    weights = base_arrays(model)
    for name, directory in kinds.items():
        assert model.load_adapter(directory) == name
        if name == "shared":  # the others are read for a base that has this one on
            assert model.adapter is None
            model.use_adapter(name)
    assert model.adapter == "shared"
    model.use_adapter(None)
    assert list(model.adapters) == list(KINDS)
    order = ["shared", "lossless", None, "plain", "at-anchor", "shared", "streams", None, "lossless", "plain"]
    for name in [*order, None]:
        model.use_adapter(name)
        assert model.adapter == name
        assert same(outcome(model), alone[name] if name is not None else bare), name
        now = base_arrays(model)
        assert now.keys() == weights.keys()
        assert all(now[key] is weights[key] for key in weights)
    assert len({repr(found[0]) for found in (*alone.values(), bare)}) == 3  # two of them change the text
    assert [name for name, adapter in model.adapters.items() if adapter.changes_text] == ["shared", "plain"]


def test_mlx_lm_agrees_about_every_text(base_path, kinds):
    """Red when: a LoRA on all rows is read otherwise than mlx-lm reads it, or stream rows leak into the text."""
    model, _ = load(base_path)
    prompt = random_prompt(9, seed=2)
    for name, directory in kinds.items():
        model.use_adapter(model.load_adapter(directory))
        live = {"shared": directory / "adapters", "plain": directory}.get(name)
        stock, _ = mlx_lm.load(str(base_path), adapter_path=str(live) if live else None)
        assert our_tokens(model, prompt, 20) == plain_tokens(stock, prompt, 20)


def test_the_streams_of_a_directory_are_an_adapter_too(base_path, kinds, tmp_path):
    path = Path(shutil.copytree(base_path, tmp_path / "model"))
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        shutil.copy(kinds["lossless"] / name, path / name)
    model, _ = load(path)
    own = outcome(model)
    assert model.adapter == OWN
    model.load_adapter(kinds["shared"], name="task")
    model.use_adapter("task")
    assert (model.adapter, model.gamma) == ("task", 3)
    model.use_adapter(None)
    assert model.gamma == 0
    assert same(outcome(model), outcome(load(base_path)[0]))
    model.use_adapter(OWN)
    assert same(outcome(model), own)
    assert list(load(path, adapter=kinds["streams"])[0].adapters) == ["streams"]


def test_memory_is_reported_and_given_back(base_path, kinds):
    """Red when: a size leaves out LoRA or streams or counts the base, or something holds on to an unloaded adapter."""
    model, _ = load(base_path)
    our_tokens(model, [7, 8], 4)  # makes what a process makes once, such as the random key
    before = active_memory()
    for name, directory in kinds.items():
        held = [sum(value.nbytes for value in mx.load(str(file)).values()) for file in directory.rglob("*.safetensors")]
        model.load_adapter(directory)
        assert model.adapters[name].num_bytes == sum(held)
        assert active_memory() - before > sum(held) - OTHERS
        model.use_adapter(name)
        our_tokens(model, [7, 8], 4)
        model.unload_adapter(name)
        assert (model.adapter, model.adapters) == (None, {})
        assert active_memory() < before + OTHERS


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(file, change):
    tensors = mx.load(str(file))
    mx.eval(tensors)
    change(tensors)
    file.unlink()
    mx.save_safetensors(str(file), tensors)


def of_another_base(path):
    model, _ = load(path.parent / "base")
    model.base.model.norm.weight = model.base.model.norm.weight + 1
    change_json(path / CONFIG_NAME, base_model={"fingerprint": mark_of(model.base), "name_or_path": "org/other"})


def of_another_shape(path):
    change_json(path / CONFIG_NAME, base_model={"hidden_size": 64})


def truncated(path):
    file = path / WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:-50])


def another_gamma(path):
    change_json(path / CONFIG_NAME, gamma=3)


def too_many_layers(path):
    change_json(path / CONFIG_NAME, num_stream_layers=5)


def half_a_lora(path):
    change_tensors(path / WEIGHTS_NAME, lambda tensors: tensors.pop("lora.model.layers.3.mlp.up_proj.lora_b"))


def lora_of_another_shape(path):
    name = "lora.model.layers.3.mlp.up_proj.lora_a"
    change_tensors(path / WEIGHTS_NAME, lambda tensors: tensors.update({name: mx.zeros((31, 4))}))


def lora_below_the_streams(path):
    name = "lora.model.layers.1.mlp.up_proj.lora_"
    below = {f"{name}a": mx.zeros((32, 4)), f"{name}b": mx.zeros((4, 64))}
    change_tensors(path / WEIGHTS_NAME, lambda tensors: tensors.update(below))


def lora_of_a_strange_layer(path):
    name = "lora.model.layers.3.mlp.strange_proj.lora_"
    strange = {f"{name}a": mx.zeros((32, 4)), f"{name}b": mx.zeros((4, 64))}
    change_tensors(path / WEIGHTS_NAME, lambda tensors: tensors.update(strange))


def lora_on_all_rows_beside_it(path):
    shutil.copytree(path.parent / "shared" / "adapters", path / "adapters")


def live_truncated(path):
    file = path / "adapters" / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def live_of_another_shape(path):
    name = "model.layers.3.mlp.up_proj.lora_a"
    change_tensors(path / "adapters" / "adapters.safetensors", lambda t: t.update({name: mx.zeros((31, 4))}))


def live_half(path):
    file = path / "adapters" / "adapters.safetensors"
    change_tensors(file, lambda tensors: tensors.pop("model.layers.3.mlp.up_proj.lora_b"))


def live_infinite(path):
    name = "model.layers.3.mlp.up_proj.lora_b"
    change_tensors(path / "adapters" / "adapters.safetensors", lambda t: t.update({name: t[name] / 0}))


def live_without_scale(path):
    change_json(path / "adapters" / "adapter_config.json", lora_parameters={"rank": 4})


def live_full(path):
    change_json(path / "adapters" / "adapter_config.json", fine_tune_type="full")


def live_without_configuration(path):
    (path / "adapters" / "adapter_config.json").unlink()


def in_pytorch_form(path):
    (path / WEIGHTS_NAME).rename(path / "adapter_model.safetensors")


DAMAGES = [
    ("lossless", of_another_base, "this is another base or revision than 'org/other'"),
    ("lossless", of_another_shape, "base_model.hidden_size is 64, this base has 32"),
    ("lossless", truncated, f"{WEIGHTS_NAME}: .*the file has [0-9]+; .*incomplete"),
    ("lossless", another_gamma, r"stream_embeddings: shape \(4, 32\), .* need \(3, 32\)"),
    ("lossless", too_many_layers, "num_stream_layers is 5, the base has 4 layers"),
    ("lossless", half_a_lora, "layers.3.mlp.up_proj: needs both lora_a and lora_b"),
    ("lossless", lora_of_another_shape, r"layers.3.mlp.up_proj: shapes \(31, 4\) .* do not fit \(32, 64\)"),
    ("lossless", lora_below_the_streams, "layers.1.mlp.up_proj: lies below the stream layers"),
    ("lossless", lora_of_a_strange_layer, "needs a linear layer, the base has no layer of this name"),
    ("lossless", lora_on_all_rows_beside_it, "a LoRA on all rows, and the streams beside it are lossless"),
    ("lossless", in_pytorch_form, "a PEFT checkpoint; run specstream-mlx convert --adapter-only"),
    ("shared", live_truncated, r"adapters.safetensors: expected \d+ bytes, the file has \d+; the file is incomplete"),
    ("shared", live_of_another_shape, r"LoRA cannot be loaded .*adapter shape \(31, 4\)"),
    ("shared", live_half, "layers.3.mlp.up_proj.lora_b: missing"),
    ("shared", live_infinite, "layers.3.mlp.up_proj.lora_b: holds NaN or infinite values"),
    ("shared", live_without_scale, "missing required key 'scale'"),
    ("shared", live_full, "fine_tune_type is 'full'"),
    ("shared", live_without_configuration, "adapter_config.json: file not found"),
]


@pytest.fixture(scope="module")
def in_use(base_path, kinds):
    """A model with two adapters, one in use, and what it computes."""
    model, _ = load(base_path)
    for name in ("shared", "lossless"):
        model.load_adapter(kinds[name], name=f"good-{name}")
    model.use_adapter("good-shared")
    return model, outcome(model)


@pytest.mark.parametrize(("kind", "damage", "message"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_refused_leaves_the_model_as_it_was(in_use, base_path, kinds, tmp_path, kind, damage, message, request):
    """Red when: an adapter that cannot be loaded stays in part, or takes the one in use away."""
    model, before = in_use
    for name in ("lossless", "shared"):
        shutil.copytree(kinds[name], tmp_path / name)
    shutil.copytree(base_path, tmp_path / "base")
    damage(tmp_path / kind)
    modules = dict(model.base.named_modules())
    with pytest.raises((InvalidInputError, UnsupportedError), match=message) as caught:
        model.load_adapter(tmp_path / kind, name="bad")
    assert len(str(caught.value).splitlines()) == 1
    assert str(tmp_path / kind) in str(caught.value)
    assert model.adapter == "good-shared"
    assert list(model.adapters) == ["good-shared", "good-lossless"]
    after = dict(model.base.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[path] is modules[path] for path in modules)
    if damage in (of_another_base, live_of_another_shape, live_half):
        assert same(outcome(model), before)
    with pytest.raises(SpecStreamError, match=message):
        load(base_path, adapter=tmp_path / kind)


def test_names(in_use, kinds):
    model, _ = in_use
    with pytest.raises(UsageError, match="'good-shared' is loaded already; give another name, or unload it first"):
        model.load_adapter(kinds["plain"], name="good-shared")
    for action in (model.use_adapter, model.unload_adapter):
        with pytest.raises(UsageError, match="'other' is not loaded; loaded: 'good-shared', 'good-lossless'"):
            action("other")
    assert model.adapter == "good-shared"


def test_a_stored_calibration_belongs_to_the_adapter_it_was_made_with(base_path, kinds, tmp_path):
    """Red when: the key of a calibration, or what passes took, is that of another adapter or of the bare base."""
    model, _ = load(base_path)
    kinds = kinds | {"other": save_live_lora(tmp_path / "other", model.base, 41)}
    keys, times = {}, {}
    for name, directory in kinds.items():
        model.use_adapter(model.load_adapter(directory))
        keys[name], times[name] = calibration_key(model), model.pass_times("streams")
    assert len({key["model"] for key in keys.values()}) == len(kinds)
    assert len({id(each) for each in times.values()}) == len(kinds)
    model.use_adapter("lossless")
    curve = Curve(((1, 0.01), (8, 0.02)))
    rates = ((0.5,),) * model.gamma
    calibration = Calibration(
        calibration_key(model), ((128, PassCosts(0.01, *[curve] * 5)),), rates, (9,) * model.gamma, "text"
    )
    save(calibration)
    for name in [*kinds, None, "lossless"]:
        model.use_adapter(name)
        assert (stored_calibration(model) is not None) == (name == "lossless")
        if name is not None:
            assert calibration_key(model) == keys[name]
            assert model.pass_times("streams") is times[name]


def test_a_text_keeps_its_adapter_whatever_is_in_use_meanwhile(base_path, kinds):
    """Red when: one text is made by two adapters, or a pass leaves the layers of its own adapter in place."""
    model, _ = load(base_path, adapter=kinds["shared"])
    model.load_adapter(kinds["lossless"])
    prompt, tokenizer = random_prompt(9, seed=2), NumberTokenizer(end_of_text=())
    expected = {}
    for name in ("lossless", "shared"):
        model.use_adapter(name)
        expected[name] = our_tokens(model, prompt, 16, tokenizer=tokenizer)
    assert expected["shared"] != expected["lossless"]
    for draft in ("chain", "off"):
        texts = {"shared": [], "lossless": []}
        generators = {}
        for name in texts:
            model.use_adapter(name)
            generators[name] = stream_generate(model, tokenizer, prompt, 16, draft=draft)
            texts[name] += next(generators[name]).tokens
        model.use_adapter(None)
        while generators:
            for name in list(generators):
                response = next(generators[name], None)
                if response is None:
                    del generators[name]
                else:
                    texts[name] += response.tokens
            assert plain_tokens(model.base, prompt, 4) == plain_tokens(make_base("llama", seed=21), prompt, 4)
        assert texts == expected


def test_two_tasks_on_one_base(base_path, kinds):
    """The example of the README: two fine-tunes take turns on one base."""
    model, _ = load(base_path)
    sql, summary = model.load_adapter(kinds["shared"], name="sql"), model.load_adapter(kinds["plain"], name="summary")
    prompt = random_prompt(7, seed=5)
    expected = {
        name: plain_tokens(mlx_lm.load(str(base_path), adapter_path=str(live))[0], prompt, 20)
        for name, live in ((sql, kinds["shared"] / "adapters"), (summary, kinds["plain"]))
    }
    expected[None] = plain_tokens(make_base("llama", seed=21), prompt, 20)
    assert len({tuple(tokens) for tokens in expected.values()}) == 3
    for name in (sql, summary, sql, None, summary, None):
        model.use_adapter(name)
        assert our_tokens(model, prompt, 20) == expected[name]
