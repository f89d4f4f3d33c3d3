"""ROUGE-1 and ROUGE-Lsum against several references, by the package `rouge-score`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .task import Row, references

KINDS = {"rouge1": "ROUGE-1", "rougeLsum": "ROUGE-Lsum"}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def rouge(rows: Sequence[Row], answers: Sequence[str]) -> dict[str, list[float]]:
    """Per row the F measure against the nearest reference, with stemming; sentences are lines for Lsum.

    Raises:
        SystemExit: `rouge-score` is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise SystemExit("ROUGE needs the package rouge-score: pip install 'specstream-mlx[tasks]'") from None
    scorer = RougeScorer(list(KINDS), use_stemmer=True)
    found: dict[str, list[float]] = {name: [] for name in KINDS.values()}
    for row, answer in zip(rows, answers, strict=True):
        scores = scorer.score_multi([lines(text) for text in references(row)], lines(answer))
        for kind, name in KINDS.items():
            found[name].append(scores[kind].fmeasure)
    return found


def lines(text: str) -> str:
    """One sentence per line."""
    return _SENTENCE_END.sub("\n", text.strip())
