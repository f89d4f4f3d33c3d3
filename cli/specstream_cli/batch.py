"""``--prompts-file``: the prompts of a file, answered several at once and told one after another."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specstream_cli.chat_template import is_used
from specstream_mlx.errors import InvalidInputError
from specstream_mlx.formats.chat_template import ChatTemplate
from specstream_mlx.formats.prompts import Prompt, encode_prompt, prompt_ids, read_prompts

SEPARATOR = "=" * 10  # between answers, as mlx-lm writes it around one


@dataclass(frozen=True)
class Batch:
    """The prompts of a file, checked before anything is generated."""

    path: Path
    prompts: list[Prompt]

    @classmethod
    def read(cls, path: Path) -> "Batch":
        """The file's prompts, as every command reads them.

        Raises:
            InvalidInputError: not such a file; the line is named.
        """
        return cls(path, read_prompts(path))

    def encode(self, target: Any, tokenizer: Any, chat: ChatTemplate) -> list[list[int]]:
        """All prompts as ids.

        Raises:
            UsageError: a flag needs a chat template and the tokenizer has none.
            InvalidInputError: prompts that the model cannot take, every one with its line.
        """
        from specstream_mlx.engine.generate import check_context

        is_used(chat, tokenizer)
        encoded, problems = [], []
        for prompt in self.prompts:
            try:
                ids = prompt_ids(tokenizer, encode_prompt(tokenizer, prompt, chat), target.vocab_size)
                check_context(target, 0, len(ids))
                encoded.append(ids)
            except InvalidInputError as error:
                problems.append(f"{prompt.place}: {error}")
        if problems:
            raise InvalidInputError("\n".join(problems))
        return encoded


class Turns:
    """Answers that are made at once, given out one after another."""

    def __init__(self, responses: Iterator[tuple[int, Any]]) -> None:
        """``responses``: of all answers, each with the index of its prompt."""
        self._responses = responses
        self._early: dict[int, list[Any]] = {}

    def answer(self, index: int) -> Iterator[Any]:
        """The responses of one answer, as they are made; those of others wait for their turn."""
        for response in self._early.pop(index, []):
            yield response
            if response.finish_reason is not None:
                return
        for place, response in self._responses:
            if place == index:
                yield response
                if response.finish_reason is not None:
                    return
            else:
                self._early.setdefault(place, []).append(response)

    def rest(self) -> list[tuple[int, list[Any]]]:
        """What was made of answers whose turn has not come, by prompt."""
        return sorted(self._early.items())


def totals(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``--json`` says about all answers together."""
    tokens = sum(answer["generation_tokens"] for answer in answers)
    passes = sum(answer["target_passes"] for answer in answers)
    return {
        "prompts": len(answers),
        "generation_tokens": tokens,
        "target_passes": passes,
        "tokens_per_pass": tokens / passes if passes else 0.0,
    }


def totals_line(answers: list[dict[str, Any]]) -> str:
    """The same for people."""
    found = totals(answers)
    prompts = "prompt" if len(answers) == 1 else "prompts"
    return (
        f"{found['prompts']} {prompts}, {found['generation_tokens']} tokens in {found['target_passes']} passes "
        f"({found['tokens_per_pass']:.2f} per pass)"
    )
