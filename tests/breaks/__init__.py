"""Small breaks of the code, each with the test that must notice it; one module for each area.

The command is ``scripts/with-openblas python -m tests.breaks [NAME ...]``.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Break:
    """Replace ``old`` by ``new`` in ``file``; ``test`` must fail."""

    name: str
    file: str
    old: str
    new: str
    test: str
