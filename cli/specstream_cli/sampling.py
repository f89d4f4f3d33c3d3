"""The sampling flags, named and defaulted as in mlx-lm, and the sampler and processors of mlx-lm they ask for."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from specstream_cli.validation import finite, within
from specstream_mlx.errors import InvalidInputError
from specstream_mlx.formats.config import read_json

Temp = Annotated[float, typer.Option(callback=within(0), help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[float, typer.Option(callback=within(0, 1, above=True), help="Nucleus sampling; 1 is off.")]
TopK = Annotated[int, typer.Option(callback=within(0), help="Sample among the k likeliest; 0 is off.")]
MinP = Annotated[float, typer.Option(callback=within(0, 1), help="Least probability relative to the likeliest token.")]
MinTokensToKeep = Annotated[int, typer.Option(callback=within(1), help="Tokens that --min-p leaves in any case.")]
XtcProbability = Annotated[
    float, typer.Option(callback=within(0, 1), help="How often XTC removes the likeliest tokens.")
]
XtcThreshold = Annotated[
    float, typer.Option(callback=within(0, 0.5), help="Probability from which XTC may remove a token.")
]
RepetitionPenalty = Annotated[
    float, typer.Option(callback=within(0), help="Factor against tokens that occurred; 0 is off.")
]
PresencePenalty = Annotated[float, typer.Option(callback=finite, help="Taken from logits of tokens that occurred.")]
FrequencyPenalty = Annotated[float, typer.Option(callback=finite, help="The same, for every time they occurred.")]
ContextSize = Annotated[int, typer.Option(callback=within(0), help="Tokens that this penalty looks back; 0: all.")]


def _logit_bias(value: str | None) -> str | None:
    if value is not None:
        parse_logit_bias(value)
    return value


LogitBias = Annotated[
    str | None,
    typer.Option(metavar="JSON", callback=_logit_bias, help="""Added to logits by token id: '{"42": -5}'."""),
]
Seed = Annotated[
    int | None, typer.Option(callback=within(0, 2**64 - 1), help="Same seed, same text, whatever the draft.")
]


ModelDefaults = Annotated[
    bool,
    typer.Option(
        "--use-generation-config",
        help="Sample as the model's generation_config.json says, where no flag says otherwise.",
    ),
]
_MODEL_DEFAULTS = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
}
_LIMITS = {"temp": (0, 100), "top_p": (0, 1), "top_k": (0, 2**31), "min_p": (0, 1), "repetition_penalty": (0, 100)}


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def parse_logit_bias(text: str) -> dict[int, float]:
    """Token ids and what is added to their logits, from a JSON object."""
    expected = """expected a JSON object of token ids and numbers, such as '{"42": -5}'"""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"not valid JSON ({error}); {expected}") from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"got {text}, {expected}")
    for token, bias in found.items():
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool) and abs(bias) < math.inf
        if not (token.isascii() and token.isdecimal() and is_number):
            raise typer.BadParameter(f"got {json.dumps({token: bias})}, {expected}")
    return {int(token): float(bias) for token, bias in found.items()}


@dataclass(frozen=True)
class Sampling:
    """What the flags say."""

    temp: float
    top_p: float
    top_k: int
    min_p: float
    min_tokens_to_keep: int
    xtc_probability: float
    xtc_threshold: float
    repetition_penalty: float
    repetition_context_size: int
    presence_penalty: float
    presence_context_size: int
    frequency_penalty: float
    frequency_context_size: int
    logit_bias: str | None

    @classmethod
    def of(cls, flags: Mapping[str, Any]) -> "Sampling":
        """The sampling flags among all flags of a command, which go by the names of the fields."""
        return cls(**{field.name: flags[field.name] for field in fields(cls)})

    def with_model_defaults(self, directory: Path, context: typer.Context) -> "Sampling":
        """The same, with what the model's ``generation_config.json`` says where no flag was given.

        As in transformers, a file that does not say ``do_sample`` asks for greedy decoding.

        Raises:
            InvalidInputError: no such file, or a value that no flag takes.
        """
        file = directory / "generation_config.json"
        said = read_json(file)
        found: dict[str, Any] = {}
        if said.get("do_sample") is True:
            found = {field: said[key] for key, field in _MODEL_DEFAULTS.items() if said.get(key) is not None}
            found.setdefault("temp", 1.0)
        problems = []
        for key, field in _MODEL_DEFAULTS.items():
            low, high = _LIMITS[field]
            value = found.get(field, low)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                problems.append(f"{file}: {key} is {value!r}, expected a number from {low} to {high}")
        if problems:
            raise InvalidInputError("\n".join(problems))
        given = {field for field in found if _is_given(context, field)}
        kept = {field: value for field, value in found.items() if field not in given}
        if "top_k" in kept:
            kept["top_k"] = int(kept["top_k"])
        return replace(self, **kept)

    def check(self, vocab_size: int) -> None:
        """Compare with the model's vocabulary what depends on it; problems are reported together.

        Raises:
            InvalidInputError: a value does not fit.
        """
        size = f"the model's vocabulary has {vocab_size} tokens"
        problems = []
        if self.top_k >= vocab_size:
            problems.append(f"--top-k: got {self.top_k}, {size}; give fewer, or 0 to sample among all")
        if self.min_tokens_to_keep > vocab_size:
            problems.append(f"--min-tokens-to-keep: got {self.min_tokens_to_keep}, {size}; give fewer")
        problems += [
            f"--logit-bias: token id {token}: {size}; give an id below" for token in self._bias() if token >= vocab_size
        ]
        if problems:
            raise InvalidInputError("\n".join(problems))

    def sampler(self, tokenizer: Any) -> Callable[..., Any] | None:
        """mlx-lm's sampler; None is greedy."""
        if self.temp == 0:
            return None
        from mlx_lm.sample_utils import make_sampler

        special = [*tokenizer.encode("\n"), *tokenizer.eos_token_ids] if self.xtc_probability > 0 else []
        return make_sampler(
            self.temp,
            top_p=self.top_p,
            min_p=self.min_p,
            min_tokens_to_keep=self.min_tokens_to_keep,
            top_k=self.top_k,
            xtc_probability=self.xtc_probability,
            xtc_threshold=self.xtc_threshold,
            xtc_special_tokens=special,
        )

    def logits_processors(self) -> list[Callable[..., Any]] | None:
        """mlx-lm's processors; None without any."""
        bias = self._bias()
        if not (bias or self.repetition_penalty or self.presence_penalty or self.frequency_penalty):
            return None
        from mlx_lm.sample_utils import make_logits_processors

        return list(
            make_logits_processors(
                bias,
                self.repetition_penalty,
                self.repetition_context_size,
                self.presence_penalty,
                self.presence_context_size,
                self.frequency_penalty,
                self.frequency_context_size,
            )
        )

    def _bias(self) -> dict[int, float]:
        return {} if self.logit_bias is None else parse_logit_bias(self.logit_bias)
