"""What tells one model on one machine from another: the key of a stored calibration."""

import hashlib
import os
from functools import partial
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from specstream_mlx.drafters.protocol import Drafter
from specstream_mlx.drafters.two_model import TwoModel
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.planning.calibration import Calibration
from specstream_mlx.planning.store import find
from specstream_mlx.target import machine
from specstream_mlx.target.target import Target


def stored_calibration(model: SpecStreamModel, drafter: Drafter | None = None) -> Calibration | None:
    """What ``calibrate`` left on this machine for ``model`` and a drafter (None: its own), if anything.

    Raises:
        InvalidInputError: the file at its place is damaged or belongs to something else.
    """
    drafter = drafter or model.drafter
    if drafter is None:
        return None
    return find(partial(calibration_key, model, drafter), drafter.max_depth)


def calibration_key(model: SpecStreamModel, drafter: Drafter | None = None) -> dict[str, Any]:
    """What a calibration of ``model`` with a drafter (None: streams) on this machine holds for."""
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
    } | ({} if drafter is None or drafter.name == "streams" else _drafter_key(drafter))


def _drafter_key(drafter: Drafter) -> dict[str, Any]:
    """Tells drafters apart; streams are in the model's digest."""
    key = {"drafter": drafter.name, "depth": drafter.max_depth, "ways": list(drafter.ways)}
    return key | ({"draft_model": model_digest(drafter.draft)} if isinstance(drafter, TwoModel) else {})


def _dtype(model: SpecStreamModel) -> str:
    """The type that a model computes in: that of its vectors, which quantisation leaves alone."""
    vectors = (value for _, value in tree_flatten(model.base.parameters()) if value.ndim == 1)
    return str(next(vectors).dtype).removeprefix("mlx.core.")


def model_digest(model: Target) -> str:
    """Tells models apart: every tensor's name, shape and type, and the contents of those small enough to read.

    The contents of norms, of stream tensors and of stream LoRA are read, so two fine-tunes of one base differ.
    """
    digest = hashlib.sha256(f"{getattr(model, 'stream_config', None)}".encode())
    for name, value in sorted(tree_flatten(model.parameters())):
        digest.update(f"{name} {value.shape} {value.dtype}\n".encode())
        if value.ndim == 1 or name.startswith("streams.") or name.rsplit(".", 1)[-1].startswith("lora_"):
            digest.update(np.array(value.astype(mx.float32)).tobytes())
    return digest.hexdigest()
