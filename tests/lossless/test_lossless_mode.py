"""Lossless mode: LoRA and streams change which tokens are drafted, and no bit of the main stream.

What is equal, bit for bit, in every dtype:

* with deferred insertion a verification pass runs the same rows through the same layers as the bare base does, so
  logits and committed keys and values are the base's;
* with leaf and parallel insertion the top layers multiply more rows at once. A kernel may sum in another order for
  another number of rows, so there the main rows are compared with a pass of as many rows: streams of zeros without any
  LoRA. Neither LoRA nor the contents of stream rows may change a bit of them. Below the stream layers they are the
  base's.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache

from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.options import DraftOptions
from specstream_mlx.target.tree import DraftTree
from tests.adapter_cases import save_adapter
from tests.passes import stream_logits, verify
from tests.tiny import FAMILIES, make_base, our_tokens, plain_tokens, random_prompt
from tests.tolerances import LOGITS

INSERTIONS = ("leaf", "parallel", "deferred")
PROMPT = random_prompt(9, seed=2)
TREE = DraftTree.from_paths([(0, 0), (0, 1), (1, 0), (2,)])
NODES = random_prompt(TREE.size, seed=3)
ACCEPTED = TREE.ancestors(TREE.size - 1)
NUM_STREAM_LAYERS = 2


def quantise(base: Any, **how: Any) -> None:
    nn.quantize(base, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0, **how)


KINDS = {
    "float32": lambda base: None,
    "bfloat16": lambda base: base.set_dtype(mx.bfloat16),
    "float16": lambda base: base.set_dtype(mx.float16),
    "4-bit": lambda base: (base.set_dtype(mx.bfloat16), quantise(base, group_size=32, bits=4)),
    "8-bit": lambda base: quantise(base, group_size=32, bits=8),
    "mxfp4": lambda base: (base.set_dtype(mx.bfloat16), quantise(base, group_size=32, bits=4, mode="mxfp4")),
}
CASES = [(family, kind) for family in FAMILIES for kind in ("float32", "bfloat16", "4-bit")]
CASES += [("llama", kind) for kind in ("float16", "8-bit", "mxfp4")]


def with_adapters(family: str, kind: str, path: Any) -> SpecStreamModel:
    """A bare base of this kind with a lossless adapter, and one of zeros without LoRA, in memory."""
    base = make_base(family, seed=8)
    save_adapter(path / "lossless", base, 9, mode="lossless", prune=None)
    zeros = save_adapter(path / "zeros", base, 10, prune=None)
    file = zeros / "specstream.safetensors"
    tensors = {name: mx.zeros(value.shape) for name, value in mx.load(str(file)).items()}
    file.unlink()
    mx.save_safetensors(str(file), tensors)
    KINDS[kind](base)
    base.eval()
    model = SpecStreamModel(base, base.model_type)
    model.load_adapter(path / "lossless")
    model.load_adapter(zeros)
    return model


def main_stream(model: SpecStreamModel, tree: DraftTree, nodes: list[int], insertion: str) -> list[mx.array]:
    """Logits of the prompt and of a pass, and the caches with the accepted rows, layer after layer from the first."""
    caches = model.make_cache()
    prompt = model(mx.array([PROMPT]), cache=caches)
    run = verify(model, mx.array(nodes), tree, caches, insertion=insertion)
    model.commit(run, ACCEPTED if tree is TREE else range(tree.size), caches)
    return [prompt, run.logits, *cached(caches)]


def cached(caches: Any) -> list[mx.array]:
    """Keys and values of one layer after another."""
    return [array[..., : cache.offset, :] for cache in caches for array in (cache.keys, cache.values)]


def equal(one: list[mx.array], other: list[mx.array]) -> list[bool]:
    assert [array.shape for array in one] == [array.shape for array in other]
    assert [array.dtype for array in one] == [array.dtype for array in other]
    return [mx.array_equal(a, b).item() for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_main_stream_is_the_untouched_base_bit_for_bit(family, kind, tmp_path):
    """Red when: LoRA reaches a main row, stream rows reach a main row or the caches, or the base is merged into.

    Over a chain the reference is the forward of a model that this package has never seen.
    """
    model = with_adapters(family, kind, tmp_path)
    bare = main_stream(model, TREE, NODES, "deferred")
    model.use_adapter("lossless")
    assert all(equal(main_stream(model, TREE, NODES, "deferred"), bare))
    trunk = 2 + 2 * (len(model.layers) - NUM_STREAM_LAYERS)
    for insertion in ("leaf", "parallel"):
        model.use_adapter("lossless")
        inserted = main_stream(model, TREE, NODES, insertion)
        model.use_adapter("zeros")
        assert all(equal(main_stream(model, TREE, NODES, insertion), inserted))
        assert all(equal(inserted[2:trunk], bare[2:trunk]))
    assert len(bare) == 2 + 2 * len(model.layers)
    model.use_adapter("lossless")
    chain = main_stream(model, DraftTree.chain(3), NODES[:4], "deferred")
    untouched = make_base(family, seed=8)
    KINDS[kind](untouched)
    caches = make_prompt_cache(untouched)
    stock = [untouched(mx.array([PROMPT]), cache=caches), untouched(mx.array([NODES[:4]]), cache=caches)[0]]
    assert all(equal(chain, [*stock, *cached(caches)]))


@pytest.mark.parametrize(("family", "kind"), [*((family, "float32") for family in FAMILIES), ("llama", "4-bit")])
def test_lora_acts_on_the_streams(family, kind, tmp_path):
    """Guards the tests above, which a LoRA without any effect would pass too; all insertions agree about it."""
    model = with_adapters(family, kind, tmp_path)
    model.use_adapter("lossless")
    found = []
    for scale in (1, 0):
        for layer in model.adapters["lossless"].mount.layers:
            layer.adapted.lora_b = layer.adapted.lora_b * scale
        for insertion in INSERTIONS:
            caches = model.make_cache()
            model(mx.array([PROMPT]), cache=caches)
            run = verify(model, mx.array(NODES), TREE, caches, insertion=insertion)
            model.commit(run, TREE.ancestors(TREE.leaf), caches)
            found.append(stream_logits(model, run, TREE.leaf, caches).astype(mx.float32))
    *inserted, deferred, without = *found[:2], found[2], found[-1]
    tolerance = LOGITS if kind == "float32" else 0.25  # bfloat16, on logits of size 1 to 10
    assert all(mx.allclose(logits, deferred, atol=tolerance) for logits in inserted)
    assert not mx.allclose(deferred, without, atol=2 * tolerance)


@pytest.mark.parametrize("insertion", INSERTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_that_of_mlx_lm_on_the_bare_base(family, insertion, tmp_path):
    """Red when: an accepted token is not what the bare base would have written."""
    model = with_adapters(family, "float32", tmp_path)
    model.use_adapter("lossless")
    untouched = make_base(family, seed=8)
    for prompt, tree in ((PROMPT, "chain:4"), (random_prompt(3, seed=5), "cartesian:2x2x1x1")):
        options = DraftOptions(tree=tree, insertion=insertion)
        expected = plain_tokens(untouched, prompt, 24)
        assert our_tokens(model, prompt, 24, draft="tree", draft_options=options) == expected
