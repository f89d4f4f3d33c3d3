"""Published Medusa and EAGLE heads, built here under the names and with the quirks of their repositories; converted.

The converted head's logits are those of an independent PyTorch forward on the published tensors, within 1e-4: both
compute in float32 and differ in the order of sums.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from specstream_convert import ConvertOptions, convert, inspect_checkpoint
from specstream_mlx import load
from specstream_mlx.drafters.eagle import Rows
from specstream_mlx.errors import InvalidInputError, SpecStreamError, UnsupportedError, UsageError
from specstream_mlx.formats.drafter_config import DRAFTER_CONFIG, DRAFTER_WEIGHTS
from tests.adapter_cases import save_base
from tests.drafters import reference
from tests.tiny import VOCAB_SIZE, our_tokens, plain_tokens, random_prompt

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:transformers.*")

D, MIDDLE, HEADS, KV_HEADS, HEAD_DIM, DRAFT_VOCAB = 32, 48, 4, 2, 8, 40
TOLERANCE = 1e-4
LAYER = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": D,
    "intermediate_size": MIDDLE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "max_position_embeddings": 128,
    "vocab_size": VOCAB_SIZE,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
}
SHAPE = {"num_heads": HEADS, "head_dim": HEAD_DIM, "rms_norm_eps": 1e-5, "rope_theta": 500.0}


@dataclass
class Published:
    """A directory as its authors publish it; ``tensors`` in PyTorch."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    file: str = "model.safetensors"

    def save(self) -> "Published":
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.json").write_text(json.dumps(self.config))
        if self.file.endswith(".safetensors"):
            save_file(self.tensors, str(self.path / self.file))
        else:
            torch.save(self.tensors, self.path / self.file)
        return self


def filled(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Random weights; norms near one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.1 * noise if "norm" in name else 0.3 * noise
    return tensors


def medusa(path: Path, num_heads: int = 3, num_layers: int = 1, **config: Any) -> Published:
    """The format of FasterDecoding/medusa-*: one file of heads, and a small configuration."""
    shapes: dict[str, tuple[int, ...]] = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            shapes |= {f"{head}.{layer}.linear.weight": (D, D), f"{head}.{layer}.linear.bias": (D,)}
        shapes[f"{head}.{num_layers}.weight"] = (VOCAB_SIZE, D)
    said = {"medusa_num_heads": num_heads, "medusa_num_layers": num_layers, "base_model_name_or_path": "org/base"}
    return Published(path, said | config, filled(shapes, 1), "medusa_lm_head.safetensors").save()


def layer_shapes(name: str, width: int, bias: bool = False) -> dict[str, tuple[int, ...]]:
    rows = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
    shapes: dict[str, tuple[int, ...]] = {f"{name}.self_attn.{p}_proj.weight": (r, width) for p, r in rows.items()}
    if bias:
        shapes |= {f"{name}.self_attn.{p}_proj.bias": (r,) for p, r in rows.items()}
    return shapes | {
        f"{name}.self_attn.o_proj.weight": (D, HEADS * HEAD_DIM),
        f"{name}.mlp.gate_proj.weight": (MIDDLE, D),
        f"{name}.mlp.up_proj.weight": (MIDDLE, D),
        f"{name}.mlp.down_proj.weight": (D, MIDDLE),
        f"{name}.post_attention_layernorm.weight": (D,),
    }


def eagle(path: Path, *, fc_bias: bool = True, qkv_bias: bool = False, file: str = "model.safetensors") -> Published:
    """The format of yuhuili/EAGLE-*: a layer without an input norm, and the base's embedding."""
    shapes = {"embed_tokens.weight": (VOCAB_SIZE, D), "fc.weight": (D, 2 * D)}
    shapes |= layer_shapes("layers.0", D, qkv_bias)
    if fc_bias:
        shapes["fc.bias"] = (D,)
    return Published(path, LAYER | {"bias": fc_bias}, filled(shapes, 2), file).save()


def eagle3(path: Path, *, layer: str = "midlayer", file: str = "model.safetensors", **config: Any) -> Published:
    """The format of yuhuili/EAGLE3-*: no embedding, a part of the vocabulary, and its maps."""
    shapes = {"fc.weight": (D, 3 * D), "norm.weight": (D,), "lm_head.weight": (DRAFT_VOCAB, D)}
    shapes |= layer_shapes(layer, 2 * D) | {
        f"{layer}.{name}.weight": (D,) for name in ("hidden_norm", "input_layernorm")
    }
    tensors = filled(shapes, 3)
    ids = torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(4))[:DRAFT_VOCAB].sort().values
    tensors["d2t"] = ids - torch.arange(DRAFT_VOCAB)
    tensors["t2d"] = torch.zeros(VOCAB_SIZE, dtype=torch.bool).scatter_(0, ids, True)
    return Published(path, LAYER | {"draft_vocab_size": DRAFT_VOCAB} | config, tensors, file).save()


@pytest.fixture(scope="module")
def base_path(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "base")


def converted(published: Published, out: Path, **options: Any) -> Path:
    convert(ConvertOptions(adapter_path=None, mlx_path=out, heads_path=published.path, **options))
    return out


def inputs(width: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(11, width, generator=generator), torch.randn(11, D, generator=generator)


def to_mlx(value: torch.Tensor) -> mx.array:
    return mx.array(value.numpy())


def close(found: mx.array, expected: torch.Tensor) -> bool:
    return bool(np.abs(np.array(found) - expected.numpy()).max() <= TOLERANCE)


def run_layer(model: Any, features: torch.Tensor, embedded: torch.Tensor) -> mx.array:
    """The converted layer over a whole text, (L, V) logits."""
    from mlx_lm.models.cache import KVCache

    head = model.drafter
    caches = [KVCache() for _ in range(head.weights.num_caches)]
    rows = Rows(0, False, "causal")
    hidden = head.weights(to_mlx(features)[None], to_mlx(embedded)[None], caches, rows)
    return head.weights.logits(model, hidden)


@pytest.mark.parametrize(("num_heads", "num_layers"), [(3, 1), (5, 2)])
def test_medusa_logits(base_path, tmp_path, num_heads, num_layers):
    """Break: heads in another order; a block without its residual."""
    published = medusa(tmp_path / "medusa", num_heads, num_layers)
    model, _ = load(base_path, adapter=converted(published, tmp_path / "out"))
    hidden, _ = inputs()
    expected = reference.medusa(published.tensors, num_heads, num_layers, hidden)
    found = mx.stack([head(to_mlx(hidden)) for head in model.drafter.weights.heads])
    assert close(found, expected)
    assert model.drafter.name == "medusa"
    assert model.drafter.max_depth == num_heads


def test_medusa_heads_beyond_what_the_configuration_says_are_taken(tmp_path):
    """The first published configurations say two heads and their files hold five."""
    published = medusa(tmp_path / "medusa", 5, medusa_num_heads=2)
    converted(published, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert report["head"]["num_heads"] == 5
    assert any("says medusa_num_heads 2" in note for note in report["notes"])


def test_medusa_inside_a_whole_models_files(base_path, tmp_path):
    """Medusa-2 is published with its base, the heads below medusa_head."""
    published = medusa(tmp_path / "medusa")
    published.tensors = {f"medusa_head.{name}": value for name, value in published.tensors.items()}
    published.tensors["model.norm.weight"] = torch.ones(D)
    (published.path / published.file).unlink()
    published.file = "model.safetensors"
    published.save()
    model, _ = load(base_path, adapter=converted(published, tmp_path / "out"))
    assert model.drafter.max_depth == 3


@pytest.mark.parametrize("fc_bias", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_eagle_logits(base_path, tmp_path, fc_bias, qkv_bias):
    """Break: feature before embedding in fc; an input norm in the first layer; the target's final norm once more."""
    published = eagle(tmp_path / "eagle", fc_bias=fc_bias, qkv_bias=qkv_bias)
    model, _ = load(base_path, adapter=converted(published, tmp_path / "out"))
    features, embedded = inputs()
    hidden = reference.eagle(published.tensors, SHAPE, features, embedded)
    head = torch.from_numpy(np.array(model.base.lm_head.weight))
    assert close(run_layer(model, features, embedded), hidden @ head.T)
    assert mx.array_equal(model.drafter.weights.embed_tokens.weight, to_mlx(published.tensors["embed_tokens.weight"]))


@pytest.mark.parametrize("layer", ["midlayer", "layers.0"])
@pytest.mark.parametrize("norm_before_residual", [True, False])
def test_eagle3_logits(base_path, tmp_path, layer, norm_before_residual):
    """Break: the residual after the norm, or before; fc over guesses too; ids without d2t."""
    published = eagle3(tmp_path / "eagle3", layer=layer, norm_before_residual=norm_before_residual)
    model, _ = load(base_path, adapter=converted(published, tmp_path / "out"))
    features, embedded = inputs(3 * D)
    tensors = {name.replace(layer, "midlayer", 1): value for name, value in published.tensors.items()}
    config = SHAPE | {"norm_before_residual": norm_before_residual}
    fused = features @ tensors["fc.weight"].T
    weights = model.drafter.weights
    states = [to_mlx(features[:, part * D : (part + 1) * D])[None] for part in range(3)]
    assert close(weights.features(model, states)[0], fused)
    hidden = reference.eagle3(tensors, config, fused, embedded)
    expected = reference.eagle3_logits(tensors, config, hidden)
    assert close(run_layer(model, fused, embedded), expected)
    ids = published.tensors["t2d"].nonzero()[:, 0].tolist()
    assert weights.ids(mx.arange(DRAFT_VOCAB)).tolist() == ids
    assert model.drafter.taps == (2, 2, 1)  # 2, N / 2, N - 3 of four layers


def test_eagle3_in_the_form_of_speculators(base_path, tmp_path):
    """The layer's sizes in a block of their own, the base's name below speculators_config, layers as vLLM counts."""
    plain = eagle3(tmp_path / "plain", layer="layers.0")
    layer = {name: value for name, value in plain.config.items() if name != "draft_vocab_size"}
    config = {
        "speculators_model_type": "eagle3",
        "draft_vocab_size": DRAFT_VOCAB,
        "norm_before_residual": True,
        "eagle_aux_hidden_state_layer_ids": [1, 2, 4],
        "transformer_layer_config": layer,
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "org/base"}},
    }
    published = Published(tmp_path / "speculators", config, plain.tensors).save()
    out = converted(published, tmp_path / "out")
    model, _ = load(base_path, adapter=out)
    assert model.drafter.taps == (1, 2, 4)
    assert json.loads((out / DRAFTER_CONFIG).read_text())["base_model"]["name_or_path"] == "org/base"


def test_layers_named_as_sglang_does_are_one_lower(base_path, tmp_path):
    """``eagle_config`` names the layer that made a state."""
    ids = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}}
    model, _ = load(base_path, adapter=converted(eagle3(tmp_path / "eagle3", **ids), tmp_path / "out"))
    assert model.drafter.taps == (1, 2, 4)


@pytest.mark.parametrize("make", [medusa, eagle, eagle3])
def test_tokens_are_the_bases_own(base_path, tmp_path, make):
    """Through ``load(adapter=)`` and ``use_adapter``."""
    out = converted(make(tmp_path / "heads"), tmp_path / "out", hf_path=str(base_path))
    model, _ = load(base_path)
    prompt = random_prompt(9, seed=3)
    expected = plain_tokens(model.base, prompt, 20)
    name = model.load_adapter(out)
    for use in (name, None, name):
        model.use_adapter(use)
        assert our_tokens(model, prompt, 20, draft="tree" if use else "off") == expected
    assert our_tokens(model, prompt, 20, drafter=model.drafter.name) == expected
    model.unload_adapter(name)
    assert model.drafter is None
    assert model.heads is None


@pytest.mark.parametrize(
    ("make", "file"),
    [(medusa, "medusa_lm_head.pt"), (eagle, "pytorch_model.bin"), (eagle3, "pytorch_model.bin")],
)
def test_pickles_only_when_allowed(tmp_path, make, file):
    """As most of them are published; the output is the same as from safetensors."""
    plain = make(tmp_path / "plain")
    pickled = Published(tmp_path / "pickled", plain.config, plain.tensors, file).save()
    with pytest.raises(UnsupportedError, match="--allow-pickle"):
        converted(pickled, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    converted(plain, tmp_path / "one")
    converted(pickled, tmp_path / "two", allow_pickle=True)
    one, two = ((tmp_path / name / DRAFTER_WEIGHTS).read_bytes() for name in ("one", "two"))
    assert one == two


def test_the_bases_own_embedding_is_not_stored_again(base_path, tmp_path):
    """Told by its values, with the base at hand."""
    published = eagle(tmp_path / "eagle")
    model, _ = load(base_path)
    published.tensors["embed_tokens.weight"] = torch.from_numpy(np.array(model.base.model.embed_tokens.weight))
    published.save()
    converted(published, tmp_path / "out", hf_path=str(base_path))
    config = json.loads((tmp_path / "out" / DRAFTER_CONFIG).read_text())
    assert config["settings"]["own_embedding"] is False
    assert config["base_model"]["fingerprint"]
    load(base_path, adapter=tmp_path / "out")


def drop(name: str) -> Any:
    return lambda published: published.tensors.pop(name)


def put(name: str, *shape: int) -> Any:
    return lambda published: published.tensors.__setitem__(name, torch.ones(shape))


def say(**config: Any) -> Any:
    return lambda published: published.config.update(config)


def only(name: str) -> Any:
    return lambda published: setattr(published, "tensors", {name: torch.ones(1)})


def repeat_an_id(published: Published) -> None:
    published.tensors["d2t"][1] = published.tensors["d2t"][0] - 1


DAMAGE = {
    "medusa: a bias is missing": (medusa, drop("1.0.linear.bias"), InvalidInputError, "1.0.linear.bias: missing"),
    "medusa: heads are missing": (medusa, say(medusa_num_heads=4), InvalidInputError, "medusa_num_heads 4"),
    "medusa: other layers": (medusa, say(medusa_num_layers=2), InvalidInputError, "medusa_num_layers is 2"),
    "medusa: a shape": (medusa, put("2.0.linear.bias", 31), InvalidInputError, r"shape \(31,\)"),
    "eagle: a projection is missing": (
        eagle,
        drop("layers.0.self_attn.k_proj.weight"),
        InvalidInputError,
        "layers.0.self_attn.k_proj.weight: missing",
    ),
    "eagle: more layers are said": (
        eagle,
        say(num_hidden_layers=2),
        InvalidInputError,
        r"layers\.1\.input_layernorm\.weight: missing",
    ),
    "eagle: norms of another version": (
        eagle,
        put("embedding_layernorm.weight", D),
        UnsupportedError,
        "another version",
    ),
    "eagle: another activation": (eagle, say(hidden_act="gelu"), UnsupportedError, "hidden_act is 'gelu'"),
    "eagle: a rotary embedding": (
        eagle,
        say(rope_scaling={"type": "dynamic", "factor": 2.0}),
        UnsupportedError,
        "rope_scaling of type 'dynamic'",
    ),
    "eagle: heads that do not fit": (eagle, say(num_attention_heads=8), InvalidInputError, "config.json needs"),
    "eagle3: no map": (eagle3, drop("d2t"), InvalidInputError, "d2t: missing"),
    "eagle3: an id twice": (eagle3, repeat_an_id, InvalidInputError, "different ones below"),
    "eagle3: the maps disagree": (
        eagle3,
        lambda published: published.tensors["t2d"].logical_not_(),
        InvalidInputError,
        "marks other ids",
    ),
    "eagle3: norms before fc": (eagle3, say(norm_before_fc=True), UnsupportedError, "norm_before_fc"),
    "eagle3: four states": (eagle3, put("fc.weight", D, 4 * D), UnsupportedError, "three hidden"),
    "nothing known": (medusa, only("x"), InvalidInputError, "neither Medusa"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line(tmp_path, name):
    """What, where, why, what to do; nothing is written."""
    make, damage, error, message = DAMAGE[name]
    published = make(tmp_path / "heads")
    damage(published)
    published.save()
    with pytest.raises(error, match=message) as caught:
        converted(published, tmp_path / "out")
    assert all(line.startswith(str(published.path)) for line in str(caught.value).splitlines())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [medusa, eagle, eagle3])
def test_another_base_is_refused(tmp_path, make):
    """At conversion with ``hf_path``, and at ``load`` without it."""
    other = save_base(tmp_path / "other", hidden_size=48)
    published = make(tmp_path / "heads")
    with pytest.raises(InvalidInputError, match=r"hidden_size 32.*has 48"):
        converted(published, tmp_path / "out", hf_path=str(other))
    with pytest.raises(InvalidInputError, match=r"base_model.hidden_size is 32, this base has 48"):
        load(other, adapter=converted(published, tmp_path / "out"))


def test_the_adapter_path_may_hold_heads(tmp_path):
    """A user who gives them there means the same; what does not go with heads is refused."""
    published = eagle3(tmp_path / "eagle3")
    report = convert(ConvertOptions(adapter_path=published.path, mlx_path=tmp_path / "a"))
    assert report.head is not None
    with pytest.raises(UsageError, match="--adapter-path holds draft heads, which does not go with --lora-only"):
        convert(ConvertOptions(adapter_path=published.path, mlx_path=tmp_path / "b", lora_only=True))
    with pytest.raises(UsageError, match="--heads does not go with --quantize"):
        converted(published, tmp_path / "b", quantize=True)


@pytest.mark.parametrize(("make", "kind"), [(medusa, "medusa"), (eagle, "eagle"), (eagle3, "eagle3")])
def test_inspect_knows_both_forms(base_path, tmp_path, make, kind):
    """As published, and converted."""
    published = make(tmp_path / "heads")
    found = inspect_checkpoint(published.path)
    assert (found.kind, found.problems) == ("published heads", ())
    assert found.head is not None
    assert found.head["kind"] == kind
    out = converted(published, tmp_path / "out", hf_path=str(base_path))
    ours = inspect_checkpoint(out)
    assert (ours.kind, ours.problems) == ("draft head", ())
    assert ours.num_head_parameters == found.num_head_parameters
    config = json.loads((out / DRAFTER_CONFIG).read_text())
    config["kind"] = "medusa-3"
    (out / DRAFTER_CONFIG).write_text(json.dumps(config))
    assert any("kind is 'medusa-3'" in problem for problem in inspect_checkpoint(out).problems)
    with pytest.raises(SpecStreamError, match="kind is 'medusa-3'"):
        load(base_path, adapter=out)
