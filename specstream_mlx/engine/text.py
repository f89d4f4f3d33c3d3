"""Tokens on their way to text: decoded, and held back where a stop string may have begun."""

from collections.abc import Sequence
from typing import Any


class Text:
    """The text of one generation.

    Attributes:
        num_tokens: taken so far, end-of-text among them.
        finish_reason: None while going on, "stop" (end-of-text or a stop string) or "length".
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], max_tokens: int, behind: int | None = None) -> None:
        """Begin with no token.

        Args:
            tokenizer: an mlx-lm ``TokenizerWrapper``.
            stop: strings that end the text.
            max_tokens: -1 for no limit.
            behind: the id that the text follows in one text; a space at its beginning then stays.
        """
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self._detokenizer = tokenizer.detokenizer
        if behind is not None:
            self._detokenizer.add_token(behind)
            _ = self._detokenizer.last_segment  # of the prompt
        self._end = set(tokenizer.eos_token_ids)
        self._stop = StopText(stop)
        self._max_tokens = max_tokens

    def take(self, tokens: Sequence[int]) -> tuple[list[int], str]:
        """The tokens that count, and the text that is certain by now."""
        kept = []
        for token in tokens:
            kept.append(token)
            self.num_tokens += 1
            if token in self._end:
                self.finish_reason = "stop"
                break
            self._detokenizer.add_token(token)
            if self._stop.feed(self._detokenizer.last_segment):
                self.finish_reason = "stop"
                break
            if self.num_tokens == self._max_tokens:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            self._detokenizer.finalize()
            self._stop.feed(self._detokenizer.last_segment)
        return kept, self._stop.take(final=self.finish_reason is not None)


class StopText:
    """Text on its way out, holding back what may be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self._stopped = False

    def feed(self, segment: str) -> bool:
        """Add decoded text; True once a stop string is complete, after which more text is ignored."""
        if self._stopped:
            return True
        self._held += segment
        hits = [index for text in self._stop if (index := self._held.find(text)) >= 0]
        if hits:
            self._held = self._held[: min(hits)]
            self._stopped = True
        return self._stopped

    def take(self, final: bool) -> str:
        """The text that is certain by now; all that is held when ``final``."""
        keep = 0
        if not final:
            keep = max(
                (n for text in self._stop for n in range(1, len(text)) if self._held.endswith(text[:n])), default=0
            )
        cut = len(self._held) - keep
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready
