"""The arguments of a generation, checked and brought to one form; nothing here imports MLX.

Every refusal is one ``UsageError`` that names the argument, the value and what was expected.
"""

import operator
from collections.abc import Callable, Iterable
from typing import Any

from specstream_mlx.errors import UsageError

LARGEST_SEED = 2**64 - 1


def max_tokens(value: Any) -> int:
    """The most tokens to generate: at least 1, or -1 for no limit."""
    return _integer("max_tokens", value, "at least 1, or -1 for no limit", lambda number: number == -1 or number >= 1)


def at_least_one(name: str, value: Any) -> int:
    """A count."""
    return _integer(name, value, "at least 1", lambda number: number >= 1)


def seed(value: Any) -> int | None:
    """A seed of random numbers, or None."""
    if value is None:
        return None
    return _integer("seed", value, f"an integer from 0 to {LARGEST_SEED}, or None", lambda n: 0 <= n <= LARGEST_SEED)


def sampler(value: Any) -> Callable[[Any], Any] | None:
    """A function from log-probabilities to ids, or None for greedy decoding."""
    if value is None or callable(value):
        return value
    raise _refusal("sampler", value, "a function such as mlx_lm.sample_utils.make_sampler(0.7), or None for greedy")


def logits_processors(value: Any) -> list[Callable[[Any, Any], Any]] | None:
    """Functions from ids and logits to logits; None without any."""
    if value is None:
        return None
    if callable(value) or isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise _refusal("logits_processors", value, "a list of functions, such as [processor], or None")
    processors = list(value)
    for processor in processors:
        if not callable(processor):
            raise _refusal("logits_processors", processor, "functions of ids and logits in the list")
    return processors or None


def stop(value: Any) -> tuple[str, ...]:
    """The texts that end an answer; one string is one of them, None is none."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, bytes | bytearray) or not isinstance(value, Iterable):
        raise _refusal("stop", value, "a string, a list of strings, or None")
    texts = tuple(value)
    for text in texts:
        if not isinstance(text, str):
            raise _refusal("stop", text, "a string, or strings in the list")
        if not text:
            raise UsageError("stop holds an empty string, which would stop at once; remove it")
    return texts


def callback(name: str, value: Any) -> Callable[..., Any] | None:
    """A function that is called on the way, or None."""
    if value is None or callable(value):
        return value
    raise _refusal(name, value, "a function, or None")


def _integer(name: str, value: Any, expected: str, fits: Callable[[int], bool]) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise _refusal(name, value, f"an integer of {expected}" if expected.startswith("at") else expected) from None
    if not fits(number):
        raise UsageError(f"{name} is {number}, expected {expected}")
    return number


def _refusal(name: str, value: Any, expected: str) -> UsageError:
    return UsageError(f"{name} is {' '.join(repr(value).split())[:80]}, expected {expected}")
