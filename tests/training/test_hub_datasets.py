"""Hugging Face data sets, read by mlx-lm's own code, through a stand-in for the package ``datasets``."""

import builtins
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from mlx_lm.tuner.datasets import load_dataset

from specstream_mlx import load
from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.training.batches import Example
from specstream_mlx.training.datasets import Dataset, read_dataset
from tests.tiny import END_OF_TEXT
from tests.training.training_cases import rows, save_base, words


class Rows:
    """What ``datasets.load_dataset`` gives for one split: rows as fresh dicts, by number."""

    def __init__(self, found: list[dict[str, Any]]) -> None:
        self.found = found

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self.found):
            raise IndexError(f"Invalid key: {index} is out of bounds for size {len(self.found)}")
        return dict(self.found[index])


class Hub(ModuleType):
    """Stands in for ``datasets``: names, splits with slices, and the real package's complaints."""

    class DatasetNotFoundError(FileNotFoundError):
        pass

    def __init__(self, sets: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
        super().__init__("datasets")
        self.sets = sets
        self.asked: list[dict[str, Any]] = []
        self.failure: Exception | None = None
        self.exceptions = SimpleNamespace(DatasetNotFoundError=self.DatasetNotFoundError)

    def load_dataset(self, path: str, split: str | None = None, **config: Any) -> Any:
        self.asked.append({"path": path, "split": split} | config)
        if self.failure is not None:
            raise self.failure
        if path not in self.sets:
            raise self.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub or cannot be accessed.")
        splits = self.sets[path]
        if split is None:
            return {name: Rows(found) for name, found in splits.items()}
        name, begin, end = re.fullmatch(r"(\w+)(?:\[(-?\d+%)?:(-?\d+%)?\])?", split).groups()  # type: ignore[union-attr]
        if name not in splits:
            raise ValueError(f'Unknown split "{name}". Should be one of {list(splits)}.')
        found = splits[name]
        first, last = (None if at is None else int(at[:-1]) * len(found) // 100 for at in (begin, end))
        return Rows(found[first:last])


def completions(count: int, prompt: str = "prompt", completion: str = "completion") -> list[dict[str, Any]]:
    return [
        {prompt: words(row.prompt), completion: words(row.answer[:-1]), "id": i} for i, row in enumerate(rows(count))
    ]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return load(save_base(tmp_path / "base"))[1]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(
        {
            "org/pairs": {"train": completions(30), "valid": completions(4), "extra": completions(12)},
            "org/questions": {"train": completions(20, "question", "answer")},
            "org/text": {"train": [{"text": "w10 w11 w12"}] * 20, "validation": [{"text": "w13"}]},
            "org/empty": {"train": []},
        }
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def read(data: Any, tokenizer: Any, **changes: Any) -> Dataset:
    return read_dataset(data, tokenizer, **({"mask_prompt": None, "max_seq_length": 64, "seed": 0} | changes))


def test_a_data_set_by_its_name(hub: Hub, tokenizer: Any) -> None:
    """Red when: splits are mixed up, or a split that mlx-lm does not read is read."""
    found = read("org/pairs", tokenizer)
    assert (found.train, found.valid, found.notes) == (rows(30), rows(4), [])
    text = read("org/text", tokenizer)
    assert text.train == [Example((10,), (11, 12, END_OF_TEXT))] * 19
    assert text.notes == ["1 of 20 rows are held out for validation"]
    named = read("org/questions", tokenizer, features={"prompt_feature": "question", "completion_feature": "answer"})
    assert sorted([*named.train, *named.valid], key=str) == sorted(rows(20), key=str)


def test_the_data_sets_of_a_configuration_are_those_of_mlx_lm(hub: Hub, tokenizer: Any) -> None:
    """Red when: splits, columns, the library's arguments or the order of several sets differ from mlx-lm's."""
    blocks = [
        {"path": "org/questions", "prompt_feature": "question", "completion_feature": "answer"},
        {"path": "org/pairs", "train_split": "extra", "valid_split": "train[50%:]", "config": {"name": "small"}},
        {"path": "org/text", "train_split": "train[:10%]", "valid_split": "validation"},
    ]
    found = read(blocks, tokenizer)
    ours = hub.asked.copy()
    text = Example((10,), (11, 12, END_OF_TEXT))
    assert found.train == [*rows(20)[:16], *rows(12), text, text]
    assert found.valid == [*rows(20)[-2:], *rows(30)[15:], Example((13,), (END_OF_TEXT,))]
    hub.asked.clear()
    asked = SimpleNamespace(hf_dataset=[dict(block) for block in blocks], train=True, test=False)
    theirs = load_dataset(asked, tokenizer)
    assert ours == hub.asked
    assert (len(found.train), len(found.valid)) == (len(theirs[0]), len(theirs[1]))
    assert found.train[0].prompt + found.train[0].answer[:-1] == tuple(
        tokenizer.encode(" ".join(theirs[0][0][key] for key in ("question", "answer")))
    )
    assert "mask_prompt" not in blocks[0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("org/nothing", "--data: org/nothing: not a data set to train on: Not found Hugging Face dataset: org/nothing"),
        ("org/questions", r"its columns are none of {'text'}, {'prompt', 'completion'} or {'messages'}; name them as"),
        ("org/empty", "org/empty: not a data set to train on: a split has no rows"),
        ("nothing", "--data: nothing: neither a file or directory nor a data set such as org/name"),
        ("./org/pairs", "--data: ./org/pairs: neither a file or directory nor a data set"),
        ([{"path": "org/nothing"}], "hf_dataset: org/nothing: not a data set to train on: Dataset 'org/nothing' does"),
        ([{"path": "org/pairs", "train_split": "training"}], 'hf_dataset: org/pairs: .* Unknown split "training"'),
        ([{"path": "org/pairs", "prompt_feature": "q"}], r"its columns are none of {'text'}, {'q', 'completion'} or"),
    ],
)
def test_what_cannot_be_read_is_one_line(data: Any, reason: str, hub: Hub, tokenizer: Any) -> None:
    """Red when: a library's complaint comes out as a traceback, or a mistyped path becomes a download."""
    with pytest.raises(InvalidInputError, match=reason) as caught:
        read(data, tokenizer)
    assert "\n" not in str(caught.value)


def test_a_mistyped_path_is_no_download(
    hub: Hub, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when: the hub is asked for a file of a directory that is here."""
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError, match="--data: org/pairs: neither a file or directory"):
        read("org/pairs", tokenizer)
    assert hub.asked == []


def test_no_train_split_no_prompts_no_network_and_no_package(
    hub: Hub, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when: one of the four is a traceback, or is not said."""
    hub.sets["org/pairs"].pop("train")
    with pytest.raises(InvalidInputError, match="it has no split 'train'; name one as train_split"):
        read("org/pairs", tokenizer)
    with pytest.raises(UsageError, match="--mask-prompt: --data: org/text holds plain text"):
        read("org/text", tokenizer, mask_prompt=True)
    hub.failure = ConnectionError("Couldn't reach 'org/text'\non the Hub " + "x" * 400 + " (OfflineModeIsEnabled)")
    with pytest.raises(InvalidInputError, match=r"Couldn't reach 'org/text' on .* \(OfflineModeIsEnabled\)") as caught:
        read("org/text", tokenizer)
    assert len(str(caught.value)) < 400
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "datasets":
            raise ModuleNotFoundError("No module named 'datasets'")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InvalidInputError, match=r"need the package datasets: pip install 'specstream-mlx\[datasets\]'"):
        read("org/text", tokenizer)


def test_the_real_package_on_a_directory(tokenizer: Any, tmp_path: Path) -> None:
    """Red when: the stand-in above is not what the package does."""
    pytest.importorskip("datasets", reason="needs the datasets extra")
    import json

    (tmp_path / "set").mkdir()
    lines = [json.dumps(row) for row in completions(20, "question", "answer")]
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(lines))
    block = {
        "path": str(tmp_path / "set"),
        "prompt_feature": "question",
        "completion_feature": "answer",
        "config": {"cache_dir": str(tmp_path / "cache")},
    }
    found = read([block], tokenizer)
    assert (found.train, found.valid) == (rows(20)[:16], rows(20)[-2:])
    with pytest.raises(InvalidInputError, match='Unknown split "training"'):
        read([block | {"train_split": "training"}], tokenizer)
    with pytest.raises(InvalidInputError, match="its columns are none of"):
        read([{"path": block["path"], "config": block["config"]}], tokenizer)
