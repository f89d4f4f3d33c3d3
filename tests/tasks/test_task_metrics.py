"""What answers are worth: SQL by spelling and by execution, ROUGE against several references, means with errors."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("sqlglot")

from benchmarks.tasks.figures import summary
from benchmarks.tasks.sql.metric import EXACT, EXECUTION, executes_alike, normalise, sql_metric

SCHEMA = "CREATE TABLE head (head_ID NUMBER, name TEXT, age NUMBER) CREATE TABLE town (town_ID NUMBER, head_ID NUMBER)"


@pytest.mark.parametrize(
    ("query", "same"),
    [
        (
            'SELECT  count(*) FROM Head WHERE name = "A b" AND x != 3',
            "select COUNT( * ) from head where name='A b' and x<>3;",
        ),
        ("SELECT T1.name FROM head AS T1", "select t1.name from head t1"),
        ("SELECT a FROM t ORDER BY a ASC", "select a from t order by a"),
        (
            "SELECT State/territory FROM 1-10 WHERE Current slogan = 'X Y'",
            'select state/territory from 1-10 where current slogan = "X Y"',
        ),
    ],
)
def test_queries_that_differ_in_spelling_alone_are_one(query: str, same: str) -> None:
    assert normalise(query) == normalise(same)


@pytest.mark.parametrize(
    ("query", "other"),
    [
        ("SELECT name FROM head WHERE name = 'A b'", "SELECT name FROM head WHERE name = 'a b'"),
        ("SELECT name FROM head", "SELECT age FROM head"),
        ("SELECT name FROM head ORDER BY age ASC", "SELECT name FROM head ORDER BY age DESC"),
        ("not a query at all", "not a query"),
    ],
)
def test_other_queries_stay_others(query: str, other: str) -> None:
    assert normalise(query) != normalise(other)


@pytest.mark.parametrize(
    ("right", "answer", "value"),
    [
        ("SELECT name FROM head WHERE age > 56", "SELECT name FROM head WHERE 56 < age", 1.0),
        ("SELECT name FROM head WHERE age > 56", "SELECT name FROM head WHERE age >= 56", 0.0),
        ("SELECT name FROM head WHERE name = 'Ann'", 'SELECT name FROM head WHERE name = "Ann"', 1.0),
        ("SELECT name FROM head ORDER BY age", "SELECT name FROM head ORDER BY age DESC", 0.0),
        ("SELECT name FROM head", "SELECT nothing FROM head", 0.0),
        ("SELECT name FROM head", "DROP TABLE head", 0.0),
        ("SELECT name FROM head", "", 0.0),
        (
            "SELECT T1.name FROM head AS T1 JOIN town AS T2 ON T1.head_ID = T2.head_ID",
            "SELECT name FROM head JOIN town USING (head_ID)",
            1.0,
        ),
    ],
)
def test_queries_are_run_on_made_up_rows(right: str, answer: str, value: float) -> None:
    assert executes_alike(SCHEMA, right, answer) == value


def test_what_sqlite_cannot_build_or_run_is_left_out() -> None:
    assert math.isnan(
        executes_alike("CREATE TABLE 1-10 (State/territory, Notes)", "SELECT Notes FROM 1-10", "SELECT 1")
    )
    assert math.isnan(executes_alike("no table", "SELECT 1", "SELECT 1"))
    assert math.isnan(executes_alike(SCHEMA, "SELECT nothing FROM head", "SELECT name FROM head"))


def test_a_query_that_does_not_end_is_wrong() -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    assert executes_alike(SCHEMA, "SELECT name FROM head", endless) == 0.0


def test_both_metrics_of_sql() -> None:
    rows = [{"prompt": "q", "context": SCHEMA, "answer": "SELECT name FROM head WHERE age > 3"}] * 2
    found = sql_metric(rows, ["select name from head where 3 < age", "SELECT name FROM head"])
    assert found == {EXACT: [0.0, 0.0], EXECUTION: [1.0, 0.0]}


def test_rouge_takes_the_nearest_reference() -> None:
    pytest.importorskip("rouge_score")
    from benchmarks.tasks.rouge import rouge

    rows = [{"prompt": "p", "references": ["The Mill is cheap. It is near.", "A pub by the river."]}]
    assert rouge(rows, ["A pub by the river."]) == {"ROUGE-1": [1.0], "ROUGE-Lsum": [1.0]}
    half = rouge(rows, ["A pub elsewhere"])["ROUGE-1"][0]
    assert half == pytest.approx(2 * (2 / 3) * (2 / 5) / (2 / 3 + 2 / 5))


def test_the_error_is_that_of_the_mean_and_rows_that_do_not_count_are_left_out() -> None:
    found = summary([1.0, 0.0, 1.0, 0.0, float("nan")])
    assert found == {"mean": 50.0, "standard_error": 28.87, "n": 4}
    assert summary([float("nan")])["n"] == 0
