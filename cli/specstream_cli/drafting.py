"""The flags that say who drafts, and what they stand for."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from specstream_cli.validation import within
from specstream_mlx.errors import InvalidInputError, SpecStreamError
from specstream_mlx.options import DrafterName

ChosenDrafter = Annotated[
    DrafterName | None,
    typer.Option(
        "--drafter",
        help="Who drafts; every choice gives the same tokens. Default: two-model with --draft-model, else what the "
        "model or its adapter has.",
    ),
]
DraftModel = Annotated[
    str | None,
    typer.Option(metavar="DIR|REPO", help="Second, smaller model with the same tokens, for the drafter two-model."),
]
NumDraftTokens = Annotated[
    int | None,
    typer.Option(callback=within(1), help="How far ahead two-model and prompt-lookup guess. Default: 4 and 10."),
]


def one_of(legal: Sequence[str]) -> Callable[[list[str] | None], list[str] | None]:
    """An option callback for words that may be given several times."""

    def check(values: list[str] | None) -> list[str] | None:
        for value in values or []:
            if value not in legal:
                raise typer.BadParameter(f"got {value!r}, expected one of {', '.join(legal)}")
        return values

    return check


def check_drafter(drafter: str | None, draft_model: str | None, num_draft_tokens: int | None) -> None:
    """Refuse flags that contradict each other before anything is loaded.

    Raises:
        UsageError: they do.
    """
    from specstream_mlx.drafters.choice import check_choice

    check_choice(drafter, draft_model, num_draft_tokens)


def check_drafters(names: Sequence[str | None], draft_model: str | None, num_draft_tokens: int | None) -> None:
    """As ``check_drafter`` for several drafters, each of which takes what is made for it; None: the model's own.

    Raises:
        UsageError: they contradict each other.
    """
    from specstream_mlx.drafters.choice import TAKE_NUM_DRAFT_TOKENS

    for name in names:
        check_drafter(name, *_made_for(name, draft_model, num_draft_tokens))
    if not set(names) & set(TAKE_NUM_DRAFT_TOKENS):
        check_drafter(None, None, num_draft_tokens)


def choose_drafters(
    target: Any, names: Sequence[str | None], draft_model: Any, num_draft_tokens: int | None
) -> dict[str | None, Any]:
    """The drafters of these names; None, for plain decoding, where the model has none of its own.

    Raises:
        UsageError: a drafter that the model does not have.
    """
    from specstream_mlx.drafters.choice import choose_drafter

    return {
        name: choose_drafter(name, target.drafter, *_made_for(name, draft_model, num_draft_tokens)) for name in names
    }


def _made_for(name: str | None, draft_model: Any, num_draft_tokens: int | None) -> tuple[Any, int | None]:
    """What of these a drafter takes."""
    from specstream_mlx.drafters.choice import TAKE_NUM_DRAFT_TOKENS

    takes = name in TAKE_NUM_DRAFT_TOKENS
    return draft_model if name == "two-model" else None, num_draft_tokens if takes else None


def drafter_arguments(
    target: Any,
    drafter: str | None,
    draft_model: str | None,
    num_draft_tokens: int | None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The same flags as arguments of the library; the draft model is loaded, those not given are left out.

    Raises:
        SpecStreamError: the draft model cannot be loaded, or has another vocabulary.
    """
    given = {"drafter": drafter, "num_draft_tokens": num_draft_tokens}
    if draft_model is not None:
        given["draft_model"] = load_draft_model(target, draft_model, trust_remote_code)
    return {name: value for name, value in given.items() if value is not None}


def load_draft_model(target: Any, place: str, trust_remote_code: bool = False) -> Any:
    """The model that ``--draft-model`` names.

    Raises:
        SpecStreamError: it cannot be loaded, or has another vocabulary.
    """
    from specstream_mlx import load

    try:
        model, _ = load(place, trust_remote_code=trust_remote_code)
    except SpecStreamError as error:
        raise type(error)("\n".join(f"--draft-model: {line}" for line in str(error).splitlines())) from error
    if model.args.vocab_size != target.args.vocab_size:
        raise InvalidInputError(
            f"--draft-model: vocabulary of {model.args.vocab_size} tokens, the model has {target.args.vocab_size}; "
            "give a draft model with the same tokenizer"
        )
    return model
