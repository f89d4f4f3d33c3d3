"""The wired limit is raised once for all generations that overlap, whoever ends last."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from specstream_mlx import stream_generate
from specstream_mlx.engine import wired
from tests.tiny import NumberTokenizer, make_model, random_prompt


@pytest.fixture
def limit(monkeypatch):
    """What became of the limit; mlx-lm's own does nothing without Metal."""
    events = []

    @contextmanager
    def fake(model, streams):
        events.append("raised")
        yield
        events.append("put back")

    monkeypatch.setattr(wired, "wired_limit", fake)
    return events


@pytest.fixture(scope="module")
def model():
    return make_model("llama", seed=62)


def begin(model, seed=0):
    responses = stream_generate(model, NumberTokenizer(end_of_text=()), random_prompt(5, seed), 12, draft="tree")
    next(responses)
    return responses


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_generations_that_overlap(limit, model, order):
    """Red when: the first one to end puts the limit back, or the last one does not."""
    running = [begin(model, seed) for seed in range(3)]
    for left, number in zip((2, 1, 0), order, strict=True):
        if number == 1:
            running[number].close()
        else:
            list(running[number])
        assert limit == ["raised"] + ["put back"] * (not left)


def test_generations_one_after_the_other(limit, model):
    for count in (1, 2):
        list(begin(model))
        assert limit == ["raised", "put back"] * count


def test_the_last_generation_ends_in_another_thread(limit, model):
    first = begin(model)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(begin, model, 1).result()
        first.close()
        pool.submit(list, second).result()
    assert limit == ["raised", "put back"]


def test_a_limit_that_cannot_be_raised(limit, model, monkeypatch):
    """Red when: a failure counts as a generation under way, so that the limit is never raised again."""

    @contextmanager
    def failing(model, streams):
        raise RuntimeError("no memory")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(wired, "wired_limit", failing)
        with pytest.raises(RuntimeError, match="no memory"):
            begin(model)
    list(begin(model))
    assert limit == ["raised", "put back"]
