"""Notes on standard error: what was done with an input that a user may want to know, said once in a process."""

import sys

_said: set[str] = set()


def note(text: str) -> None:
    """Print ``note: text`` once."""
    if text not in _said and sys.stderr is not None:
        print(f"note: {text}", file=sys.stderr, flush=True)
    _said.add(text)
