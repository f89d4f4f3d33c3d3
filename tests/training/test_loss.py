"""The loss in pieces: the gradients of the whole, in memory that the number of pieces does not change."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.training.batches import IGNORE, Batch, Example, anchor_chunks, make_batch
from specstream_mlx.training.forward import forward_main
from specstream_mlx.training.loss import LossWeights, _pieces, loss_and_gradients, loss_only
from specstream_mlx.training.trainable import train_pruner_only
from tests import tiny
from tests.tiny import active_memory, make_model, random_prompt
from tests.tolerances import LOSSES
from tests.training.training_cases import with_lora

GRADIENTS = 2e-5
"""Of a tensor's largest gradient, float32: every number of it sums products of that size, in other orders."""
LEAST_GRADIENT = 1e-2
"""A tensor whose gradients are all smaller has them from larger numbers that cancel out, with their rounding."""
LENGTHS = ((7, 12), (3, 20), (11, 2), (5, 1))


def trainable(family: str = "llama", base_changes: Any = None, bits: int | None = None, **case: Any) -> SpecStreamModel:
    """Streams and LoRA attached, and moved away from their neutral start."""
    model = make_model(family, seed=4, base_changes=base_changes, **case)
    if bits is not None:
        nn.quantize(model.base, group_size=32, bits=bits)
    return with_lora(model)


def gradient_bound(value: mx.array) -> float:
    """How far each gradient of a tensor may be from ``value``."""
    return GRADIENTS * max(LEAST_GRADIENT, float(np.abs(np.array(value)).max()))


def batch_of(lengths: Any = LENGTHS, max_anchors: int | None = None) -> Batch:
    rows = [(random_prompt(prompt, seed=i), random_prompt(n, seed=50 + i)) for i, (prompt, n) in enumerate(lengths)]
    return make_batch([Example(tuple(p), tuple(a)) for p, a in rows], 4, max_anchors=max_anchors, seed=1)


def whole_gradients(model: SpecStreamModel, batch: Batch, weights: LossWeights) -> tuple[float, dict[str, mx.array]]:
    """One graph from the tokens to the loss, as MLX differentiates it."""

    def loss() -> mx.array:
        main = forward_main(model, mx.array(batch.tokens))
        return sum((piece.run(main)[0] for piece in _pieces(model, batch, weights, 1 << 20)), start=mx.array(0.0))

    before = model.trainable_parameters()
    value, gradients = nn.value_and_grad(model, loss)()
    model.update(before)
    return value.item(), dict(tree_flatten(gradients))


CASES: dict[str, tuple[dict[str, Any], float]] = {
    "shared": ({}, 1.0),
    "shared-one-trunk-layer": ({"num_stream_layers": 3, "prune": None}, 0.7),
    "shared-all-layers": ({"num_stream_layers": 4, "prune": None, "stream_position": "anchor"}, 1.0),
    "shared-rotation": ({"stream_id": {"type": "value_rotation", "epsilon": 0.3}}, 1.0),
    "shared-4-bit": ({"bits": 4}, 1.0),
    "lossless": ({"mode": "lossless"}, 0.0),
    "lossless-4-bit": ({"mode": "lossless", "bits": 4}, 0.0),
}


def test_chunks_hold_every_anchor_once_and_no_sequence_that_is_over() -> None:
    """Red when: an anchor is left out or comes twice, a chunk is too large, or short answers fill it up."""
    batch = batch_of(((7, 40), (3, 4), (2, 12), (5, 1)))
    for rows_per_chunk in (1, 40, 64, 1 << 20):
        seen = np.zeros(batch.anchors.shape, dtype=int)
        for sequences, columns in anchor_chunks(batch, rows_per_chunk):
            seen[sequences, columns] += 1
            exists = batch.stream_targets[sequences, columns] != IGNORE
            assert exists.any(axis=(1, 2)).all()
            assert exists.size <= max(rows_per_chunk, batch.stream_targets.shape[2] * len(sequences))
        assert (seen[batch.stream_targets[:, :, 0] != IGNORE] == 1).all()
    alone = sum(len(sequences) == 1 for sequences, _ in anchor_chunks(batch, 40))
    assert alone >= 2, "the long answer's end goes alone"


@pytest.mark.parametrize(
    ("family", "case"),
    [*(("llama", case) for case in CASES), *((family, "shared") for family in ("gemma3_text", "olmo3", "gpt2"))],
)
def test_the_pieces_have_the_gradients_of_the_whole(family: str, case: str) -> None:
    """Red when: a gradient is lost between a piece and the main pass, counted twice, or computed with other weights."""
    changes, main = CASES[case]
    window = {"sliding_window": 6} if family in tiny.WINDOWED else {}
    model = trainable(family, window, **changes)
    weights = LossWeights(main=main, streams=0.3, prune=0.5, latent=0.2)
    parameters = model.trainable_parameters()
    for max_anchors in (None, 5):
        batch = batch_of(max_anchors=max_anchors)
        expected_loss, expected = whole_gradients(model, batch, weights)
        for rows_per_chunk, checkpoint in ((1 << 20, False), (1 << 20, True), (33, False), (33, True)):
            report, found = loss_and_gradients(
                model, batch, weights, rows_per_chunk=rows_per_chunk, checkpoint=checkpoint
            )
            gradients = dict(tree_flatten(found))
            assert report.loss == pytest.approx(expected_loss, rel=1e-5, abs=LOSSES)
            assert gradients.keys() == expected.keys() == dict(tree_flatten(parameters)).keys()
            for name, value in expected.items():
                error = np.abs(np.array(gradients[name] - value)).max()
                assert error <= gradient_bound(value), (name, rows_per_chunk, checkpoint)
        alone = loss_only(model, batch, weights, rows_per_chunk=33)
        assert alone.loss == pytest.approx(expected_loss, rel=1e-5, abs=LOSSES)
        assert alone.streams == pytest.approx(report.streams, rel=1e-5, abs=LOSSES)
        assert np.array_equal(alone.stream_right, report.stream_right)
    after = dict(tree_flatten(model.trainable_parameters()))
    assert all(after[name] is value for name, value in tree_flatten(parameters)), "parameters were replaced"


def test_the_pruner_alone_and_a_loss_without_rows_have_gradients_too() -> None:
    """Red when: a piece moves what is frozen, or a parameter that no piece reaches has no gradient."""
    for mode in ("lossless", "shared"):
        model = trainable(mode=mode)
        train_pruner_only(model)
        weights = LossWeights(main=0.0, streams=0.0, prune=1.0)
        gradients = dict(tree_flatten(loss_and_gradients(model, batch_of(), weights, rows_per_chunk=7)[1]))
        _, expected = whole_gradients(model, batch_of(), weights)
        assert gradients.keys() == expected.keys() == {"streams.prune.down.weight", "streams.prune.up.weight"}
        for name, value in expected.items():
            assert np.abs(np.array(gradients[name] - value)).max() <= gradient_bound(value), (mode, name)
    model = trainable(mode="lossless", prune=None)
    report, nothing = loss_and_gradients(model, batch_of([(4, 1)]), LossWeights(main=0.0))
    assert report.loss == 0
    assert all(not mx.any(value).item() for _, value in tree_flatten(nothing))
    assert dict(tree_flatten(nothing)).keys() == dict(tree_flatten(model.trainable_parameters())).keys()


def peak(model: SpecStreamModel, batch: Batch, weights: LossWeights, rows_per_chunk: int) -> int:
    """Most bytes in use beyond what is in use before."""
    before = active_memory()
    mx.clear_cache()
    mx.reset_peak_memory()
    loss_and_gradients(model, batch, weights, rows_per_chunk=rows_per_chunk)
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("mode", ["shared", "lossless"])
def test_memory_is_that_of_one_piece(mode: str) -> None:
    """Red when: a piece's values live longer than the piece, or all of them are differentiated in one graph."""
    model = trainable(mode=mode)
    weights = LossWeights(main=float(mode == "shared"), latent=0.1)
    all_anchors, some_anchors = (batch_of([(2, 254)], max_anchors=count) for count in (None, 64))
    one, many = peak(model, all_anchors, weights, 1 << 20), peak(model, all_anchors, weights, 64)
    assert many < 0.4 * one
    assert many < 1.2 * peak(model, some_anchors, weights, 64)


def test_logits_of_main_rows_exist_piece_by_piece_too() -> None:
    """Red when: few stream rows put all main rows, and the logits of each, into one graph."""
    model = trainable(base_changes={"vocab_size": 9000}, prune=None)
    batch = batch_of([(2, 254)], max_anchors=8)
    pieces, whole = (peak(model, batch, LossWeights(main=1.0), rows) for rows in (32, 1 << 20))
    assert pieces < 0.4 * whole
