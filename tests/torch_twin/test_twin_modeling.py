"""The stream forward against Hugging Face's own forward and against the method written out row by row."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from twin_models import ATOL, FAMILIES, PROMPT, load, naive_streams, tiny  # noqa: E402

from specstream_torch.checkpoint import load_base  # noqa: E402
from specstream_torch.generate import reference_logits  # noqa: E402
from specstream_torch.modeling import (  # noqa: E402
    NO_ANCHOR,
    cache_argument,
    causal_lm,
    forward_streams,
    prune_hidden,
    stream_mask,
)
from specstream_torch.streams import StreamConfig, rotate_values  # noqa: E402
from specstream_torch.testing import make_tiny_checkpoint  # noqa: E402
from tests.tolerances import FLOAT32  # noqa: E402

VARIANTS = [
    *[(family, {}) for family in FAMILIES],
    ("llama", {"stream_position": "anchor"}),
    ("llama", {"stream_init": "low_rank", "gamma": 3, "num_stream_layers": 1}),
    ("mistral", {"stream_init": "low_rank_residual", "num_stream_layers": 4}),
    ("qwen3", {"tie_word_embeddings": True, "use_rslora": True}),
    *[(family, {"mode": "lossless"}) for family in FAMILIES],
    *[(family, {"stream_id": "value_rotation"}) for family in ("llama", "qwen2", "phi3", "opt", "gpt2")],
    ("qwen3", {"stream_id": "value_rotation", "mode": "lossless", "stream_position": "anchor"}),
]


def test_stream_mask_written_out() -> None:
    """Catches: an anchor off by one, streams of other anchors visible, a stream that sees later ones."""
    mask = stream_mask(torch.tensor([[1, 2], [3, NO_ANCHOR]]), num_main=4, gamma=2)
    drawn = (
        [
            # main    (1,.)(2,.)
            ["xx..", "x.", ".."],
            ["xx..", "xx", ".."],
            ["xxx.", "..", "x."],
            ["xxx.", "..", "xx"],
        ],
        [
            ["xxxx", "x.", ".."],
            ["xxxx", "xx", ".."],
            ["x...", "..", "x."],
            ["x...", "..", "xx"],
        ],
    )
    expected = [[[c == "x" for c in "".join(row)] for row in rows] for rows in drawn]
    assert mask.tolist() == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_main_logits_equal_hugging_face(family: str, attention: str) -> None:
    """Catches: a missing causal mask, shifted positions, a skipped layer or norm, an adapter left out."""
    model = load(family, attention)
    tokens = torch.tensor([PROMPT, PROMPT[::-1]])
    result = forward_streams(model, tokens, torch.tensor([[0, 3, 11], [5, 6, NO_ANCHOR]]))
    torch.testing.assert_close(result.main, model(tokens).logits, atol=ATOL, rtol=0)
    states = model(tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(result.trunk, states[2], atol=ATOL, rtol=0)  # after layer N - N_s = 2
    without = load_base(tiny(family).base)(tokens).logits
    assert (result.main - without).abs().max() > 0.1, "the adapter does nothing, the test shows nothing"


@pytest.mark.parametrize(("family", "options"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
@torch.no_grad()
def test_streams_equal_the_method_written_out(family: str, options: dict) -> None:
    """Catches: a wrong stream position, start, mask, value rotation (sign, angle, rows), a LoRA gate that leaks."""
    model = load(family, **options)
    for anchor in (0, 4, len(PROMPT) - 1):
        result = forward_streams(model, torch.tensor([PROMPT]), torch.tensor([[anchor]])).streams[0, 0]
        torch.testing.assert_close(result, naive_streams(model, PROMPT, anchor), atol=ATOL, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("stream_id", ["embedding", "value_rotation"])
@torch.no_grad()
def test_a_stream_does_not_depend_on_other_anchors_or_padding(stream_id: str, attention: str) -> None:
    """Catches: streams of other anchors visible, rows (or angles) of one anchor taken for another's, padding seen."""
    model = load("llama", attention, stream_id=stream_id)
    padded = torch.tensor([PROMPT, [*PROMPT[:6], 0, 0, 0, 0, 0, 0]])
    together = forward_streams(model, padded, torch.tensor([[2, 3, 4, 9], [1, 5, NO_ANCHOR, NO_ANCHOR]]))
    for row, index, anchor in [(0, 0, 2), (0, 1, 3), (0, 3, 9), (1, 0, 1), (1, 1, 5)]:
        tokens = PROMPT if row == 0 else PROMPT[:6]
        alone = forward_streams(model, torch.tensor([tokens]), torch.tensor([[anchor]]))
        torch.testing.assert_close(together.streams[row, index], alone.streams[0, 0], atol=ATOL, rtol=0)
        torch.testing.assert_close(together.main[row, : len(tokens)], alone.main[0], atol=ATOL, rtol=0)


@torch.no_grad()
def test_a_stream_does_not_depend_on_later_tokens() -> None:
    """Catches: an anchor that sees one main row too many."""
    model = load("llama")
    other = [*PROMPT[:5], *(token + 1 for token in PROMPT[5:])]
    first, second = (reference_logits(model, tokens, anchor=4) for tokens in (PROMPT, other))
    torch.testing.assert_close(first.streams, second.streams, atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_lossless_main_is_bit_identical_to_the_base(family: str) -> None:
    """Catches: an adapter that touches main rows, at any place; a main pass that sees the streams; base dropout."""
    paths = tiny(family, mode="lossless")
    tokens = torch.tensor([PROMPT])
    expected = load_base(paths.base)(tokens).logits
    model = load(family, mode="lossless").train()
    result = forward_streams(model, tokens, torch.tensor([[3, 7]]))
    assert torch.equal(result.main, expected)
    for module in causal_lm(model).modules():
        if hasattr(module, "lora_B"):
            module.lora_B["default"].weight.zero_()
    without = forward_streams(model, tokens, torch.tensor([[3, 7]]))
    assert torch.equal(without.main, expected)
    assert (without.streams - result.streams).abs().max() > 0.01, "LoRA does not reach the streams"


@torch.no_grad()
def test_pruner_logits() -> None:
    """Catches: the trunk taken one layer off, a dropped residual or final norm."""
    model = load("llama", prune=True)
    base, spec = causal_lm(model), causal_lm(model).specstream.modules_to_save["default"]
    trunk = model(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states[2]
    down, up = spec.prune.down.weight, spec.prune.up.weight
    expected = base.lm_head(base.model.norm(trunk + trunk @ down.T @ up.T))[0]
    result = reference_logits(model, PROMPT)
    torch.testing.assert_close(torch.tensor(result.pruner), expected, atol=ATOL, rtol=0)
    assert prune_hidden(model, trunk).shape == trunk.shape


def test_the_cache_has_the_name_that_the_layer_knows() -> None:
    """Catches: a name that one release of transformers deprecates, or that another drops in its **kwargs."""

    class Newer(torch.nn.Module):
        def forward(self, hidden, cache=None, **kwargs):
            return hidden

    class Older(torch.nn.Module):
        def forward(self, hidden, past_key_values=None, **kwargs):
            return hidden

    assert cache_argument(Newer(), "kept") == {"cache": "kept"}
    assert cache_argument(Older(), "kept") == {"past_key_values": "kept"}
    with pytest.raises(TypeError, match=r"Identity of transformers .* neither as 'cache' nor as 'past_key_values'"):
        cache_argument(torch.nn.Identity(), "kept")


def test_value_rotation_by_a_right_angle() -> None:
    """Catches: the other sign, interleaved instead of halved heads, one angle for all rows."""
    values = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 2, 1, 4)
    turned = rotate_values(values, torch.tensor([torch.pi / 2, torch.pi]))
    expected = torch.tensor([[[[-3.0, -4.0, 1.0, 2.0]], [[-1.0, -2.0, -3.0, -4.0]]]])
    torch.testing.assert_close(turned, expected, atol=FLOAT32, rtol=0)


def test_what_would_give_other_numbers_is_refused(tmp_path) -> None:
    """Catches: a silent sliding window, gradient checkpointing that drops the keys and values, a bad setting."""
    model = load("llama").train()
    call = (torch.tensor([PROMPT]), torch.tensor([[3]]))
    causal_lm(model).model.layers[0].gradient_checkpointing = True
    with pytest.raises(ValueError, match="gradient checkpointing"):
        forward_streams(model, *call)
    model = load("mistral")
    causal_lm(model).config.sliding_window = 8
    with pytest.raises(ValueError, match="sliding window of 8"):
        forward_streams(model, *call)
    with pytest.raises(ValueError, match=r"expected 0\.\.11"):
        reference_logits(load("llama"), PROMPT, anchor=12)
    with pytest.raises(ValueError, match=r"gamma is 0.*\n.*num_stream_layers is 0"):
        StreamConfig(gamma=0, num_stream_layers=0)
    with pytest.raises(ValueError, match="the model has 4 layers"):
        make_tiny_checkpoint("llama", tmp_path, num_stream_layers=5)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_sequences_beyond_the_learned_positions_are_refused(family: str) -> None:
    """Catches: an index error of PyTorch in place of a word about the positions."""
    model = load(family)
    with pytest.raises(ValueError, match="1025 tokens, the model has 1024 learned positions"):
        forward_streams(model, torch.zeros(1, 1025, dtype=torch.long), torch.tensor([[3]]))
