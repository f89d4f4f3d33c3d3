"""Positions of a pass: every row can have its own, whatever a stock block asks its rotary embedding for.

A stock block asks for consecutive positions from ``cache.offset``. ``TreeRope`` wraps the embedding and, inside
``rows_at``, gives every row its own position by treating rows as batch entries. A family with learned positions has
none: its rows get theirs with the token embedding, and attention knows no position.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE

from specstream_mlx.errors import UnsupportedError
from specstream_mlx.families.decoder import DecoderFamily


class PassContext(threading.local):
    """What the wrapped modules of a model need to know about the pass that is being built in this thread."""

    def __init__(self) -> None:
        self.positions: mx.array | None = None  # (L,) absolute position of every row; None: consecutive
        self.num_main_rows: int | None = None  # rows from this one on are riders; None: all are main
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
        """Within the block, rows have these positions, and those from ``num_main_rows`` on are riders."""
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


def install(family: DecoderFamily, context: PassContext) -> None:
    """Wrap the rotary embedding of every layer's attention in place, where the family has one.

    Raises:
        UnsupportedError: a block is not built the way the seam assumes.
    """
    for index, layer in enumerate(family.layers):
        attention, rotary = family.attention(layer), family.is_rotary(layer)
        rope = getattr(attention, family.ROPE, None)
        if attention is None or (rope is None) is rotary:
            expected = f"{'a' if rotary else 'no'} rotary embedding at {family.ATTENTION}.{family.ROPE}"
            raise UnsupportedError(
                f"{family.LAYERS}.{index}: expected {expected}; this block of mlx-lm is not supported, "
                "use a tested mlx-lm (see pyproject.toml) or another model family"
            )
        if rotary and not isinstance(rope, TreeRope):
            setattr(attention, family.ROPE, TreeRope(rope, context))


def runs_batches(family: DecoderFamily) -> bool:
    """Whether mlx-lm itself can run several texts of unequal length at once."""
    ropes = (getattr(family.attention(layer), family.ROPE, None) for layer in family.layers)
    return family.SHARED_ATTENTION and not any(isinstance(rope, TreeRope) and rope.one_offset for rope in ropes)
