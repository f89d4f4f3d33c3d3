"""``--prompts-file``: the prompts of a file, answered one after another."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specstream_mlx.errors import InvalidInputError

SEPARATOR = "=" * 10  # between answers, as mlx-lm writes it around one


@dataclass(frozen=True)
class Batch:
    """The prompts of a file, checked before anything is generated."""

    path: Path
    prompts: list[str]
    lines: list[int]

    @classmethod
    def read(cls, path: Path) -> "Batch":
        """JSON lines with a ``prompt`` each, as ``benchmark`` reads them.

        Raises:
            InvalidInputError: not such a file; the line is named.
        """
        from specstream_mlx.calibration.measure import read_prompts

        rows = read_prompts(path)
        lines = [number for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1) if line.strip()]
        return cls(path, [row["prompt"] for row in rows], lines)

    def encode(self, target: Any, tokenizer: Any, apply: Callable[[Any, str], str | list[int]]) -> list[list[int]]:
        """All prompts as ids; ``apply`` puts one into the chat template.

        Raises:
            InvalidInputError: prompts that the model cannot take, every one with its line.
        """
        from specstream_mlx.engine.generate import check_context, prompt_ids

        encoded, problems = [], []
        for prompt, line in zip(self.prompts, self.lines, strict=True):
            try:
                ids = prompt_ids(tokenizer, apply(tokenizer, prompt), target.args.vocab_size)
                check_context(target, 0, len(ids))
                encoded.append(ids)
            except InvalidInputError as error:
                problems.append(f"{self.path}:{line}: {error}")
        if problems:
            raise InvalidInputError("\n".join(problems))
        return encoded


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
