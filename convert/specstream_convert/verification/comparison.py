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
from specstream_convert.changes.lora import LoraSet
from specstream_convert.verification.reference import Array, Reference, load, rows_of, to_numpy
from specstream_convert.writing.outputs import OutputTensor
from specstream_convert.writing.quantized import PARTS, Quantized
from specstream_mlx.errors import VerificationError
from specstream_mlx.formats.messages import listing
from specstream_mlx.formats.safetensors import dtype_name, mlx_dtype

ROUNDING = {"F32": 2.0**-24, "BF16": 2.0**-8, "F16": 2.0**-11}
QUANTIZED_APART = 0.05  # how far two quantisations of nearly equal weights may lie apart, in units of their own error


@dataclass(frozen=True)
class Expected:
    """What the output must be: the inputs and the decisions, from which the reference is computed anew."""

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
        self._problems = [f"{name}: not in the output" for name in sorted(wanted - set(self._written))]
        self._problems += [f"{name}: in the output without reason" for name in sorted(set(self._written) - wanted)]
        self._checked: set[str] = set()
        self._largest, self._share = 0.0, 0.0

    def parameters(self) -> list[str]:
        """The names of the unquantised model's parameters."""
        return [name for name in self._expected.base.parameters if name in self._outputs]

    def blocks(self, name: str, only: Array | None = None) -> Iterator[tuple[slice, mx.array]]:
        """Slices of rows of a parameter and their float32 reference; each is compared with the output.

        With ``only``, row numbers, just the blocks that hold one of them come, and nothing is compared.
        """
        shape, live = self._expected.base.parameters[name], self._live.get(name, ())
        value_of = self._value_of(name, compare=only is None)
        reference = Reference(shape, lambda rows: to_numpy(value_of(rows)), ())
        changed = None
        if live:
            plain = self._value_of(name, compare=False)
            changed = Reference(shape, lambda rows: to_numpy(plain(rows)), live)
        for rows in reference.blocks():
            if only is not None and not ((only >= rows.start) & (only < rows.stop)).any():
                continue
            value = value_of(rows)
            if changed is not None:
                value = mx.array(changed.rows(rows)[0].astype(np.float32))
            yield rows, value
            if only is None:
                self._count(value.nbytes)
        if only is None:
            self._checked.add(name)
        mx.clear_cache()

    def finish(self) -> dict[str, Any]:
        """The figures for the report.

        Raises:
            VerificationError: a tensor differs by more than rounding explains, or was never compared.
        """
        missed = sorted(set(self.parameters()) - self._checked)
        self._problems += [f"{name}: was not compared" for name in missed]
        if self._problems:
            raise VerificationError(listing(f"the output is wrong: {problem}" for problem in self._problems))
        return {
            "checked": len(self._written),
            "merged": sum(bool(output.changes) for output in self._outputs.values()),
            "max_abs_error": self._largest,
            "max_share_of_rounding_bound": self._share,
        }

    def _value_of(self, name: str, *, compare: bool) -> Callable[[slice], mx.array]:
        """What gives float32 rows of a parameter as the output must hold it, after comparing them with the output."""
        module = name.removesuffix(".weight")
        output, quantized = self._outputs[name], self._expected.quantized
        if name.endswith(".weight") and f"{module}.scales" in self._outputs:
            parts = [part for part in PARTS if f"{module}.{part}" in self._outputs]
            return self._copied(module, parts, compare)
        if quantized is not None and name in quantized.layers:
            return self._quantized(output, quantized, compare)
        return self._plain(output, compare)

    def _plain(self, output: OutputTensor, compare: bool) -> Callable[[slice], mx.array]:
        wanted_of, found = _rounded(output), self._found([output.name])[0] if compare else None
        if found is not None and (dtype_name(found), found.shape) != (output.dtype, output.shape):
            self._problems.append(
                f"{output.name}: written as {dtype_name(found)} {tuple(found.shape)}, "
                f"expected {output.dtype} {output.shape}"
            )
            found = None

        def value(rows: slice) -> mx.array:
            plain, wanted, allowed = wanted_of(rows)
            if found is not None and _is_exact(output):
                self._same(output.name, found[rows], plain)
            elif found is not None:
                error = np.abs(to_numpy(found[rows]).astype(np.float64) - wanted)
                bound = 1.01 * ROUNDING[output.dtype] * np.abs(wanted) + allowed
                bound += 2.0**-25 if output.dtype == "F16" else 1e-37
                largest, share = float(error.max()), float((error / bound).max())
                self._largest, self._share = max(self._largest, largest), max(self._share, share)
                if not share <= 1:
                    self._problem(
                        output.name,
                        f"differs from the float64 reference by {largest:.3g}, {share:.3g} times the rounding allowed",
                    )
            return plain.astype(mx.float32)

        return value

    def _quantized(self, output: OutputTensor, quantized: Quantized, compare: bool) -> Callable[[slice], mx.array]:
        how, names = quantized.layers[output.name], [entry.name for entry in quantized.entries[output.name]]
        wanted_of, found = _rounded(output), self._found(names) if compare else []

        def value(rows: slice) -> mx.array:
            plain = wanted_of(rows)[0]
            wanted = mx.quantize(plain, **how)
            value = _dequantized(wanted, how)
            held = [part[rows] for part in found if part is not None]
            if len(held) < len(names):
                return value
            if _is_exact(output):
                for part, name, right in zip(held, names, wanted, strict=True):
                    self._same(name, part, right)
            elif held:
                self._near(output, _dequantized(held, how), value, plain.astype(mx.float32))
            return value

        return value

    def _near(self, output: OutputTensor, found: mx.array, wanted: mx.array, plain: mx.array) -> None:
        """Compare two quantisations of rows that may differ in their last bits before it."""
        own, apart = (np.asarray(mx.abs(wanted - other)).astype(np.float64) for other in (plain, found))
        rounding = 4 * ROUNDING[output.dtype] * np.linalg.norm(np.asarray(plain), axis=-1)
        # One value that lay between two steps may have gone the other way; a row may have got another step.
        for axis, share in ((None, QUANTIZED_APART), (-1, 3.0)):
            allowed = share * np.linalg.norm(own, axis=axis) + 4 * own.max() + rounding.max()
            ratio = float((np.linalg.norm(apart, axis=axis) / np.maximum(allowed, 1e-37)).max())
            if not ratio <= 1:
                self._problem(
                    output.name, f"quantised to values {ratio:.3g} times as far from the reference as allowed"
                )
        self._largest = max(self._largest, float(apart.max()))

    def _copied(self, module: str, parts: list[str], compare: bool) -> Callable[[slice], mx.array]:
        """The packed weight of a base that is quantised already."""
        quantization = self._expected.base.config["quantization"]
        own = quantization.get(module)
        settings = own if isinstance(own, dict) else quantization
        how = {key: settings[key] for key in ("group_size", "bits", "mode") if key in settings}
        names = [f"{module}.{part}" for part in parts]
        readers = [rows_of(self._outputs[name].source) for name in names]
        found = self._found(names) if compare else [None] * len(names)
        self._checked |= set(names) if compare else set()

        def value(rows: slice) -> mx.array:
            held = [read(rows) for read in readers]
            for name, part, right in zip(names, found, held, strict=True):
                if part is not None:
                    self._same(name, part[rows], right)
            return _dequantized(held, how)

        return value

    def _found(self, names: list[str]) -> list[mx.array | None]:
        """Tensors of the output, None where there is none."""
        found = [load(self._written[name])[name] if name in self._written else None for name in names]
        mx.eval([value for value in found if value is not None])
        return found

    def _same(self, name: str, found: mx.array, wanted: mx.array) -> None:
        if found.dtype != wanted.dtype or not bool(mx.array_equal(found, wanted).item()):
            self._problem(name, "differs from the base although nothing changes it")

    def _problem(self, name: str, what: str) -> None:
        """Note the first problem of a tensor."""
        if not any(problem.startswith(f"{name}: ") for problem in self._problems):
            self._problems.append(f"{name}: {what}")


def _is_exact(output: OutputTensor) -> bool:
    """Whether nothing but a cast is done to the tensor, so that every bit of the output is known."""
    return not output.changes and not isinstance(output.source, DequantizedTensor)


def _rounded(output: OutputTensor) -> Callable[[slice], tuple[mx.array, Array, Array]]:
    """Rows of a tensor in the dtype it is written in; of a changed one also in float64, and the error allowed."""
    dtype = mlx_dtype(output.dtype)
    if _is_exact(output):
        read, nothing = rows_of(output.source), np.zeros(0)
        return lambda rows: (read(rows).astype(dtype), nothing, nothing)
    reference = Reference.of(output.source, output.changes)

    def rounded(rows: slice) -> tuple[mx.array, Array, Array]:
        wanted, allowed = reference.rows(rows)
        return mx.array(wanted.astype(np.float32)).astype(dtype), wanted, allowed

    return rounded


def _dequantized(parts: Sequence[mx.array], how: Mapping[str, Any]) -> mx.array:
    """The float32 values of rows of a quantised weight."""
    weight, scales = parts[:2]
    return mx.dequantize(weight, scales, parts[2] if len(parts) > 2 else None, **how).astype(mx.float32)
