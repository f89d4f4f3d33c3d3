"""Measure one model on this machine: costs, acceptance, and the calibration they make."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from specstream_mlx.calibration.acceptance import measure_acceptance
from specstream_mlx.calibration.costs import CONTEXTS, measure_costs, usable_contexts
from specstream_mlx.drafters.protocol import Drafter
from specstream_mlx.errors import UsageError
from specstream_mlx.models.identity import calibration_key
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.planning.calibration import Calibration

OWN_TEXT = "text sampled from the model"
OWN_SAMPLES = 12
OWN_SAMPLE_TOKENS = 96


def measure(
    model: SpecStreamModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    drafter: Drafter | None = None,
    text: str | None = None,
    contexts: Sequence[int] | None = None,
    repeats: int = 7,
    max_tokens: int = 128,
    progress: Callable[[str, int, int], None] | None = None,
) -> Calibration:
    """Measure costs and acceptance; nothing is stored.

    Args:
        model: with streams, or beside another drafter.
        drafter: whose plan to make; None: the streams.
        prompts: ids to measure acceptance on; None: text that the model samples from nothing.
        text: says what the prompts are, for the record.
        contexts: lengths of context to time passes at; None: a few that fit the model.

    Raises:
        UsageError: the model has no drafter of its own, and no other is given.
    """
    drafter = drafter or model.drafter
    if drafter is None:
        raise UsageError(
            "this model has no streams, so there is no draft to plan; convert one with streams, or name a drafter"
        )
    stop_tokens = sorted(tokenizer.eos_token_ids)
    if prompts:
        counts = measure_acceptance(
            model, prompts, drafter, max_tokens=max_tokens, stop_tokens=stop_tokens, progress=progress
        )
    else:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else stop_tokens[0]
        counts = measure_acceptance(
            model, [[first]] * OWN_SAMPLES, drafter, max_tokens=OWN_SAMPLE_TOKENS, temperature=1.0, progress=progress
        )
    lengths = usable_contexts(model, contexts or CONTEXTS, drafter.max_depth)
    costs = measure_costs(model, lengths, drafter, repeats=repeats, progress=progress)
    anchors = tuple(int(count) for count in counts.trials)
    return Calibration(calibration_key(model, drafter), tuple(costs), counts.rates(), anchors, text or OWN_TEXT)


def find_samples(directory: Path) -> Path | None:
    """``samples.jsonl`` of a model's directory; None without one."""
    file = directory / "samples.jsonl"
    return file if file.is_file() else None
