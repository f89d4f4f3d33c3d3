"""The passes of an answer drawn as lines: what was drafted and accepted, what was rejected, what is certain."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

Decode = Callable[[Sequence[int]], str]

GREEN, RED, BOLD, PLAIN = "\x1b[32m", "\x1b[2;31m", "\x1b[1m", "\x1b[0m"


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


def pass_lines(passes: Iterable[Pass], decode: Decode, *, colour: bool) -> Iterator[str]:
    """One line for each pass, as soon as it is known: ``  2  [ COUNT( DISTINCT] pz``.

    Accepted ids are green or in brackets, the target's own bold or bare, rejected ones red or in braces.
    """
    made: list[int] = []
    for number, one in enumerate(passes, 1):
        accepted = list(one.accepted)
        certain = list(one.tokens[len(accepted) :])
        line = _marked(_added(decode, made, accepted), (GREEN, PLAIN) if colour else ("[", "]"))
        line += _marked(_added(decode, [*made, *accepted], certain), (BOLD, PLAIN) if colour else ("", ""))
        for begin, end in one.rejected():
            text = _added(decode, [*made, *begin], end)
            line += "  " + _marked(text, (RED, PLAIN) if colour else ("{", "}"))
        made += one.tokens
        yield f"{number:>3}  {line}"


def legend(*, colour: bool, rejected: bool = False) -> str:
    """What the marks of `pass_lines` mean, in one line."""
    kinds = [("drafted and accepted", GREEN, "[]"), ("the model's own token", BOLD, "")]
    if rejected:
        kinds.append(("drafted and rejected", RED, "{}"))
    if colour:
        return ", ".join(f"{mark}{words}{PLAIN}" for words, mark, _ in kinds)
    return ", ".join(f"{pair[:1]}{words}{pair[1:]}" for words, _, pair in kinds)


def _added(decode: Decode, before: list[int], ids: list[int]) -> str:
    """The text that ``ids`` add, on one line."""
    if not ids:
        return ""
    text = decode([*before, *ids])[len(decode(before)) if before else 0 :]
    return text.replace("\n", "\\n").replace("\t", "\\t")


def _marked(text: str, marks: tuple[str, str]) -> str:
    return f"{marks[0]}{text}{marks[1]}" if text else ""
