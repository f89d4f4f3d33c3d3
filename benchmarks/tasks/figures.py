"""Means with their errors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard error in percent, of the values that are numbers."""
    known = [100 * value for value in values if not math.isnan(value)]
    if not known:
        return {"mean": float("nan"), "standard_error": float("nan"), "n": 0}
    error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else float("nan")
    return {"mean": round(statistics.fmean(known), 2), "standard_error": round(error, 2), "n": len(known)}
