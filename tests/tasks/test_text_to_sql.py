"""The text-to-SQL task: seeded examples, splits that share no word, queries that are valid SQL."""

from __future__ import annotations

import itertools
import re
import sqlite3
from contextlib import closing

import pytest

from benchmarks.tasks.text_to_sql.task import PROMPT_END, Example, examples
from benchmarks.tasks.text_to_sql.words import SPLITS, Split, pseudo_split, real_words


def draw(split: Split, count: int, seed: int = 7) -> list[Example]:
    return list(itertools.islice(examples(split, seed), count))


def names_and_values(example: Example) -> set[str]:
    """The words of table names, column names and text values."""
    quoted = re.findall(r"'([^']*)'", example.answer)
    typed = re.findall(r"(\w+) (?:INT|REAL|TEXT)\b", example.schema)
    tables = re.findall(r"CREATE TABLE (\w+)", example.schema)
    words = {w for name in (*quoted, *typed, *tables) for w in re.split(r"[_ %]", name) if w}
    return words - {"id"}


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_seed_gives_the_same_examples(split: Split) -> None:
    """Catches a draw from the global generator or an order that depends on hashing."""
    assert draw(split, 50) == draw(split, 50)
    assert draw(split, 50) != draw(split, 50, seed=8)


def test_splits_share_no_word() -> None:
    """Catches a word pool that leaks into another split."""
    seen = {split: set().union(*(names_and_values(e) for e in draw(split, 500))) for split in SPLITS}
    for left, right in itertools.combinations(SPLITS, 2):
        assert not seen[left] & seen[right]
        assert not real_words(left) & real_words(right)


@pytest.mark.parametrize("split", SPLITS)
def test_every_word_belongs_to_its_split(split: Split) -> None:
    """Every word is a real word of the split or a pseudo-word that hashes to it."""
    for example in draw(split, 300):
        for word in names_and_values(example):
            assert word in real_words(split) or pseudo_split(word) == split


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_valid_sql_on_its_schema(split: Split) -> None:
    """SQLite compiles each query against the tables of its prompt; catches a column of a table not joined."""
    for example in draw(split, 400):
        with closing(sqlite3.connect(":memory:")) as database:
            database.executescript(example.schema)
            database.execute(f"EXPLAIN {example.answer}")


def test_a_prompt_determines_its_answer() -> None:
    """No two examples with one prompt may have different answers."""
    answers: dict[str, str] = {}
    for example in draw("train", 3000):
        assert answers.setdefault(example.prompt, example.answer) == example.answer


def test_the_question_names_what_the_query_uses() -> None:
    """Every column and value of a query stands in the question, keys apart, so copying is enough."""
    for example in draw("heldout", 300):
        question = example.prompt.split("-- question:")[1]
        columns = set(re.findall(r"(\w+) (?:INT|REAL|TEXT)\b", example.schema))
        used = set(re.findall(r"\w+", example.answer)) & columns
        assert all(re.search(rf"\b{name}\b", question) for name in used if not name.endswith("_id"))
        for value in re.findall(r"'%?([^'%]*)%?'", example.answer):
            assert f"'{value}'" in question


def test_the_examples_cover_the_constructs() -> None:
    """Catches a construct that a change of the weights removed."""
    text = "\n".join(e.answer for e in draw("heldout", 600))
    for construct in (
        "JOIN",
        "USING",
        "GROUP BY",
        "HAVING",
        "ORDER BY",
        "LIMIT",
        "BETWEEN",
        "LIKE",
        " IN (",
        "NOT IN",
        "IS NULL",
        "IS NOT NULL",
        "DISTINCT",
        "COUNT(*)",
        "AVG(",
        "SUM(",
        "MIN(",
        "MAX(",
        " OR ",
        " AND (",
        "IN ( SELECT",
        "> ( SELECT AVG(",
    ):
        assert construct in text


def test_prompt_and_answer_have_the_documented_form() -> None:
    for example in draw("valid", 200):
        lines = example.prompt.split("\n")
        assert lines[-1] == PROMPT_END
        assert lines[-2].startswith("-- question: ")
        assert all(line.startswith("CREATE TABLE ") and line.endswith(" );") for line in lines[:-2])
        assert example.answer.startswith("SELECT ")
        assert example.answer == " ".join(example.answer.split())
