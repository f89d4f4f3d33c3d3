"""The flags of chat templates."""

import json
from typing import Any

from specstream_mlx.errors import UsageError
from specstream_mlx.formats.chat_template import RESERVED, ChatTemplate
from specstream_mlx.formats.prompts import template_ids

_FLAGS = {
    "system_prompt": "--system-prompt",
    "arguments": "--chat-template-config",
    "prefill": "--prefill-response",
}


def chat_template(
    system_prompt: str | None, config: str | None, ignored: bool = False, prefill: str | None = None
) -> ChatTemplate:
    """From the values of the command line.

    Raises:
        UsageError: not JSON, an argument that is decided here, or contradicting options.
    """
    arguments: Any = None
    if config is not None:
        try:
            arguments = json.loads(config)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--chat-template-config: not valid JSON ({error}); give an object") from None
        if not isinstance(arguments, dict):
            raise UsageError(f"--chat-template-config: got {config}, expected a JSON object")
        taken = sorted(RESERVED & set(arguments))
        if taken:
            raise UsageError(f"--chat-template-config: {taken[0]!r} is decided by this program; leave it out")
    chat = ChatTemplate(system_prompt, arguments, ignored, prefill)
    if ignored and chat.needed_by:
        raise UsageError(f"{_FLAGS[chat.needed_by[0]]}: contradicts --ignore-chat-template; drop one")
    return chat


def is_used(chat: ChatTemplate, tokenizer: Any) -> bool:
    """Whether there is a template to apply.

    Raises:
        UsageError: a flag needs one and the tokenizer has none.
    """
    if not chat.ignored and not tokenizer.has_chat_template and chat.needed_by:
        raise UsageError(
            f"{_FLAGS[chat.needed_by[0]]}: this tokenizer has no chat template; put everything into the prompt"
        )
    return chat.is_used(tokenizer)


def ask(chat: ChatTemplate, tokenizer: Any, question: str, *, cached: bool = False) -> str | list[int]:
    """The prompt of one question: its text, or ids where the template has already written the special tokens.

    Args:
        chat: the flags.
        tokenizer: mlx-lm's wrapper.
        question: of the user.
        cached: a prompt cache already holds everything before the question.

    Raises:
        UsageError: see ``is_used``.
        InvalidInputError: the template refuses the messages.
    """
    if not is_used(chat, tokenizer):
        return question
    text = chat.after_cache(tokenizer, question) if cached else chat.render(tokenizer, chat.asked(question))
    return template_ids(tokenizer, text)
