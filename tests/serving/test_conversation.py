"""Messages on their way in, and the parts of an answer on their way out."""

import json
import queue
from typing import Any, ClassVar

import pytest
from mlx_lm.tool_parsers import json_tools

from specstream_mlx.errors import InvalidInputError
from specstream_mlx.serving.conversation import Call, Splitter, encode_messages
from specstream_mlx.serving.jobs import Admitted, Failed, Job, Piece, Question, SamplingWish
from specstream_mlx.serving.scheduler import Scheduler, ServerSettings

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "parameters": {
                "type": "object",
                "properties": {"place": {"enum": ["here", "there"]}},
                "required": ["place"],
                "additionalProperties": False,
            },
        },
    }
]
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }} <tool_call> {# tool_call.name #}{% endif %}"
)


class Tokenizer:
    """Marks as some models have them."""

    has_thinking, think_start, think_end = True, "<think>", "</think>"
    has_tool_calling, tool_call_start, tool_call_end = True, "<tool_call>", "</tool_call>"
    structural_markers: tuple[str, ...] = ()
    response_transitions: ClassVar[dict[str, Any]] = {}
    has_chat_template = False
    tool_parser = staticmethod(json_tools.parse_tool_call)

    def get_vocab(self) -> dict[str, int]:
        return {}

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


class Channels(Tokenizer):
    has_thinking = has_tool_calling = False

    def get_vocab(self) -> dict[str, int]:
        return {"<|channel|>": 1, "<|message|>": 2}


def split(text: str, tokenizer: Any, size: int, *, reasoning: bool = False) -> list[tuple[str, Any]]:
    """The parts of a text that arrives in pieces of ``size``, neighbours of a kind joined."""
    splitter = Splitter(tokenizer, reasoning=reasoning, tools=TOOLS)
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    parts: list[tuple[str, Any]] = []
    for index, piece in enumerate(pieces):
        for kind, value in splitter.feed(piece, final=index == len(pieces) - 1):
            if parts and parts[-1][0] == kind and isinstance(value, str):
                parts[-1] = kind, parts[-1][1] + value
            else:
                parts.append((kind, value))
    return parts


CALL = '<tool_call>\n{"name": "find", "arguments": {"place": "here"}}\n</tool_call>'
FOUND = Call("find", '{"place": "here"}')


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "reasoning", "expected"),
    [
        ("plain <b> text <", False, [("content", "plain <b> text <")]),
        ("<think>hm</think>yes", False, [("reasoning", "hm"), ("content", "yes")]),
        ("hm</think>yes", True, [("reasoning", "hm"), ("content", "yes")]),
        ("a" + CALL + CALL, False, [("content", "a"), ("call", FOUND), ("call", FOUND)]),
        (CALL + "after", False, [("call", FOUND), ("content", "after")]),
        ('<tool_call>{"name": ', False, [("content", '{"name": ')]),
        ("<think>never ends", False, [("reasoning", "never ends")]),
    ],
)
def test_parts_are_told_apart_however_they_arrive(text, reasoning, expected, size):
    assert split(text, Tokenizer(), size, reasoning=reasoning) == expected


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_channels(size):
    text = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes"
    assert split(text, Channels(), size) == [("reasoning", "hm"), ("content", "yes")]


def test_without_a_template_texts_are_joined_and_a_templates_refusal_is_an_error():
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": ""}, {"role": "user", "content": "b"}]
    how: dict[str, Any] = {"tools": None, "template": {}, "continued": False}
    assert encode_messages(Tokenizer(), messages, **how) == [ord(c) for c in "a\n\nb"]

    class Refusing(Tokenizer):
        has_chat_template = True

        def apply_chat_template(self, *arguments: Any, **more: Any) -> str:
            raise ValueError("roles must\nalternate")

    with pytest.raises(InvalidInputError, match="roles must alternate"):
        encode_messages(Refusing(), messages, **how)


def ask(scheduler: Scheduler, question: Question) -> tuple[str, Failed | None, Admitted | None]:
    """The text of an answer, or what it failed with."""
    events: queue.Queue[Any] = queue.Queue()
    scheduler.submit(Job(question, events.put))
    text, admitted = "", None
    while True:
        event = events.get(timeout=120)
        if isinstance(event, Failed):
            return text, event, admitted
        if isinstance(event, Admitted):
            admitted = event
        if isinstance(event, Piece):
            text += event.text
            if event.finish_reason is not None:
                return text, None, admitted


@pytest.fixture(scope="module")
def scheduler():
    found = Scheduler(ServerSettings(chat_template=TEMPLATE, max_concurrency=2, cache_size=3))
    found.start()
    yield found
    found.stop()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_demanded_call_is_written(scheduler, temperature):
    """Red when: the grammar of tool calls does not hold, or drafts get past it."""
    question = Question(
        scheduler.names[0],
        messages=[{"role": "user", "content": "where?"}],
        tools=TOOLS,
        forced_tool="find",
        max_tokens=80,
        sampling=SamplingWish(temperature=temperature),
        seed=3,
    )
    text, failed, _ = ask(scheduler, question)
    assert failed is None
    splitter = scheduler.splitter(reasoning=False, tools=TOOLS)
    ((kind, call),) = [part for part in splitter.feed(text, final=True) if part[0] == "call" or part[1].strip()]
    assert (kind, call.name) == ("call", "find")
    assert json.loads(call.arguments)["place"] in ("here", "there")


def test_a_prompt_that_goes_on_is_not_run_again(scheduler):
    """Turns of a chat: the next prompt begins with the one before and its answer."""
    first = {"role": "user", "content": "one two three four five six seven eight nine ten eleven twelve"}
    name = scheduler.names[0]
    answer, _, begin = ask(scheduler, Question(name, messages=[first], max_tokens=20))
    assert begin is not None
    assert begin.cached_tokens == 0
    follow = [first, {"role": "assistant", "content": answer}, {"role": "user", "content": "and then?"}]
    again, _, later = ask(scheduler, Question(name, messages=follow, max_tokens=12))
    assert later is not None
    assert later.cached_tokens >= begin.prompt_tokens - 1
    fresh = Scheduler(ServerSettings(chat_template=TEMPLATE, cache_size=0))
    fresh.start()
    try:
        assert ask(fresh, Question(name, messages=follow, max_tokens=12))[0] == again
    finally:
        fresh.stop()


def test_more_than_can_wait_are_told_to_come_later():
    found = Scheduler(ServerSettings(max_concurrency=1, max_waiting=1, cache_size=0))
    found.start()
    events: queue.Queue[Any] = queue.Queue()
    jobs = [
        Job(Question(found.names[0], prompt="a b c", max_tokens=400, seed=index), lambda e, i=index: events.put((i, e)))
        for index in range(4)
    ]
    try:
        with found._wake:  # all of them arrive before the first is taken
            for job in jobs:
                found.submit(job)
        refused = set()
        while len(refused) < 3:
            index, event = events.get(timeout=60)
            if isinstance(event, Failed):
                assert event.status == 429
                refused.add(index)
        assert 0 not in refused
    finally:
        found.stop()
