"""The training loss (method section 8), with gradients computed in pieces that bound the memory.

``L = - alpha_0 sum_t log p(y_{t+1} | y_<=t) - sum_j alpha_j sum_t log p(y_{t+1+j} | y_<=t)``, ``t`` from the last
prompt token on. Each sum is the mean over its own targets, so that neither length nor the sub-sampling of anchors
changes the balance; a target past the end of the answer does not exist and counts nowhere.

What a main pass leaves behind (``MainPass``) being given, the loss is a sum over rows, and so is its gradient::

    main pass, nothing kept for a gradient   ->  trunk, M^N, keys, values
    one piece of the rows after another      ->  its loss; the gradients of trunk, M^N, keys, values and of the
                                                 parameters that the piece itself has used, added up
    main pass again, backwards from the sums ->  the other gradients of the parameters

This is the chain rule with nothing left out, and only one piece is in memory at a time. Where the main stream is not
trained, the third line falls away. Where it is, and the rows of each part of the loss are one piece, all of it is one
graph, which saves a main pass.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten, tree_unflatten

from specstream_mlx.drafters.streams.drafter import StreamsDrafter
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.training.batches import IGNORE, AnchorChunk, Batch, IntArray, anchor_chunks
from specstream_mlx.training.forward import MainPass, forward_main, forward_streams

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LossWeights:
    """What each part of the loss counts.

    Attributes:
        main: ``alpha_0``; 0 in lossless mode, where nothing moves the main stream.
        streams: ``alpha_j``, one number for every stream.
        prune: of the early exit's next-token loss, whose gradient reaches the pruner alone.
        latent: of the latent consistency, summed over the streams: the mean squared distance between ``S_{t,j}^N``
            and the detached ``M_{t+j}^N``, both after the final norm, relative to the latter's square; 0 leaves it
            out.
    """

    main: float
    streams: float = 0.1
    prune: float = 1.0
    latent: float = 0.0


@dataclass
class LossReport:
    """A batch's loss, its parts, and which predictions were right.

    Attributes:
        loss: the weighted sum.
        main: next-token loss of the main stream; NaN when it is not trained.
        streams: (G,) loss of each stream; of this and the next two nothing where streams count nothing in training.
        prune: next-token loss of the early exit; NaN without one.
        latent: NaN when it is left out.
        stream_right: (B, A, G) bool, whether the stream's likeliest token is the target.
        stream_counts: (G,) number of targets.
    """

    loss: float
    main: float = float("nan")
    streams: list[float] = field(default_factory=list)
    prune: float = float("nan")
    latent: float = float("nan")
    stream_right: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0, 0), dtype=np.bool_))
    stream_counts: list[int] = field(default_factory=list)

    @property
    def agreement(self) -> list[float]:
        """(G,) how often each stream's likeliest token is the target."""
        right = self.stream_right.sum(axis=(0, 1))
        return [float(r) / max(count, 1) for r, count in zip(right, self.stream_counts, strict=True)]


def loss_and_gradients(
    model: SpecStreamModel,
    batch: Batch,
    weights: LossWeights,
    *,
    rows_per_chunk: int = 1024,
    checkpoint: bool = False,
) -> tuple[LossReport, Any]:
    """The loss of one batch and its gradients with respect to ``model.trainable_parameters()``, evaluated.

    Args:
        model: with streams, LoRA attached and everything else frozen.
        batch: what to predict.
        weights: of the loss's parts.
        rows_per_chunk: most rows of a piece, so that memory does not grow with the number of anchors.
        checkpoint: keep the input of each block only, and compute the rest again for the gradient.
    """
    before = model.trainable_parameters()
    parameters: _Parameters = dict(tree_flatten(before))
    tokens = mx.array(batch.tokens)
    pieces = list(_pieces(model, batch, weights, rows_per_chunk, checkpoint=checkpoint))
    if weights.main and not checkpoint and len(pieces) == len({piece.part for piece in pieces}):
        outcomes, gradients = _gradients_at_once(model, tokens, pieces, parameters)
    else:
        outcomes, gradients = _gradients_in_pieces(
            model, tokens, pieces, parameters, through_main=weights.main > 0, checkpoint=checkpoint
        )
    model.update(before)  # the functions above left traced arrays there
    with_streams = weights.streams > 0 or weights.latent > 0
    return _report(batch, pieces, outcomes, with_streams=with_streams), tree_unflatten(list(gradients.items()))


def loss_only(model: SpecStreamModel, batch: Batch, weights: LossWeights, *, rows_per_chunk: int = 1024) -> LossReport:
    """The loss of one batch, for validation; of the streams too where they count nothing."""
    main = forward_main(model, mx.array(batch.tokens))
    pieces = list(_pieces(model, batch, weights, rows_per_chunk, with_streams=True))
    outcomes = []
    for piece in pieces:
        outcomes.append(piece.run(main))
        mx.eval(outcomes[-1])
    return _report(batch, pieces, outcomes, with_streams=True)


_Parameters = dict[str, mx.array]
_Outcome = tuple[mx.array, dict[str, mx.array]]


@dataclass(frozen=True)
class _Piece:
    """Some rows of the loss.

    Attributes:
        part: of the loss: "streams", "main" or "prune".
        run: of a main pass: the weighted loss of these rows, and what a report has of them.
        places: (n,) of stream rows, their index among all (B * A * G); of main rows empty.
    """

    part: str
    run: Callable[[MainPass], _Outcome]
    places: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))


def _gradients_at_once(
    model: SpecStreamModel, tokens: mx.array, pieces: Sequence[_Piece], parameters: _Parameters
) -> tuple[list[_Outcome], _Parameters]:
    """What each piece gives, and the gradients of the parameters: one graph."""

    def run(values: list[mx.array]) -> tuple[mx.array, list[_Outcome]]:
        _set(model, parameters, values)
        main = forward_main(model, tokens)
        outcomes = [piece.run(main) for piece in pieces]
        return sum((loss for loss, _ in outcomes), start=mx.array(0.0)), outcomes

    (_, outcomes), gradients = mx.value_and_grad(run)(list(parameters.values()))
    mx.eval(outcomes, gradients)
    return outcomes, dict(zip(parameters, gradients, strict=True))


def _gradients_in_pieces(
    model: SpecStreamModel,
    tokens: mx.array,
    pieces: Sequence[_Piece],
    parameters: _Parameters,
    *,
    through_main: bool,
    checkpoint: bool,
) -> tuple[list[_Outcome], _Parameters]:
    """The same, one piece after another, then the main pass backwards from their sums."""
    outcomes, above, by_main = _sums_over_pieces(
        model, forward_main(model, tokens), pieces, parameters, through_main=through_main
    )
    gradients = {name: above.get(name, mx.zeros_like(value)) for name, value in parameters.items()}
    if through_main:

        def main_pass(*values: mx.array) -> list[mx.array]:
            _set(model, parameters, values)
            return forward_main(model, tokens, checkpoint=checkpoint).arrays

        _, further = mx.vjp(main_pass, list(parameters.values()), by_main)
        gradients = {name: gradients[name] + value for name, value in zip(parameters, further, strict=True)}
    mx.eval(gradients)
    return outcomes, gradients


def _sums_over_pieces(
    model: SpecStreamModel,
    main: MainPass,
    pieces: Sequence[_Piece],
    parameters: _Parameters,
    *,
    through_main: bool,
) -> tuple[list[_Outcome], _Parameters, list[mx.array]]:
    """Differentiate one piece after another.

    Returns:
        What each gave, the sums of the gradients of the parameters above the trunk, and with ``through_main`` those
        of ``main.arrays``.
    """
    trunk = tuple(f"base.{model.family.LAYERS}.{index}." for index in range(model.num_trunk_layers))
    above = {name: value for name, value in parameters.items() if not name.startswith(trunk)}
    mx.eval(main.trunk, main.keys_values)
    inputs = [*above.values(), *(main.arrays if through_main else [])]
    sums = [mx.zeros_like(array) for array in inputs]
    outcomes = []
    for piece in pieces:

        def run(arrays: list[mx.array], piece: _Piece = piece) -> _Outcome:
            _set(model, above, arrays[: len(above)])
            return piece.run(MainPass.of(arrays[len(above) :]) if through_main else main)

        outcome, gradients = mx.value_and_grad(run)(inputs)
        sums = [total + gradient for total, gradient in zip(sums, gradients, strict=True)]
        del gradients
        mx.eval(outcome, sums)
        outcomes.append(outcome)
    return outcomes, dict(zip(above, sums[: len(above)], strict=True)), sums[len(above) :]


def _set(model: SpecStreamModel, names: Iterable[str], values: Sequence[mx.array]) -> None:
    model.update(tree_unflatten(list(zip(names, values, strict=True))))


def _pieces(
    model: SpecStreamModel,
    batch: Batch,
    weights: LossWeights,
    rows_per_chunk: int,
    *,
    checkpoint: bool = False,
    with_streams: bool = False,
) -> Iterator[_Piece]:
    """The whole loss, ``rows_per_chunk`` rows at a time."""
    if weights.streams or weights.latent or with_streams:
        yield from _stream_pieces(model, batch, weights, rows_per_chunk, checkpoint)

    def main_logits(main: MainPass, rows: IntArray) -> mx.array:
        return model.family.head(model.family.norm(_rows(main.hidden, rows)))

    def early_exit_logits(main: MainPass, rows: IntArray) -> mx.array:
        assert isinstance(model.drafter, StreamsDrafter)
        return model.drafter.early_exit_logits(model, _rows(mx.stop_gradient(main.trunk), rows)[None])

    if weights.main:
        yield from _next_token_pieces("main", main_logits, batch, weights.main, rows_per_chunk)
    assert model.stream_config is not None
    if model.stream_config.prune is not None:
        yield from _next_token_pieces("prune", early_exit_logits, batch, weights.prune, rows_per_chunk)


def _next_token_pieces(
    name: str, logits_of: Callable[[MainPass, IntArray], mx.array], batch: Batch, weight: float, rows_per_chunk: int
) -> Iterator[_Piece]:
    """The mean loss of the main rows that have a target, under the logits that ``logits_of`` gives such rows."""
    predicts = np.flatnonzero(batch.main_targets != IGNORE).astype(np.int32)

    def run(main: MainPass, rows: IntArray) -> _Outcome:
        targets = mx.array(batch.main_targets.reshape(-1)[rows])
        logits = logits_of(main, rows).astype(mx.float32)
        loss = nn.losses.cross_entropy(logits, targets, reduction="sum") / len(predicts)
        return weight * loss, {name: loss}

    for start in range(0, len(predicts), rows_per_chunk):
        yield _Piece(name, partial(run, rows=predicts[start : start + rows_per_chunk]))


def _stream_pieces(
    model: SpecStreamModel, batch: Batch, weights: LossWeights, rows_per_chunk: int, checkpoint: bool
) -> Iterator[_Piece]:
    """The streams of some anchors at a time, those rows among them that have a target."""
    all_targets = batch.stream_targets
    size, _, gamma = all_targets.shape
    length = batch.tokens.shape[1]
    # One over the number of targets of the row's stream: sums of rows become sums of means.
    row_weights = np.broadcast_to(1 / np.maximum(_counts(batch), 1).astype(np.float32), all_targets.shape)
    all_places = np.arange(all_targets.size, dtype=np.int32).reshape(all_targets.shape)
    # Where M_{t+j}, which predicts the same token as stream j, is among the (B * L) main rows.
    all_ahead = np.arange(size)[:, None, None] * length + batch.anchors[:, :, None] + np.arange(1, gamma + 1)

    def run(main: MainPass, part: AnchorChunk, rows: IntArray) -> _Outcome:
        targets = mx.array(all_targets[part].reshape(-1)[rows])
        shares = mx.array(row_weights[part].reshape(-1)[rows])
        read = main if len(part[0]) == size else main.of_sequences(part[0])
        hidden = forward_streams(model, read.trunk, read.keys_values, batch.anchors[part], checkpoint=checkpoint)
        normed = model.family.norm(_rows(hidden, rows))
        logits = model.family.head(normed).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, targets, reduction="none")
        total = weights.streams * (losses * shares).sum()
        outcome = {"losses": losses, "right": logits.argmax(axis=-1) == targets}
        if weights.latent:
            ahead = all_ahead[part].reshape(-1)[rows]
            aim = model.family.norm(mx.stop_gradient(_rows(main.hidden, ahead))).astype(mx.float32)
            distance = (normed.astype(mx.float32) - aim).square().sum(axis=-1) / aim.square().sum(axis=-1)
            outcome["latent"] = (distance * shares).sum()
            total = total + weights.latent * outcome["latent"]
        return total, outcome

    for part in anchor_chunks(batch, rows_per_chunk):
        rows = np.flatnonzero(all_targets[part] != IGNORE).astype(np.int32)
        yield _Piece("streams", partial(run, part=part, rows=rows), all_places[part].reshape(-1)[rows])


def _rows(hidden: mx.array, rows: npt.NDArray[Any]) -> mx.array:
    """(B, L, D), index (n,) into the B * L rows -> (n, D)."""
    return hidden.reshape(-1, hidden.shape[-1])[mx.array(rows)]


def _counts(batch: Batch) -> npt.NDArray[np.int64]:
    """(G,) targets of each stream."""
    return (batch.stream_targets != IGNORE).sum(axis=(0, 1))


def _report(batch: Batch, pieces: Sequence[_Piece], outcomes: Sequence[_Outcome], *, with_streams: bool) -> LossReport:
    targets = batch.stream_targets
    losses = np.zeros(targets.size, dtype=np.float32)
    right = np.zeros(targets.size, dtype=np.bool_)
    parts: dict[str, float] = {}
    for piece, (_, parts_of_piece) in zip(pieces, outcomes, strict=True):
        for name, value in parts_of_piece.items():
            if name == "losses":
                losses[piece.places] = np.array(value)
            elif name == "right":
                right[piece.places] = np.array(value)
            else:
                parts[name] = parts.get(name, 0.0) + float(np.array(value))
    nan = float("nan")
    report = LossReport(sum(float(np.array(loss)) for loss, _ in outcomes))
    report.main, report.prune, report.latent = (parts.get(name, nan) for name in ("main", "prune", "latent"))
    if with_streams:
        counts = _counts(batch)
        report.streams = (losses.reshape(targets.shape).sum(axis=(0, 1)) / np.maximum(counts, 1)).tolist()
        report.stream_right = right.reshape(targets.shape)
        report.stream_counts = counts.tolist()
    return report
