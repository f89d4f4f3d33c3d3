"""OPT and GPT-2 through the converter: names, transposed weights, settings, and adapters that PEFT itself wrote."""

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import mlx_lm  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from specstream_convert import ConvertOptions, convert, inspect_checkpoint  # noqa: E402
from specstream_convert.base.model import open_base  # noqa: E402
from specstream_convert.verification import forward  # noqa: E402
from specstream_convert.verification.forward import output_logits  # noqa: E402
from specstream_mlx import load  # noqa: E402
from specstream_mlx.errors import InvalidInputError, UnsupportedError  # noqa: E402
from specstream_mlx.families import model_classes  # noqa: E402
from specstream_torch.testing import make_tiny_checkpoint, write_tiny_base  # noqa: E402
from tests.tolerances import CLOSE_LOGITS, LOGITS  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:transformers.*"),
]
TOKENS = [5, 17, 3, 88, 40, 41, 2, 9, 60, 33]
SMALL = {"hidden_size": 32, "num_layers": 2}
WEIGHTS = "model.safetensors"
OPT = ("opt", "opt-post-norm", "opt-projected")
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{family} every layer": (
            family,
            {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]},
        )
        for family in OPT
    },
    "opt all-linear": ("opt", {"target_modules": "all-linear"}),
    "opt-projected all-linear": ("opt-projected", {"target_modules": "all-linear"}),
    "opt patterns": (
        "opt",
        {
            "target_modules": ["q_proj", "fc1", "fc2"],
            "rank_pattern": {"fc1": 2, "layers.1.fc2": 6},
            "alpha_pattern": {"q_proj": 3},
            "use_rslora": True,
        },
    ),
    "opt one layer": (
        "opt",
        {"target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "gpt2 every layer": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2 all-linear": ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "gpt2 patterns": (
        "gpt2",
        {
            "target_modules": ["c_attn", "mlp.c_proj"],
            "fan_in_fan_out": True,
            "rank_pattern": {"h.1.attn.c_attn": 3},
            "use_rslora": True,
        },
    ),
    "gpt2 one layer": (
        "gpt2",
        {
            "target_modules": ["c_fc"],
            "fan_in_fan_out": True,
            "layers_to_transform": [1],
            "layers_pattern": "h",
        },
    ),
}


@pytest.mark.parametrize("fuse", [True, False], ids=["merged", "live"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_peft(tmp_path: Path, name: str, fuse: bool) -> None:
    """Red when: a Conv1D factor is transposed once too often, or a module of one family is not found."""
    family, settings = ADAPTERS[name]
    write_tiny_base(family, tmp_path / "base", **SMALL)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings)
    model = peft.get_peft_model(base, lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in sorted(model.named_parameters()):
            if ".lora_" in parameter_name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.eval()
        wanted = model(torch.tensor([TOKENS])).logits[0].numpy()
        with model.disable_adapter():
            without = model(torch.tensor([TOKENS])).logits[0].numpy()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    out = tmp_path / "out"
    report = convert(ConvertOptions(adapter_path=tmp_path / "adapter", mlx_path=out, lora_only=True, fuse=fuse))
    difference = float(np.abs(output_logits(out, np.array(TOKENS), live=not fuse) - wanted).max())
    print(f"max |difference| to PEFT {difference:.2e}")
    assert difference <= LOGITS
    assert np.abs(without - wanted).max() > 100 * LOGITS, "the adapter does nothing, the test shows nothing"
    assert report.warnings == ()


def test_the_layer_by_layer_reference_is_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that large outputs take: every part in its turn."""
    for family in (*OPT, "gpt2", "llama"):
        paths = make_tiny_checkpoint(family, tmp_path / family, num_stream_layers=1, **SMALL)
        out = tmp_path / family / "out"
        convert(ConvertOptions(adapter_path=paths.adapter, mlx_path=out))
        whole = output_logits(out, np.array(TOKENS), live=False)
        with monkeypatch.context() as patch:
            patch.setattr(forward, "WHOLE_MODEL_BYTES", 0)
            assert np.abs(output_logits(out, np.array(TOKENS), live=False) - whole).max() <= CLOSE_LOGITS


def test_the_layer_by_layer_reference_drops_each_layer(tmp_path: Path) -> None:
    """Red when a block's weights outlive its turn: a large model would be held whole."""
    write_tiny_base("opt", tmp_path, **SMALL)
    model, _ = load_model(tmp_path, get_model_classes=model_classes)
    weights = [weakref.ref(layer.fc1) for layer in model.layers]
    alive: list[int] = []

    class Counted(forward._Loaded):
        def head(self) -> Iterator[None]:
            alive.append(sum(weight() is not None for weight in weights))
            yield from super().head()

    forward._by_parts(model, "opt", np.array(TOKENS), Counted(model, "opt"))
    assert alive == [0]


@pytest.mark.parametrize("family", [*OPT, "gpt2"])
def test_quantised_outputs(tmp_path: Path, family: str) -> None:
    """The converter's own check passes: it quantises just what mlx-lm does, so not OPT's table of positions."""
    paths = make_tiny_checkpoint(family, tmp_path, num_stream_layers=1, hidden_size=64, num_layers=2)
    options = {"quantize": True, "q_bits": 4, "q_group_size": 64}
    convert(ConvertOptions(adapter_path=paths.adapter, mlx_path=tmp_path / "out", **options))
    names = set(mx.load(str(tmp_path / "out" / WEIGHTS)))
    assert ("model.wpe.scales" in names) is (family == "gpt2")
    assert "model.decoder.embed_positions.scales" not in names
    assert any(name.endswith(("fc1.scales", "c_fc.scales")) for name in names)
    model, _ = load(tmp_path / "out")
    assert model.gamma == 4


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_who_opens_the_output(tmp_path: Path, family: str) -> None:
    """The model card and the report say that mlx-lm has no OPT."""
    paths = make_tiny_checkpoint(family, tmp_path, num_stream_layers=1, **SMALL)
    report = convert(ConvertOptions(adapter_path=paths.adapter, mlx_path=tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    if family == "opt":
        assert "mlx-lm itself has no `opt`" in card
        assert "from mlx_lm import load" not in card
        assert any("mlx-lm has no OPT" in note for note in report.notes)
        with pytest.raises(ValueError, match="opt not supported"):
            mlx_lm.load(str(tmp_path / "out"))
        return
    assert "from mlx_lm import load" in card
    stock, _ = mlx_lm.load(str(tmp_path / "out"))
    assert mx.array_equal(stock(mx.array([TOKENS])), load(tmp_path / "out")[0](mx.array([TOKENS])))


@pytest.mark.parametrize(("family", "layers"), [("opt", "model.decoder.layers"), ("gpt2", "model.h")])
def test_an_output_is_a_base_again(tmp_path: Path, family: str, layers: str) -> None:
    """Red when a weight that is in MLX's form already is transposed once more, or the report hides that it was."""
    fates = {}
    paths = make_tiny_checkpoint(family, tmp_path, num_stream_layers=1, **SMALL)
    for name, base in (("first", paths.base), ("second", tmp_path / "first")):
        options = ConvertOptions(
            adapter_path=paths.adapter, mlx_path=tmp_path / name, hf_path=str(base), fuse=False, dtype="float32"
        )
        report = convert(options)
        fates[name] = {fate.fate for fate in report.tensors if fate.file == WEIGHTS}
    assert fates["first"] == ({"copied"} if family == "opt" else {"copied", "transposed"})
    assert fates["second"] == {"copied"}
    first, second = (mx.load(str(tmp_path / name / WEIGHTS)) for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(mx.array_equal(value, second[name]) for name, value in first.items())
    assert f"{layers}.1.{'fc1' if family == 'opt' else 'mlp.c_fc'}.weight" in first


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_inspect_names_the_sizes(tmp_path: Path, family: str) -> None:
    write_tiny_base(family, tmp_path, **SMALL)
    base = inspect_checkpoint(tmp_path).base
    assert base is not None
    assert (base["hidden_size"], base["num_hidden_layers"], base["num_attention_heads"]) == (32, 2, 4)


def rewritten(path: Path, change: Any) -> Path:
    tensors = change(dict(mx.load(str(path / WEIGHTS))))
    mx.eval(tensors)
    (path / WEIGHTS).unlink()
    mx.save_safetensors(str(path / WEIGHTS), tensors)
    return path


@pytest.mark.parametrize(
    ("family", "old", "new", "extra"),
    [
        ("opt", "model.decoder.", "decoder.", {"decoder.version": (1,)}),
        ("opt-projected", "model.decoder.", "decoder.", {}),
        ("gpt2", "transformer.", "", {"h.0.attn.bias": (1, 1, 8, 8), "h.1.attn.masked_bias": ()}),
        ("gpt2", "transformer.", "transformer.", {"transformer.h.0.attn.bias": (1, 1, 8, 8)}),
    ],
)
def test_names_of_files_on_the_hub(
    tmp_path: Path, family: str, old: str, new: str, extra: dict[str, tuple[int, ...]]
) -> None:
    """Inner models without a prefix, buffers, a tied head's copy, and a config.json that says nothing of the tie."""
    write_tiny_base(family, tmp_path, tie_word_embeddings=True, **SMALL)
    wanted = open_base(tmp_path, "base")
    values = {name: np.array(tensor.read()) for name, tensor in wanted.tensors.items()}
    embedding = f"{wanted.family.EMBEDDING}.weight"

    def rename(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
        renamed = {new + name.removeprefix(old): value for name, value in tensors.items()}
        renamed["lm_head.weight"] = mx.array(values[embedding])
        return renamed | {name: mx.ones(shape) for name, shape in extra.items()}

    rewritten(tmp_path, rename)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = open_base(tmp_path, "base")
    assert base.tied
    assert {name: tensor.shape for name, tensor in base.tensors.items()} == base.parameters
    assert all(np.array_equal(np.array(tensor.read()), values[name]) for name, tensor in base.tensors.items())
    assert set(base.dropped) == {"lm_head.weight", *extra}
    head = "lm_head.weight"
    rewritten(tmp_path, lambda tensors: tensors | {head: tensors[head] + 1})
    with pytest.raises(InvalidInputError, match=r"lm_head.weight: differs from .* although"):
        open_base(tmp_path, "base")


@pytest.mark.parametrize(
    ("family", "changes", "error", "message"),
    [
        ("opt", {"activation_function": "gelu"}, UnsupportedError, "activation_function is 'gelu'"),
        ("opt", {"ffn_dim": None}, UnsupportedError, "ffn_dim is None, expected an integer"),
        ("opt", {"max_position_embeddings": 0}, InvalidInputError, "max_position_embeddings is 0"),
        ("opt", {"word_embed_proj_dim": "8"}, InvalidInputError, "word_embed_proj_dim is '8'"),
        ("opt", {"word_embed_proj_dim": 8}, InvalidInputError, r"embed_tokens.weight: shape .* asks for \(97, 8\)"),
        ("opt", {"do_layer_norm_before": "no"}, InvalidInputError, "do_layer_norm_before is 'no', expected true"),
        ("opt", {"do_layer_norm_before": False}, InvalidInputError, "decoder.final_layer_norm.bias: not part of"),
        ("opt", {"enable_bias": False}, InvalidInputError, "fc1.bias: not part of the model"),
        ("opt", {"num_attention_heads": 5}, InvalidInputError, "hidden_size 32 is no multiple of 5 heads"),
        ("opt", {"max_position_embeddings": 64}, InvalidInputError, r"embed_positions.weight: shape .* \(66, 32\)"),
        ("gpt2", {"activation_function": "relu"}, UnsupportedError, "activation_function is 'relu'"),
        ("gpt2", {"n_inner": 100}, UnsupportedError, "n_inner is 100"),
        ("gpt2", {"scale_attn_weights": False}, UnsupportedError, "scale_attn_weights is False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, UnsupportedError, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, UnsupportedError, "add_cross_attention is True"),
        ("gpt2", {"tie_word_embeddings": False}, UnsupportedError, "tie_word_embeddings is False"),
        ("gpt2", {"layer_norm_epsilon": None}, InvalidInputError, "layer_norm_epsilon is None"),
        ("gpt2", {"n_head": 5}, InvalidInputError, "n_embd must be divisible by n_head"),
        ("gpt2", {"n_layer": 20_000}, InvalidInputError, "n_layer is 20000, which no model has"),
        ("gpt2", {"n_layer": 3}, InvalidInputError, "model.h.2.attn.c_attn.bias: missing"),
    ],
    ids=str,
)
def test_configurations_that_have_no_exact_result(
    tmp_path: Path, family: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    write_tiny_base(family, tmp_path, **SMALL)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(error, match=message):
        open_base(tmp_path, "base")


def test_lossless_lora_outside_the_stream_layers_of_gpt2(tmp_path: Path) -> None:
    """Red when layers are looked for under llama's name."""
    paths = make_tiny_checkpoint("gpt2", tmp_path, mode="lossless", num_stream_layers=2, **SMALL)
    config = paths.adapter / "specstream_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_stream_layers": 1}))
    with pytest.raises(InvalidInputError, match="mode lossless allows LoRA only in layers 1 to 1") as caught:
        convert(ConvertOptions(adapter_path=paths.adapter, mlx_path=tmp_path / "out"))
    assert "h.0.mlp.c_fc" in str(caught.value)
    assert "h.1." not in str(caught.value)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_a_context_shorter_than_the_comparison(tmp_path: Path, family: str) -> None:
    """Red when the check of the output, or reference logits of the user's, read past the table of positions."""
    paths = make_tiny_checkpoint(family, tmp_path, num_stream_layers=1, max_position_embeddings=8, **SMALL)
    report = convert(ConvertOptions(adapter_path=paths.adapter, mlx_path=tmp_path / "out"))
    assert report.verification is not None
    assert report.verification["logits"]["tokens"] == 8
    logits = tmp_path / "logits.npz"
    np.savez(logits, tokens=np.arange(9), logits=np.zeros((9, 97), dtype=np.float32))
    options = ConvertOptions(adapter_path=paths.adapter, mlx_path=tmp_path / "again", reference_logits=logits)
    with pytest.raises(InvalidInputError, match="9 tokens, the model has 8 learned positions"):
        convert(options)
