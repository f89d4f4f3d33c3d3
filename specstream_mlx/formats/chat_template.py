"""How messages become the text of a prompt, as mlx-lm applies chat templates."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specstream_mlx.errors import InvalidInputError, UsageError

Message = dict[str, Any]
# Arguments of transformers' ``apply_chat_template`` that are decided here.
RESERVED = frozenset(
    (
        "add_generation_prompt", "continue_final_message", "conversation", "max_length", "messages", "padding",
        "processor_kwargs", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize",
        "tokenizer_kwargs", "truncation",
    )
)  # fmt: skip
_CHANNEL = re.compile(
    r"<\|channel\|>(\w+)[^<]*<\|message\|>(.*?)(?=<\|end\|>|<\|return\|>|<\|call\|>|<\|start\|>|\Z)", re.DOTALL
)


@dataclass(frozen=True)
class ChatTemplate:
    """What is given to a tokenizer's chat template beside the messages.

    Attributes:
        system_prompt: the system message.
        arguments: further arguments of the template.
        ignored: the model gets the raw prompt.
        prefill: the beginning of the answer, which the model goes on with.
    """

    system_prompt: str | None = None
    arguments: Mapping[str, Any] | None = None
    ignored: bool = False
    prefill: str | None = None

    def __post_init__(self) -> None:
        taken = sorted(RESERVED & set(self.arguments or ()))
        if taken:
            raise UsageError(f"chat template arguments: {taken[0]!r} is decided by this program; leave it out")

    @property
    def needed_by(self) -> list[str]:
        """The attributes that are given and have no meaning without a template."""
        return [name for name in ("system_prompt", "arguments", "prefill") if getattr(self, name) is not None]

    def is_used(self, tokenizer: Any) -> bool:
        """Whether there is a template to apply.

        Raises:
            UsageError: an attribute needs one and the tokenizer has none.
        """
        if self.ignored or tokenizer.has_chat_template:
            return not self.ignored
        if self.needed_by:
            raise UsageError(
                f"{self.needed_by[0]}: this tokenizer has no chat template; put everything into the prompt"
            )
        return False

    def render(
        self,
        tokenizer: Any,
        messages: Sequence[Mapping[str, Any]],
        *,
        continued: bool | None = None,
        tools: Any = None,
    ) -> str:
        """The text of a conversation, up to where the model goes on.

        Args:
            tokenizer: mlx-lm's wrapper, with a chat template.
            messages: without the system prompt; with the prefill, where there is one.
            continued: go on with the last message instead of beginning an answer; None: when there is a prefill.
            tools: descriptions of tools, for this conversation alone.

        Raises:
            InvalidInputError: the template, a program of the model's author, refuses the messages.
        """
        goes_on = self.prefill is not None if continued is None else continued
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        given = dict(self.arguments or {})
        if tools is not None:
            given["tools"] = tools
        if goes_on:
            given["continue_final_message"] = True
        try:
            text: str = tokenizer.apply_chat_template(
                [*system, *messages], tokenize=False, add_generation_prompt=not goes_on, **given
            )
        except Exception as error:  # a program of the model's author may raise anything
            reason = " ".join(str(error).split())
            if type(error).__name__ == "TemplateSyntaxError":
                raise InvalidInputError(
                    f"{_file_of(tokenizer)}: chat template: line {getattr(error, 'lineno', '?')}: {reason}; mend it, "
                    "or give the raw prompt"
                ) from error
            raise InvalidInputError(f"chat template: refused the messages ({reason})") from error
        return text

    def asked(self, question: str) -> list[Message]:
        """The messages of one question, and the beginning of its answer."""
        messages: list[Message] = [{"role": "user", "content": question}]
        if self.prefill is not None:
            messages.append({"role": "assistant", "content": self.prefill})
        return messages

    def after_cache(self, tokenizer: Any, question: str) -> str:
        """The text of one question from the question on: a prompt cache already holds everything before it.

        The question begins where the texts of two other questions begin to differ, so it does not matter what the
        system prompt or the question says.

        Raises:
            InvalidInputError: the template refuses the messages, or does not show the question as it is.
        """
        text = self.render(tokenizer, self.asked(question))
        first, second = (self.render(tokenizer, self.asked(other)) for other in ("A", "B"))
        begin = next((at for at, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
        shown = question.strip()
        if begin is None or not shown or text[:begin] != first[:begin] or not text[begin:].lstrip().startswith(shown):
            raise InvalidInputError("chat template: does not show the question as it is; give the raw prompt instead")
        return text[begin:]


def _file_of(tokenizer: Any) -> Path:
    """The file that holds a tokenizer's chat template."""
    directory = Path(str(getattr(tokenizer, "name_or_path", "") or "."))
    names = ("chat_template.jinja", "chat_template.json")
    return next(
        (directory / name for name in names if (directory / name).exists()), directory / "tokenizer_config.json"
    )


def answer_message(text: str) -> Message:
    """An answer as a message of the conversation that goes on.

    gpt-oss writes its answer in channels, and its template wants the thoughts and the answer apart.
    """
    parts = _CHANNEL.findall(text)
    if not parts:
        return {"role": "assistant", "content": text}
    thoughts = "\n".join(said for channel, said in parts if channel == "analysis")
    content = "".join(said for channel, said in parts if channel != "analysis")
    return {"role": "assistant", "content": content} | ({"thinking": thoughts} if thoughts else {})
