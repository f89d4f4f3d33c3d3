"""What a query is worth: exact match after normalising, and execution match on made-up rows in SQLite.

Two queries execute alike when they give the same rows on several small databases, filled by chance with the values
that the right query names and with others near them. A query's rows count as a bag, or as a list where the right
query has ORDER BY. A row whose schema SQLite cannot build, or whose right query it cannot run, is left out.
"""

from __future__ import annotations

import contextlib
import random
import re
import sqlite3
from collections import Counter
from collections.abc import Sequence

from ..task import Row, references

EXACT, EXECUTION = "exact match", "execution match"
_NUM_DATABASES = 4
_NUM_ROWS = 24
_MOST_STEPS = 2_000_000
_TOKEN = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|\d+\.?\d*|\w+|<>|!=|>=|<=|\S")
_TABLE = re.compile(r"CREATE TABLE\s+(\w+)\s*\(([^()]*)\)", re.IGNORECASE)


def sql_metric(rows: Sequence[Row], answers: Sequence[str]) -> dict[str, list[float]]:
    """Exact match and execution match per row; a row without a database has NaN under the second."""
    found: dict[str, list[float]] = {EXACT: [], EXECUTION: []}
    for row, answer in zip(rows, answers, strict=True):
        right = references(row)
        found[EXACT].append(float(any(normalise(answer) == normalise(query) for query in right)))
        found[EXECUTION].append(executes_alike(str(row["context"]), right[0], answer))
    return found


def normalise(query: str) -> str:
    """One spelling for queries that differ in space, case, quotes, `!=`, `AS` and the like.

    sqlglot writes what it can read; the rest is compared token by token.
    """
    try:
        import sqlglot
    except ImportError:
        raise SystemExit("exact match of SQL needs the package sqlglot: pip install 'specstream-mlx[tasks]'") from None
    query = _one_quote(query.strip().rstrip(";").strip())
    with contextlib.suppress(Exception):  # of many kinds, for text that is no SQL
        parsed = sqlglot.parse_one(query, read="sqlite", error_level=sqlglot.ErrorLevel.RAISE)
        return _fold(parsed.sql(dialect="sqlite", normalize=True, normalize_functions="upper", comments=False))
    return _fold(query)


def _one_quote(query: str) -> str:
    return re.sub(r'"([^"]*)"', lambda match: "'" + match[1].replace("'", "''") + "'", query)


def _fold(query: str) -> str:
    folded = (token if token[0] == "'" else token.lower() for token in _TOKEN.findall(query))
    return " ".join(token for token in folded if token != "asc")  # the order that is meant without it


def executes_alike(schema: str, right: str, answer: str) -> float:
    """1 or 0, or NaN where there is nothing to run the right query on."""
    tables = [(name, [_column(part) for part in columns.split(",")]) for name, columns in _TABLE.findall(schema)]
    if not tables or any(not name for _, columns in tables for name, _ in columns):
        return float("nan")
    ordered = bool(re.search(r"\border\s+by\b", right, re.IGNORECASE))
    for number in range(_NUM_DATABASES):
        database = _fill(tables, right, random.Random(f"{schema}/{right}/{number}"))
        if database is None:
            return float("nan")
        with contextlib.closing(database):
            expected = _run(database, right)
            if expected is None:
                return float("nan")
            got = _run(database, answer)
            if got is None or (got != expected if ordered else Counter(got) != Counter(expected)):
                return 0.0
    return 1.0


def _column(declared: str) -> tuple[str, bool]:
    """The name of a declared column and whether it holds numbers."""
    words = declared.split()
    return (
        (words[0], len(words) > 1 and words[1].upper() in ("NUMBER", "INT", "INTEGER", "REAL"))
        if words
        else ("", False)
    )


def _fill(
    tables: Sequence[tuple[str, Sequence[tuple[str, bool]]]], right: str, chance: random.Random
) -> sqlite3.Connection | None:
    """A database in memory whose cells are drawn from the values of the query and a few others."""
    texts = [match.strip("%") for match in re.findall(r"['\"]([^'\"]*)['\"]", right)]
    numbers = [float(match) for match in re.findall(r"(?<![\w'\"])\d+(?:\.\d+)?", right)]
    words = [*texts, *texts, "alpha", "beta", "gamma delta", "Yes", "No"]
    values = [*numbers, *(n + 1 for n in numbers), *(n - 1 for n in numbers), 1.0, 2.0, 3.0, 4.0, 5.0]
    database = sqlite3.connect(":memory:")
    try:
        for name, columns in tables:
            spelled = ", ".join(f'"{column}" {"NUMERIC" if numeric else "TEXT"}' for column, numeric in columns)
            database.execute(f'CREATE TABLE "{name}" ({spelled})')
            marks = ", ".join("?" for _ in columns)
            cells = [[chance.choice(values if numeric else words) for _, numeric in columns] for _ in range(_NUM_ROWS)]
            database.executemany(f'INSERT INTO "{name}" VALUES ({marks})', cells)
    except sqlite3.Error:
        database.close()
        return None
    return database


def _run(database: sqlite3.Connection, query: str) -> list[tuple[object, ...]] | None:
    """The rows of a query; None where it fails or does not end. It may only read."""
    steps = 0

    def watch() -> int:
        nonlocal steps
        steps += 10_000
        return int(steps > _MOST_STEPS)

    database.set_progress_handler(watch, 10_000)
    database.execute("PRAGMA query_only = ON")
    try:
        return database.execute(query).fetchall()
    except (sqlite3.Error, sqlite3.Warning):
        return None
    finally:
        database.set_progress_handler(None, 0)
