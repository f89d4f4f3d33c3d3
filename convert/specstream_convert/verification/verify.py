"""The check of what was written: reload it with stock mlx-lm and compare it with the float32 reference.

The reference is made from the inputs once more, part by part: every part is compared with the output's tensors and then
run on sample tokens (``comparison.py``, ``forward.py``). The output is then opened by ``mlx_lm.utils.load_model`` and
run on the same tokens.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from specstream_convert.adapter.streams import StreamSource
from specstream_convert.base.model import Base
from specstream_convert.verification.comparison import Array, Comparison, Expected, load
from specstream_convert.verification.forward import output_logits, reference_logits
from specstream_mlx.errors import InvalidInputError, VerificationError
from specstream_mlx.formats.config import LORA_PREFIX, PREFIX
from specstream_mlx.formats.messages import refuse
from specstream_mlx.formats.safetensors import row_blocks

Progress = Callable[[str, int, int], None]
NUM_TOKENS = 16
LOGIT_TOLERANCE = {"F32": 1e-4, "BF16": 2e-3, "F16": 1e-3}
REFERENCE_TOLERANCE = {"F32": 1e-4, "BF16": 8e-2, "F16": 2e-2}


def verify_output(directory: Path, expected: Expected, progress: Progress | None = None) -> dict[str, Any]:
    """Compare the directory just written with the reference.

    Returns:
        The figures for the report.

    Raises:
        VerificationError: a tensor or a logit differs by more than rounding explains.
    """
    figures: dict[str, Any] = {}
    if (directory / "config.json").exists():
        figures |= _verify_model(directory, expected, progress)
    figures["adapters"] = _verify_adapters(directory, expected)
    figures["streams"] = _verify_streams(directory, expected.streams)
    return {name: figure for name, figure in figures.items() if figure is not None}


def _verify_model(directory: Path, expected: Expected, progress: Progress | None) -> dict[str, Any]:
    """Every tensor of ``model*.safetensors``, and the logits of sample tokens."""
    sizes = {name: 4 * math.prod(shape) for name, shape in expected.base.parameters.items()}
    total, done = 2 * sum(sizes.values()), 0  # every parameter is compared, and run in the output

    def count(num_bytes: int) -> None:
        nonlocal done
        done = min(total, done + num_bytes)
        if progress is not None:
            progress("verify", done, total)

    def count_layer(path: str) -> None:
        count(sum(size for name, size in sizes.items() if name.startswith(f"{path}.")))

    comparison = Comparison(directory, expected, count)
    num_tokens = min(NUM_TOKENS, expected.base.num_positions or NUM_TOKENS)
    tokens = sample_tokens(int(expected.base.config["vocab_size"]), num_tokens)
    wanted = reference_logits(expected.base, comparison, tokens)
    tensors = comparison.finish()
    found = output_logits(directory, tokens, live=expected.placement == "live", done=count_layer)
    count(total)
    difference = float(np.abs(found - wanted).max())
    tolerance = _tolerance(expected, LOGIT_TOLERANCE, 1e-2) * max(1.0, float(np.abs(wanted).max()))
    if not difference <= tolerance:
        raise VerificationError(
            f"the output is wrong: logits of the reloaded model differ from the float32 reference by {difference:.3g}, "
            f"allowed {tolerance:.3g}"
        )
    logits = {"tokens": len(tokens), "max_abs_difference": difference, "tolerance": tolerance}
    return {"tensors": tensors, "logits": logits}


def _tolerance(expected: Expected, table: dict[str, float], quantized: float) -> float:
    if expected.quantized is not None or expected.base.quantized:
        return quantized
    return max(table[output.dtype] for output in expected.outputs)


def _verify_adapters(directory: Path, expected: Expected) -> dict[str, Any] | None:
    """Live and sidecar LoRA: ``scale * lora_a @ lora_b`` must equal ``s * (B @ A).T``."""
    if expected.loras is None or expected.placement not in ("live", "sidecar"):
        return None
    live = expected.placement == "live"
    path = directory / ("adapters/adapters.safetensors" if live else "specstream.safetensors")
    held = {name: value for name, value in load(path).items() if live or not name.startswith(PREFIX)}
    largest, problems = 0.0, []
    prefix = "" if live else LORA_PREFIX
    for item in expected.loras.items:
        names = [f"{prefix}{item.module}.{side}" for side in ("lora_a", "lora_b")]
        if not set(names) <= set(held):
            problems.append(f"{item.module}: its LoRA is not in the output")
            continue
        (a, b), (lora_a, lora_b) = item.read(), (held.pop(name) for name in names)
        error, size = 0.0, 1e-30
        with mx.stream(mx.cpu):
            for rows in row_blocks(item.shape):
                left, right, ours = (a.T, b.T, lora_a) if item.embedding else (b, a, lora_b.T)
                other = lora_b if item.embedding else lora_a.T
                apart = expected.loras.scale * (ours[rows] @ other) - item.scale * (left[rows] @ right)
                error = max(error, float(np.asarray(mx.abs(apart)).max()))
                size = max(size, abs(item.scale) * float(np.asarray(mx.abs(left[rows]) @ mx.abs(right)).max()))
        largest = max(largest, error)
        if not error <= 2e-6 * size:
            problems.append(f"{item.module}: its LoRA differs from s*B@A by {error:.3g}")
        if item.magnitude is not None:
            m = held.pop(f"{item.module}.m", None)
            if m is None or not bool(mx.array_equal(m, item.magnitude.read_float32()).item()):
                problems.append(f"{item.module}: its DoRA magnitude differs from the input")
    problems += [f"{name}: in the output without reason" for name in sorted(held)]
    refuse([f"the output is wrong: {problem}" for problem in problems], VerificationError)
    return {"checked": len(expected.loras.items), "max_abs_error": largest}


def _verify_streams(directory: Path, streams: StreamSource) -> dict[str, Any] | None:
    if not streams.tensors:
        return None
    held = load(directory / "specstream.safetensors")
    for name, source in streams.tensors.items():
        found = held.get(PREFIX + name)
        if found is None or not bool(mx.array_equal(found, source.read()).item()):
            raise VerificationError(f"the output is wrong: {PREFIX}{name} differs from the input")
    return {"checked": len(streams.tensors), "max_abs_error": 0.0}


def sample_tokens(vocab_size: int, count: int = NUM_TOKENS) -> Array:
    """The token ids of the comparison, the same every time."""
    return np.random.default_rng(0).integers(0, vocab_size, count)


def compare_reference_logits(directory: Path, path: Path, expected: Expected) -> dict[str, Any]:
    """Compare with logits computed elsewhere: an npz of ``tokens`` (L,) and ``logits`` (L, V)."""
    tokens, wanted = read_reference_logits(path, expected.base)
    found = output_logits(directory, tokens, live=expected.placement == "live")
    difference = float(np.abs(found - wanted).max())
    quantized = expected.quantized is not None or expected.base.quantized
    figure: dict[str, Any] = {
        "tokens": len(tokens),
        "max_abs_difference": difference,
        "same_argmax": float((found.argmax(-1) == wanted.argmax(-1)).mean()),
    }
    if quantized:
        return figure | {"tolerance": None}
    tolerance = _tolerance(expected, REFERENCE_TOLERANCE, 0.0) * max(1.0, float(np.abs(wanted).max()))
    if not difference <= tolerance:
        raise VerificationError(
            f"{path}: logits of the reloaded model differ from these by {difference:.3g}, allowed {tolerance:.3g}; "
            "they belong to another model, or the conversion is wrong"
        )
    return figure | {"tolerance": tolerance}


def read_reference_logits(path: Path, base: Base) -> tuple[Array, Array]:
    """``tokens`` and ``logits`` of an npz, checked against the base; nothing pickled is read."""
    vocab_size = int(base.config["vocab_size"])
    if path.exists() and not path.is_file():
        raise InvalidInputError(f"{path}: not a regular file; give the npz file itself")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            missing = [name for name in ("tokens", "logits") if name not in held]
            if missing:
                raise InvalidInputError(
                    f"{path}: has no array {' or '.join(missing)}; it needs tokens (L,), logits (L, V)"
                )
            tokens, logits = held["tokens"], held["logits"]
    except InvalidInputError:
        raise
    except FileNotFoundError as error:
        raise InvalidInputError(f"{path}: file not found") from error
    except Exception as error:  # np.load raises whatever the damaged zip provokes
        reason = " ".join(str(error).split())
        raise InvalidInputError(f"{path}: not a readable npz file ({reason})") from error
    if tokens.ndim != 1 or not len(tokens) or tokens.dtype.kind not in "iu" or logits.dtype.kind != "f":
        raise InvalidInputError(f"{path}: expected integer tokens (L,) and float logits (L, V)")
    if base.num_positions is not None and len(tokens) > base.num_positions:
        raise InvalidInputError(f"{path}: {len(tokens)} tokens, the model has {base.num_positions} learned positions")
    if logits.shape != (len(tokens), vocab_size):
        raise InvalidInputError(f"{path}: logits have shape {logits.shape}, expected {(len(tokens), vocab_size)}")
    if tokens.min() < 0 or tokens.max() >= vocab_size or not np.isfinite(logits).all():
        raise InvalidInputError(f"{path}: token ids outside the vocabulary, or logits that are not finite")
    return tokens.astype(np.int64), logits.astype(np.float32)
