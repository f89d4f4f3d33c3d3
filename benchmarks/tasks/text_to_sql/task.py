"""A seeded generator of text-to-SQL examples: schema and question in, one canonical query out.

The question determines the query. Names and values stand in the question as they are written in the query,
columns and conditions keep the question's order, and a join is always `asked JOIN other USING ( parent_id )`.
Parentheses are padded and text values are always in quotes, so that a name is spelled by the same tokens
wherever it occurs. Every schema names each column once, keys apart, so no query needs an alias.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .words import Split, Topic, pseudo_word, topics

PROMPT_END = "-- query:"


@dataclass(frozen=True)
class Example:
    """One prompt with its answer; the text a model reads is `prompt + " " + answer` and then end-of-text."""

    prompt: str
    answer: str

    @property
    def schema(self) -> str:
        """The CREATE TABLE statements of the prompt."""
        return self.prompt.split("-- question:")[0]


@dataclass(frozen=True)
class Column:
    """A column that a question may speak of; keys are not among these."""

    name: str
    is_number: bool


@dataclass
class Table:
    """A table, its columns without keys, and the table whose key it carries, if any."""

    name: str
    columns: list[Column]
    parent: Table | None = None
    children: list[Table] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{self.name}_id"

    def create(self, rng: random.Random) -> str:
        keys = [f"{self.key} INT"] + ([f"{self.parent.key} INT"] if self.parent else [])
        typed = [f"{c.name} {rng.choice(('INT', 'REAL')) if c.is_number else 'TEXT'}" for c in self.columns]
        return f"CREATE TABLE {self.name} ( {', '.join(keys + typed)} );"


@dataclass(frozen=True)
class Clause:
    """A piece of question with the piece of query that it stands for."""

    text: str
    sql: str


def _join_words(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


_COMPARISONS = {
    ">": ("is above {}", "is greater than {}", "exceeds {}", "is more than {}"),
    "<": ("is below {}", "is less than {}", "is under {}"),
    ">=": ("is at least {}", "is {} or more"),
    "<=": ("is at most {}", "is {} or less"),
    "=": ("is {}", "equals {}"),
    "!=": ("is not {}", "differs from {}"),
}
_AGGREGATES = {
    "AVG": ("average", "mean"),
    "SUM": ("total", "sum of the"),
    "MIN": ("lowest", "smallest", "minimum"),
    "MAX": ("highest", "largest", "maximum"),
}
_HAVING = {
    ">": ("more than {}", "over {}"),
    ">=": ("at least {}",),
    "<": ("fewer than {}", "less than {}"),
}


class _Writer:
    """Draws one example: a schema first, then a question with its query."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        self.rng = rng
        self.split = split
        self.used: set[str] = set()
        self.topic: Topic = rng.choice(topics(split))
        self.pseudo_rate = rng.choice((0.0, 0.5, 1.0, 1.0))

    # names and values

    def _name(self, pool: tuple[str, ...]) -> str:
        rng = self.rng
        for _ in range(100):
            name = pseudo_word(rng, self.split) if rng.random() < self.pseudo_rate or not pool else rng.choice(pool)
            if rng.random() < 0.08:
                name = f"{name}_{pseudo_word(rng, self.split)}"
            if name not in self.used:
                self.used.add(name)
                return name
            pool = () if rng.random() < 0.1 else pool
        raise AssertionError("the word pools are too small for a schema")

    def _value(self) -> str:
        rng = self.rng
        word = rng.choice(self.topic.values) if rng.random() > self.pseudo_rate else pseudo_word(rng, self.split)
        word = word.replace("_", " ")
        if rng.random() < 0.1:
            word = f"{word} {pseudo_word(rng, self.split)}"
        return f"'{word}'"

    def _number(self) -> int:
        return self.rng.randint(1, self.rng.choice((9, 99, 99, 999, 5000)))

    def _pick(self, options: tuple[str, ...]) -> str:
        return self.rng.choice(options)

    def schema(self) -> list[Table]:
        rng = self.rng
        count = rng.choices((1, 2, 3), (25, 50, 25))[0]
        tables: list[Table] = []
        for _ in range(count):
            columns = []
            for kind in [False, True] + [rng.random() < 0.5 for _ in range(rng.randint(0, 2))]:
                columns.append(Column(self._name(self.topic.numbers if kind else self.topic.texts), kind))
            rng.shuffle(columns)
            table = Table(self._name(self.topic.tables), columns)
            if tables:
                table.parent = rng.choice(tables)
                table.parent.children.append(table)
            tables.append(table)
        rng.shuffle(tables)
        return tables

    # conditions

    def atom(self, table: Table, columns: list[Column], nested: bool = False) -> Clause:
        """One condition on a column; `nested` forbids a sub-select inside a sub-select."""
        rng = self.rng
        column = rng.choice(columns)
        name = column.name
        if column.is_number:
            kind = rng.choices(("compare", "between", "null", "average"), (60, 20, 8, 0 if nested else 12))[0]
        else:
            kind = rng.choices(("equal", "in", "like", "null"), (40, 20, 30, 10))[0]
        if kind == "compare":
            sign = rng.choices(tuple(_COMPARISONS), (30, 30, 15, 15, 5, 5))[0]
            number = str(self._number())
            return Clause(f"{name} {self._pick(_COMPARISONS[sign]).format(number)}", f"{name} {sign} {number}")
        if kind == "equal":
            sign = rng.choices(("=", "!="), (75, 25))[0]
            value = self._value()
            return Clause(f"{name} {self._pick(_COMPARISONS[sign]).format(value)}", f"{name} {sign} {value}")
        if kind == "between":
            low = self._number()
            high = low + self._number()
            text = self._pick(("is between {} and {}", "lies between {} and {}", "ranges from {} to {}"))
            return Clause(f"{name} {text.format(low, high)}", f"{name} BETWEEN {low} AND {high}")
        if kind == "in":
            values = [self._value() for _ in range(rng.choice((2, 2, 3)))]
            positive = rng.random() < 0.7
            text = self._pick(("is one of", "is any of")) if positive else "is none of"
            sign = "IN" if positive else "NOT IN"
            return Clause(f"{name} {text} {_join_words(values)}", f"{name} {sign} ( {', '.join(values)} )")
        if kind == "like":
            value = self._value()
            place = rng.choice(("start", "end", "middle"))
            verbs = {
                "start": ("starts with", "begins with"),
                "end": ("ends with", "ends in"),
                "middle": ("contains", "includes"),
            }
            pattern = {"start": "'{}%'", "end": "'%{}'", "middle": "'%{}%'"}[place].format(value.strip("'"))
            return Clause(f"{name} {self._pick(verbs[place])} {value}", f"{name} LIKE {pattern}")
        if kind == "null":
            if rng.random() < 0.5:
                text = self._pick(("is missing", "is unknown", "is not recorded"))
                return Clause(f"{name} {text}", f"{name} IS NULL")
            text = self._pick(("is known", "is present", "is recorded"))
            return Clause(f"{name} {text}", f"{name} IS NOT NULL")
        text, sign, function = rng.choice(
            (
                ("is above the average", ">", "AVG"),
                ("is below the average", "<", "AVG"),
                ("is the highest", "=", "MAX"),
                ("is the lowest", "=", "MIN"),
            )
        )
        owner = next(t for t in (table, *table.children, table.parent) if t and column in t.columns)
        return Clause(f"{name} {text}", f"{name} {sign} ( SELECT {function}( {name} ) FROM {owner.name} )")

    def where(self, table: Table, joined: Table | None) -> Clause:
        """The condition of a query, possibly empty."""
        rng = self.rng
        columns = table.columns + (joined.columns if joined else [])
        if joined is None and table.children and rng.random() < 0.4:
            return self._related(table)
        count = rng.choices((0, 1, 2, 3), (10 if joined else 4, 40, 40, 12))[0]
        if count == 0:
            return Clause("", "")
        atoms = [self.atom(table, columns) for _ in range(count)]
        lead = self._pick((" where ", " for which "))
        if count == 1:
            text, sql = atoms[0].text, atoms[0].sql
        elif count == 2:
            either = rng.random() < 0.4
            text = f"either {atoms[0].text} or {atoms[1].text}" if either else f"{atoms[0].text} and {atoms[1].text}"
            sql = f"{atoms[0].sql} {'OR' if either else 'AND'} {atoms[1].sql}"
        else:
            a, b, c = atoms
            text, sql = rng.choice(
                (
                    (f"{a.text} and either {b.text} or {c.text}", f"{a.sql} AND ( {b.sql} OR {c.sql} )"),
                    (f"either {a.text} or {b.text}, and {c.text}", f"( {a.sql} OR {b.sql} ) AND {c.sql}"),
                    (f"{a.text}, {b.text} and {c.text}", f"{a.sql} AND {b.sql} AND {c.sql}"),
                )
            )
        return Clause(lead + text, f" WHERE {sql}")

    def _related(self, table: Table) -> Clause:
        """A condition on the rows of another table that carry this table's key: a nested query."""
        child = self.rng.choice(table.children)
        inner = self.atom(child, child.columns, nested=True)
        has = self.rng.random() < 0.65
        text = self._pick(("with at least one", "that has some") if has else ("without any", "that has no"))
        sign = "IN" if has else "NOT IN"
        sql = f" WHERE {table.key} {sign} ( SELECT {table.key} FROM {child.name} WHERE {inner.sql} )"
        return Clause(f" {text} {child.name} whose {inner.text}", sql)

    # queries

    def source(self, tables: list[Table]) -> tuple[Table, Table | None, Clause]:
        """The table asked about, perhaps a joined one, and the FROM clause."""
        rng = self.rng
        table = rng.choice(tables)
        others = table.children + ([table.parent] if table.parent else [])
        if not others or rng.random() < 0.5:
            return table, None, Clause(table.name, f" FROM {table.name}")
        joined = rng.choice(others)
        key = joined.key if joined is table.parent else table.key
        link = self._pick(("joined with", "together with its", "along with its"))
        sql = f" FROM {table.name} JOIN {joined.name} USING ( {key} )"
        return table, joined, Clause(f"{table.name} {link} {joined.name}", sql)

    def example(self) -> Example:
        rng = self.rng
        tables = self.schema()
        table, joined, source = self.source(tables)
        kinds: tuple[Callable[[Table, Table | None, Clause], Clause], ...]
        kinds = (self._list, self._top, self._count, self._aggregate, self._group)
        kind = rng.choices(kinds, (30, 18, 12, 15, 25))[0]
        clause = kind(table, joined, source)
        schema = "\n".join(t.create(rng) for t in tables)
        return Example(f"{schema}\n-- question: {clause.text}\n{PROMPT_END}", clause.sql)

    def _columns(self, table: Table, joined: Table | None) -> list[Column]:
        return table.columns + (joined.columns if joined else [])

    def _chosen(self, table: Table, joined: Table | None) -> list[str]:
        names = [c.name for c in self._columns(table, joined)]
        return self.rng.sample(names, min(len(names), self.rng.choices((1, 2, 3), (35, 45, 20))[0]))

    def _list(self, table: Table, joined: Table | None, source: Clause) -> Clause:
        names = self._chosen(table, joined)
        where = self.where(table, joined)
        lead = self._pick(("Show the", "List the", "What are the", "Find the", "Give me the"))
        distinct = self.rng.random() < 0.25
        each = self._pick(("every", "each"))
        text = f"{lead} {'distinct ' if distinct else ''}{_join_words(names)}"
        text += f" of {each} {source.text}{where.text}"
        sql = f"SELECT {'DISTINCT ' if distinct else ''}{', '.join(names)}{source.sql}{where.sql}"
        if self.rng.random() < 0.45:
            column = self.rng.choice(self._columns(table, joined)).name
            order, down = self._direction()
            text += f", {self._pick(('sorted by', 'ordered by'))} {column} {order}"
            sql += f" ORDER BY {column} {down}"
        return Clause(text + ("?" if lead.startswith("What") else "."), sql)

    def _direction(self) -> tuple[str, str]:
        if self.rng.random() < 0.5:
            return self._pick(("in ascending order", "from low to high")), "ASC"
        return self._pick(("in descending order", "from high to low")), "DESC"

    def _top(self, table: Table, joined: Table | None, source: Clause) -> Clause:
        names = self._chosen(table, joined)
        where = self.where(table, joined)
        column = self.rng.choice([c.name for c in self._columns(table, joined) if c.is_number])
        number = self.rng.randint(2, 20)
        high = self.rng.random() < 0.6
        word = self._pick(("highest", "largest") if high else ("lowest", "smallest"))
        lead = self._pick(("Show the", "What are the", "Give the"))
        text = f"{lead} {_join_words(names)} of the {number} {source.text} with the {word} {column}{where.text}"
        order = f" ORDER BY {column} {'DESC' if high else 'ASC'} LIMIT {number}"
        return Clause(
            text + ("?" if lead.startswith("What") else "."),
            f"SELECT {', '.join(names)}{source.sql}{where.sql}{order}",
        )

    def _count(self, table: Table, joined: Table | None, source: Clause) -> Clause:
        where = self.where(table, joined)
        if self.rng.random() < 0.35:
            column = self.rng.choice(self._columns(table, joined)).name
            lead = self._pick(("How many different {} are there in", "Count the distinct {} of"))
            text, what = f"{lead.format(column)} {source.text}", f"COUNT( DISTINCT {column} )"
        else:
            lead = self._pick(("How many rows are there of", "Count the rows of", "What is the number of"))
            text, what = f"{lead} {source.text}", "COUNT(*)"
        end = "." if lead.startswith("Count") else "?"
        return Clause(f"{text}{where.text}{end}", f"SELECT {what}{source.sql}{where.sql}")

    def _measure(self, columns: list[Column]) -> Clause:
        function = self.rng.choice(tuple(_AGGREGATES))
        column = self.rng.choice([c.name for c in columns if c.is_number])
        return Clause(f"{self._pick(_AGGREGATES[function])} {column}", f"{function}( {column} )")

    def _aggregate(self, table: Table, joined: Table | None, source: Clause) -> Clause:
        columns = self._columns(table, joined)
        measures = [self._measure(columns)]
        if self.rng.random() < 0.6:
            other = self._measure(columns)
            measures += [other] if other.sql != measures[0].sql else []
        where = self.where(table, joined)
        lead = self._pick(("What is the", "Compute the", "Find the", "Show the"))
        asked = " and the ".join(m.text for m in measures)
        sql = f"SELECT {', '.join(m.sql for m in measures)}{source.sql}{where.sql}"
        end = "?" if lead.startswith("What") else "."
        return Clause(f"{lead} {asked} of {self._pick(('every', 'all'))} {source.text}{where.text}{end}", sql)

    def _group(self, table: Table, joined: Table | None, source: Clause) -> Clause:
        rng = self.rng
        columns = self._columns(table, joined)
        group = rng.choice([c.name for c in columns if not c.is_number])
        if rng.random() < 0.5:
            measure = Clause(self._pick(("number of rows", "row count")), "COUNT(*)")
        else:
            measure = self._measure(columns)
        where = self.where(table, joined) if rng.random() < 0.5 else Clause("", "")
        lead = self._pick(("For each {} show the", "For every {} give the", "Per {} what is the"))
        text = f"{lead.format(group)} {measure.text} of {source.text}{where.text}"
        sql = f"SELECT {group}, {measure.sql}{source.sql}{where.sql} GROUP BY {group}"
        if rng.random() < 0.5:
            sign = rng.choice(tuple(_HAVING))
            number = self._number()
            same = rng.random() < 0.5
            bound = Clause("row count", "COUNT(*)") if same else self._measure(columns)
            keep = self._pick(("keeping only groups whose", "for groups whose"))
            text += f", {keep} {bound.text} is {self._pick(_HAVING[sign]).format(number)}"
            sql += f" HAVING {bound.sql} {sign} {number}"
        if rng.random() < 0.45:
            order, down = self._direction()
            what = rng.choice((Clause(group, group), Clause("that result", measure.sql)))
            text += f", {self._pick(('sorted by', 'ordered by'))} {what.text} {order}"
            sql += f" ORDER BY {what.sql} {down}"
            if rng.random() < 0.4:
                limit = rng.randint(1, 20)
                text += f", {self._pick(('only the first', 'at most'))} {limit}"
                sql += f" LIMIT {limit}"
        return Clause(text + ("?" if lead.startswith("Per") else "."), sql)


def examples(split: Split, seed: int) -> Iterator[Example]:
    """An endless stream of examples of a split, the same for the same seed.

    Queries of fewer than 8 or more than 34 words are left out; in tokens of the recipe's tokenizer the
    answers have about 20 to 80.
    """
    rng = random.Random(f"text_to_sql/{split}/{seed}")
    while True:
        example = _Writer(rng, split).example()
        if 8 <= len(example.answer.split()) <= 34:
            yield example
