"""What a request asks of the model, and what it is told while its answer is made. Nothing here imports MLX."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from specstream_mlx.options import DraftMode

Message = dict[str, Any]


@dataclass(frozen=True)
class SamplingWish:
    """mlx-lm's sampling parameters; None: the server's default."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repetition_penalty: float = 0.0
    repetition_context_size: int = 20
    presence_penalty: float = 0.0
    presence_context_size: int = 20
    frequency_penalty: float = 0.0
    frequency_context_size: int = 20
    logit_bias: Mapping[int, float] | None = None


@dataclass(frozen=True)
class Question:
    """What one answer is asked for.

    Attributes:
        model: as the request names it.
        prompt: text or ids; None: ``messages`` are given.
        continued: the last message is the beginning of the answer.
        template: further arguments of the chat template.
        seed: makes sampled text repeatable.
        top_logprobs: how many alternatives to tell of every token; None: no log-probabilities.
        schema: what the text must be: a JSON schema; {}: any JSON object; None: anything.
        forced_tool: a tool call is demanded: the name of the tool, "" for any; None: it is not.
    """

    model: str
    prompt: str | list[int] | None = None
    messages: list[Message] = field(default_factory=list)
    continued: bool = False
    tools: list[dict[str, Any]] | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int = 512
    sampling: SamplingWish = SamplingWish()
    seed: int = 0
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    schema: Mapping[str, Any] | None = None
    forced_tool: str | None = None
    draft: DraftMode | None = None


@dataclass(frozen=True)
class Admitted:
    """The request can be answered; it waits or begins."""

    prompt_tokens: int
    cached_tokens: int
    reasoning: bool


@dataclass(frozen=True)
class Prefilled:
    """So much of the prompt was run."""

    done: int
    total: int


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token, its text, its log-probability and the likeliest alternatives."""

    id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True)
class Piece:
    """What a pass added.

    Attributes:
        accepted: how many of the tokens were drafted.
        target_passes, num_tokens: running totals.
        stop_string: the stop string that ended the text, if one did.
    """

    text: str
    tokens: list[int]
    accepted: int
    target_passes: int
    num_tokens: int
    finish_reason: str | None
    logprobs: list[TokenLogprob]
    stop_string: str | None = None


@dataclass(frozen=True)
class Failed:
    """There will be no more of the answer.

    Attributes:
        status: an HTTP status.
        code: OpenAI's word for it, where there is one.
    """

    message: str
    status: int = 500
    code: str | None = None


Event = Admitted | Prefilled | Piece | Failed


class Job:
    """A question on its way; ``emit`` is called in the model's thread."""

    def __init__(self, question: Question, emit: Callable[[Event], None]) -> None:
        self.question, self.emit = question, emit
        self._gone = threading.Event()

    def cancel(self) -> None:
        """Nobody wants the answer any more; from any thread."""
        self._gone.set()

    @property
    def cancelled(self) -> bool:
        """Whether somebody cancelled it."""
        return self._gone.is_set()
