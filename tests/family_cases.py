"""What is checked of every family, by tests and by the table of docs/families.md."""

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.target.tree import DraftTree
from specstream_mlx.training.forward import forward_main, forward_streams
from tests.passes import stream_logits, verify
from tests.tiny import random_prompt

TREE = DraftTree.from_paths([(0, 0), (0, 1), (1, 0), (2,)])
TOLERANCE = 5e-5
"""Absolute, on float32 logits up to 15 of one program whose rows come in other passes: other orders of summation."""


def tree_error(model: SpecStreamModel, prompt_length: int) -> float:
    """Logits of every node against its path run alone by the stock model; then of the token after a committed branch.

    The stock model is mlx-lm's, with the caches that mlx-lm makes for it.
    """
    prompt = random_prompt(prompt_length, seed=1)
    node_tokens = random_prompt(TREE.size, seed=2)
    worst = 0.0

    def stock(tokens: list[int]) -> mx.array:
        caches = make_prompt_cache(model.base)
        model.base(mx.array([prompt]), cache=caches)
        for token in tokens[:-1]:
            model.base(mx.array([[token]]), cache=caches)
        return model.base(mx.array([[tokens[-1]]]), cache=caches)[0, -1]

    for node in range(TREE.size):
        caches = model.make_cache()
        model(mx.array([prompt]), cache=caches)
        verified = verify(model, mx.array(node_tokens), TREE, caches)
        path = TREE.ancestors(node)
        branch = [node_tokens[ancestor] for ancestor in path]
        worst = max(worst, difference(verified.logits[node], stock(branch)))
        model.commit(verified, path, caches)
        following = verify(model, mx.array([7]), DraftTree.chain(0), caches)
        worst = max(worst, difference(following.logits[0], stock([*branch, 7])))
    return worst


def insertion_error(model: SpecStreamModel, prompt_length: int) -> float:
    """Stream and main logits of the other insertions against those of deferred insertion, at every node.

    Deferred insertion leaves the caches as they were.
    """
    worst = 0.0
    assert TREE.leaf not in (0, TREE.size - 1)
    for node in range(TREE.size):
        results = []
        for insertion in ("deferred", "leaf", "parallel"):
            caches = model.make_cache()
            model(mx.array([random_prompt(prompt_length, seed=1)]), cache=caches)
            verified = verify(model, mx.array(random_prompt(TREE.size, seed=2)), TREE, caches, insertion=insertion)
            inserted = insertion == "parallel" or (insertion == "leaf" and node == TREE.leaf)
            assert verified.carried(node, model.gamma) is inserted
            model.commit(verified, TREE.ancestors(node), caches)
            offsets = [cache.offset for cache in caches]
            results.append((stream_logits(model, verified, node, caches), verified.logits))
            assert [cache.offset for cache in caches] == offsets
        for streams, main in results[1:]:
            worst = max(worst, difference(streams, results[0][0]), difference(main, results[0][1]))
    return worst


def training_error(model: SpecStreamModel) -> float:
    """Main and stream logits of the training forward against inference, at some anchors of a text."""
    tokens = random_prompt(17, seed=3)
    anchors = [0, 6, 16]
    main = forward_main(model, mx.array([tokens]))
    hidden = forward_streams(model, main.trunk, main.keys_values, np.array([anchors], dtype=np.int32))
    streams = np.array(model.family.head(model.family.norm(hidden))).reshape(len(anchors), model.gamma, -1)
    logits = np.array(model.family.head(model.family.norm(main.hidden)))[0]
    worst = 0.0
    for place, anchor in enumerate(anchors):
        expected_main, expected = inference_logits(model, tokens, anchor)
        worst = max(worst, np.abs(logits[anchor] - expected_main).max(), np.abs(streams[place] - expected).max())
    return float(worst)


def inference_logits(model: SpecStreamModel, tokens: list[int], anchor: int) -> tuple[np.ndarray, np.ndarray]:
    """Main and stream logits at one anchor, as generation computes them."""
    caches = model.make_cache()
    if anchor:
        model(mx.array([tokens[:anchor]]), cache=caches)
    verified = verify(model, mx.array(tokens[anchor : anchor + 1]), DraftTree.chain(0), caches)
    model.commit(verified, [0], caches)
    return np.array(verified.logits[0]), np.array(stream_logits(model, verified, 0, caches))


def difference(one: mx.array, other: mx.array) -> float:
    """The largest difference of two arrays."""
    return float(mx.abs(one - other).max().item())
