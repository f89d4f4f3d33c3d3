"""What standard error says of long work where nobody watches it: lines, neither too many nor too few."""

import pytest

from specstream_cli import terminal


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(terminal, "clock", found)
    monkeypatch.setattr(terminal, "_last_line", None)
    return found


def test_quick_work_says_nothing(clock, capsys):
    with terminal.progress_bar() as progress:
        for done in range(20):
            clock.now += 0.099
            progress("answers", done, 20)
    assert capsys.readouterr().err == ""


def test_long_work_says_where_it_is_after_two_seconds_and_every_ten(clock, capsys):
    """Red when: a log gets nothing for minutes, or a line for every step."""
    with terminal.progress_bar() as progress:
        for done in range(1, 31):
            clock.now += 1
            progress("answers", done, 3000)
    assert capsys.readouterr().err.splitlines() == [
        "answers: 2 of 3,000, about 50 min left",
        "answers: 12 of 3,000, about 50 min left",
        "answers: 22 of 3,000, about 50 min left",
    ]


def test_other_lines_count(clock, capsys):
    """Red when: the lines of a training that reports often are doubled."""
    with terminal.progress_bar() as progress:
        for done in range(1, 51):
            clock.now += 1
            if done % 9 == 0:
                terminal.to_stderr(f"iter {done}")
            progress("train", done, 50)
    assert capsys.readouterr().err.splitlines() == [
        "train: 2 of 50, about 48 s left",
        *(f"iter {done}" for done in range(9, 50, 9)),
    ]


def test_a_line_before_the_work_does_not_delay_its_first(clock, capsys):
    terminal.to_stderr("note: something")
    clock.now += 1
    with terminal.progress_bar() as progress:
        clock.now += 3
        progress("passes", 0, 4)
        clock.now += 3000
        progress("passes", 1, 4)
        clock.now += 10
        progress("passes", 4, 4)
    assert capsys.readouterr().err.splitlines() == [
        "note: something",
        "passes: 0 of 4",
        "passes: 1 of 4, about 2.5 h left",
        "passes: 4 of 4",
    ]


def test_stages_have_their_own_time_left_and_bytes_their_units(clock, capsys):
    with terminal.progress_bar(in_bytes=True) as progress:
        progress("hash", 0, 10**8)
        clock.now += 20
        progress("hash", 10**8, 10**8)
        progress("write", 0, 4 * 10**9)
        clock.now += 30
        progress("write", 10**9, 4 * 10**9)
    assert capsys.readouterr().err.splitlines() == [
        "hash: 100.0 of 100.0 MB",
        "write: 1.0 of 4.0 GB, about 90 s left",
    ]


def test_quiet_work_has_no_progress(clock):
    with terminal.progress_bar(quiet=True) as progress:
        assert progress is None
