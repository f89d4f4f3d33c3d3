"""Rows of mlx-lm's formats -> examples, batches and their order."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specstream_mlx import load
from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.training.batches import IGNORE, Example, iterate_batches, make_batch
from specstream_mlx.training.datasets import Dataset, read_dataset
from tests.tiny import END_OF_TEXT
from tests.training.training_cases import rows, save_base, write_rows


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return load(save_base(tmp_path / "base"))[1]


def read(data: Path, tokenizer: Any, **changes: Any) -> Dataset:
    return read_dataset(str(data), tokenizer, **({"mask_prompt": None, "max_seq_length": 64, "seed": 0} | changes))


def test_completions_without_a_chat_template(tokenizer: Any, tmp_path: Path) -> None:
    """Red when: a prompt gets into the targets, or end-of-text is missing."""
    file = write_rows(tmp_path / "rows.jsonl", 40)
    found = read(file, tokenizer)
    assert len(found.valid) == 2
    assert sorted([*found.train, *found.valid], key=str) == sorted(rows(40), key=str)
    assert read(file, tokenizer) == found
    assert read(file, tokenizer, seed=1).valid != found.valid
    unmasked = read(file, tokenizer, mask_prompt=False).train[0]
    assert (len(unmasked.prompt), unmasked.prompt + unmasked.answer) == (
        1,
        found.train[0].prompt + found.train[0].answer,
    )


def test_a_directory_has_its_own_validation_rows(tokenizer: Any, tmp_path: Path) -> None:
    """Red when: valid.jsonl is ignored."""
    write_rows(tmp_path / "train.jsonl", 30)
    write_rows(tmp_path / "valid.jsonl", 3)
    found = read(tmp_path, tokenizer)
    assert (found.train, found.valid) == (rows(30), rows(3))


def test_text_and_chat_go_through_mlx_lm(tokenizer: Any, tmp_path: Path) -> None:
    """Red when: a format of mlx-lm is not read, or its prompt is not masked."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "w10 w11 w12"}\n')
    assert read(file, tokenizer).train == [Example((10,), (11, 12, END_OF_TEXT))]
    with pytest.raises(UsageError, match="plain text, which has no prompt"):
        read(file, tokenizer, mask_prompt=True)
    chat = [{"role": "user", "content": "w10 w11"}, {"role": "assistant", "content": "w12"}]
    tokenizer._tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w20 ' if m['role'] == 'user' else 'w21 ' }}{{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}w21{% endif %}"
    )
    tokenizer.has_chat_template = True
    for row in ({"messages": chat}, {"prompt": "w10 w11", "completion": "w12"}):
        file.write_text(json.dumps(row) + "\n")
        assert read(file, tokenizer).train == [Example((20, 10, 11, 21), (12,))]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no rows"),
        ("{", "rows.jsonl:1: not JSON"),
        ('\n["a"]\n', "rows.jsonl:2: a list"),
        ('{"question": "w10"}', r"rows have 'question', expected {'text'}"),
        ('{"messages": []}', "need a chat template"),
        ('{"prompt": "w10", "completion": "w11"}\n{"prompt": "w10"}', "row 2: has no 'completion'"),
        ('{"prompt": null, "completion": "w11"}', "row 1: 'prompt' is null, expected a text"),
        ('{"text": ["w10"]}', "row 1: 'text' is .*, expected a text"),
        ('{"prompt": "w10", "completion": 5}', "row 1: 'completion' is 5, expected a text"),
        (json.dumps({"prompt": "w10 " * 70, "completion": "w11"}), "no row to train on is left"),
    ],
)
def test_bad_rows_are_one_line_each(text: str, reason: str, tokenizer: Any, tmp_path: Path) -> None:
    """Red when: a bad row gives a traceback, or is trained on."""
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(InvalidInputError, match=reason) as caught:
        read(file, tokenizer)
    assert "\n" not in str(caught.value)


def test_missing_data_is_named(tokenizer: Any, tmp_path: Path) -> None:
    """Red when: a missing file becomes a download or a traceback."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match=r"train.jsonl: no such file"):
        read(tmp_path / "empty", tokenizer)
    with pytest.raises(InvalidInputError, match="neither a file or directory nor a data set"):
        read(tmp_path / "nothing", tokenizer)


def test_long_rows_are_cut_and_said_so(tokenizer: Any, tmp_path: Path) -> None:
    """Red when: a row is longer than asked for, or is cut in silence."""
    found = read(write_rows(tmp_path / "rows.jsonl", 24), tokenizer, max_seq_length=6)
    assert max(len(example) for example in [*found.train, *found.valid]) == 6
    assert any("cut to 6 tokens" in note for note in found.notes)


def test_a_batch_says_what_every_row_predicts() -> None:
    """Red when: targets are shifted, reach past the end, or belong to the prompt."""
    batch = make_batch([Example((7, 8), (10, 11, 12, 13)), Example((9,), (20,))], gamma=3)
    assert batch.tokens.shape[1] % 16 == 0
    assert batch.main_targets[0, :7].tolist() == [IGNORE, 10, 11, 12, 13, IGNORE, IGNORE]
    assert batch.main_targets[1, :2].tolist() == [20, IGNORE]
    assert batch.anchors[0].tolist() == [1, 2, 3]
    assert batch.stream_targets[0].tolist() == [[11, 12, 13], [12, 13, IGNORE], [13, IGNORE, IGNORE]]
    assert (batch.stream_targets[1] == IGNORE).all()
    some = make_batch([Example((7,), tuple(range(10, 40)))], gamma=2, max_anchors=5, seed=1)
    assert some.anchors.shape == (1, 5)
    assert (np.diff(some.anchors[0]) > 0).all()
    assert some.stream_targets[0, :, 0].tolist() == [anchor + 11 for anchor in some.anchors[0]]


def test_batches_cover_every_row_once_an_epoch_in_an_order_of_the_seed() -> None:
    """Red when: rows are dropped, epochs repeat their order, or the order is not the seed's alone."""
    examples = [Example((1,), (5,) * (1 + i % 10)) for i in range(41)]
    source = iterate_batches(examples, 4, seed=3)
    epochs = [[next(source) for _ in range(11)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(row for batch in epoch for row in batch) == list(range(41))
    assert epochs[0] != epochs[1]
    again = iterate_batches(examples, 4, seed=3)
    assert [next(again) for _ in range(22)] == epochs[0] + epochs[1]
