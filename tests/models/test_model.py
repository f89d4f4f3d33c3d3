"""Streams on a model: both insertions give the same numbers, and the main stream never sees them."""

from typing import get_args

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import RotatingKVCache

from specstream_mlx.errors import UnsupportedError, UsageError
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.options import Insertion
from specstream_mlx.target.tree import DraftTree
from tests import tiny
from tests.family_cases import TOLERANCE, insertion_error
from tests.passes import stream_logits, streams_of, trunk_of, verify
from tests.tiny import make_base, make_model, random_prompt
from tests.tolerances import LOGITS

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
    return verify(model, node_tokens, tree, caches, insertion=insertion), caches


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        *((family, variant) for family in ("llama", "phi3", "opt", "gpt2") for variant in VARIANTS),
        *zip(("mistral", "qwen2", "qwen3", "opt-post-norm", "opt-projected"), VARIANTS, strict=False),
        *((family, "default") for family in tiny.VARIANTS),
        *((family, "rotation-at-anchor") for family in tiny.WINDOWED),
    ],
)
def test_all_insertions_give_the_same_stream_logits(family, variant):
    """Red when: a stream sees another node's streams, sits at another position, or its own node is hidden from it."""
    assert insertion_error(make_model(family, seed=2, **VARIANTS[variant]), 9) <= TOLERANCE


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
        return verify(model, tokens, nodes, caches, prune_threshold=threshold), caches

    for threshold in 10.0 ** -np.arange(1, 12, 0.25):
        pruned, caches = run(tree, node_tokens, float(threshold))
        node = pruned.draft.tree.size - 1
        if pruned.kept[node] != node and pruned.draft.tree.depths[node] == 2:
            break
    else:
        pytest.fail("no threshold drops a node before another that stays")
    path = pruned.draft.tree.ancestors(node)
    model.commit(pruned, path, caches)
    tokens = pruned.draft.tokens[mx.array(path)]
    alone, fresh = run(DraftTree.chain(len(path) - 1), tokens, None)
    model.commit(alone, range(len(path)), fresh)
    assert mx.allclose(pruned.logits[node], alone.logits[-1], atol=LOGITS)
    expected = stream_logits(model, alone, len(path) - 1, fresh)
    assert mx.allclose(stream_logits(model, pruned, node, caches), expected, atol=LOGITS)


def test_streams_differ_from_one_another_and_from_main():
    """Guards the comparison above: equal logits everywhere would satisfy it too."""
    for variant in VARIANTS.values():
        model = make_model("llama", seed=2, **variant)
        tree = DraftTree.chain(0)
        run, caches = verified(model, tree, "deferred")
        model.commit(run, [0], caches)
        rows = np.array(mx.concatenate([run.logits, stream_logits(model, run, 0, caches)]))
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
    whole = stream_logits(model, run, 1, caches)
    for count in range(1, model.gamma + 1):
        assert mx.allclose(stream_logits(model, run, 1, caches, count), whole[:count], atol=LOGITS)


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
                    trunk_of(model, run),
                    stream_logits(model, run, 0, caches),
                    caches[-1].keys,
                    caches[-1].values,
                ]
                assert {array.dtype for array in arrays} == {dtype}


def test_models_whose_caches_cannot_take_rows_back_are_refused():
    base = make_base("llama")
    base.make_cache = lambda: [RotatingKVCache(max_size=8, keep=4) for _ in base.layers]
    with pytest.raises(UnsupportedError, match="layer 0 keeps the past in a RotatingKVCache, from which rejected rows"):
        SpecStreamModel(base, "llama")


def test_unknown_families_are_refused():
    with pytest.raises(UnsupportedError, match="'deepseek_v3' is not supported; supported: cohere, "):
        SpecStreamModel(make_base("llama"), "deepseek_v3")


def test_pruning_is_checked_against_the_model():
    with pytest.raises(UsageError, match="no early-exit pruner"):
        streams_of(make_model(prune=None)).pruning(0.1, "deferred")
    high = streams_of(make_model(prune={"type": "low_rank", "rank": 4, "layer": 3}))
    for insertion in ("leaf", "parallel"):
        with pytest.raises(UnsupportedError, match=f"{insertion} insertion cannot prune there, use deferred"):
            high.pruning(0.1, insertion)
    high.pruning(0.1, "deferred")
