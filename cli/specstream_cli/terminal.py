"""Standard output belongs to the answer; everything else that speaks, speaks on standard error."""

import contextlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from specstream_mlx.errors import UsageError

Progress = Callable[[str, int, int], None]

FIRST_LINE_AFTER = 2.0
"""Seconds of work without a word before a log gets its first line of progress."""
LINE_EVERY = 10.0
"""Least seconds between a line on standard error and the next line of progress in a log."""

clock = time.monotonic
_last_line: float | None = None


def to_stderr(line: str) -> None:
    """Write one line to standard error; a reader that went away is not an error."""
    global _last_line
    _last_line = clock()
    with contextlib.suppress(BrokenPipeError):
        print(line, file=sys.stderr, flush=True)


class ReaderGone(Exception):
    """Whoever read our standard output stopped reading. Not an OSError, which typer would take for its own."""


class Answer:
    """Standard output while a command runs; every write is flushed, so a reader sees text as it is made."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        """Write ``text`` at once.

        Raises:
            ReaderGone: the reader went away.
            UsageError: the text cannot be stored, for instance because the disk is full.
        """
        try:
            self.stream.write(text)
            self.stream.flush()
        except BrokenPipeError:
            silence_stdout()
            raise ReaderGone from None
        except OSError as error:
            silence_stdout()
            raise UsageError(f"standard output: the answer cannot be written ({error.strerror})") from error

    def write_json(self, document: Mapping[str, Any]) -> None:
        """Write ``document`` as one line of strict JSON."""
        self.write(json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def answer() -> Iterator[Answer]:
    """Reserve standard output for the answer; what libraries print meanwhile goes to standard error."""
    stdout = sys.stdout
    if stdout is None:
        raise UsageError("standard output is closed; the answer has nowhere to go")
    reconfigure = getattr(stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a terminal that is not UTF-8 loses a character, not the answer
    with contextlib.redirect_stdout(sys.stderr):
        yield Answer(stdout)


def silence_stdout() -> None:
    """Point standard output at the null device, so that the interpreter's last flush cannot fail."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # type: ignore[union-attr]


def quieten_libraries(*, offline: bool, debug: bool) -> None:
    """Set up transformers and huggingface_hub, which read the environment at their first import.

    ``offline`` forbids the network: nobody named a repository, so nothing may be looked up in one.
    """
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants = sys.modules.get("huggingface_hub.constants")
        if constants is not None:  # imported already (python -m specstream_mlx), and read only then
            vars(constants)["HF_HUB_OFFLINE"] = True
    if not is_terminal():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # where it is imported already
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        warnings.simplefilter("ignore")


def is_terminal() -> bool:
    """Whether standard error is watched by a person."""
    return sys.stderr.isatty()


class ProgressLines:
    """Where the work is, as lines for a log: after two seconds, then ten seconds after any other line.

    A line is written when the work reports, so a step that takes longer says nothing meanwhile.
    """

    def __init__(self, *, in_bytes: bool = False) -> None:
        self.in_bytes = in_bytes
        self.begin = clock()
        self.stages: dict[str, tuple[float, int]] = {}  # when a stage first reported, and how much was done then

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Note that ``done`` of ``total`` are done, and say so where it is time to."""
        now = clock()
        begin, already = self.stages.setdefault(stage, (now, done))
        due = self.begin + FIRST_LINE_AFTER
        if _last_line is not None and _last_line > self.begin:
            due = _last_line + LINE_EVERY
        if now < due:
            return
        amount = _bytes(done, total) if self.in_bytes else f"{done:,} of {total:,}"
        left = (
            f", {_duration((now - begin) * (total - done) / (done - already))} left" if already < done < total else ""
        )
        to_stderr(f"{stage}: {amount}{left}")


def _bytes(done: int, total: int) -> str:
    unit, size = ("GB", 1e9) if total >= 1e9 else ("MB", 1e6)
    return f"{done / size:.1f} of {total / size:.1f} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"about {seconds:.0f} s"
    if seconds < 6000:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h"


@contextlib.contextmanager
def progress_bar(*, quiet: bool = False, in_bytes: bool = False) -> Iterator[Progress | None]:
    """A ``progress(stage, done, total)`` that shows on standard error how far the work is; None where ``quiet``.

    On a terminal it draws a bar, elsewhere it writes a line now and then. ``in_bytes``: ``done`` and ``total`` are
    bytes.
    """
    if quiet:
        yield None
        return
    if not is_terminal():
        yield ProgressLines(in_bytes=in_bytes)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    amount = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        stages: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total)
            bars.update(stages[stage], completed=done, total=total)

        yield progress
