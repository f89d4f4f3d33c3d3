"""One description for a flag that several commands have."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter", "--adapter-path", help="Directory with a stream adapter for this base (convert --adapter-only)."
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="REVISION", help="Branch, tag or commit of the model's repository; also org/name@REVISION."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model's repository, if it needs any.")
]


def place_of(revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """What ``load`` is told of the model's repository beside its name."""
    given = {} if revision is None else {"revision": revision}
    return given | ({"trust_remote_code": True} if trust_remote_code else {})


def of(described: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: parameters that ``described`` has too get its flag, check and help text.

    Those that say something of their own (``Annotated``) keep it.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        theirs = inspect.get_annotations(described)
        own = inspect.get_annotations(command)
        for name, annotation in own.items():
            if name in theirs and not hasattr(annotation, "__metadata__") and name != "return":
                command.__annotations__[name] = theirs[name]
        return command

    return decorate
