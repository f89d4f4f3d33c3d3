"""The passes of an answer drawn as lines: what was drafted and accepted, what was rejected, what is certain."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

Decode = Callable[[Sequence[int]], str]

GREEN, RED, BOLD, PLAIN = "\x1b[32m", "\x1b[2;31m", "\x1b[1m", "\x1b[0m"
CONTEXT = 16
"""Ids before a token that its text may depend on: a letter of several tokens, a space between words."""


@dataclass(frozen=True)
class Pass:
    """One pass of the target.

    Attributes:
        tokens: ids that it added to the text.
        accepted: the first of these, which were drafted; the target itself made what follows them.
        drafted: the ids of each drafted path, from the root.
    """

    tokens: Sequence[int]
    accepted: Sequence[int] = ()
    drafted: Sequence[Sequence[int]] = ()

    @classmethod
    def of(cls, response: Any) -> "Pass":
        """The pass behind a ``GenerationResponse``."""
        return cls(response.tokens, response.accepted, response.drafted)

    def to_json(self) -> dict[str, Any]:
        """As ``generate --json`` lists it."""
        return {
            "drafted": [list(path) for path in self.drafted],
            "accepted": list(self.accepted),
            "tokens": list(self.tokens),
        }

    def rejected(self) -> list[tuple[list[int], list[int]]]:
        """The drafted paths that were not accepted whole, in two parts: accepted, rejected. Without repeats."""
        found = []
        for path in self.drafted:
            common = 0
            while common < min(len(path), len(self.accepted)) and path[common] == self.accepted[common]:
                common += 1
            parts = (list(path[:common]), list(path[common:]))
            if parts[1] and parts not in found:
                found.append(parts)
        return found


class PassLines:
    """The passes of one answer as lines, one after another: ``  2  [ COUNT( DISTINCT] pz  { name}``.

    Accepted ids are green or in brackets, the target's own bold or bare, rejected ones red or in braces.
    """

    def __init__(self, decode: Decode, *, coloured: bool) -> None:
        self._decode = decode
        self._accepted = (GREEN, PLAIN) if coloured else ("[", "]")
        self._own = (BOLD, PLAIN) if coloured else ("", "")
        self._rejected = (RED, PLAIN) if coloured else ("{", "}")
        self._made: list[int] = []
        self._number = 0

    def line(self, one: Pass) -> str:
        """The line of the next pass."""
        made, accepted = self._made, list(one.accepted)
        line = _marked(self._kept(made, accepted), self._accepted)
        line += _marked(self._kept([*made, *accepted], one.tokens[len(accepted) :]), self._own)
        for begin, end in one.rejected():
            line += "  " + _marked(self._added([*made, *begin], end), self._rejected)
        self._made = [*made, *one.tokens][-CONTEXT:]
        self._number += 1
        return f"{self._number:>3}  {line}"

    def _kept(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """As ``_added``; a letter that is not complete yet is drawn where it is."""
        return self._added(before, ids).rstrip("\ufffd")

    def _added(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text that ``ids`` add, on one line."""
        if not ids:
            return ""
        known, text = (self._decode(part) if part else "" for part in (list(before), [*before, *ids]))
        same = next((i for i, (a, b) in enumerate(zip(known, text, strict=False)) if a != b), len(known))
        added = text[same:]
        return added.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def legend(*, coloured: bool) -> str:
    """What the marks of ``PassLines`` mean, in one line."""
    kinds = [
        ("drafted and accepted", GREEN, "[]"),
        ("the model's own token", BOLD, ""),
        ("drafted and rejected", RED, "{}"),
    ]
    if coloured:
        return ", ".join(f"{mark}{words}{PLAIN}" for words, mark, _ in kinds)
    return ", ".join(f"{pair[:1]}{words}{pair[1:]}" for words, _, pair in kinds)


def is_coloured(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows colours, and nobody asked for none."""
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def _marked(text: str, marks: tuple[str, str]) -> str:
    return f"{marks[0]}{text}{marks[1]}" if text else ""
