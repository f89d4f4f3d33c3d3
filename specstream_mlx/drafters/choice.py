"""The drafter that a name stands for."""

from typing import get_args

from specstream_mlx.drafters.prompt_lookup import PromptLookup
from specstream_mlx.drafters.protocol import Drafter
from specstream_mlx.drafters.two_model import TwoModel
from specstream_mlx.errors import UsageError
from specstream_mlx.options import DrafterName
from specstream_mlx.target.target import Target


def choose_drafter(
    name: str | None, own: Drafter | None, draft_model: Target | None = None, num_draft_tokens: int | None = None
) -> Drafter | None:
    """The drafter of a generation; None: plain decoding.

    Args:
        name: as ``--drafter`` takes it; None: two-model where a draft model is given, else the model's own, else none.
        own: the drafter that the model's adapter brings.
        draft_model: the second model of two-model.
        num_draft_tokens: how far ahead two-model and prompt-lookup guess; None: their default.

    Raises:
        UsageError: a name that is not known, or one that does not go with the rest.
    """
    if name is not None and name not in get_args(DrafterName):
        raise UsageError(f"drafter is {name!r}, expected one of {', '.join(get_args(DrafterName))}")
    if num_draft_tokens is not None and num_draft_tokens < 1:
        raise UsageError(f"num_draft_tokens is {num_draft_tokens}, expected at least 1")
    if draft_model is not None and name not in (None, "two-model"):
        raise UsageError(f"drafter {name!r} does not take a draft model; leave it out, or choose 'two-model'")
    if draft_model is not None:
        return TwoModel(draft_model, num_draft_tokens) if num_draft_tokens else TwoModel(draft_model)
    if name == "two-model":
        raise UsageError("drafter 'two-model' needs a draft model; give one")
    if name == "prompt-lookup":
        return PromptLookup(num_draft_tokens) if num_draft_tokens else PromptLookup()
    if num_draft_tokens is not None:
        raise UsageError("num_draft_tokens goes with the drafters 'two-model' and 'prompt-lookup'; leave it out")
    if name == "none":
        return None
    if name is not None and (own is None or own.name != name):
        raise UsageError(f"drafter {name!r} is asked for, and the model and its adapter have none; give an adapter")
    return own
