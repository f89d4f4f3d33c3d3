"""The training forward: main rows in one pass, then the streams of many anchors in the top ``N_s`` layers.

The main stream never sees a stream, so the two are two passes over the same blocks: the main pass leaves its keys and
values of the top ``N_s`` layers behind, and stream rows, which exist in those layers alone, attend to them::

    rows \\ keys    main 0 1 2 3 | anchor 1: j=1 2 | anchor 2: j=1 2
    stream (1,1)        x x . . |           x .   |           . .
    stream (1,2)        x x . . |           x x   |           . .
    stream (2,1)        x x x . |           . .   |           x .
    stream (2,2)        x x x . |           . .   |           x x

Shapes: B batch, L main rows, A anchors per sequence, G streams. Stream rows lie anchor by anchor: row
``a * G + (j - 1)``. ``M_t^N`` predicts token ``t + 1``, ``S_{t,j}^N`` predicts token ``t + 1 + j``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from specstream_mlx.drafters.streams.value_rotation import ValueRotation
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.target.masks import BoolMatrix, within
from specstream_mlx.training.batches import IntArray

KeysValues = list[tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class MainPass:
    """What the streams and the loss need of a main pass.

    Attributes:
        trunk: (B, L, D), ``M^{N-N_s}``.
        hidden: (B, L, D), ``M^N`` before the final norm.
        keys_values: of each of the top ``N_s`` layers, (B, H_kv, L, D_h) each.
    """

    trunk: mx.array
    hidden: mx.array
    keys_values: KeysValues

    @property
    def arrays(self) -> list[mx.array]:
        """All of it in one list, which ``of`` takes back."""
        return [self.trunk, self.hidden, *(array for pair in self.keys_values for array in pair)]

    def of_sequences(self, sequences: IntArray) -> "MainPass":
        """The pass of some sequences of the batch alone."""
        chosen = mx.array(sequences)
        return MainPass.of([array[chosen] for array in self.arrays])

    @classmethod
    def of(cls, arrays: Sequence[mx.array]) -> "MainPass":
        """The pass that ``arrays`` lists."""
        return cls(arrays[0], arrays[1], list(zip(arrays[2::2], arrays[3::2], strict=True)))


class RecordedKeysValues:
    """Stands where a block expects a KV cache: keeps the keys and values of a pass, after ``main`` ones if given."""

    offset = 0

    def __init__(self, main: tuple[mx.array, mx.array] | None = None) -> None:
        self._main = main
        self.keys_values: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """(B, H_kv, L, D_h) each in, what the rows attend to out."""
        self.keys_values = keys, values
        if self._main is None:
            return keys, values
        main_keys, main_values = self._main
        return mx.concatenate([main_keys, keys], axis=2), mx.concatenate([main_values, values], axis=2)


def forward_main(model: SpecStreamModel, tokens: mx.array, *, checkpoint: bool = False) -> MainPass:
    """Run the main stream over whole sequences.

    Args:
        model: with a stream configuration.
        tokens: (B, L) ids; padding on the right is harmless, since no earlier row sees it.
        checkpoint: keep the input of each block only, and compute the rest again for the gradient.
    """
    positions = np.arange(tokens.shape[1], dtype=np.int32)
    hidden = model.family.embed(tokens, positions)
    reaches = model.reaches(0, positions, None)
    trunk, keys_values = hidden, []
    for index, layer in enumerate(model.layers):
        if index == model.num_trunk_layers:
            trunk = hidden
        run = _main_block(model, layer, reaches[model.windows[index]].mask)
        hidden, keys, values = (_checkpointed(layer, run) if checkpoint else run)(hidden)
        if index >= model.num_trunk_layers:
            keys_values.append((keys, values))
    return MainPass(trunk, hidden, keys_values)


def forward_streams(
    model: SpecStreamModel, trunk: mx.array, keys_values: KeysValues, anchors: IntArray, *, checkpoint: bool = False
) -> mx.array:
    """Run the streams of some anchors.

    Args:
        model: with streams.
        trunk: (B, L, D), ``M^{N-N_s}`` of the main pass.
        keys_values: of the main pass.
        anchors: (B, A) positions ``t`` in 0..L-1.
        checkpoint: as in ``forward_main``.

    Returns:
        (B, A * G, D), ``S^N`` before the final norm.
    """
    assert model.streams is not None
    assert model.stream_config is not None
    num_anchors = anchors.shape[1]
    anchored = mx.take_along_axis(trunk, mx.array(anchors)[:, :, None], axis=1)
    hidden = model.streams(anchored)
    stream_numbers = np.tile(np.arange(1, model.gamma + 1, dtype=np.int32), num_anchors)
    ahead = stream_numbers if model.stream_config.stream_position == "anchor_plus_j" else np.zeros_like(stream_numbers)
    positions = np.repeat(anchors, model.gamma, axis=1) + ahead
    windows = model.windows[model.num_trunk_layers :]
    seen = stream_mask(anchors, trunk.shape[1], model.gamma)
    main_positions = np.broadcast_to(np.arange(trunk.shape[1]), trunk.shape[:2])
    columns = np.concatenate([main_positions, positions], axis=1)
    masks = {
        window: model.family.over_heads(mx.array(seen if window is None else seen & within(window, positions, columns)))
        for window in set(windows)
    }
    epsilon = model.stream_config.stream_id.epsilon
    rows, numbers = mx.array(positions.reshape(-1)), mx.array(stream_numbers)

    def block(layer: nn.Module, window: int | None) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
        def run(hidden: mx.array, keys: mx.array, values: mx.array) -> mx.array:
            cache: Any = RecordedKeysValues((keys, values))
            if epsilon is not None:
                cache = ValueRotation(cache, numbers, epsilon)
            with model.context.rows_at(rows, 0):
                return model.family.block(layer, hidden, masks[window], cache, rows)

        return run

    for layer, main, window in zip(model.layers[model.num_trunk_layers :], keys_values, windows, strict=True):
        run = block(layer, window)
        hidden = (_checkpointed(layer, run) if checkpoint else run)(hidden, *main)
    return hidden


def stream_mask(anchors: IntArray, num_main: int, gamma: int) -> BoolMatrix:
    """What each stream row sees: (B, A * G, num_main + A * G), as drawn at the top of this module."""
    num_anchors = anchors.shape[1]
    sees_main = np.arange(num_main) <= np.repeat(anchors, gamma, axis=1)[:, :, None]
    own = np.kron(np.eye(num_anchors, dtype=np.bool_), np.tri(gamma, dtype=np.bool_))
    return np.concatenate([sees_main, np.broadcast_to(own, (len(anchors), *own.shape))], axis=2)


def _main_block(
    model: SpecStreamModel, layer: nn.Module, mask: Any
) -> Callable[[mx.array], tuple[mx.array, mx.array, mx.array]]:
    def run(hidden: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        cache = RecordedKeysValues()
        out = model.family.block(layer, hidden, mask, cache)
        assert cache.keys_values is not None
        return out, *cache.keys_values

    return run


def _checkpointed(layer: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, which calls ``layer``, kept as its inputs and outputs: the rest is computed again for the gradient."""

    def again(parameters: Any, *arrays: mx.array) -> Any:
        layer.update(parameters)
        return run(*arrays)

    recomputed = mx.checkpoint(again)
    return lambda *arrays: recomputed(layer.trainable_parameters(), *arrays)
