"""PNG plots of what was measured; matplotlib is optional and imported only when a plot is asked for."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specstream_mlx.errors import UsageError

Line = tuple[str, Sequence[float], Sequence[float]]  # label, x, y


def check_plot(path: Path | None, option: str = "--plot") -> None:
    """Refuse early what could not be drawn after minutes of measuring.

    Raises:
        UsageError: matplotlib is absent, the file is no PNG, or its directory does not exist.
    """
    if path is None:
        return
    if path.suffix.lower() != ".png":
        raise UsageError(f"{option}: {path}: plots are PNG files; give a name that ends in .png")
    if not path.parent.is_dir():
        raise UsageError(f"{option}: {path.parent}: no such directory; make it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            f"{option}: matplotlib is not installed; pip install 'specstream-mlx[plots]', or drop {option}"
        )


def draw(path: Path, panels: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw panels side by side.

    Args:
        panels: each with ``title``, ``x``, ``y`` (labels of the axes) and ``lines``; ``marks`` are points to point out.

    Raises:
        UsageError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for label, x, y in panel["lines"]:
            axes.plot(x, y, marker="o", markersize=3, label=label)
        for label, x, y in panel.get("marks", ()):
            axes.plot(x, y, marker="*", markersize=12, linestyle="none", label=label)
        axes.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"])
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise UsageError(f"{path}: the plot cannot be written ({error.strerror or error})") from error
