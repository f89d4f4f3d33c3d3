"""LoRA factors brought to MLX's form: merged into a weight, or stacked to one rank and one scale.

    PEFT  A (r, in), B (out, r)      y + s * B(A(x))
    MLX   lora_a = A.T (in, R), lora_b = B.T (R, out), one scale for all modules
    merge W' = W + s * B @ A (out, in), in float32, then cast once

Modules of a smaller rank are padded with zeros to ``R``; a module's own scale is folded into its ``lora_b``.
"""

from dataclasses import dataclass

import mlx.core as mx

from specstream_convert.adapter import LoraPair
from specstream_convert.messages import at
from specstream_convert.safetensors_io import mlx_dtype
from specstream_mlx.errors import InvalidInputError


@dataclass(frozen=True)
class Lora:
    """One LoRA-adapted linear layer of the base."""

    module: str  # mlx-lm's path
    pair: LoraPair
    scale: float

    def read(self) -> tuple[mx.array, mx.array]:
        """``A`` (r, in) and ``B`` (out, r) in float32."""
        return self.pair.file.read_float32(self.pair.a), self.pair.file.read_float32(self.pair.b)


@dataclass(frozen=True)
class LoraSet:
    """All adapted layers, with the one rank and the one scale that the live form gives them."""

    items: tuple[Lora, ...]

    @property
    def rank(self) -> int:
        return max(item.pair.rank for item in self.items)

    @property
    def scale(self) -> float:
        """The scale of the first module; the others' difference from it goes into their ``lora_b``."""
        nonzero = [item.scale for item in self.items if item.scale != 0]
        return nonzero[0] if nonzero else 0.0

    def by_weight(self) -> dict[str, Lora]:
        """The base tensor that each item changes."""
        return {f"{item.module}.weight": item for item in self.items}

    def live(self, item: Lora) -> tuple[mx.array, mx.array]:
        """``lora_a`` (in, R) and ``lora_b`` (R, out) of ``item``, float32, for :attr:`scale`."""
        a, b = item.read()
        if item.scale != self.scale:
            b = b * (item.scale / self.scale)
        missing = self.rank - item.pair.rank
        return mx.pad(a.T, [(0, 0), (0, missing)]), mx.pad(b.T, [(0, missing), (0, 0)])


def merged(weight: mx.array, item: Lora) -> mx.array:
    """``W + s * B @ A`` in float32, computed on the CPU whose products are never rounded to fewer bits."""
    a, b = item.read()
    with mx.stream(mx.cpu):
        result = weight.astype(mx.float32) + item.scale * (b @ a)
        mx.eval(result)
    return result


def cast(value: mx.array, dtype: str, place: str) -> mx.array:
    """Cast to ``dtype``, refusing a finite value that the target cannot hold."""
    target = mlx_dtype(dtype)
    if value.dtype == target:
        return value
    result = value.astype(target)
    if not bool(mx.isfinite(result).all().item()):
        raise InvalidInputError(f"{place}: values above the range of {dtype}; choose --dtype bfloat16 or float32")
    return result


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
            a, b = item.read()
        except InvalidInputError as error:
            problems.append(str(error))
            continue
        rows = (b != 0).any(axis=1)
        filled = float(rows.mean())
        if filled == 0 or not bool((a != 0).any().item()):
            no_effect += 1
        elif filled <= 0.5 and item.pair.shape[0] > 1:
            mostly_zero += 1
    if problems:
        raise InvalidInputError("\n".join(problems))
    if not items:
        return []
    first = items[0].pair
    if no_effect == len(items):
        raise InvalidInputError(
            f"{at(first.file.path, first.b)}: A or B is zero in all {len(items)} modules, so the adapter does nothing; "
            "it was saved before training, or its save failed"
        )
    if mostly_zero > len(items) / 2:
        raise InvalidInputError(
            f"{at(first.file.path, first.b)}: half or more of the rows of lora_B are exactly zero in {mostly_zero} of "
            f"{len(items)} modules; it looks like one worker's part of a sharded save, save it again unsharded"
        )
    return [f"A or B is zero in {no_effect} of {len(items)} modules"] if no_effect else []
