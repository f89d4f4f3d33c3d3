"""Data in mlx-lm's formats (text, completions, chat) -> examples, through mlx-lm's own datasets."""

import contextlib
import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_lm.tuner.datasets import CompletionsDataset, create_dataset, load_dataset

from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.training.batches import Example

FORMATS = "{'text'}, {'prompt', 'completion'} or {'messages'}"
_VALIDATION_SHARE = 20  # one row in so many is held out where the data has no validation split
_MOST_HELD_OUT = 100


@dataclass(frozen=True)
class Dataset:
    """Examples to train on and to validate on, and what a reader of the log should know about them."""

    train: list[Example]
    valid: list[Example]
    notes: list[str] = field(default_factory=list)


class PlainCompletions(CompletionsDataset):
    """Prompt and completion of a model without a chat template: one text after the other, then end-of-text."""

    def process(self, d: dict[str, str]) -> tuple[list[int], int]:
        """A row's ids, and how many of them are prompt."""
        prompt = plain_prompt(self.tokenizer, d[self.prompt_key])
        completion = self.tokenizer.encode(d[self.completion_key], add_special_tokens=False)
        return [*prompt, *completion, self.tokenizer.eos_token_id], len(prompt) if self.mask_prompt else 0


def plain_prompt(tokenizer: Any, text: str) -> list[int]:
    """The ids of a prompt as generation meets them: special tokens at the start, no end-of-text."""
    ids = list(tokenizer.encode(text))
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def read_dataset(data: str, tokenizer: Any, *, mask_prompt: bool | None, max_seq_length: int, seed: int) -> Dataset:
    """Read ``data``: a directory with ``train.jsonl`` (and ``valid.jsonl``), a JSONL file, or a Hugging Face data set.

    Args:
        data: where.
        tokenizer: mlx-lm's wrapper.
        mask_prompt: leave the prompt out of the loss; None: where the data has prompts.
        max_seq_length: longer rows are cut, as in mlx-lm; a row whose prompt alone is so long is dropped.
        seed: of the choice of validation rows, where the data has none.

    Raises:
        InvalidInputError: a file is missing or a row is not in one of the formats.
        UsageError: prompts are to be masked in data that has none.
    """
    path = Path(data).expanduser()
    notes: list[str] = []
    if path.is_dir() or path.is_file():
        files = [path / "train.jsonl", path / "valid.jsonl"] if path.is_dir() else [path]
        parts = [_read_file(file, tokenizer, mask_prompt) for file in files if file.exists() or file == files[0]]
    else:
        parts = _read_hub(data, tokenizer, mask_prompt)
    cut = [_within(part, max_seq_length, notes) for part in parts]
    train, valid = cut[0], cut[1] if len(cut) > 1 else []
    if not valid:
        train, valid = hold_out(train, seed)
        notes.append(f"{len(valid)} of {len(train) + len(valid)} rows are held out for validation")
    if not train:
        raise InvalidInputError(f"{data}: no row to train on is left; give longer answers or a larger --max-seq-length")
    return Dataset(train, valid, notes)


def hold_out(rows: Sequence[Any], seed: int) -> tuple[list[Any], list[Any]]:
    """Split rows into those to train on and those to validate on, at random; fewer than 10 rows are all trained on."""
    count = 0 if len(rows) < 10 else min(_MOST_HELD_OUT, max(1, len(rows) // _VALIDATION_SHARE))
    chosen = set(random.Random(f"validation/{seed}").sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file.

    Raises:
        InvalidInputError: the file cannot be read, is empty, or a line is no JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise InvalidInputError(f"{path}: no such file; a data directory needs train.jsonl") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidInputError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise InvalidInputError(f"{path}:{number}: a {type(row).__name__}, expected an object like {FORMATS}")
        rows.append(row)
    if not rows:
        raise InvalidInputError(f"{path}: holds no rows; expected one JSON object a line like {FORMATS}")
    return rows


def _read_file(path: Path, tokenizer: Any, mask_prompt: bool | None) -> list[Example]:
    rows = read_rows(path)
    return _encode(_dataset(rows, tokenizer, mask_prompt, str(path)), rows, str(path))


def _dataset(rows: list[dict[str, Any]], tokenizer: Any, mask_prompt: bool | None, where: str) -> Any:
    """mlx-lm's dataset of these rows, whose format the first row tells."""
    has_prompt = "messages" in rows[0] or ("prompt" in rows[0] and "completion" in rows[0])
    masked = has_prompt if mask_prompt is None else mask_prompt
    if masked and not has_prompt:
        raise UsageError(f"--mask-prompt: {where} holds plain text, which has no prompt; drop one")
    if "completion" in rows[0] and "prompt" in rows[0] and not tokenizer.has_chat_template:
        return PlainCompletions(rows, tokenizer, "prompt", "completion", masked)
    if "messages" in rows[0] and not tokenizer.has_chat_template:
        raise InvalidInputError(
            f"{where}: chat rows need a chat template, and this tokenizer has none; give completions"
        )
    try:
        return create_dataset(rows, tokenizer, SimpleNamespace(mask_prompt=masked))
    except ValueError as error:
        raise InvalidInputError(f"{where}: rows have {', '.join(map(repr, rows[0]))}, expected {FORMATS}") from error


def _encode(dataset: Any, rows: Sequence[dict[str, Any]], where: str) -> list[Example]:
    examples, problems = [], []
    for number, row in enumerate(rows, 1):
        try:
            tokens, offset = dataset.process(row)
        except Exception as error:  # a chat template is a program and may raise anything
            problems.append(f"{where}: row {number}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            if len(problems) == 5:
                break
            continue
        offset = max(1, offset)
        examples.append(Example(tuple(tokens[:offset]), tuple(tokens[offset:])))
    if problems:
        raise InvalidInputError("\n".join(problems))
    return examples


def _within(examples: list[Example], max_seq_length: int, notes: list[str]) -> list[Example]:
    kept, cut = [], 0
    for example in examples:
        room = max_seq_length - len(example.prompt)
        if room < 2 or not example.answer:
            continue
        cut += len(example.answer) > room
        kept.append(Example(example.prompt, example.answer[:room]))
    if len(kept) < len(examples):
        notes.append(f"{len(examples) - len(kept)} rows are left out: no answer within {max_seq_length} tokens")
    if cut:
        notes.append(f"{cut} rows are cut to {max_seq_length} tokens")
    return kept


def _read_hub(data: str, tokenizer: Any, mask_prompt: bool | None) -> list[list[Example]]:
    """A Hugging Face data set through mlx-lm, which tells its format the same way."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm says what it loads
            parts = load_dataset(SimpleNamespace(data=data, train=True, test=False, mask_prompt=False), tokenizer)[:2]
    except ImportError as error:
        raise InvalidInputError(
            f"--data: {data}: neither a file or directory nor a data set that can be loaded; data sets of the hub need "
            "pip install datasets"
        ) from error
    except Exception as error:  # offline, unknown, no split, other columns: each its own kind
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InvalidInputError(f"--data: {data}: neither a file or directory nor a data set ({reason})") from error
    rows = [[dict(part[i]) for i in range(len(part))] for part in parts if len(part)]
    return [_encode(_dataset(part, tokenizer, mask_prompt, data), part, data) for part in rows]
