"""The check of what was written: reload it with stock mlx-lm and compare it with a reference made another way.

The reference (``reference.py``) reads the inputs with ``mx.load``, works in NumPy float64 and runs layer by layer; the
output is opened by ``mlx_lm.utils.load_model``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_attention_mask
from mlx_lm.utils import load_adapters, load_model

from specstream_convert.base import Base
from specstream_convert.lora import LoraSet
from specstream_convert.messages import listing
from specstream_convert.outputs import OutputTensor
from specstream_convert.reference import Array, Reference, factors64, load, read, to_numpy
from specstream_convert.safetensors_io import dtype_name, mlx_dtype
from specstream_convert.streams_in import StreamSource
from specstream_mlx.config import LORA_PREFIX, PREFIX
from specstream_mlx.errors import InvalidInputError, VerificationError
from specstream_mlx.families import family_of, model_classes

NUM_TOKENS = 16
WHOLE_MODEL_BYTES = 2 << 30  # above this the reloaded model is run layer by layer too
ROUNDING = {"F32": 2.0**-24, "BF16": 2.0**-8, "F16": 2.0**-11}
PARTS = ("weight", "scales", "biases")  # of a quantised layer
LOGIT_TOLERANCE = {"F32": 1e-4, "BF16": 2e-3, "F16": 1e-3}
REFERENCE_TOLERANCE = {"F32": 1e-4, "BF16": 8e-2, "F16": 2e-2}


@dataclass(frozen=True)
class Expected:
    """What the output must be: the inputs and the decisions, from which the reference is computed anew."""

    base: Base
    loras: LoraSet | None
    outputs: tuple[OutputTensor, ...]
    placement: str
    quantization: dict[str, Any] | None  # of this conversion
    streams: StreamSource


def verify_output(
    directory: Path, expected: Expected, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Compare the directory just written with the reference.

    Returns:
        The figures for the report.

    Raises:
        VerificationError: a tensor or a logit differs by more than rounding explains.
    """
    figures: dict[str, Any] = {}
    if (directory / "config.json").exists():
        if expected.quantization is None:
            figures["tensors"] = _verify_tensors(directory, expected, progress)
        figures["logits"] = _verify_logits(directory, expected)
    figures["adapters"] = _verify_adapters(directory, expected)
    figures["streams"] = _verify_streams(directory, expected.streams)
    return {name: figure for name, figure in figures.items() if figure is not None}


def _verify_tensors(directory: Path, expected: Expected, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
    written = {name: path for path in sorted(directory.glob("model*.safetensors")) for name in load(path)}
    wanted = {output.name: output for output in expected.outputs}
    problems = [f"{name}: not in the output" for name in sorted(set(wanted) - set(written))]
    problems += [f"{name}: in the output without reason" for name in sorted(set(written) - set(wanted))]
    largest, ratio = 0.0, 0.0
    for i, name in enumerate(sorted(set(wanted) & set(written))):
        output, found = wanted[name], load(written[name])[name]
        mx.eval(found)
        if dtype_name(found) != output.dtype:
            problems.append(f"{name}: written as {dtype_name(found)}, expected {output.dtype}")
        elif not output.changes:
            if not bool(mx.array_equal(found, read(output.source).astype(mlx_dtype(output.dtype))).item()):
                problems.append(f"{name}: differs from the base although nothing changes it")
        else:
            error, share = _error(found, Reference(read(output.source), output.changes))
            largest, ratio = max(largest, error), max(ratio, share)
            if not share <= 1:
                problems.append(
                    f"{name}: differs from the float64 reference by {error:.3g}, {share:.3g} times the rounding allowed"
                )
        mx.clear_cache()
        if progress is not None:
            progress(i + 1, len(wanted))
    if problems:
        raise VerificationError(listing(f"the output is wrong: {problem}" for problem in problems))
    return {
        "checked": len(wanted),
        "merged": sum(bool(output.changes) for output in expected.outputs),
        "max_abs_error": largest,
        "max_share_of_rounding_bound": ratio,
    }


def _error(found: mx.array, reference: Reference) -> tuple[float, float]:
    """The largest error of a tensor against its reference, absolute and as a share of the rounding allowed."""
    if tuple(found.shape) != reference.shape:
        return float("inf"), float("inf")
    dtype = dtype_name(found)
    largest, share = 0.0, 0.0
    for rows, wanted, allowed in reference.blocks():
        error = np.abs(to_numpy(found[rows]).astype(np.float64) - wanted)
        bound = 1.01 * ROUNDING[dtype] * np.abs(wanted) + allowed + (2.0**-25 if dtype == "F16" else 1e-37)
        largest, share = max(largest, float(error.max())), max(share, float((error / bound).max()))
    return largest, share


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
        a, b = factors64(item.factors)
        scale = item.factors.scale
        names = [f"{prefix}{item.module}.{side}" for side in ("lora_a", "lora_b")]
        if not set(names) <= set(held):
            problems.append(f"{item.module}: its LoRA is not in the output")
            continue
        lora_a, lora_b = (to_numpy(held.pop(name)).astype(np.float64) for name in names)
        wanted = scale * (b @ a)
        product = lora_a @ lora_b if item.factors.embedding else (lora_a @ lora_b).T
        error = float(np.abs(expected.loras.scale * product - wanted).max())
        largest = max(largest, error)
        if not error <= 1e-6 * max(1e-30, abs(scale) * float((np.abs(b) @ np.abs(a)).max())):
            problems.append(f"{item.module}: its LoRA differs from s*B@A by {error:.3g}")
    problems += [f"{name}: in the output without reason" for name in sorted(held)]
    if problems:
        raise VerificationError(listing(f"the output is wrong: {problem}" for problem in problems))
    return {"checked": len(expected.loras.items), "max_abs_error": largest}


def _verify_streams(directory: Path, streams: StreamSource) -> dict[str, Any] | None:
    if not streams.tensors:
        return None
    held = load(directory / "specstream.safetensors")
    for name, source in streams.tensors.items():
        files = [to_numpy(source.oriented(load(source.file.path)[tensor])).reshape(-1) for tensor in source.names]
        found = held.get(PREFIX + name)
        if found is None or not np.array_equal(to_numpy(found).reshape(-1), np.concatenate(files)):
            raise VerificationError(f"the output is wrong: {PREFIX}{name} differs from the input")
    return {"checked": len(streams.tensors), "max_abs_error": 0.0}


def sample_tokens(vocab_size: int, count: int = NUM_TOKENS) -> Array:
    """The token ids of the comparison, the same every time."""
    return np.random.default_rng(0).integers(0, vocab_size, count)


def _verify_logits(directory: Path, expected: Expected) -> dict[str, Any]:
    base = expected.base
    tokens = sample_tokens(int(base.config["vocab_size"]), min(NUM_TOKENS, base.num_positions or NUM_TOKENS))
    found = output_logits(directory, tokens, live=expected.placement == "live")
    wanted = reference_logits(expected, tokens)
    difference = float(np.abs(found - wanted).max())
    scale = max(1.0, float(np.abs(wanted).max()))
    tolerance = _tolerance(expected, LOGIT_TOLERANCE, 1e-2) * scale
    if not difference <= tolerance:
        raise VerificationError(
            f"the output is wrong: logits of the reloaded model differ from the float32 reference by {difference:.3g}, "
            f"allowed {tolerance:.3g}"
        )
    return {"tokens": len(tokens), "max_abs_difference": difference, "tolerance": tolerance}


def _tolerance(expected: Expected, table: dict[str, float], quantized: float) -> float:
    if expected.quantization is not None or expected.base.quantized:
        return quantized
    return max(table[output.dtype] for output in expected.outputs)


def output_logits(directory: Path, tokens: Array, *, live: bool) -> Array:
    """Logits (L, V) of the directory as mlx-lm opens it, computed in float32."""
    try:
        model, _ = load_model(directory, lazy=True, get_model_classes=model_classes)
        if live:
            model = load_adapters(model, str(directory / "adapters"))
    except (ValueError, TypeError, KeyError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise VerificationError(f"the output is wrong: mlx-lm does not open it ({reason})") from error
    model.eval()
    model.set_dtype(mx.float32)
    total = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    ids = mx.array(tokens)[None]
    logits = model(ids) if total <= WHOLE_MODEL_BYTES else _by_layers(model, ids, lambda module, prefix: None)
    return np.array(logits[0].astype(mx.float32))


def reference_logits(expected: Expected, tokens: Array) -> Array:
    """Logits (L, V) of the independently merged reference: float32 arithmetic, one layer in memory at a time."""
    base = expected.base
    model_class, args_class = model_classes(base.config)
    model = model_class(args_class.from_dict(base.config))
    model.eval()
    outputs = {output.name: output for output in expected.outputs}
    items = expected.loras.items if expected.loras is not None and expected.placement == "live" else ()
    live = {item.weight: item.merged() for item in items}
    quantizable = {f"{name}.weight" for name, module in model.named_modules() if hasattr(module, "to_quantized")}

    def fill(module: nn.Module, prefix: str) -> None:
        values = []
        for name, _ in tree_flatten(module.parameters()):
            quantized = expected.quantization is not None and f"{prefix}{name}" in quantizable
            value = _reference_tensor(outputs[f"{prefix}{name}"], outputs, expected, quantized)
            if f"{prefix}{name}" in live:
                value = Reference(value, live[f"{prefix}{name}"]).float32()
            values.append((name, value))
        module.load_weights(values)

    return np.array(_by_layers(model, mx.array(tokens)[None], fill)[0])


def _reference_tensor(
    output: OutputTensor, outputs: dict[str, OutputTensor], expected: Expected, quantized: bool
) -> mx.array:
    """The float32 value that one tensor of the output stands for."""
    value, module = read(output.source), output.name.removesuffix(".weight")
    if output.name.endswith(".weight") and f"{module}.scales" in outputs:
        return _dequantized(module, outputs, expected.base.config["quantization"]).astype(mx.float32)
    if output.changes:
        value = Reference(value, output.changes).float32()
    value = value.astype(mlx_dtype(output.dtype))
    if quantized:
        assert expected.quantization is not None
        how = {key: expected.quantization[key] for key in ("group_size", "bits", "mode")}
        if value.shape[-1] % how["group_size"] == 0:
            value = mx.dequantize(*mx.quantize(value, **how), **how)
    return value.astype(mx.float32)


def _dequantized(module: str, outputs: dict[str, OutputTensor], quantization: dict[str, Any]) -> mx.array:
    own = quantization.get(module)
    how = own if isinstance(own, dict) else quantization
    settings = {key: how[key] for key in ("group_size", "bits", "mode") if key in how}
    held = {part: read(outputs[name].source) for part in PARTS if (name := f"{module}.{part}") in outputs}
    return mx.dequantize(held["weight"], held["scales"], held.get("biases"), **settings)


def _by_layers(model: nn.Module, ids: mx.array, fill: Callable[[nn.Module, str], None]) -> mx.array:
    """Logits (1, L, V): run the model one part at a time, letting ``fill`` load each part and dropping it after."""
    family = family_of(model, model.model_type)

    def inside(name: str, paths: tuple[str, ...]) -> bool:
        return any(name == path or name.startswith(f"{path}.") for path in paths)

    # No module of a block may be among them, or its weights would stay.
    leaves = [(name, module) for name, module in model.named_modules() if not module.children()]
    parts = [(name, module) for name, module in leaves if not inside(name, (family.LAYERS,))]
    del leaves
    for name, module in parts:
        if inside(name, family.INPUT):
            fill(module, f"{name}.")
    hidden = family.embed(ids, np.arange(ids.shape[1], dtype=np.int32)).astype(mx.float32)
    mask = create_attention_mask(hidden, None)
    for i in range(len(family.layers)):
        layer = family.layers[i]
        family.layers[i] = None
        fill(layer, f"{family.LAYERS}.{i}.")
        hidden = layer(hidden, mask, None)
        mx.eval(hidden)
        del layer
        mx.clear_cache()
    for name, module in parts:
        if not inside(name, family.INPUT):
            fill(module, f"{name}.")
    return family.head(family.norm(hidden))


def compare_reference_logits(directory: Path, path: Path, expected: Expected) -> dict[str, Any]:
    """Compare with logits computed elsewhere: an npz of ``tokens`` (L,) and ``logits`` (L, V)."""
    tokens, wanted = read_reference_logits(path, expected.base)
    found = output_logits(directory, tokens, live=expected.placement == "live")
    difference = float(np.abs(found - wanted).max())
    quantized = expected.quantization is not None or expected.base.quantized
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
