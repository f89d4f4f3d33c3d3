"""The seam to mlx-lm. A failure here names the assumption that a new mlx-lm broke."""

import inspect
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache

from specstream_mlx.drafters.streams.value_rotation import ValueRotation
from specstream_mlx.errors import UnsupportedError
from specstream_mlx.families import FAMILIES as FAMILY_CLASSES
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.target.masks import Reach, attention_mask, reach, windows_of, with_riders
from specstream_mlx.target.rotary import PassContext, TreeRope
from specstream_mlx.target.tree import DraftTree
from tests.family_cases import TOLERANCE, tree_error
from tests.tiny import EVERY_FAMILY, WINDOW, WINDOWED, make_base, make_model, random_prompt
from tests.tolerances import CLOSE_LOGITS, FLOAT32


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_what_the_seam_assumes_of_mlx_lm(name):
    base = make_base(name)
    family = FAMILY_CLASSES[base.model_type](base)
    for layer in family.layers:
        parameters = list(inspect.signature(type(layer).__call__).parameters)
        assert parameters[1:4] == ["x", "mask", "cache"], "blocks are no longer called as layer(x, mask, cache)"
        attention = getattr(layer, family.ATTENTION)
        source = inspect.getsource(type(attention).__call__)
        asks = re.search(r"self\.rope\(q\w*, offset=cache\.offset\)", source)
        assert bool(asks) is family.ROTARY, "attention no longer asks rope by cache.offset, or does where it did not"
        assert hasattr(attention, "rope") is family.ROTARY, "the rotary embedding is no longer at .rope"
        appends = re.search(r"cache\.update_and_fetch\(k\w*, v\w*\)", source)
        assert appends, "attention no longer appends by update_and_fetch"
    caches = make_prompt_cache(base)
    expected = {KVCache, RotatingKVCache} if name in WINDOWED else {KVCache}
    assert {type(cache) for cache in caches} == expected, "mlx-lm now makes other caches for this family"
    base(mx.array([[1, 2, 3]]), cache=caches)
    for cache in caches:
        assert cache.offset == 3, "the cache no longer counts its rows in offset"
        assert cache.keys.shape[0] == 1, "keys are no longer (B, H_kv, S, D_h)"
        assert cache.keys.shape[2] >= 3, "keys no longer hold a row per token along axis 2"
    tokens = mx.array([random_prompt(9, seed=1)])
    hidden = family.embed(tokens, np.arange(9, dtype=np.int32))
    mask = "causal" if family.SHARED_ATTENTION else mx.tri(9, dtype=mx.bool_)
    for layer in family.layers:
        hidden = layer(hidden, mask, None)
    logits = family.head(family.norm(hidden))
    assert mx.allclose(base(tokens), logits, atol=CLOSE_LOGITS), "the parts no longer make the model"


@pytest.mark.parametrize(
    "rope_scaling",
    [
        None,
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "dynamic", "factor": 2.0},
    ],
    ids=lambda scaling: scaling["rope_type"] if scaling else "default",
)
def test_rope_gives_every_row_its_own_position(rope_scaling):
    """Red when rows are rotated by their index in the pass."""
    rope = make_base("llama", rope_scaling=rope_scaling, max_position_embeddings=20).model.layers[0].self_attn.rope
    context = PassContext()
    wrapped = TreeRope(rope, context)
    x = mx.random.normal((1, 4, 5, 8), key=mx.random.key(1))
    assert mx.array_equal(wrapped(x, offset=7), rope(x, offset=7))
    positions = [3, 9, 9, 40, 0]
    with context.rows_at(mx.array(positions)):
        rotated = wrapped(x, offset=7)
    for row, position in enumerate(positions):
        alone = rope(x[:, :, row : row + 1], offset=position)
        assert mx.allclose(rotated[:, :, row : row + 1], alone, atol=FLOAT32)
    assert context.positions is None


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize(("dims", "size", "scale"), [(32, 32, 1.0), (16, 32, 1.0), (80, 80, 0.25)])
def test_shared_cosines_and_sines_are_the_ropes_own(dims, size, scale, dtype):
    """Red when a bit differs: the tokens would no longer be mlx-lm's."""
    rope = nn.RoPE(dims, base=5000.0, scale=scale)
    other = nn.RoPE(dims, base=100.0)
    context = PassContext()
    wrapped, wrapped_other = TreeRope(rope, context), TreeRope(other, context)
    for offset, length in ((0, 1), (117, 1), (118, 5), (5000, 33), (0, 33)):
        x = mx.random.normal((1, 3, length, size), key=mx.random.key(length)).astype(dtype)
        with context.rows_at(None):
            assert mx.array_equal(wrapped(x, offset=offset), rope(x, offset=offset))
            assert mx.array_equal(wrapped_other(x, offset=offset), other(x, offset=offset))
        positions = mx.array([offset + row // 2 for row in range(length)])
        with context.rows_at(positions):
            rotated = wrapped(x, offset=offset)
        rows = rope(x.transpose(0, 2, 1, 3).reshape(length, 3, 1, size), offset=positions)
        assert mx.array_equal(rotated, rows.reshape(1, length, 3, size).transpose(0, 2, 1, 3))


@pytest.mark.parametrize(
    ("name", "length"), [*((name, 9) for name in EVERY_FAMILY), *((name, 2 * WINDOW) for name in WINDOWED)]
)
def test_a_branch_in_a_tree_equals_the_branch_alone(name, length):
    """Red when the mask shows a sibling, a position is not a depth, a scale is left out, a window ends elsewhere."""
    assert tree_error(make_model(name, seed=1), length) <= TOLERANCE


@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_window_reaches_back_from_every_rows_own_position(window):
    """Red when the window counts rows of the pass, or the first cached row is one off."""
    tree = DraftTree.from_paths([(0, 0), (1,)])
    depths = np.array(tree.depths, dtype=np.int32)
    for start in range(8):
        found = reach(start, depths, tree.ancestor_mask, window)
        columns = [*range(start), *(start + depths)]
        for row, depth in enumerate(depths):
            expected = [
                start + depth - columns[column] < window and (column < start or tree.ancestor_mask[row, column - start])
                for column in range(start + 4)
            ]
            assert not any(expected[: found.first])
            shown = np.array(found.mask)[row] if isinstance(found.mask, mx.array) else np.ones(4 + start - found.first)
            assert shown.tolist() == expected[found.first :]


def test_a_plain_step_beyond_the_window_needs_no_mask():
    one, root = np.ones((1, 1), dtype=bool), np.zeros(1, dtype=np.int32)
    assert reach(30, root, one, 12) == Reach(19, None)
    assert reach(11, root, one, 12) == Reach(0, None)
    assert reach(7, np.arange(3, dtype=np.int32), None, 12) == Reach(0, "causal")


def test_layers_that_keep_the_past_otherwise_are_refused():
    """Red when a cache that overwrites rows is taken for one with a window."""
    assert windows_of([KVCache(), RotatingKVCache(max_size=8)]) == [None, 8]
    for cache in (RotatingKVCache(max_size=8, keep=4), ArraysCache(2), QuantizedKVCache()):
        with pytest.raises(UnsupportedError, match=f"layer 1 keeps the past in a {type(cache).__name__}, from which"):
            windows_of([KVCache(), cache])


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("llama", r"model.layers.2: expected a rotary embedding at self_attn.rope"),
        ("opt", r"model.decoder.layers.2: expected no rotary embedding at self_attn.rope"),
        ("gpt2", r"model.h.2: expected no rotary embedding at attn.rope"),
    ],
)
def test_blocks_built_otherwise_are_refused(family, message):
    """Red when a block whose positions nobody sets is accepted, or a rotary one where positions are learned."""
    base = make_base(family)
    family_class = FAMILY_CLASSES[base.model_type]
    family_class(base).layers[2][family_class.ATTENTION].rope = None if family == "llama" else nn.RoPE(8)
    with pytest.raises(UnsupportedError, match=message):
        SpecStreamModel(base, base.model_type)


def test_the_mask_drawn_in_the_module():
    mask = DraftTree.chain(1).ancestor_mask
    assert with_riders(mask, [1], 2).astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert with_riders(mask, [0, 1], 2).astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]


def test_masks_over_cached_rows():
    assert attention_mask(5, 1, None) is None
    assert attention_mask(5, 3, None) == "causal"
    mask = attention_mask(2, 3, DraftTree.cartesian([2]).ancestor_mask)
    assert np.array(mask).astype(int).tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]


def test_value_rotation_turns_stream_rows_only():
    cache = ValueRotation(KVCache(), mx.array([0, 1, 2]), epsilon=0.5)
    values = mx.random.normal((1, 2, 3, 4), key=mx.random.key(0))
    _, turned = cache.update_and_fetch(values, values)
    numbers = np.array(values)[..., :2] + 1j * np.array(values)[..., 2:]
    expected = numbers * np.exp(1j * 0.5 * np.arange(3))[:, None]
    assert np.allclose(np.array(turned)[..., :2], expected.real, atol=FLOAT32)
    assert np.allclose(np.array(turned)[..., 2:], expected.imag, atol=FLOAT32)
    assert cache.offset == 3
