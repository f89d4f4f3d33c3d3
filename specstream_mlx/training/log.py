"""The log of a training, one JSON object a line, and its plot."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from specstream_mlx.errors import UsageError

LOG = "training_log.jsonl"
PLOT = "training.png"
_FEW_DEPTHS = 8  # that a legend holds in one column


class TrainingLog:
    """Appends events to ``DIRECTORY/training_log.jsonl`` as they happen; a context that closes the file."""

    def __init__(self, directory: Path, done: int, report: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Keep, of an earlier log, the events up to iteration ``done``.

        Raises:
            UsageError: the log cannot be written.
        """
        self.path = directory / LOG
        self._report = report
        kept = [event for event in read_log(self.path) if event.get("iteration", 0) <= done] if done else []
        try:
            directory.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(_line(event) for event in kept), encoding="utf-8")
            partial.replace(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be written ({error.strerror})") from error

    def write(self, event: dict[str, Any]) -> None:
        """Log an event and report it.

        Raises:
            UsageError: the log cannot be written.
        """
        event = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in event.items()}
        try:
            self._file.write(_line(event))
            self._file.flush()
        except OSError as error:
            raise UsageError(
                f"{self.path}: cannot be written ({error.strerror}); what was saved before is as it was"
            ) from error
        if self._report is not None:
            self._report(event)

    def copy_to(self, directory: Path) -> None:
        """Put the log, and its plot where matplotlib is installed, into ``directory``."""
        (directory / LOG).write_bytes(self.path.read_bytes())
        plot(read_log(self.path), directory / PLOT)

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _line(event: dict[str, Any]) -> str:
    return json.dumps(event, allow_nan=False) + "\n"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The events of a log; a last line that was cut off is left out."""
    events = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:
                break
    return events


def plot(events: list[dict[str, Any]], path: Path) -> bool:
    """Draw loss and acceptance by depth to a PNG; False, and nothing written, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return False
    figure = Figure(layout="constrained")
    _draw(figure, events)
    figure.savefig(path)
    return True


def _draw(figure: Any, events: list[dict[str, Any]]) -> None:
    """Loss, and beside it acceptance by depth where something was validated."""
    steps = [event for event in events if event["event"] == "train"]
    checks = [event for event in events if event["event"] == "validation"]
    figure.set_size_inches(10 if checks else 5, 4)
    losses, *others = figure.subplots(1, 2 if checks else 1, squeeze=False)[0]
    losses.plot([e["iteration"] for e in steps], [e["loss"] for e in steps], label="training")
    losses.set(xlabel="iteration", ylabel="loss")
    if checks:
        iterations = [e["iteration"] for e in checks]
        losses.plot(iterations, [e["loss"] for e in checks], "o-", label="validation")
        losses.legend()
        (acceptance,) = others
        rates = list(zip(*(e["acceptance"] for e in checks), strict=True))
        for depth, column in enumerate(rates, 1):
            acceptance.plot(iterations, column, "o-", label=f"depth {depth}")
        acceptance.set(xlabel="iteration", ylabel="acceptance, validation", ylim=(-0.03, 1.03))
        small = len(rates) > _FEW_DEPTHS
        acceptance.legend(ncols=4 if small else 1, fontsize="xx-small" if small else None)
    for axes in (losses, *others):
        axes.locator_params(axis="x", integer=True)
