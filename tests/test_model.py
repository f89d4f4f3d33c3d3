"""Streams on a model: both insertions give the same numbers, and the main stream never sees them."""

from typing import get_args

import mlx.core as mx
import numpy as np
import pytest

from specstream_mlx.drafting import Insertion
from specstream_mlx.errors import UnsupportedError, UsageError
from specstream_mlx.model import SpecStreamModel
from specstream_mlx.tree import DraftTree
from tests.tiny import FAMILIES, make_base, make_model, random_prompt

VARIANTS = {
    "default": {},
    "anchor": {"stream_position": "anchor"},
    "value-rotation": {"stream_id": {"type": "value_rotation", "epsilon": 0.3}},
    "rotation-at-anchor": {
        "stream_id": {"type": "value_rotation", "epsilon": 0.3},
        "stream_position": "anchor",
        "stream_init": {"type": "identity"},
    },
    "one-layer": {"num_stream_layers": 1, "prune": None},
    "all-layers": {"num_stream_layers": 4, "prune": None},
}


def verified(model, tree, insertion, seed=1):
    prompt = random_prompt(9, seed=seed)
    caches = model.make_cache()
    model(mx.array([prompt]), cache=caches)
    node_tokens = mx.array(random_prompt(tree.size, seed=seed + 1))
    return model.verify(node_tokens, tree, caches, insertion=insertion), caches


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_insertions_give_the_same_stream_logits(family, variant):
    """Red when: a stream sees another node's streams, sits at another position, or its own node is hidden from it."""
    model = make_model(family, seed=2, **VARIANTS[variant])
    tree = DraftTree.from_paths([(0, 0), (0, 1), (1, 0), (2,)])
    assert tree.leaf == 2
    for node in range(tree.size):
        deferred, caches = verified(model, tree, "deferred")
        model.commit(deferred, tree.ancestors(node), caches)
        offsets = [cache.offset for cache in caches]
        afterwards = model.stream_logits(deferred, node, caches)
        assert [cache.offset for cache in caches] == offsets
        for insertion in ("leaf", "parallel"):
            run, caches = verified(model, tree, insertion)
            assert model.has_streams_of(run, node, model.gamma) is (insertion == "parallel" or node == tree.leaf)
            model.commit(run, tree.ancestors(node), caches)
            logits = model.stream_logits(run, node, caches)
            assert mx.allclose(logits, afterwards, atol=1e-4)
            assert mx.array_equal(mx.argmax(logits, axis=-1), mx.argmax(afterwards, axis=-1))
            assert mx.allclose(run.logits, deferred.logits, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fewer_streams_inserted_are_the_first_of_all(variant):
    """Red when: stream rows are numbered, placed or masked as if all streams were there."""
    model = make_model("llama", seed=2, **VARIANTS[variant])
    tree = DraftTree.from_paths([(0, 0), (1,)])
    for insertion in ("leaf", "parallel"):
        whole, caches = verified(model, tree, insertion)
        model.commit(whole, [0, 1, 2], caches)
        expected = model.stream_logits(whole, 2, caches)
        prompt_caches = model.make_cache()
        model(mx.array([random_prompt(9, seed=1)]), cache=prompt_caches)
        for count in range(1, model.gamma):
            for cache in prompt_caches:
                cache.offset = 9
            run = model.verify(whole.node_tokens, tree, prompt_caches, insertion=insertion, num_streams=count)
            assert mx.allclose(run.logits, whole.logits, atol=1e-4)
            assert model.has_streams_of(run, 2, count)
            assert not model.has_streams_of(run, 2, count + 1)
            model.commit(run, [0, 1, 2], prompt_caches)
            assert mx.allclose(model.stream_logits(run, 2, prompt_caches, count), expected[:count], atol=1e-4)
            assert mx.allclose(model.stream_logits(run, 2, prompt_caches), expected, atol=1e-4)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_streams_after_pruning_are_those_of_the_surviving_path(layer):
    """Red when: the trunk rows are not selected along with the pruned rows."""
    model = make_model("llama", seed=5, prune={"type": "low_rank", "rank": 4, "layer": layer})
    tree = DraftTree.cartesian([4, 2])
    prompt = random_prompt(9, seed=1)
    node_tokens = mx.array(random_prompt(tree.size, seed=2))

    def run(nodes, tokens, threshold):
        caches = model.make_cache()
        model(mx.array([prompt]), cache=caches)
        return model.verify(tokens, nodes, caches, prune_threshold=threshold), caches

    for threshold in 10.0 ** -np.arange(1, 12, 0.25):
        pruned, caches = run(tree, node_tokens, float(threshold))
        node = pruned.tree.size - 1
        if pruned.kept[node] != node and pruned.tree.depths[node] == 2:
            break
    else:
        pytest.fail("no threshold drops a node before another that stays")
    path = pruned.tree.ancestors(node)
    model.commit(pruned, path, caches)
    tokens = pruned.node_tokens[mx.array(path)]
    alone, fresh = run(DraftTree.chain(len(path) - 1), tokens, None)
    model.commit(alone, range(len(path)), fresh)
    assert mx.allclose(pruned.logits[node], alone.logits[-1], atol=1e-4)
    expected = model.stream_logits(alone, len(path) - 1, fresh)
    assert mx.allclose(model.stream_logits(pruned, node, caches), expected, atol=1e-4)


def test_streams_differ_from_one_another_and_from_main():
    """Guards the comparison above: equal logits everywhere would satisfy it too."""
    for variant in VARIANTS.values():
        model = make_model("llama", seed=2, **variant)
        tree = DraftTree.chain(0)
        run, caches = verified(model, tree, "deferred")
        model.commit(run, [0], caches)
        rows = np.array(mx.concatenate([run.logits, model.stream_logits(run, 0, caches)]))
        for i in range(len(rows)):
            for j in range(i):
                assert np.abs(rows[i] - rows[j]).max() > 1e-2


@pytest.mark.parametrize("insertion", get_args(Insertion))
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_streams_alone_are_the_first_of_all(variant, insertion):
    """Red when a stream is numbered, placed or masked by how many streams are run."""
    model = make_model("llama", seed=5, **VARIANTS[variant])
    run, caches = verified(model, DraftTree.cartesian([2, 1]), insertion)
    model.commit(run, [0, 1], caches)
    whole = model.stream_logits(run, 1, caches)
    for count in range(1, model.gamma + 1):
        assert mx.allclose(model.stream_logits(run, 1, caches, count), whole[:count], atol=1e-4)


def test_a_stock_call_is_the_base_model():
    model = make_model("llama", seed=3)
    tokens = mx.array([random_prompt(6, seed=3)])
    assert mx.array_equal(model(tokens), model.base(tokens))
    assert mx.array_equal(model(tokens), make_base("llama", seed=3)(tokens))


def test_float16_stays_float16():
    """No silent upcast: logits, trunk, streams and caches keep the weights' dtype."""
    for variant in VARIANTS.values():
        model = make_model("llama", seed=4, **variant)
        for dtype in (mx.float16, mx.bfloat16):
            model.set_dtype(dtype)
            tree = DraftTree.cartesian([2, 1])
            for insertion in get_args(Insertion):
                run, caches = verified(model, tree, insertion)
                model.commit(run, [0], caches)
                arrays = [
                    run.logits,
                    run.trunk,
                    model.stream_logits(run, 0, caches),
                    caches[-1].keys,
                    caches[-1].values,
                ]
                assert {array.dtype for array in arrays} == {dtype}


def test_models_whose_caches_cannot_take_rows_back_are_refused():
    layer_types = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    base = make_base("llama", layer_types=layer_types, sliding_window=8)
    with pytest.raises(UnsupportedError, match="RotatingKVCache"):
        SpecStreamModel(base, "llama")


def test_unknown_families_are_refused():
    with pytest.raises(UnsupportedError, match="'mamba' is not supported; supported: gpt2, llama"):
        SpecStreamModel(make_base("llama"), "mamba")


def test_pruning_is_checked_against_the_model():
    with pytest.raises(UsageError, match="no early-exit pruner"):
        make_model(prune=None).check_pruning("deferred")
    high = make_model(prune={"type": "low_rank", "rank": 4, "layer": 3})
    for insertion in ("leaf", "parallel"):
        with pytest.raises(UnsupportedError, match=f"{insertion} insertion cannot prune there, use deferred"):
            high.check_pruning(insertion)
    high.check_pruning("deferred")
