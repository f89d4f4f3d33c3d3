"""The seam to stock mlx-lm blocks: positions and masks of a pass over a tree.

A stock block is called as ``layer(h, mask, cache)``. Three things make it verify a tree:

* positions: the block asks its rotary embedding for consecutive positions from ``cache.offset``. ``TreeRope`` wraps
  that embedding and, inside ``rows_at``, gives every row its own position by treating rows as batch entries (a family
  with learned positions has none: its rows get theirs with the token embedding, and attention knows no position);
* mask: a boolean (T, S + T) array, prefix then ancestors; a chain needs no more than the causal mask;
* cache: a pass appends all its rows to mlx-lm's own caches, and takes back the rejected ones (``caches.py``).

Where mlx-lm gives a layer with a sliding window a rotating cache, which overwrites rows that a rejected draft would
need back, that layer gets a plain one here, and its rows see what lies within the window by their positions
(``reach``): the same rows as in mlx-lm.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_map
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE

from specstream_mlx.errors import UnsupportedError
from specstream_mlx.families.decoder import DecoderFamily

BoolMatrix = npt.NDArray[np.bool_]


class PassContext:
    """What the wrapped modules of a model need to know about the pass that is being built."""

    def __init__(self) -> None:
        self.positions: mx.array | None = None  # (L,) absolute position of every row; None: consecutive
        self.num_main_rows: int | None = None  # rows from this one on are stream rows; None: all are main
        self.in_pass = False  # whether a pass of ours is being built
        self._rotations: dict[object, tuple[mx.array, mx.array]] = {}

    def rotation(self, rope: nn.RoPE, offset: Any, length: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Cosines ``[cos, cos]`` and sines ``[-sin, sin]`` of a pass's rows, (L, dims), made once for all layers.

        They are what ``rope`` itself makes of ones followed by zeros, so the numbers are exactly its own.
        """
        places = self.positions
        key = (rope.dims, rope.base, rope.scale, offset if places is None else id(places), length, dtype)
        if key not in self._rotations:
            half = rope.dims // 2
            ones = mx.repeat(mx.array([1, 0], dtype=dtype), half)
            if places is None:
                turned = rope(mx.broadcast_to(ones, (1, 1, length, 2 * half)), offset=offset)[0, 0]
            else:
                turned = rope(mx.broadcast_to(ones, (length, 1, 1, 2 * half)), offset=places)[:, 0, 0]
            cos, sin = turned[:, :half], turned[:, half:]
            self._rotations[key] = mx.concatenate([cos, cos], axis=1), mx.concatenate([-sin, sin], axis=1)
        return self._rotations[key]

    @contextmanager
    def rows_at(self, positions: mx.array | None, num_main_rows: int | None = None) -> Iterator[None]:
        """Within the block, rows have these positions, and those from ``num_main_rows`` on are streams."""
        before = self.positions, self.num_main_rows, self.in_pass
        self.positions, self.num_main_rows, self.in_pass = positions, num_main_rows, True
        try:
            yield
        finally:
            self.positions, self.num_main_rows, self.in_pass = before
            self._rotations = {}


class TreeRope(nn.Module):
    """A rotary embedding whose rows can have arbitrary positions; without positions it is the wrapped one."""

    def __init__(self, rope: nn.Module, context: PassContext) -> None:
        super().__init__()
        self._rope = rope
        self._context = context
        # MLX's CPU backend makes cosines and sines anew in every call: a quarter of a small model's step.
        self._shares_rotation = type(rope) is nn.RoPE and not rope.traditional
        # The base of this one grows with the length of the text, token by token in plain decoding.
        self.one_offset = type(rope) is DynamicNTKScalingRoPE

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
        """Rotate ``x`` of shape (1, H, L, D_h); ``offset`` counts only when no positions are set."""
        positions = self._context.positions
        if self._shares_rotation and self._context.in_pass and x.shape[0] == 1 and runs_on_cpu():
            return self._rotate(x, offset)
        by_row = self.one_offset and self._context.in_pass
        if positions is None and not by_row:
            return self._rope(x, offset=offset)
        batch, heads, length, size = x.shape
        rows = x.transpose(0, 2, 1, 3).reshape(batch * length, heads, 1, size)
        if by_row:
            places: Any = range(offset, offset + length) if positions is None else positions.tolist()
            rows = mx.concatenate([self._rope(rows[i : i + 1], offset=place) for i, place in enumerate(places)])
        else:
            rows = self._rope(rows, offset=positions)
        return rows.reshape(batch, length, heads, size).transpose(0, 2, 1, 3)

    def _rotate(self, x: mx.array, offset: Any) -> mx.array:
        cos, sin = self._context.rotation(self._rope, offset, x.shape[2], x.dtype)
        half, dims = self._rope.dims // 2, self._rope.dims
        rotated = x if dims == x.shape[-1] else x[..., :dims]
        swapped = mx.concatenate([x[..., half:dims], x[..., :half]], axis=-1)
        turned = rotated * cos + swapped * sin
        return turned if rotated is x else mx.concatenate([turned, x[..., dims:]], axis=-1)


def runs_on_cpu() -> bool:
    """Whether operations go to MLX's CPU backend, which lacks the fused kernels that are worth keeping elsewhere."""
    return mx.default_device() == mx.cpu


class ValueRotation:
    """A KV cache that turns the values of stream rows on their way in (method section 2, variant without ``P_j``).

    The value of stream ``j`` is ``V * exp(i * epsilon * j)``: the first half of the head dimension holds real parts,
    the second half imaginary parts. Everything else is the wrapped cache's.
    """

    def __init__(self, cache: Any, stream_index: mx.array, epsilon: float) -> None:
        """``stream_index``: (L,) the stream number of each row of the pass, 0 for main rows (left unturned)."""
        self._cache = cache
        angle = stream_index.astype(mx.float32) * epsilon
        self._cos, self._sin = mx.cos(angle)[:, None], mx.sin(angle)[:, None]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append (1, H_kv, L, D_h) keys and turned values."""
        real, imaginary = mx.split(values, 2, axis=-1)
        cos, sin = self._cos.astype(values.dtype), self._sin.astype(values.dtype)
        turned = mx.concatenate([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)
        return self._cache.update_and_fetch(keys, turned)


class WindowView:
    """A KV cache that shows attention its rows from ``first`` on; everything else is the wrapped cache's."""

    def __init__(self, cache: Any, first: int) -> None:
        self._cache = cache
        self._first = first

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append (1, H_kv, L, D_h) keys and values."""
        return tree_map(lambda rows: rows[..., self._first :, :], self._cache.update_and_fetch(keys, values))


def install(family: DecoderFamily, context: PassContext) -> None:
    """Wrap the rotary embedding of every layer's attention in place, where the family has one.

    Raises:
        UnsupportedError: a block is not built the way the seam assumes.
    """
    for index, layer in enumerate(family.layers):
        attention = getattr(layer, family.ATTENTION, None)
        rope = getattr(attention, "rope", None)
        if attention is None or (rope is None) is family.ROTARY:
            expected = f"{'a' if family.ROTARY else 'no'} rotary embedding at {family.ATTENTION}.rope"
            raise UnsupportedError(
                f"{family.LAYERS}.{index}: expected {expected}; this block of mlx-lm is not supported, "
                "use a tested mlx-lm (see pyproject.toml) or another model family"
            )
        if family.ROTARY and not isinstance(rope, TreeRope):
            attention.rope = TreeRope(rope, context)


def runs_batches(family: DecoderFamily) -> bool:
    """Whether mlx-lm itself can run several texts of unequal length at once."""
    ropes = (getattr(getattr(layer, family.ATTENTION), "rope", None) for layer in family.layers)
    return family.SHARED_ATTENTION and not any(isinstance(rope, TreeRope) and rope.one_offset for rope in ropes)


def windows_of(caches: Sequence[Any]) -> list[int | None]:
    """How far back each layer sees, in rows, as mlx-lm's own caches for a model tell; None: without limit.

    Raises:
        UnsupportedError: a layer keeps the past in a form from which rows cannot be taken back.
    """
    windows: list[int | None] = []
    for index, cache in enumerate(caches):
        if type(cache) is KVCache:
            windows.append(None)
        elif type(cache) is RotatingKVCache and cache.keep == 0 and isinstance(cache.max_size, int):
            windows.append(cache.max_size)
        else:
            raise UnsupportedError(
                f"layer {index} keeps the past in a {type(cache).__name__}, from which rejected rows cannot be taken "
                "back; run this model with mlx-lm"
            )
    return windows


@dataclass(frozen=True)
class Reach:
    """What the rows of a pass see in a layer: cached rows from ``first`` on and one another, under ``mask``."""

    first: int
    mask: mx.array | str | None


def reach(
    start: int, depths: npt.NDArray[np.int32], visible: BoolMatrix | None, window: int | None, *, named: bool = True
) -> Reach:
    """What the L rows of a pass that follow ``start`` cached ones see in a layer with this window.

    A row at position ``p`` sees positions ``p - window + 1 .. p``, a stream by the position it is rotated to. Cached
    rows lie at the position of their index.

    Args:
        depths: (L,) positions relative to ``start``.
        visible: (L, L) bool, which rows of the pass see which; None: each sees all before it.
        window: rows, the row itself counted; None: without limit.
        named: whether the mask may be "causal".
    """
    length = len(depths)
    unlimited = window is None or start + int(depths.max()) < window
    if visible is None and not (unlimited and named):
        visible = np.tri(length, dtype=np.bool_)
    if window is None or unlimited:
        return Reach(0, attention_mask(start, length, visible))
    assert visible is not None
    positions = start + depths
    first = max(0, int(positions.min()) - window + 1)
    seen = np.concatenate([np.ones((length, start - first), dtype=np.bool_), visible], axis=1)
    seen &= within(window, positions, np.concatenate([np.arange(first, start), positions]))
    return Reach(first, None if seen.all() else mx.array(seen))


def within(window: int, positions: npt.NDArray[Any], others: npt.NDArray[Any]) -> BoolMatrix:
    """Which ``others`` lie in the window of a row at each of ``positions``: (..., L) and (..., S) -> (..., L, S)."""
    near: BoolMatrix = positions[..., :, None] - others[..., None, :] < window
    return near


def attention_mask(start: int, length: int, visible: BoolMatrix | None) -> mx.array | str | None:
    """The mask of a pass whose L rows follow ``start`` cached ones.

    Args:
        start: cached rows S; every row of the pass sees them all.
        length: L.
        visible: (L, L) bool, which rows of the pass see which; None: each sees all before it.

    Returns:
        None for a single row, "causal", or a (L, S + L) bool array.
    """
    if length == 1:
        return None
    if visible is None:
        return "causal"
    return mx.concatenate([mx.ones((length, start), dtype=mx.bool_), mx.array(visible)], axis=1)


def with_streams(tree_mask: BoolMatrix, anchors: Sequence[int], num_streams: int) -> BoolMatrix:
    """Extend a tree's mask by the rows of some nodes' streams, anchor after anchor (method section 1).

    Stream ``j`` of node ``n`` sees what ``n`` sees, and streams 1..j of ``n``. No main row sees a stream::

        tree 0-1, both anchors    0  1 | 0.1 0.2 1.1 1.2
                             0    1  .    .   .   .   .
                             1    1  1    .   .   .   .
                             0.1  1  .    1   .   .   .
                             0.2  1  .    1   1   .   .
                             1.1  1  1    .   .   1   .
                             1.2  1  1    .   .   1   1

    Args:
        tree_mask: (T, T) bool.
        anchors: A nodes.
        num_streams: streams 1..num_streams of each.

    Returns:
        (T + A * num_streams, T + A * num_streams) bool.
    """
    size, rows = len(tree_mask), len(anchors) * num_streams
    own = np.kron(np.eye(len(anchors), dtype=np.bool_), np.tri(num_streams, dtype=np.bool_))
    return np.block(
        [
            [tree_mask, np.zeros((size, rows), dtype=np.bool_)],
            [np.repeat(tree_mask[list(anchors)], num_streams, axis=0), own],
        ]
    )
