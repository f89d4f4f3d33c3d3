"""Self-distillation: the model answers prompts, and its streams learn to predict its own answers.

Answers are appended to a file as they are made, so an interrupted run goes on and a later one uses them again.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler

from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.formats import prompts
from specstream_mlx.formats.chat_template import ChatTemplate
from specstream_mlx.formats.jsonl import read_jsonl, text_lines
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.target.rotary import runs_batches
from specstream_mlx.training.batches import Example, mixed_seed
from specstream_mlx.training.datasets import Dataset, hold_out, plain_prompt
from specstream_mlx.training.settings import flag

Prompt = tuple[int, ...]
PROMPTS_NAME = "prompts.jsonl"  # prompts that a model directory brings along
_BLOCKS, _BLOCK_SIZE = 1024, 4096  # of a file of weights that are read to tell it from others; size in bytes


@dataclass(frozen=True)
class DistillSettings:
    """How the model answers.

    Attributes:
        samples: sampled answers of each prompt, beside the greedy one.
        temp: of the sampled answers.
        max_tokens: of an answer.
        batch_size: prompts answered at once.
        seed: of the sampled answers.
    """

    samples: int = 1
    temp: float = 0.8
    max_tokens: int = 256
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        assert self.batch_size >= 1
        problems = []
        for name, least in (("samples", 0), ("max_tokens", 2)):
            if getattr(self, name) < least:
                problems.append(f"{flag(name)}: got {getattr(self, name)}, expected at least {least}")
        if not (math.isfinite(self.temp) and self.temp > 0):
            problems.append(f"--temp: got {self.temp}, expected a number above 0")
        if problems:
            raise UsageError("\n".join(problems))


def default_prompts(model: Path) -> Path | None:
    """The prompts that a model's directory brings along, or None where it has none."""
    path = model / PROMPTS_NAME
    return path if path.is_file() else None


def general_prompts() -> list[str]:
    """The prompts that ship with the package: everyday requests of many kinds, written for this project."""
    text = resources.files("specstream_mlx").joinpath("bundled/prompts.txt").read_text(encoding="utf-8")
    return [line for _, line in text_lines(text)]


def read_prompts(path: Path | None, tokenizer: Any, template: Mapping[str, Any] | None = None) -> list[Prompt]:
    """The ids of the prompts of a file (``formats.prompts.read_prompts``); answers are ignored.

    A repeated prompt is kept once. ``tools`` of a JSONL row go into the chat template, as in mlx-lm's data.

    Args:
        path: the file, or a directory with ``train.jsonl``; None for ``general_prompts``.
        tokenizer: mlx-lm's wrapper; its chat template is used where it has one.
        template: further arguments of the chat template.

    Raises:
        InvalidInputError: the file cannot be read, or rows have no prompt that the tokenizer takes.
    """
    if path is None:
        rows = [prompts.Prompt.of_row({"prompt": line}, line) for line in general_prompts()]
    else:
        rows = prompts.read_prompts(path / "train.jsonl" if path.is_dir() else path)
    chat = ChatTemplate(arguments=template or None)
    found, problems = [], []
    for row in rows:
        try:
            ids = prompts.encode_prompt(tokenizer, row, chat) if tokenizer.has_chat_template else _plain(tokenizer, row)
            if not ids:
                raise InvalidInputError("the prompt has no token")
            found.append(tuple(ids))
        except InvalidInputError as error:
            problems.append(f"{row.place}: {' '.join(str(error).split())[:200]}")
            if len(problems) == prompts.MOST_PROBLEMS:
                break
    if problems:
        raise InvalidInputError("\n".join(problems))
    return list(dict.fromkeys(found))


def _plain(tokenizer: Any, row: prompts.Prompt) -> list[int]:
    """The ids of a prompt of a model without a chat template, as its training rows begin."""
    if not row.is_text:
        raise InvalidInputError("messages need a chat template, and this tokenizer has none")
    return plain_prompt(tokenizer, row.text)


def own_answers(
    model: SpecStreamModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: DistillSettings,
    file: Path,
    *,
    identity: str,
    max_seq_length: int,
    split_seed: int,
    validation: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """The model's own answers as a dataset; validation holds out prompts, and their greedy answers alone.

    Args:
        model: as ``load`` returns it, before streams are attached.
        tokenizer: mlx-lm's wrapper.
        prompts: ids.
        settings: how to answer.
        file: answers are appended here, and those that are here already are not made again.
        identity: of the model (``base_identity``); answers of another one are left alone.
        max_seq_length: longer prompts are left out, answers end there.
        split_seed: of the choice of validation prompts.
        validation: whether prompts are held out at all.
        progress: told how many of all answers there are.

    Raises:
        InvalidInputError: the file is damaged before its last line, or no prompt is short enough.
        UsageError: the file cannot be written.
    """
    fitting = [prompt for prompt in prompts if len(prompt) + 2 <= max_seq_length]
    notes = []
    if len(fitting) < len(prompts):
        notes.append(f"{len(prompts) - len(fitting)} prompts are left out: longer than {max_seq_length} tokens")
    if not fitting:
        raise InvalidInputError(f"no prompt of {len(prompts)} leaves room for an answer within {max_seq_length} tokens")
    answers: dict[tuple[Prompt, int], tuple[int, ...]] = {}
    key = partial(_key, identity, settings, max_seq_length)
    recorded = _recorded(file, key)
    total = len(fitting) * (1 + settings.samples)
    for sample in range(1 + settings.samples):
        order = sorted(fitting, key=len)
        for start in range(0, len(order), settings.batch_size):
            group = order[start : start + settings.batch_size]
            asked = [(prompt, sample) for prompt in group]
            if not all(one in recorded for one in asked):
                room = [key(prompt, sample)["max_tokens"] for prompt in group]
                seed = mixed_seed(settings.seed, sample * len(order) + start)
                told = None if progress is None else partial(_tell, progress, len(answers), total)
                made = _answer(model, tokenizer, group, room, settings.temp if sample else 0.0, seed, told)
                new = dict(zip(asked, made, strict=True))
                _append(file, key, new)
                recorded |= new
            answers |= {one: recorded[one] for one in asked}
            if progress is not None:
                progress(len(answers), total)
    train, valid = hold_out(fitting, split_seed) if validation else (fitting, [])
    return Dataset(
        [Example(prompt, answers[prompt, sample]) for sample in range(1 + settings.samples) for prompt in train],
        [Example(prompt, answers[prompt, 0]) for prompt in valid],
        notes,
    )


def base_identity(path: Path, base_model: Mapping[str, Any]) -> str:
    """Tells models whose answers differ apart: configuration, fingerprint, and blocks from all over the weights.

    Args:
        path: the model's directory.
        base_model: its description (``output.describe_base``), of which only the fingerprint counts.
    """
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("model*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as weights:  # fine-tunes of one base have its sizes, and often its fingerprint
            for block in range(_BLOCKS):
                weights.seek(block * size // _BLOCKS)
                digest.update(weights.read(_BLOCK_SIZE))
    digest.update(json.dumps(base_model.get("fingerprint")).encode())
    return digest.hexdigest()


def _answer(
    model: SpecStreamModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    room: list[int],
    temp: float,
    seed: int,
    told: Callable[[int], None] | None = None,
) -> list[tuple[int, ...]]:
    """Answers with their end-of-text token, unless they were cut; one batch on mlx-lm's batched generation.

    Where mlx-lm cannot run batches, one prompt after another. ``told`` hears how many answers have ended.
    """
    mx.random.seed(seed)
    sampler = make_sampler(temp) if temp else None
    stop = [[token] for token in sorted(tokenizer.eos_token_ids)]
    size = len(prompts) if runs_batches(model.family) else 1
    generator = BatchGenerator(
        model.base, stop_tokens=stop, sampler=sampler, completion_batch_size=size, prefill_batch_size=size
    )
    try:
        ids = generator.insert([list(prompt) for prompt in prompts], room)
        answers: dict[int, list[int]] = {uid: [] for uid in ids}
        ended = 0
        while responses := generator.next_generated():
            for response in responses:
                answers[response.uid].append(response.token)
                ended += response.finish_reason is not None
            if told is not None:
                told(ended)
    finally:
        generator.close()
    return [tuple(answers[uid]) for uid in ids]


def _tell(progress: Callable[[int, int], None], before: int, total: int, ended: int) -> None:
    """Report a batch that is not done: ``ended`` of its answers, after ``before`` others."""
    progress(before + ended, total)


def _key(
    identity: str, settings: DistillSettings, max_seq_length: int, prompt: Sequence[int], sample: int
) -> dict[str, Any]:
    """What decides an answer, its prompt aside."""
    room = min(settings.max_tokens, max_seq_length - len(prompt))
    key: dict[str, Any] = {"model": identity, "sample": sample, "max_tokens": room}
    return key | ({"temp": settings.temp, "seed": settings.seed} if sample else {})


def _recorded(file: Path, key: Callable[..., dict[str, Any]]) -> dict[tuple[Prompt, int], tuple[int, ...]]:
    """The answers in the file that were made by this model in this way."""
    found = {}
    for row in _rows(file):
        if not all(
            isinstance(row.get(name), kind) for name, kind in (("sample", int), ("prompt", list), ("answer", list))
        ):
            raise InvalidInputError(f"{file}: not a file of answers; give another --answers")
        if key(row["prompt"], row["sample"]).items() <= row.items():
            found[tuple(row["prompt"]), row["sample"]] = tuple(row["answer"])
    return found


def _rows(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    if not os.access(file, os.R_OK) or not file.is_file():
        raise UsageError(f"{file}: cannot be read; give another --answers")
    try:
        return [row for _, row in read_jsonl(file, may_be_cut=True)]
    except InvalidInputError as error:
        raise InvalidInputError(
            f"{error}; damaged, or not a file of answers: delete the line, or give another --answers"
        ) from error


def _append(file: Path, key: Callable[..., dict[str, Any]], answers: dict[tuple[Prompt, int], tuple[int, ...]]) -> None:
    lines = "".join(
        json.dumps(key(prompt, sample) | {"prompt": prompt, "answer": answer}) + "\n"
        for (prompt, sample), answer in answers.items()
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a+b") as out:
            out.seek(0)
            out.truncate(out.read().rfind(b"\n") + 1)  # a line cut off by an interruption
            out.write(lines.encode())
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror}); the answers before are in it") from error
