"""``serve`` before it serves: what it refuses, and how it reads its flags."""

import socket

import pytest
import typer

from specstream_cli.serve import parse_size


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--host", "0.0.0.0"), 2, "0.0.0.0 can be reached by others; set an API key and name it with --api-key-env"),
        (("--api-key-env", "NO_SUCH_VARIABLE"), 2, "the environment variable NO_SUCH_VARIABLE is not set"),
        (("--adapter", "a=/nowhere/at/all"), 3, "/nowhere/at/all"),
        (("--adapter", "a=x/y", "--adapter", "a=x/z"), 2, "two of one name"),
        (("--prompt-cache-bytes", "many"), 2, "expected bytes"),
        (("--log-level", "loud"), 2, "expected debug, info, warning or error"),
        (("--draft", "often"), 2, "often"),
    ],
)
def test_refusals_are_one_line(run, words, code, says):
    """Red when: a mistake is noticed only by a request, or by the whole network."""
    result = run("serve", *words)
    assert result.code == code, result.stderr
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_named(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("serve", "--port", str(taken.getsockname()[1]))
    assert result.code == 3
    assert "cannot listen on 127.0.0.1" in result.stderr


@pytest.mark.parametrize(("text", "size"), [("12", 12), ("5k", 5000), ("1.5 MB", 1_500_000), ("4GB", 4_000_000_000)])
def test_sizes(text, size):
    assert parse_size(text) == size


def test_bad_sizes():
    with pytest.raises(typer.BadParameter):
        parse_size("-1")
