"""One description for a flag that several commands have."""

import inspect
from collections.abc import Callable
from typing import Any


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
