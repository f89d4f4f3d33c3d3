"""Initialisations that take their factors out of the base weight, recomputed as PEFT computes them.

PiSSA and OLoRA start from factors of ``W`` itself and subtract them, so the trained model is

    W - s * B0 @ A0 + s * B @ A

and the adapter file holds only ``A`` and ``B``. Both products are fixed by ``W``, the rank and the scale:

    PiSSA   s * B0 @ A0 = the best approximation of W of rank r: W on its r leading right singular vectors
    OLoRA   B0 @ A0     = the projection of W on the span of its first r columns; multiplied by s once more

PEFT computes in float32, here it is float64. Where PEFT's own rounding would decide which factors it took, the result
is not defined and refused.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from specstream_convert.files.stored import StoredTensor

RECOMPUTABLE = ("pissa", "olora")
RESAVE = "re-save it in PEFT with path_initial_model_for_weight_conversion"
# What PEFT subtracted from the base, for initialisations where it cannot be found out again.
UNRECOVERABLE = {
    "pissa_niter": "by a randomised decomposition whose random numbers were not recorded",
    "corda": "by a decomposition that depends on calibration data",
    "lora_ga": "by factors of gradients on training data",
    "loftq": "by the error of a quantisation that was not recorded",
}
FLOAT32 = 2.0**-24  # rounding of PEFT's decomposition
TOLERANCE = 1e-3  # of the largest singular value: the largest error that PEFT's rounding may cause
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Initial:
    """The factors that one module started from; the base lost ``scale * B0 @ A0``.

    Attributes:
        kind: one of :data:`RECOMPUTABLE`.
        weight: the base's weight, (out, in).
    """

    kind: str
    weight: StoredTensor
    rank: int
    scale: float

    @cached_property
    def _factors(self) -> tuple[Array, Array, float]:
        weight = np.array(self.weight.read_float32()).astype(np.float64)
        compute = _leading if self.kind == "pissa" else _first_columns
        a, b, error = compute(weight, self.rank)
        if self.kind == "pissa":  # PEFT divides by the scale, then multiplies by it
            a = a / self.scale
        return a.astype(np.float32), b.astype(np.float32), error

    def read(self) -> tuple[mx.array, mx.array]:
        """``A0`` (r, in) and ``B0`` (out, r) in float32."""
        a, b, _ = self._factors
        return mx.array(a), mx.array(b)

    def problem(self) -> str | None:
        """Why these factors are not those that PEFT had, if so."""
        if self.kind == "pissa" and self.scale <= 0:
            return f"PiSSA has no factors for the scale {self.scale:g}; correct lora_alpha"
        if self.kind == "olora" and self.weight.transposed:
            return f"PEFT's OLoRA factors the transposed weight of a Conv1D and is not defined here; {RESAVE}"
        if self._factors[2] > TOLERANCE:
            return (
                f"float32 rounding decides which factors {self.kind} took (singular values or columns of the base "
                f"agree too closely), so they cannot be recomputed; {RESAVE}"
            )
        return None


def _leading(weight: Array, rank: int) -> tuple[Array, Array, float]:
    """The best approximation of rank ``rank``, as factors, and how far float32 may be from it, relative."""
    tall = weight.shape[0] >= weight.shape[1]
    values, vectors = np.linalg.eigh(weight.T @ weight if tall else weight @ weight.T)
    sigma = np.sqrt(np.maximum(values[::-1], 0))
    kept = vectors[:, ::-1][:, :rank]
    error = 0.0
    if rank < len(sigma) and sigma[0] > 0:
        gap = max(sigma[rank - 1] - sigma[rank], np.finfo(np.float64).tiny)
        error = float(sigma[rank - 1] / sigma[0] * min(1.0, FLOAT32 * sigma[0] / gap))
    return (kept.T, weight @ kept, error) if tall else (kept.T @ weight, kept, error)


def _first_columns(weight: Array, rank: int) -> tuple[Array, Array, float]:
    """The projection on the span of the first ``rank`` columns, as factors, and the relative error of float32."""
    columns = weight[:, :rank]
    q, r = np.linalg.qr(columns)
    smallest, largest = np.abs(np.diag(r)).min(), np.linalg.norm(columns, axis=0).max()
    error = float(FLOAT32 * largest / smallest) if smallest > 0 else 1.0
    return q.T @ weight, q, error if largest > 0 else 0.0


def reason_against(init: Any) -> str:
    """Why the initialisation ``init`` cannot be undone; what to do about it."""
    known = next((text for name, text in UNRECOVERABLE.items() if isinstance(init, str) and init.startswith(name)), "")
    how = f"the base weights were changed at initialisation, {known}," if known else "the base weights were changed"
    return f"{how} and are not in this adapter; {RESAVE}"
