"""LoRA modules mapped onto the base, and the form in which mlx-lm holds them live: one rank, one scale.

    PEFT  A (r, in), B (out, r)      y + s * B(A(x))
    MLX   lora_a = A.T (in, R), lora_b = B.T (R, out), one scale for all modules

Modules of a smaller rank are padded with zeros to ``R``; a module's own scale is folded into its ``lora_b``.
"""

from dataclasses import dataclass

import mlx.core as mx

from specstream_convert.changes import AddLowRank, Change, Factors
from specstream_mlx.errors import InvalidInputError


@dataclass(frozen=True)
class Lora:
    """The LoRA of one module of the base."""

    module: str  # mlx-lm's path
    factors: Factors

    @property
    def weight(self) -> str:
        """The base tensor it changes when merged."""
        return f"{self.module}.weight"

    def merged(self) -> tuple[Change, ...]:
        """What merging does to :attr:`weight`."""
        return (AddLowRank(self.factors),)


@dataclass(frozen=True)
class LoraSet:
    """All LoRA modules, with the one rank and the one scale that the live form gives them."""

    items: tuple[Lora, ...]

    @property
    def rank(self) -> int:
        return max(item.factors.rank for item in self.items)

    @property
    def scale(self) -> float:
        """The scale of the first module; the others' difference from it goes into their ``lora_b``."""
        nonzero = [item.factors.scale for item in self.items if item.factors.scale != 0]
        return nonzero[0] if nonzero else 0.0

    def live_shapes(self, item: Lora) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of :meth:`live`."""
        return (item.factors.a.shape[1], self.rank), (self.rank, item.factors.b.shape[0])

    def live(self, item: Lora) -> tuple[mx.array, mx.array]:
        """``lora_a`` (in, R) and ``lora_b`` (R, out) of ``item``, float32, for :attr:`scale`."""
        a, b = item.factors.read()
        if item.factors.scale != self.scale:
            b = b * (item.factors.scale / self.scale)
        missing = self.rank - item.factors.rank
        return mx.pad(a.T, [(0, 0), (0, missing)]), mx.pad(b.T, [(0, missing), (0, 0)])


def check_effect(items: tuple[Lora, ...]) -> list[str]:
    """Read every factor once: refuse values that are not finite, adapters without effect and cut-off saves.

    Returns:
        Warnings.
    """
    problems: list[str] = []
    no_effect = 0
    mostly_zero = 0
    for item in items:
        try:
            a, b = item.factors.read_trained()
        except InvalidInputError as error:
            problems.append(str(error))
            continue
        rows = (b != 0).any(axis=1)
        filled = float(rows.mean())
        if filled == 0 or not bool((a != 0).any().item()):
            no_effect += 1
        elif filled <= 0.5 and b.shape[0] > 1:
            mostly_zero += 1
    if problems:
        raise InvalidInputError("\n".join(problems))
    if not items:
        return []
    first = items[0].factors.b
    if no_effect == len(items):
        raise InvalidInputError(
            f"{first.place}: A or B is zero in all {len(items)} modules, so the adapter does nothing; "
            "it was saved before training, or its save failed"
        )
    if mostly_zero > len(items) / 2:
        raise InvalidInputError(
            f"{first.place}: half or more of the rows of lora_B are exactly zero in {mostly_zero} of "
            f"{len(items)} modules; it looks like one worker's part of a sharded save, save it again unsharded"
        )
    return [f"A or B is zero in {no_effect} of {len(items)} modules"] if no_effect else []
