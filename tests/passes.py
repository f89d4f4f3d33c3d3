"""Single passes of a model with streams, as the engine makes them."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from specstream_mlx import SpecStreamModel
from specstream_mlx.drafters.streams.drafter import StreamsDrafter
from specstream_mlx.target.rows import Draft
from specstream_mlx.target.target import Passed
from specstream_mlx.target.tree import DraftTree


def streams_of(model: SpecStreamModel) -> StreamsDrafter:
    """The streams of the adapter in use, whatever drafts in their place."""
    assert model.stream_config is not None
    assert model.streams is not None
    return StreamsDrafter(model.stream_config, model.streams, len(model.layers))


def verify(
    model: SpecStreamModel,
    node_tokens: mx.array,
    tree: DraftTree,
    caches: Sequence[Any],
    *,
    insertion: str = "deferred",
    num_streams: int | None = None,
    prune_threshold: float | None = None,
) -> Passed:
    """A verification pass, with streams beside the tree where the model has some."""
    draft = Draft(tree, node_tokens)
    if model.stream_config is None:
        return model.verify(draft, caches)
    drafter = streams_of(model)
    if prune_threshold is not None:
        drafter = drafter.pruning(prune_threshold, insertion)
    count = drafter.max_depth if num_streams is None else num_streams
    riders = drafter.riders(count, insertion, drafter.early_exit(model))
    return model.verify(draft, caches, riders=riders, taps=drafter.taps)


def stream_logits(
    model: SpecStreamModel, passed: Passed, node: int, caches: Sequence[Any], num_streams: int | None = None
) -> mx.array:
    """(num_streams, V) logits of the streams anchored at ``node``, up to which ``caches`` are committed."""
    drafter = streams_of(model)
    count = drafter.max_depth if num_streams is None else num_streams
    return model.ride(passed, node, drafter.riders(count, "deferred"), caches)


def trunk_of(model: SpecStreamModel, passed: Passed) -> mx.array:
    """(1, T, D), ``M^{N-N_s}`` of every node."""
    return passed.taps[model.num_trunk_layers]


def early_exit_logits(model: SpecStreamModel, trunk: mx.array) -> mx.array:
    """(1, T, D) -> (T, V) of the early exit."""
    return streams_of(model).early_exit_logits(model, trunk)
