"""Assembles the commands and turns every outcome into an exit code and at most a few lines on standard error.

Exit codes: 0 ok, 1 a bug of ours, 2 usage, 3 invalid input, 4 unsupported, 5 verification failed, 130 interrupted,
141 the reader of our standard output went away. Nothing heavy is imported here, so ``--help`` answers at once.
"""

import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.main import get_command

from specstream_cli.benchmark import benchmark
from specstream_cli.cache_prompt import cache_prompt
from specstream_cli.calibrate import calibrate
from specstream_cli.chat import chat
from specstream_cli.convert import convert
from specstream_cli.doctor import doctor
from specstream_cli.generate import generate
from specstream_cli.inspect import inspect
from specstream_cli.serve import serve
from specstream_cli.terminal import ReaderGone, silence_stdout, to_stderr
from specstream_cli.train import TrainCommand, train
from specstream_mlx.errors import SpecStreamError, UsageError

PROGRAM = "specstream-mlx"
INTERRUPTED = 130
READER_GONE = 141

app = typer.Typer(
    name=PROGRAM,
    help="Speculative Streaming on MLX: one model drafts and verifies, the text stays exactly the same.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from specstream_mlx import __version__

        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Speculative Streaming on MLX: one model drafts and verifies, the text stays exactly the same."""


for _command in (generate, chat, convert, inspect, calibrate, train, benchmark, serve, doctor):
    app.command(cls=TrainCommand if _command is train else None)(_command)
app.command("cache_prompt")(cache_prompt)  # mlx-lm's spelling


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; ``arguments`` defaults to those of the process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    if sys.stderr is None:  # closed by the caller; print(file=None) would write into the answer
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if not words:
        to_stderr("error: no command given; try 'specstream-mlx generate', or 'specstream-mlx --help'")
        return 2
    try:
        code: Any = get_command(app).main(args=words, prog_name=PROGRAM, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except (ReaderGone, BrokenPipeError, SystemExit):  # typer exits on a broken pipe, and only then
        silence_stdout()
        return READER_GONE
    except Exception as error:
        code = _report(error, debug)
    if code == INTERRUPTED:
        to_stderr("interrupted")
    return int(code or 0)


def _report(error: Exception, debug: bool) -> int:
    """Print ``error`` the way its kind deserves and return the exit code."""
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, typer.TyperException):
        to_stderr(f"error: {_usage_message(error)}")
        return int(getattr(error, "exit_code", 2))

    if isinstance(error, SpecStreamError):
        for line in str(error).splitlines() or [type(error).__name__]:
            to_stderr(f"error: {_with_flag(line) if isinstance(error, UsageError) else line}")
        return error.exit_code
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        to_stderr(f"error: {name}{error.strerror}")
        return 3
    message = " ".join(str(error).split())
    hint = "" if debug else "; run again with --debug for the traceback"
    to_stderr(f"error: {type(error).__name__}: {message} (this is a bug of {PROGRAM}{hint})")
    return 1


def _with_flag(line: str) -> str:
    """A library's message about an argument, by its flag."""
    return re.sub(r"^(draft_model|num_draft_tokens|prune_threshold)(?= )", _flag, line)


def _flag(argument: re.Match[str]) -> str:
    return "--" + argument[0].replace("_", "-")


def _usage_message(error: typer.TyperException) -> str:
    option = getattr(getattr(error, "param", None), "opts", None)
    if isinstance(error, typer.BadParameter) and option and error.message:
        message = f"{max(option, key=len)}: {error.message.removeprefix('Value error, ')}"
    else:
        message = str(getattr(error, "format_message", error.__str__)())
    message = " ".join(message.split()).rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else PROGRAM
    return f"{message}; see '{command} --help'"


if __name__ == "__main__":
    sys.exit(main())
