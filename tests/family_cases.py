"""What is checked of every family, by tests and by the table of docs/families.md."""

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from specstream_mlx.model import SpecStreamModel
from specstream_mlx.tree import DraftTree
from tests.tiny import random_prompt

TREE = DraftTree.from_paths([(0, 0), (0, 1), (1, 0), (2,)])
TOLERANCE = 5e-5  # float32, logits up to 15, other orders of summation


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
        verified = model.verify(mx.array(node_tokens), TREE, caches)
        path = TREE.ancestors(node)
        branch = [node_tokens[ancestor] for ancestor in path]
        worst = max(worst, difference(verified.logits[node], stock(branch)))
        model.commit(verified, path, caches)
        following = model.verify(mx.array([7]), DraftTree.chain(0), caches)
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
            verified = model.verify(mx.array(random_prompt(TREE.size, seed=2)), TREE, caches, insertion=insertion)
            inserted = insertion == "parallel" or (insertion == "leaf" and node == TREE.leaf)
            assert model.has_streams_of(verified, node, model.gamma) is inserted
            model.commit(verified, TREE.ancestors(node), caches)
            offsets = [cache.offset for cache in caches]
            results.append((model.stream_logits(verified, node, caches), verified.logits))
            assert [cache.offset for cache in caches] == offsets
        for streams, main in results[1:]:
            worst = max(worst, difference(streams, results[0][0]), difference(main, results[0][1]))
    return worst


def difference(one: mx.array, other: mx.array) -> float:
    """The largest difference of two arrays."""
    return float(mx.abs(one - other).max().item())
