"""The seam to mlx-lm. A failure here names the assumption that a new mlx-lm broke."""

import inspect

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache

from specstream_mlx.errors import UnsupportedError
from specstream_mlx.families import FAMILIES as FAMILY_CLASSES
from specstream_mlx.model import SpecStreamModel
from specstream_mlx.tree import DraftTree
from specstream_mlx.tree_attention import (
    PassContext,
    TreeRope,
    ValueRotation,
    attention_mask,
    check_caches,
    commit_rows,
    drop_rows,
    with_streams,
)
from tests.tiny import FAMILIES, ROTARY_FAMILIES, make_base, make_model, random_prompt


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_what_the_seam_assumes_of_mlx_lm(family):
    base = make_base(family)
    layer = base.model.layers[0]
    parameters = list(inspect.signature(type(layer).__call__).parameters)
    assert parameters[1:4] == ["x", "mask", "cache"], "blocks are no longer called as layer(x, mask, cache)"
    assert hasattr(layer.self_attn, "rope"), "the rotary embedding is no longer at self_attn.rope"
    source = inspect.getsource(type(layer.self_attn).__call__)
    assert "self.rope(queries, offset=cache.offset)" in source, "attention no longer asks rope by cache.offset"
    assert "cache.update_and_fetch(keys, values)" in source, "attention no longer appends by update_and_fetch"
    assert hasattr(base.model, "embed_tokens"), "the embedding is no longer at model.embed_tokens"
    assert hasattr(base.model, "norm"), "the final norm is no longer at model.norm"
    assert hasattr(base, "lm_head"), "the LM head is no longer at lm_head"
    caches = make_prompt_cache(base)
    assert {type(cache) for cache in caches} == {KVCache}, "plain models no longer get a KVCache per layer"
    base(mx.array([[1, 2, 3]]), cache=caches)
    cache = caches[0]
    assert cache.offset == 3, "the cache no longer counts its rows in offset"
    assert cache.keys.shape[:2] == (1, 2), "keys are no longer (B, H_kv, S, D_h)"
    assert cache.keys.shape[2] >= 3, "keys no longer hold a row per token along axis 2"


def test_what_the_seam_assumes_of_gpt2():
    base = make_base("gpt2")
    block = base.model.h[0]
    assert list(inspect.signature(type(block).__call__).parameters)[1:4] == ["x", "mask", "cache"]
    source = inspect.getsource(type(block.attn).__call__)
    assert "cache.update_and_fetch(keys, values)" in source, "attention no longer appends by update_and_fetch"
    assert "offset" not in source, "attention now asks for positions; they were added to the embedding"
    tokens, caches = mx.array([[1, 2, 3]]), make_prompt_cache(base)
    assert {type(cache) for cache in caches} == {KVCache}
    hidden = base.model.wte(tokens) + base.model.wpe(mx.arange(3))
    for layer in base.model.h:
        hidden = layer(hidden, "causal", None)
    logits = base.model.wte.as_linear(base.model.ln_f(hidden))
    assert mx.allclose(base(tokens), logits, atol=1e-5), "the parts no longer make up the model"


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
    ],
    ids=lambda scaling: scaling["rope_type"] if scaling else "default",
)
def test_rope_gives_every_row_its_own_position(rope_scaling):
    """Red when rows are rotated by their index in the pass."""
    rope = make_base("llama", rope_scaling=rope_scaling).model.layers[0].self_attn.rope
    context = PassContext()
    wrapped = TreeRope(rope, context)
    x = mx.random.normal((1, 4, 5, 8), key=mx.random.key(1))
    assert mx.array_equal(wrapped(x, offset=7), rope(x, offset=7))
    positions = [3, 9, 9, 40, 0]
    with context.rows_at(mx.array(positions)):
        rotated = wrapped(x, offset=7)
    for row, position in enumerate(positions):
        alone = rope(x[:, :, row : row + 1], offset=position)
        assert mx.allclose(rotated[:, :, row : row + 1], alone, atol=1e-6)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_branch_in_a_tree_equals_the_branch_alone(family):
    """Red when the mask shows a sibling, or a node's position is not its depth."""
    model = make_model(family, seed=1)
    prompt = random_prompt(9, seed=1)
    tree = DraftTree.from_paths([(0, 0, 0), (0, 1), (1, 0), (2,)])
    node_tokens = mx.array(random_prompt(tree.size, seed=2))
    caches = model.make_cache()
    model(mx.array([prompt]), cache=caches)
    logits = model.verify(node_tokens, tree, caches).logits
    for node in range(tree.size):
        branch = [node_tokens[ancestor].item() for ancestor in tree.ancestors(node)]
        alone = model(mx.array([prompt + branch]), cache=model.make_cache())[0, -1]
        assert mx.allclose(logits[node], alone, atol=1e-4)


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
    assert with_streams(mask, [1], 2).astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert with_streams(mask, [0, 1], 2).astype(int).tolist() == [
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


rows_of = st.lists(st.integers(0, 7), unique=True, max_size=8).map(sorted)


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 260), rows=rows_of)
def test_the_cache_contract(start, rows):
    """After a commit the next append gives what a fresh cache of the kept rows gives; red when rows are misplaced."""
    noise = mx.random.normal((1, 2, start + 8 + 3, 4), key=mx.random.key(start))
    cache, fresh = KVCache(), KVCache()
    if start:
        cache.update_and_fetch(noise[..., :start, :], noise[..., :start, :] + 1)
    cache.update_and_fetch(noise[..., start : start + 8, :], noise[..., start : start + 8, :] + 1)
    commit_rows(cache, start, rows)
    assert cache.offset == start + len(rows)
    keys, values = cache.update_and_fetch(noise[..., -3:, :], noise[..., -3:, :] + 1)
    order = [*range(start), *(start + row for row in rows), *range(start + 8, start + 11)]
    expected = mx.take(noise, mx.array(order), axis=2)
    fresh_keys, fresh_values = fresh.update_and_fetch(expected, expected + 1)
    assert mx.array_equal(keys, fresh_keys)
    assert mx.array_equal(values, fresh_values)


def test_committing_a_chain_moves_nothing():
    cache = KVCache()
    rows = mx.ones((1, 2, 6, 4))
    cache.update_and_fetch(rows, rows)
    keys = cache.keys
    commit_rows(cache, 2, [0, 1])
    assert cache.keys is keys
    drop_rows(cache, 1)
    assert (cache.keys is keys, cache.offset) == (True, 1)


def test_value_rotation_turns_stream_rows_only():
    cache = ValueRotation(KVCache(), mx.array([0, 1, 2]), epsilon=0.5)
    values = mx.random.normal((1, 2, 3, 4), key=mx.random.key(0))
    _, turned = cache.update_and_fetch(values, values)
    numbers = np.array(values)[..., :2] + 1j * np.array(values)[..., 2:]
    expected = numbers * np.exp(1j * 0.5 * np.arange(3))[:, None]
    assert np.allclose(np.array(turned)[..., :2], expected.real, atol=1e-6)
    assert np.allclose(np.array(turned)[..., 2:], expected.imag, atol=1e-6)
    assert cache.offset == 3


@pytest.mark.parametrize("cache", [RotatingKVCache(max_size=8), QuantizedKVCache()], ids=lambda c: type(c).__name__)
def test_other_caches_are_refused_by_name(cache):
    with pytest.raises(UnsupportedError, match=f"cache of layer 1: {type(cache).__name__}"):
        check_caches([KVCache(), cache])


def test_caches_of_unequal_length_are_refused():
    longer = KVCache()
    longer.offset = 3
    with pytest.raises(UnsupportedError, match="different numbers of tokens"):
        check_caches([KVCache(), longer])
