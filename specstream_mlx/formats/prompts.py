"""Prompts as users have them -> ids: files of them, text, chat messages, ids, arrays. Nothing here imports MLX.

Every command and the library go through ``prompt_ids``; files of prompts are read by ``read_prompts`` alone.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.formats.chat_template import ChatTemplate
from specstream_mlx.formats.jsonl import read_jsonl, read_text, text_lines

MOST_PROBLEMS = 5  # of one file, in one message
_EXPECTED = "a JSON object with a 'prompt' that is not empty"
_PLAIN = ChatTemplate()


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file.

    Attributes:
        place: file and line, for messages.
        messages: what is asked, up to the last message of the user.
        row: the whole object; its other columns are kept.
        is_text: whether the file gave a text, not messages.
    """

    place: str
    messages: tuple[Mapping[str, Any], ...]
    row: Mapping[str, Any]
    is_text: bool

    @property
    def text(self) -> str:
        """The text, or the content of the last message."""
        return str(self.messages[-1].get("content") or "")

    @property
    def asked(self) -> Any:
        """What the file gave: a text or messages."""
        return self.row.get("prompt", self.row.get("messages"))

    @classmethod
    def of_row(cls, row: Mapping[str, Any], place: str) -> "Prompt":
        """From an object with ``prompt`` (a text or messages) or ``messages``; an answer at the end is left out.

        Raises:
            InvalidInputError: it has neither, or an empty one.
        """
        asked = row.get("prompt", row.get("messages"))
        if isinstance(asked, str) and asked:
            return cls(place, ({"role": "user", "content": asked},), row, True)
        if isinstance(asked, list) and asked and all(isinstance(message, dict) for message in asked):
            messages = asked[:-1] if asked[-1].get("role") == "assistant" else asked
            if messages:
                return cls(place, tuple(messages), row, False)
        raise InvalidInputError(f"{place}: expected {_EXPECTED}")


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: JSON lines with ``prompt`` or ``messages`` each, or text, one prompt a line.

    A name that ends in ``.jsonl`` or ``.json`` is of JSON lines, one that ends in ``.txt`` of text; any other file is
    of JSON lines when its first line begins with ``{``.

    Raises:
        InvalidInputError: the file cannot be read, holds no prompt, or a row has none; file and line are named.
    """
    lines = text_lines(read_text(path))
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".json") or (suffix != ".txt" and lines and lines[0][1].lstrip().startswith("{")):
        rows = read_jsonl(path, _EXPECTED)
    else:
        rows = [(number, {"prompt": line.rstrip("\r")}) for number, line in lines]
    prompts, problems = [], []
    for number, row in rows:
        try:
            prompts.append(Prompt.of_row(row, f"{path}:{number}"))
        except InvalidInputError as error:
            problems.append(str(error))
    if problems:
        raise InvalidInputError("\n".join(problems[:MOST_PROBLEMS]))
    if not prompts:
        raise InvalidInputError(f"{path}: no prompts in it")
    return prompts


def encode_prompt(tokenizer: Any, prompt: str | Prompt, template: ChatTemplate = _PLAIN) -> list[int]:
    """The ids of a prompt, through the chat template where the tokenizer has one.

    Raises:
        InvalidInputError: the template refuses the messages, or messages meet a tokenizer without one.
    """
    if isinstance(prompt, str):
        prompt = Prompt("prompt", ({"role": "user", "content": prompt},), {}, True)
    if template.is_used(tokenizer):
        answer = [] if template.prefill is None else [{"role": "assistant", "content": template.prefill}]
        text = template.render(tokenizer, [*prompt.messages, *answer], tools=prompt.row.get("tools"))
        return template_ids(tokenizer, text)
    if not prompt.is_text:
        raise InvalidInputError("messages need a chat template, and this tokenizer has none")
    return text_ids(tokenizer, prompt.text)


def template_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that a chat template wrote: its special tokens are in it."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def text_ids(tokenizer: Any, text: str, *, begins: bool = True) -> list[int]:
    """The ids of a text, with special tokens as mlx-lm adds them.

    Args:
        tokenizer: mlx-lm's wrapper.
        text: the text; a beginning-of-text token that it spells itself is not added again.
        begins: the text is the beginning, not the continuation of what a prompt cache holds, which gets no special
            tokens.

    Raises:
        InvalidInputError: half a surrogate pair in the text.
    """
    if not text:
        return []
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise InvalidInputError(f"prompt: {half} alone is no character; remove it") from error
    special = begins and (tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token))
    return list(tokenizer.encode(text, add_special_tokens=special))


def prompt_ids(tokenizer: Any, prompt: Any, vocab_size: int, *, begins: bool = True) -> list[int]:
    """The ids of a prompt: text, ids, an array of ids, or what a tokenizer of transformers returns for one text.

    Args:
        tokenizer: mlx-lm's wrapper.
        prompt: the prompt.
        vocab_size: of the model.
        begins: see ``text_ids``; ids are taken as they are.

    Raises:
        UsageError: something else, or ids of several prompts.
        InvalidInputError: nothing in it, or ids that the model has no embedding for.
    """
    ids = text_ids(tokenizer, prompt, begins=begins) if isinstance(prompt, str) else _given_ids(prompt)
    if not ids:
        raise InvalidInputError("prompt is empty; give at least one token")
    outside = next((token for token in ids if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise InvalidInputError(f"prompt: token id {outside} is outside the model's vocabulary 0..{vocab_size - 1}")
    return ids


def _given_ids(prompt: Any) -> list[int]:
    if isinstance(prompt, Mapping) or hasattr(prompt, "input_ids"):  # a BatchEncoding of transformers
        if "input_ids" not in prompt:
            raise _no_prompt(prompt, "a mapping without 'input_ids'")
        return _given_ids(prompt["input_ids"])
    values = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(values, bytes | bytearray) or not isinstance(values, Sequence):
        raise _no_prompt(prompt, repr(prompt)[:60])
    if any(isinstance(value, Sequence) and not isinstance(value, str) for value in values):
        one = "prompt[0]" if len(values) == 1 else "one of them"
        raise _no_prompt(prompt, f"{len(values)} rows of ids; give {one}")
    try:
        if any(isinstance(value, bool) for value in values):
            raise TypeError
        return [operator.index(value) for value in values]
    except TypeError:
        odd = next(value for value in values if isinstance(value, bool) or not hasattr(value, "__index__"))
        raise _no_prompt(prompt, f"a {type(prompt).__name__} with {odd!r} in it") from None


def _no_prompt(prompt: Any, found: str) -> UsageError:
    return UsageError(f"prompt is {found}: expected a text, or the token ids of one prompt as a list or an array")
