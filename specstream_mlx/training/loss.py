"""The training loss (method section 8), with gradients computed in pieces that bound the memory.

``L = - alpha_0 sum_t log p(y_{t+1} | y_<=t) - sum_j alpha_j sum_t log p(y_{t+1+j} | y_<=t)``, ``t`` from the last
prompt token on. Each sum is the mean over its own targets, so that neither length nor the sub-sampling of anchors
changes the balance; a target past the end of the answer does not exist and counts nowhere.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from specstream_mlx.model import SpecStreamModel
from specstream_mlx.training.batches import IGNORE, Batch
from specstream_mlx.training.forward import IntArray, MainPass, forward_main, forward_streams

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
        streams: (G,) loss of each stream.
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


@dataclass(frozen=True)
class _Chunk:
    """Some of a batch's anchors, and the stream rows among them that have a target.

    Attributes:
        anchors: (B, A_c).
        rows: (n,) index into the (B * A_c * G) stream rows.
        places: (n,) index of the same rows among all (B * A * G).
        targets: (n,).
        weights: (n,) one over the number of targets of the row's stream, which makes sums of rows sums of means.
        ahead: (n,) index into the (B * L) main rows of ``M_{t+j}``, which predicts the same token.
    """

    anchors: IntArray
    rows: IntArray
    places: IntArray
    targets: IntArray
    weights: FloatArray
    ahead: IntArray


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
        rows_per_chunk: most stream rows that pass at once. More anchors go in several chunks, each computed again
            for its gradient, so that memory does not grow with their number.
        checkpoint: compute blocks again for the gradient even where one chunk is enough.
    """
    chunks = _chunks(batch, rows_per_chunk) if weights.streams or weights.latent else []
    recompute = checkpoint or len(chunks) > 1
    # A main stream that is not trained is computed outside the gradient: nothing of it is kept but what streams read.
    fixed = None if weights.main else forward_main(model, mx.array(batch.tokens))

    def loss(tokens: mx.array) -> tuple[mx.array, _Parts]:
        main = fixed if fixed is not None else forward_main(model, tokens, checkpoint=checkpoint)
        return _loss(model, main, batch, chunks, weights, recompute)

    before = model.trainable_parameters()
    (total, parts), gradients = nn.value_and_grad(model, loss)(mx.array(batch.tokens))
    model.update(before)  # the functions above left traced arrays there
    mx.eval(total, parts, gradients)
    return _report(batch, chunks, total, parts), gradients


def loss_only(model: SpecStreamModel, batch: Batch, weights: LossWeights, *, rows_per_chunk: int = 1024) -> LossReport:
    """The loss of one batch, for validation."""
    chunks = _chunks(batch, rows_per_chunk)
    main = forward_main(model, mx.array(batch.tokens))
    total, parts = _loss(model, main, batch, chunks, weights, recompute=False, evaluate=True)
    mx.eval(total, parts)
    return _report(batch, chunks, total, parts)


_Parts = dict[str, Any]


def _loss(
    model: SpecStreamModel,
    main: MainPass,
    batch: Batch,
    chunks: Sequence[_Chunk],
    weights: LossWeights,
    recompute: bool,
    evaluate: bool = False,
) -> tuple[mx.array, _Parts]:
    """The weighted loss, and its unweighted parts detached."""
    total = mx.array(0.0)
    parts: _Parts = {"losses": [], "right": []}
    aims = model.family.norm(mx.stop_gradient(main.hidden)) if weights.latent else None
    flat_keys_values = [array for pair in main.keys_values for array in pair]
    for chunk in chunks:
        run = _chunk_loss(model, chunk, aims, weights)
        chunk_loss, losses, right, latent = (mx.checkpoint(run) if recompute else run)(
            model.trainable_parameters(), main.trunk, *flat_keys_values
        )
        if evaluate:
            mx.eval(chunk_loss, losses, right, latent)
        total = total + chunk_loss
        parts["losses"].append(mx.stop_gradient(losses))
        parts["right"].append(right)
        if weights.latent:
            parts["latent"] = parts.get("latent", 0.0) + mx.stop_gradient(latent)
    predicts = np.flatnonzero(batch.main_targets.reshape(-1) != IGNORE)
    targets = mx.array(batch.main_targets.reshape(-1)[predicts])
    if weights.main:
        logits = model.family.head(model.family.norm(_rows(main.hidden, predicts)))
        main_loss = nn.losses.cross_entropy(logits.astype(mx.float32), targets, reduction="mean")
        total = total + weights.main * main_loss
        parts["main"] = mx.stop_gradient(main_loss)
    assert model.stream_config is not None
    if model.stream_config.prune is not None:
        logits = model.early_exit_logits(_rows(mx.stop_gradient(main.trunk), predicts)[None])
        prune_loss = nn.losses.cross_entropy(logits.astype(mx.float32), targets, reduction="mean")
        total = total + weights.prune * prune_loss
        parts["prune"] = mx.stop_gradient(prune_loss)
    return total, parts


def _chunk_loss(
    model: SpecStreamModel, chunk: _Chunk, aims: mx.array | None, weights: LossWeights
) -> Callable[..., tuple[mx.array, mx.array, mx.array, mx.array]]:
    """A function of everything that a chunk's gradient reaches, as ``mx.checkpoint`` needs it."""

    def run(
        parameters: Any, trunk: mx.array, *flat_keys_values: mx.array
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        model.update(parameters)
        keys_values = list(zip(flat_keys_values[::2], flat_keys_values[1::2], strict=True))
        hidden = forward_streams(model, trunk, keys_values, chunk.anchors)
        normed = model.family.norm(_rows(hidden, chunk.rows))  # only the rows that have a target
        logits = model.family.head(normed).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, mx.array(chunk.targets), reduction="none")
        total = weights.streams * (losses * mx.array(chunk.weights)).sum()
        latent = mx.array(0.0)
        if aims is not None:
            aim = _rows(aims, chunk.ahead).astype(mx.float32)
            distance = (normed.astype(mx.float32) - aim).square().sum(axis=-1) / aim.square().sum(axis=-1)
            latent = (distance * mx.array(chunk.weights)).sum()
            total = total + weights.latent * latent
        right = logits.argmax(axis=-1) == mx.array(chunk.targets)
        return total, losses, right, latent

    return run


def _rows(hidden: mx.array, rows: npt.NDArray[Any]) -> mx.array:
    """(B, L, D), index (n,) into the B * L rows -> (n, D)."""
    return hidden.reshape(-1, hidden.shape[-1])[mx.array(rows)]


def _chunks(batch: Batch, rows_per_chunk: int) -> list[_Chunk]:
    targets = batch.stream_targets
    size, num_anchors, gamma = targets.shape
    length = batch.tokens.shape[1]
    counts = np.maximum((targets != IGNORE).sum(axis=(0, 1)), 1)
    places = np.arange(targets.size, dtype=np.int32).reshape(targets.shape)
    ahead = np.arange(size)[:, None, None] * length + batch.anchors[:, :, None] + np.arange(1, gamma + 1)
    row_weights = np.broadcast_to(1 / counts.astype(np.float32), targets.shape)
    step = max(1, rows_per_chunk // (size * gamma))

    def pieces() -> Iterator[_Chunk]:
        for start in range(0, num_anchors, step):
            part = (slice(None), slice(start, start + step))
            rows = np.flatnonzero(targets[part].reshape(-1) != IGNORE).astype(np.int32)
            yield _Chunk(
                batch.anchors[part],
                rows,
                places[part].reshape(-1)[rows],
                targets[part].reshape(-1)[rows],
                row_weights[part].reshape(-1)[rows].astype(np.float32),
                ahead[part].reshape(-1)[rows].astype(np.int32),
            )

    return [chunk for chunk in pieces() if len(chunk.rows)]


def _report(batch: Batch, chunks: Sequence[_Chunk], total: mx.array, parts: _Parts) -> LossReport:
    targets = batch.stream_targets
    losses = np.zeros(targets.size, dtype=np.float32)
    right = np.zeros(targets.size, dtype=np.bool_)
    for chunk, chunk_losses, chunk_right in zip(chunks, parts["losses"], parts["right"], strict=True):
        losses[chunk.places], right[chunk.places] = np.array(chunk_losses), np.array(chunk_right)
    counts = (targets != IGNORE).sum(axis=(0, 1))
    per_stream = losses.reshape(targets.shape).sum(axis=(0, 1)) / np.maximum(counts, 1)
    report = LossReport(
        total.item(),  # type: ignore[arg-type]
        streams=per_stream.tolist(),
        stream_right=right.reshape(targets.shape),
        stream_counts=counts.tolist(),
    )
    for name in ("main", "prune", "latent"):
        if name in parts:
            setattr(report, name, parts[name].item())
    return report
