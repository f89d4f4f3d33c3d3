"""Data in mlx-lm's formats (text, completions, chat) -> examples, through mlx-lm's own datasets."""

import contextlib
import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset, TextDataset, create_dataset, load_dataset

from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.formats.jsonl import read_jsonl
from specstream_mlx.formats.places import is_repository_id
from specstream_mlx.formats.prompts import text_ids
from specstream_mlx.training.batches import Example

Encode = Callable[[Any], tuple[list[int], int]]
_VALIDATION_SHARE = 20  # one row in so many is held out where the data has no validation split
_MOST_HELD_OUT = 100
_FEWEST = 10  # rows that one is held out of


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
    ids = text_ids(tokenizer, text)
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def read_dataset(
    data: str | Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    mask_prompt: bool | None,
    max_seq_length: int,
    seed: int,
    features: Mapping[str, str] | None = None,
    validation: bool = True,
) -> Dataset:
    """Read ``data``: a directory with ``train.jsonl`` (and ``valid.jsonl``), a JSONL file, or Hugging Face data sets.

    Args:
        data: a place, or the data sets of mlx-lm's ``hf_dataset``, one after the other.
        tokenizer: mlx-lm's wrapper.
        mask_prompt: leave the prompt out of the loss; None: where the data has prompts.
        max_seq_length: longer rows are cut, as in mlx-lm; a row whose prompt alone is so long is dropped.
        seed: of the choice of validation rows, where the data has none.
        features: other names of the columns, as in mlx-lm: ``{"prompt_feature": "question"}``.
        validation: whether there is to be one; without it nothing is held out, and ``valid.jsonl`` is not read.

    Raises:
        InvalidInputError: data is missing or a row is not in one of the formats.
        UsageError: prompts are to be masked in data that has none.
    """
    names = dict(features or {})
    notes: list[str] = []
    if not isinstance(data, str):
        loaded = [
            _read_hub({"hf_dataset": dict(one)}, f"hf_dataset: {one['path']}", one, tokenizer, mask_prompt)
            for one in data
        ]
        parts = [[row for part in column for row in part] for column in zip(*loaded, strict=True)]
    elif files := local_files(data):
        chosen = files if validation else files[:1]
        parts = [_read_file(file, names, tokenizer, mask_prompt) for file in chosen]
    else:
        parts = _read_hub({"data": data} | names, f"--data: {data}", names, tokenizer, mask_prompt)
    cut = [_within(part, max_seq_length, notes) for part in (parts if validation else parts[:1])]
    train, valid = cut[0], cut[1] if len(cut) > 1 else []
    if validation and not valid:
        train, valid = hold_out(train, seed)
        total = len(train) + len(valid)
        few = f"no validation: {_rows(total)}, fewer than {_FEWEST} to hold one out of; give a valid.jsonl"
        notes.append(few if not valid else f"{len(valid)} of {total} rows are held out for validation")
    if not train:
        raise InvalidInputError(
            f"{data if isinstance(data, str) else 'hf_dataset'}: no row to train on is left; give longer answers or a "
            "larger --max-seq-length"
        )
    return Dataset(train, valid, notes)


def local_files(data: str) -> list[Path]:
    """The files of a local ``--data``, the one to train on first; none for a data set of the hub.

    Raises:
        InvalidInputError: there is nothing of that name.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        train, valid = path / "train.jsonl", path / "valid.jsonl"
        if not train.exists():
            raise InvalidInputError(f"--data: {train}: no such file; a data directory needs train.jsonl")
        return [train, valid] if valid.exists() else [train]
    if path.exists():
        return [path]
    if is_repository_id(data) and not path.parent.is_dir():  # a mistyped path is no download
        return []
    raise InvalidInputError(f"--data: {data}: neither a file or directory nor a data set such as org/name")


def hold_out(rows: Sequence[Any], seed: int) -> tuple[list[Any], list[Any]]:
    """Split rows into those to train on and those to validate on, at random; few rows are all trained on."""
    count = 0 if len(rows) < _FEWEST else min(_MOST_HELD_OUT, max(1, len(rows) // _VALIDATION_SHARE))
    chosen = set(random.Random(f"validation/{seed}").sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file.

    Raises:
        InvalidInputError: the file cannot be read, is empty, or a line is no JSON object.
    """
    rows = [row for _, row in read_jsonl(path, f"an object like {_formats({})}")]
    if not rows:
        raise InvalidInputError(f"{path}: holds no rows; expected one JSON object a line like {_formats({})}")
    return rows


def _formats(features: Mapping[str, str]) -> str:
    text, prompt, completion, chat = (
        features.get(f"{kind}_feature", usual)
        for kind, usual in {"text": "text", "prompt": "prompt", "completion": "completion", "chat": "messages"}.items()
    )
    return f"{{{text!r}}}, {{{prompt!r}, {completion!r}}} or {{{chat!r}}}"


def _read_file(path: Path, features: Mapping[str, str], tokenizer: Any, mask_prompt: bool | None) -> list[Example]:
    rows = read_rows(path)
    try:
        dataset = create_dataset(rows, tokenizer, SimpleNamespace(mask_prompt=False, **features))
    except ValueError as error:
        columns = ", ".join(map(repr, rows[0])) or "nothing"
        raise InvalidInputError(f"{path}: rows have {columns}, expected {_formats(features)}") from error
    return _encode_dataset(dataset, rows, tokenizer, mask_prompt, str(path))


def _read_hub(
    arguments: Mapping[str, Any], where: str, features: Mapping[str, str], tokenizer: Any, mask_prompt: bool | None
) -> list[list[Example]]:
    """The rows to train on and to validate on of a Hugging Face data set, through mlx-lm.

    Args:
        arguments: mlx-lm's, ``data`` or ``hf_dataset``.
        where: the data set's name in messages.
        features: may hold names of columns.
        tokenizer: mlx-lm's wrapper.
        mask_prompt: see ``read_dataset``.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm says what it loads
            asked = SimpleNamespace(train=True, test=False, mask_prompt=False, **arguments)
            parts = load_dataset(asked, tokenizer)[:2]
    except ImportError as error:
        raise InvalidInputError(
            f"{where}: neither a file or directory nor a data set that can be loaded; data sets of the hub need the "
            f"package datasets: pip install 'specstream-mlx[datasets]' ({error})"
        ) from error
    except Exception as error:  # offline, unknown, no split, other columns: each its own kind
        reason = " ".join(str(error).split()) or type(error).__name__
        if reason.startswith("Unsupported data format"):
            reason = f"its columns are none of {_formats(features)}; name them as prompt_feature, ... in a --config"
        elif reason.startswith("Training set not found"):
            reason = "it has no split 'train'; name one as train_split of hf_dataset in a --config"
        elif isinstance(error, IndexError):
            reason = "a split has no rows"
        if len(reason) > 300:  # the library prints all it knows, and says at the end what is wrong
            reason = f"{reason[:140]} ... {reason[-150:]}"
        raise InvalidInputError(f"{where}: not a data set to train on: {reason}") from error
    return [
        _encode_dataset(part, [part[i] for i in range(len(part))], tokenizer, mask_prompt, where) if len(part) else []
        for part in parts
    ]


def _encoder(dataset: Any, tokenizer: Any, mask_prompt: bool | None, where: str) -> Encode:
    """How mlx-lm encodes a row of this dataset: to ids, and how many of them are not learned.

    Raises:
        UsageError: plain text is to be masked.
        InvalidInputError: chat rows meet a tokenizer without a chat template.
    """
    if isinstance(dataset, TextDataset):
        if mask_prompt:
            raise UsageError(f"--mask-prompt: {where} holds plain text, which has no prompt; drop one")
        return dataset.process
    dataset.mask_prompt = mask_prompt is not False
    if tokenizer.has_chat_template:
        return dataset.process
    if isinstance(dataset, ChatDataset):
        raise InvalidInputError(
            f"{where}: chat rows need a chat template, and this tokenizer has none; give completions"
        )
    return PlainCompletions([], tokenizer, dataset.prompt_key, dataset.completion_key, dataset.mask_prompt).process


def _encode_dataset(
    dataset: Any, rows: Sequence[Any], tokenizer: Any, mask_prompt: bool | None, where: str
) -> list[Example]:
    texts = [getattr(dataset, key) for key in ("text_key", "prompt_key", "completion_key") if hasattr(dataset, key)]
    return _encode(_encoder(dataset, tokenizer, mask_prompt, where), rows, texts, where)


def _check_texts(row: Any, columns: Sequence[str]) -> None:
    """Refuse what a tokenizer refuses in its own words, and a chat template would print as ``None``."""
    for column in columns:
        if column not in row:
            raise InvalidInputError(f"has no {column!r}, as the first row does")
        if not isinstance(row[column], str):
            raise InvalidInputError(f"{column!r} is {json.dumps(row[column])[:40]}, expected a text")


def _encode(encode: Encode, rows: Sequence[Any], texts: Sequence[str], where: str) -> list[Example]:
    """Rows as examples; ``texts`` are the columns that hold a text each."""
    examples, problems = [], []
    for number, row in enumerate(rows, 1):
        try:
            _check_texts(row, texts)
            tokens, offset = encode(row)
        except Exception as error:  # a chat template is a program and may raise anything
            kind = "" if isinstance(error, InvalidInputError) else f"{type(error).__name__}: "
            problems.append(f"{where}: row {number}: {kind}{' '.join(str(error).split())[:200]}")
            if len(problems) == 5:
                break
            continue
        offset = max(1, offset)
        examples.append(Example(tuple(tokens[:offset]), tuple(tokens[offset:])))
    if problems:
        raise InvalidInputError("\n".join(problems))
    return examples


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _within(examples: list[Example], max_seq_length: int, notes: list[str]) -> list[Example]:
    kept, cut = [], 0
    for example in examples:
        room = max_seq_length - len(example.prompt)
        if room < 2 or not example.answer:
            continue
        cut += len(example.answer) > room
        kept.append(Example(example.prompt, example.answer[:room]))
    if len(kept) < len(examples):
        notes.append(f"{_rows(len(examples) - len(kept))} left out: no answer within {max_seq_length} tokens")
    if cut:
        notes.append(f"{_rows(cut)} cut to {max_seq_length} tokens")
    return kept
