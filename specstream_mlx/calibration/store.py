"""Where calibrations are kept: one file per machine, software and model in the user's cache directory."""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from specstream_mlx.calibration import machine
from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.planning.calibration import Calibration

CACHE_VARIABLE = "SPECSTREAM_MLX_CACHE"  # a directory to use instead of the user's


def cache_directory() -> Path:
    """``$SPECSTREAM_MLX_CACHE``, else ``specstream-mlx`` in the system's place for caches."""
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base).expanduser() / "specstream-mlx"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "specstream-mlx"


def calibration_key(model: SpecStreamModel) -> dict[str, Any]:
    """What a calibration of ``model`` on this machine holds for."""
    quantised = next((m for m in model.base.modules() if isinstance(m, nn.QuantizedLinear)), None)
    on_cpu = machine.device() == "cpu"
    return {
        "processor": machine.processor(),
        "device": machine.device(),
        "device_name": str(mx.device_info().get("device_name", "")),
        "mlx": version("mlx"),
        "blas": machine.blas() if on_cpu else None,
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS") if on_cpu else None,
        "model_type": model.model_type,
        "model": model_digest(model),
        "quantization": f"{quantised.bits} bits, groups of {quantised.group_size}" if quantised is not None else None,
        "dtype": _dtype(model),
    }


def _dtype(model: SpecStreamModel) -> str:
    """The type that a model computes in: that of its vectors, which quantisation leaves alone."""
    vectors = (value for _, value in tree_flatten(model.base.parameters()) if value.ndim == 1)
    return str(next(vectors).dtype).removeprefix("mlx.core.")


def model_digest(model: SpecStreamModel) -> str:
    """Tells models apart: every tensor's name, shape and type, and the contents of those small enough to read.

    The contents of norms, of stream tensors and of stream LoRA are read, so two fine-tunes of one base differ.
    """
    digest = hashlib.sha256(f"{model.stream_config}".encode())
    for name, value in sorted(tree_flatten(model.parameters())):
        digest.update(f"{name} {value.shape} {value.dtype}\n".encode())
        if value.ndim == 1 or name.startswith("streams.") or name.rsplit(".", 1)[-1].startswith("lora_"):
            digest.update(np.array(value.astype(mx.float32)).tobytes())
    return digest.hexdigest()


def path_for(key: dict[str, Any]) -> Path:
    """The file of a calibration with this key."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return cache_directory() / "calibrations" / f"{name}.json"


def save(calibration: Calibration) -> Path:
    """Write a calibration to its place, whole or not at all.

    Raises:
        UsageError: the cache directory cannot be written.
    """
    path = path_for(dict(calibration.key))
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            temporary = Path(file.name)
            json.dump(calibration.to_dict(), file, indent=1)
            file.write("\n")
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise UsageError(
            f"{path}: cannot be written ({error.strerror or error}); make the directory writable, or set "
            f"{CACHE_VARIABLE} to another one"
        ) from error
    return path


def find(model: SpecStreamModel) -> Calibration | None:
    """The calibration of ``model`` on this machine, if there is one.

    Raises:
        InvalidInputError: the file at its place is damaged or belongs to something else.
    """
    if model.gamma == 0:
        return None
    directory = cache_directory() / "calibrations"
    if not directory.is_dir():
        return None
    key = calibration_key(model)
    path = path_for(key)
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return None
    found = _read(path, changed)
    if dict(found.key) != key:
        differing = ", ".join(sorted(name for name in key if found.key.get(name) != key[name])) or "more than it should"
        raise InvalidInputError(f"{path}: made for another {differing}; run specstream-mlx calibrate again")
    if len(found.rates) != model.gamma:
        raise InvalidInputError(
            f"{path}: damaged calibration ({len(found.rates)} depths, this model has {model.gamma} streams); run "
            "specstream-mlx calibrate again"
        )
    return found


@lru_cache(maxsize=8)
def _read(path: Path, changed: int) -> Calibration:
    """Read a file as of ``changed``.

    Raises:
        InvalidInputError: not readable, not JSON, or not a calibration.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(
            f"{path}: damaged calibration (not JSON: {error}); run specstream-mlx calibrate again"
        ) from error
    return Calibration.from_dict(raw, str(path))
