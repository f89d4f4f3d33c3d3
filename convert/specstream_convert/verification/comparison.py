"""The tensors of an output beside what they must be, block of rows by block of rows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from specstream_convert.adapter.streams import StreamSource
from specstream_convert.base.dequantize import DequantizedTensor
from specstream_convert.base.model import Base
from specstream_convert.changes.kinds import changed
from specstream_convert.changes.lora import LoraSet
from specstream_convert.writing.outputs import OutputTensor
from specstream_convert.writing.quantized import PARTS, Quantized
from specstream_mlx.errors import VerificationError
from specstream_mlx.formats.messages import refuse
from specstream_mlx.formats.safetensors import dtype_name, mlx_dtype, row_blocks

Array = np.ndarray[Any, Any]
ROUNDING = {"F32": 2.0**-24, "BF16": 2.0**-8, "F16": 2.0**-11}
Parts = tuple[mx.array, ...]
PRODUCTS = 8 * 2.0**-23  # by how much two orders of summation may differ, in units of the largest value
FEW = 1 << 18  # values that are compared together: there are several copies of them
QUANTIZED_APART = 0.05  # how far two quantisations of nearly equal weights may lie apart, in units of their own error


@dataclass(frozen=True)
class Expected:
    """What the output must be: the inputs and the decisions, from which the float32 reference is computed anew."""

    base: Base
    loras: LoraSet | None
    outputs: tuple[OutputTensor, ...]
    placement: str
    quantized: Quantized | None  # by this conversion
    streams: StreamSource


class Comparison:
    """Gives the float32 reference of every parameter, and compares the output with it on the way.

    Args:
        directory: the output.
        expected: what it must hold.
        count: is told the bytes of every block that has been compared.
    """

    def __init__(self, directory: Path, expected: Expected, count: Callable[[int], None]) -> None:
        self._expected = expected
        self._outputs = {output.name: output for output in expected.outputs}
        self._count = count
        self._written = {name: path for path in sorted(directory.glob("model*.safetensors")) for name in load(path)}
        live = expected.loras.items if expected.loras is not None and expected.placement == "live" else ()
        self._live = {item.weight: item.merged() for item in live}
        wanted = set(self._outputs)
        if expected.quantized is not None:
            wanted = {entry.name for entries in expected.quantized.entries.values() for entry in entries}
        self._problems = dict.fromkeys(sorted(wanted - set(self._written)), "not in the output")
        self._problems |= dict.fromkeys(sorted(set(self._written) - wanted), "in the output without reason")
        self._checked: set[str] = set()

    def parameters(self) -> list[str]:
        """The names of the unquantised model's parameters."""
        return [name for name in self._expected.base.parameters if name in self._outputs]

    def blocks(self, name: str, *, compare: bool = True) -> Iterator[tuple[slice, mx.array]]:
        """Slices of rows of a parameter and their float32 reference; with ``compare``, the output is held beside it."""
        rows_of = _Rows(self._expected.base.parameters[name], lambda: self._rows(name, compare))
        live = self._live.get(name)
        values = changed(rows_of, live) if live else (value for _, value in rows_of.blocks())
        for rows, value in zip(row_blocks(rows_of.shape), values, strict=True):
            yield rows, value
            if compare:
                self._count(value.nbytes)
        if compare:
            self._checked.add(name)
        mx.clear_cache()

    def finish(self) -> dict[str, Any]:
        """The figures for the report.

        Raises:
            VerificationError: a tensor differs by more than rounding explains, or was never compared.
        """
        missed = sorted(set(self.parameters()) - self._checked)
        problems = [f"{name}: {what}" for name, what in self._problems.items()]
        problems += [f"{name}: was not compared" for name in missed]
        refuse([f"the output is wrong: {problem}" for problem in problems], VerificationError)
        merged = sum(bool(output.changes) for output in self._outputs.values())
        return {"checked": len(self._written), "merged": merged}

    def _rows(self, name: str, compare: bool) -> Iterator[tuple[slice, mx.array]]:
        """Float32 rows of a parameter as the output must hold it, compared with the output before they are given."""
        output, (names, how, wanted) = self._outputs[name], self._wanted(name)
        self._checked |= set(names) if compare else set()
        found = [load(self._written[part])[part] for part in names if compare and part in self._written]
        mx.eval(found)
        exact = not output.changes and not isinstance(output.source, DequantizedTensor)
        for rows, (plain, parts) in zip(row_blocks(self._expected.base.parameters[name]), wanted, strict=True):
            value = _float32(parts, how)
            held = [part[rows] for part in found]
            if len(held) == len(names):
                for part, one, right in zip(names, held, parts, strict=True):
                    if one.dtype != right.dtype or one.shape != right.shape:
                        wrong = ", expected ".join(f"{dtype_name(array)} {array.shape}" for array in (one, right))
                        self._problem(part, f"written as {wrong}")
                    elif exact and not bool(mx.array_equal(one, right).item()):
                        self._problem(part, "differs from the base although nothing changes it")
                if not exact and not self._problems.keys() & set(names):
                    for few in row_blocks(value.shape, FEW):
                        one = _float32([part[few] for part in held], how)
                        self._near(output, one, value[few], plain[few].astype(mx.float32))
            yield rows, value

    def _wanted(self, name: str) -> tuple[list[str], dict[str, Any] | None, Iterator[tuple[mx.array, Parts]]]:
        """What a parameter is written as, how that is quantised, and its rows before quantisation and as written."""
        output, quantized, module = self._outputs[name], self._expected.quantized, name.removesuffix(".weight")
        if name.endswith(".weight") and f"{module}.scales" in self._outputs:  # the base's own quantisation
            settings = self._expected.base.config["quantization"]
            own = settings[module] if isinstance(settings.get(module), dict) else settings
            names = [f"{module}.{part}" for part in PARTS if f"{module}.{part}" in self._outputs]
            held = [self._outputs[part].source.read() for part in names]
            how = {key: own[key] for key in ("group_size", "bits", "mode") if key in own}
            cut = (tuple(part[rows] for part in held) for rows in row_blocks(self._expected.base.parameters[name]))
            return names, how, ((parts[0], parts) for parts in cut)
        values = changed(output.source, output.changes) if output.changes else _stored(output)
        plain = (value.astype(mlx_dtype(output.dtype)) for value in values)
        if quantized is None or name not in quantized.layers:
            return [name], None, ((value, (value,)) for value in plain)
        how = quantized.layers[name]
        names = [entry.name for entry in quantized.entries[name]]
        return names, how, ((value, tuple(mx.quantize(value, **how))) for value in plain)

    def _near(self, output: OutputTensor, found: mx.array, wanted: mx.array, plain: mx.array) -> None:
        """Compare rows whose sums may have been taken in another order before they were rounded, or quantised."""
        apart, own = (np.asarray(mx.abs(wanted - other)) for other in (found, plain))
        size = np.abs(np.asarray(plain))
        rounding = 2.01 * ROUNDING[output.dtype] * size + PRODUCTS * size.max() + 1e-37
        ratio = float((apart / (rounding + 2.0**-25 * (output.dtype == "F16"))).max())
        if own.any():  # quantised: a value between two steps may have gone the other way, a row may have another step
            limits = ((None, QUANTIZED_APART), (-1, 3.0))
            allowed = 4 * own.max() + 2 * np.linalg.norm(rounding, axis=-1).max()
            ratio = max(
                float((np.linalg.norm(apart, axis=axis) / (share * np.linalg.norm(own, axis=axis) + allowed)).max())
                for axis, share in limits
            )
        if not ratio <= 1:
            self._problem(output.name, f"differs from the float32 reference by {ratio:.3g} times what rounding allows")

    def _problem(self, name: str, what: str) -> None:
        """Note the first problem of a tensor."""
        self._problems.setdefault(name, what)


@dataclass(frozen=True)
class _Rows:
    """A tensor given in blocks of rows, as ``changed`` reads it."""

    shape: tuple[int, ...]
    read: Callable[[], Iterator[tuple[slice, mx.array]]]

    def blocks(self, *, finite: bool = False) -> Iterator[tuple[slice, mx.array]]:
        return self.read()


def load(path: Path) -> dict[str, mx.array]:
    """``mx.load`` of a safetensors file: lazy arrays."""
    tensors: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
    return tensors


def _stored(output: OutputTensor) -> Iterator[mx.array]:
    return (value for _, value in output.source.blocks())


def _float32(parts: Sequence[mx.array], how: Mapping[str, Any] | None) -> mx.array:
    """The float32 values of rows, dequantised where they are quantised."""
    if how is None:
        return parts[0].astype(mx.float32)
    weight, scales = parts[:2]
    return mx.dequantize(weight, scales, parts[2] if len(parts) > 2 else None, **how).astype(mx.float32)
