"""How good answers are, where a task file has references: exact match, and ROUGE by the rouge-score package."""

import importlib.util
from collections.abc import Sequence
from typing import Any

ROUGE_TYPES = ("rouge1", "rougeLsum")


def quality(answers: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Percent of answers that equal their reference, trimmed, and mean ROUGE F (None without rouge-score)."""
    pairs = [(answer.strip(), reference.strip()) for answer, reference in zip(answers, references, strict=True)]
    found: dict[str, Any] = {"exact_match": 100 * sum(a == r for a, r in pairs) / len(pairs)}
    if importlib.util.find_spec("rouge_score") is None:
        return found | dict.fromkeys(ROUGE_TYPES)
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE_TYPES), use_stemmer=True)
    scores = [scorer.score(reference, answer) for answer, reference in pairs]
    return found | {kind: 100 * sum(score[kind].fmeasure for score in scores) / len(scores) for kind in ROUGE_TYPES}
