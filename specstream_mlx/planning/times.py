"""What recent passes took, remembered with a model from one generation to the next."""

from collections import deque

RECENT = 9


class PassTimes:
    """Seconds of the last few passes, by way of drafting, and of plain decoding."""

    def __init__(self) -> None:
        self.plain: deque[float] = deque(maxlen=RECENT)
        self._drafted: dict[tuple[object, ...], deque[float]] = {}

    def of(self, *drafting: object) -> deque[float]:
        """The times of one way to draft, kept up to date by whoever drafts so."""
        return self._drafted.setdefault(drafting, deque(maxlen=RECENT))
