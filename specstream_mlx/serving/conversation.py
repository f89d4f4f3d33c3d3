"""Messages on their way to ids, and generated text on its way to reasoning, content and tool calls.

Marks of reasoning and tools, and the parsers of calls, are mlx-lm's, by tokenizer.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_lm.generate import TextStateMachine, make_text_state_machine

from specstream_mlx.errors import InvalidInputError
from specstream_mlx.serving.jobs import Message

Kind = Literal["content", "reasoning", "call"]
_CHANNELS = {
    "normal": [
        ("<|start|>assistant", "normal"),
        ("<|channel|>analysis<|message|>", "reasoning"),
        ("<|channel|>final<|message|>", "normal"),
        ("<|end|>", "normal"),
    ],
    "reasoning": [("<|end|>", "normal")],
}


@dataclass(frozen=True)
class Call:
    """A tool call; ``arguments`` is JSON."""

    name: str
    arguments: str


def encode_messages(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    template: Mapping[str, Any],
    continued: bool,
) -> list[int]:
    """The ids of a conversation, up to where the answer begins.

    A tokenizer without a chat template gets the messages' texts with an empty line between them.

    Raises:
        InvalidInputError: the template, a program of the model's author, refuses the messages.
    """
    if not tokenizer.has_chat_template:
        text = "\n\n".join(str(message["content"]) for message in messages if message.get("content"))
        return list(tokenizer.encode(text)) if text else []
    how: dict[str, Any] = dict(template)
    if continued:
        how["continue_final_message"] = True
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=list(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=not continued,
            **how,
        )
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InvalidInputError(f"messages: the chat template refused them ({reason})") from error
    return list(tokenizer.encode(text, add_special_tokens=False))


def begins_in_reasoning(tokenizer: Any, ids: Sequence[int]) -> bool:
    """Whether the prompt ends within a passage of reasoning, so that the answer goes on with it."""
    state = getattr(tokenizer, "response_initial_state", None)
    if state:
        return bool(state == "reasoning")
    if not getattr(tokenizer, "has_thinking", False):
        return False
    return bool(tokenizer.rfind_think_start(list(ids)) > tokenizer.rfind_think_end(list(ids)))


class Splitter:
    """Tells the parts of an answer apart as it comes; marks are left out, and held back while they may be begun."""

    def __init__(self, tokenizer: Any, *, reasoning: bool, tools: Sequence[Mapping[str, Any]] | None) -> None:
        self._tokenizer, self._tools = tokenizer, list(tools) if tools else None
        self._state = _machine(tokenizer).make_state("reasoning" if reasoning else "normal")
        self._call = ""
        self._in_call = False

    def feed(self, text: str, *, final: bool = False) -> list[tuple[Kind, Any]]:
        """What is certain by now: (kind, text), or ("call", ``Call``)."""
        self._state, segments = TextStateMachine.split(self._state, text)
        if final:
            self._state, rest, state = TextStateMachine.flush(self._state)
            segments.append((state, rest))
        found: list[tuple[Kind, Any]] = []
        for state, segment in segments:
            if state == "tool":
                self._in_call = True
                self._call += segment
                continue
            if self._in_call:
                found += self._finish_call()
            if segment:
                found.append(("reasoning" if state == "reasoning" else "content", segment))
        if final and self._in_call:
            found += self._finish_call()
        return found

    def _finish_call(self) -> list[tuple[Kind, Any]]:
        text, self._call, self._in_call = self._call, "", False
        try:
            parsed = self._tokenizer.tool_parser(text, self._tools)
            calls = parsed if isinstance(parsed, list) else [parsed]
            return [("call", Call(str(call["name"]), _arguments(call.get("arguments")))) for call in calls]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, SyntaxError):
            return [("content", text)] if text.strip() else []  # what is no call is shown as it is


def _machine(tokenizer: Any) -> TextStateMachine:
    """mlx-lm's marks of a tokenizer; those of gpt-oss's channels are not among them."""
    vocabulary = tokenizer.get_vocab()
    if "<|channel|>" in vocabulary and "<|message|>" in vocabulary and not tokenizer.has_thinking:
        return TextStateMachine(_CHANNELS)
    return make_text_state_machine(tokenizer)


def _arguments(arguments: Any) -> str:
    if isinstance(arguments, str):
        return arguments
    return json.dumps({} if arguments is None else arguments, ensure_ascii=False)
