"""LoRA modules mapped onto the base, and the form in which mlx-lm holds them live: one rank, one scale.

    PEFT  A (r, in), B (out, r)      y + s * B(A(x)); of an embedding A (r, rows), B (width, r)
    MLX   lora_a = A.T (in, R), lora_b = B.T (R, out), one scale for all modules; DoRA's magnitude is m (out,)

Modules of a smaller rank are padded with zeros to ``R``; a module's own scale is folded into its ``lora_b``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx

from specstream_convert.changes.kinds import Change, Lora
from specstream_mlx.errors import InvalidInputError

UNEVEN_BITS = (3, 5, 6)  # 32 is no multiple: mlx-lm's DoRALinear takes the size of its input to be another


def merged_changes(loras: tuple[Lora, ...], others: Mapping[str, tuple[Change, ...]]) -> dict[str, tuple[Change, ...]]:
    """All changes by tensor, in the order in which they apply: LoRA comes after whole tensors and rows."""
    changes = dict(others)
    for item in loras:
        changes[item.weight] = changes.get(item.weight, ()) + item.merged()
    return changes


@dataclass(frozen=True)
class LoraSet:
    """All LoRA modules, with the one rank and the one scale that the live form gives them."""

    items: tuple[Lora, ...]

    @property
    def rank(self) -> int:
        return max(item.rank for item in self.items)

    @property
    def scale(self) -> float:
        """The scale of the first module; the others' difference from it goes into their ``lora_b``."""
        nonzero = [item.scale for item in self.items if item.scale != 0]
        return nonzero[0] if nonzero else 0.0

    @property
    def dora(self) -> bool:
        """Whether the modules are DoRA; PEFT has it for all of an adapter's modules or for none."""
        return any(item.magnitude is not None for item in self.items)

    def live_shapes(self, item: Lora) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of :meth:`live`."""
        return (item.a.shape[1], self.rank), (self.rank, item.b.shape[0])

    def live(self, item: Lora) -> tuple[mx.array, mx.array]:
        """``lora_a`` (in, R) and ``lora_b`` (R, out) of ``item``, float32, for :attr:`scale`."""
        a, b = item.read()
        if item.scale != self.scale:
            b = b * (item.scale / self.scale)
        missing = self.rank - item.rank
        return mx.pad(a.T, [(0, 0), (0, missing)]), mx.pad(b.T, [(0, missing), (0, 0)])

    def live_problems(self, bits: Callable[[str], int | None]) -> list[str]:
        """Why mlx-lm cannot hold the modules live; ``bits`` says how a module is quantised, if it is."""
        if not self.dora:
            return []
        problems = []
        for item in self.items:
            if item.embedding:
                problems.append(
                    f"{item.a.place}: mlx-lm's DoRA of an embedding has one magnitude per token, PEFT's has "
                    "one per column"
                )
            elif bits(item.module) in UNEVEN_BITS:
                problems.append(
                    f"{item.a.place}: mlx-lm cannot put DoRA on {item.module}, quantised with {bits(item.module)} bits"
                )
        return problems


def check_effect(items: tuple[Lora, ...], alone: bool = True) -> list[str]:
    """Read every factor once: refuse values that are not finite, adapters without effect and cut-off saves.

    ``alone`` says that the adapter changes nothing but by these modules.

    Returns:
        Warnings.
    """
    problems: list[str] = []
    no_effect = 0
    mostly_zero = 0
    for item in items:
        try:
            a, b = item.read_trained()
            for tensor in (item.magnitude, item.bias):
                if tensor is not None:
                    tensor.read_float32()
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
    first = items[0].b
    if no_effect == len(items) and alone:
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
