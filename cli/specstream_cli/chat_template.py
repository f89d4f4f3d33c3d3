"""How what the user says becomes the model's prompt, as mlx-lm applies chat templates."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specstream_mlx.errors import InvalidInputError, UsageError

Message = dict[str, str]
_PLACE = "<query>"  # stands for the question where mlx-lm looks for the part behind a prompt cache


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template's options; ``prefill`` is the beginning of the answer."""

    system_prompt: str | None = None
    arguments: Mapping[str, Any] | None = None
    ignored: bool = False
    prefill: str | None = None

    @classmethod
    def of(
        cls, system_prompt: str | None, config: str | None, ignored: bool = False, prefill: str | None = None
    ) -> "ChatTemplate":
        """From the values of the command line.

        Raises:
            UsageError: not JSON, or contradicting options.
        """
        arguments: Any = None
        if config is not None:
            try:
                arguments = json.loads(config)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"--chat-template-config: not valid JSON ({error}); give an object") from None
            if not isinstance(arguments, dict):
                raise UsageError(f"--chat-template-config: got {config}, expected a JSON object")
        chat = cls(system_prompt, arguments, ignored, prefill)
        if ignored and chat._given:
            raise UsageError(f"{chat._given[0]}: contradicts --ignore-chat-template; drop one")
        return chat

    @property
    def _given(self) -> list[str]:
        options = {
            "--system-prompt": self.system_prompt,
            "--chat-template-config": self.arguments,
            "--prefill-response": self.prefill,
        }
        return [option for option, value in options.items() if value is not None]

    def is_used(self, tokenizer: Any) -> bool:
        """Whether there is a template to apply.

        Raises:
            UsageError: an option needs one and the tokenizer has none.
        """
        if self.ignored or tokenizer.has_chat_template:
            return not self.ignored
        if self._given:
            raise UsageError(f"{self._given[0]}: this tokenizer has no chat template; put everything into the prompt")
        return False

    def prompt(self, tokenizer: Any, question: str, *, cached: bool = False) -> str | list[int]:
        """The prompt as text, or as ids where the template has already written the special tokens.

        Args:
            cached: a prompt cache already holds everything before the question.

        Raises:
            UsageError: see ``is_used``.
            InvalidInputError: the template refuses the messages.
        """
        if not self.is_used(tokenizer):
            return question
        messages = [{"role": "user", "content": question}]
        if self.prefill is not None:
            messages.append({"role": "assistant", "content": self.prefill})
        text = self.render(tokenizer, messages)
        if cached:
            messages[-1]["content"] = _PLACE
            place = self.render(tokenizer, messages).find(_PLACE)
            if place < 0:
                raise InvalidInputError(
                    "chat template: does not show the question as it is; use --ignore-chat-template"
                )
            text = text[place:]
        return list(tokenizer.encode(text, add_special_tokens=False))

    def render(self, tokenizer: Any, messages: Sequence[Message], *, continued: bool | None = None) -> str:
        """The text of a conversation, up to where the model goes on.

        Args:
            continued: go on with the last message instead of beginning an answer; None: when it is the prefill.

        Raises:
            InvalidInputError: the template, a program of the model's author, refuses the messages.
        """
        goes_on = self.prefill is not None if continued is None else continued
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        mode = {"continue_final_message": True} if goes_on else {}
        try:
            text: str = tokenizer.apply_chat_template(
                [*system, *messages],
                tokenize=False,
                add_generation_prompt=not goes_on,
                **mode,
                **(self.arguments or {}),
            )
        except Exception as error:
            reason = " ".join(str(error).split())
            raise InvalidInputError(f"chat template: refused the messages ({reason})") from error
        return text
