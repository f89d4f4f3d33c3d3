"""The drafter that a name stands for."""

from typing import get_args

from specstream_mlx.drafters.prompt_lookup import PromptLookup
from specstream_mlx.drafters.protocol import Drafter
from specstream_mlx.drafters.two_model import TwoModel
from specstream_mlx.errors import UsageError
from specstream_mlx.options import DrafterName
from specstream_mlx.target.target import Target

TAKE_NUM_DRAFT_TOKENS = (TwoModel.name, PromptLookup.name)
"""Drafters that guess as far ahead as one likes."""


def choose_drafter(
    name: str | None, own: Drafter | None, draft_model: Target | None = None, num_draft_tokens: int | None = None
) -> Drafter | None:
    """The drafter of a generation; None: plain decoding.

    Args:
        name: one of ``DrafterName``; None: two-model where a draft model is given, else the model's own, else none.
        own: the drafter that the model's adapter brings.
        draft_model: the second model of two-model.
        num_draft_tokens: how far ahead two-model and prompt-lookup guess; None: their default.

    Raises:
        UsageError: a name that is not known, or one that does not go with the rest.
    """
    check_choice(name, draft_model, num_draft_tokens)
    if draft_model is not None:
        return TwoModel(draft_model, num_draft_tokens) if num_draft_tokens else TwoModel(draft_model)
    if name == "prompt-lookup":
        return PromptLookup(num_draft_tokens) if num_draft_tokens else PromptLookup()
    if name == "none":
        return None
    if name is not None and (own is None or own.name != name):
        raise UsageError(f"drafter {name!r} is asked for, and the model and its adapter have none; give an adapter")
    return own


def check_choice(name: str | None, draft_model: object | None = None, num_draft_tokens: int | None = None) -> None:
    """Refuse what ``choose_drafter`` refuses whatever the model is; ``draft_model`` need not be loaded yet.

    Raises:
        UsageError: a name that is not known, or one that does not go with the rest.
    """
    if name is not None and name not in get_args(DrafterName):
        raise UsageError(f"drafter is {name!r}, expected one of {', '.join(get_args(DrafterName))}")
    if num_draft_tokens is not None and num_draft_tokens < 1:
        raise UsageError(f"num_draft_tokens is {num_draft_tokens}, expected at least 1")
    if draft_model is not None and name not in (None, "two-model"):
        raise UsageError(f"draft_model does not go with drafter {name!r}; leave it out, or choose drafter 'two-model'")
    if draft_model is None and name == "two-model":
        raise UsageError("draft_model is missing; drafter 'two-model' needs a second, smaller model")
    if num_draft_tokens is not None and draft_model is None and name not in TAKE_NUM_DRAFT_TOKENS:
        wanted = " and ".join(map(repr, TAKE_NUM_DRAFT_TOKENS))
        raise UsageError(f"num_draft_tokens goes with the drafters {wanted}; leave it out")
