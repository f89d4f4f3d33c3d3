"""The sets that others published, by name, through the package `datasets`."""

from __future__ import annotations

from typing import Any


def load_published(name: str, split: str) -> list[dict[str, Any]]:
    """Load a split of a set from the Hugging Face hub.

    Raises:
        SystemExit: `datasets` is not installed, or the set cannot be had.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise SystemExit(
            f"{name} is loaded by the package datasets: pip install 'specstream-mlx[datasets]', or give --data FILE"
        ) from None
    try:
        return [dict(row) for row in load_dataset(name, split=split)]
    except Exception as error:  # the hub, the network and the set's own form all fail in their own ways
        raise SystemExit(f"{name}: cannot be loaded ({str(error).splitlines()[0]}); give --data FILE") from None
