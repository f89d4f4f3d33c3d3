"""Anthropic's messages: their requests as chat requests, and answers in their shapes, whole or as a stream."""

import json
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from specstream_mlx.serving.answers import Choice, failure, failure_object
from specstream_mlx.serving.body import BadRequest, Body, content_of, stops_of
from specstream_mlx.serving.jobs import Event, Failed, Piece

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
NamedEvent = tuple[str, dict[str, Any]]


def as_chat(body: Body) -> Body:
    """The same request in OpenAI's form.

    Raises:
        BadRequest: a field that is missing or wrong.
    """
    if body.get("max_tokens") is None:
        raise body.wrong("max_tokens", "a whole number")
    messages = []
    if body.get("system") is not None:
        messages.append({"role": "system", "content": content_of(body, "system")})
    for entry in body.objects("messages"):
        if entry.get("role") not in ("user", "assistant", "system"):
            raise entry.wrong("role", "'user' or 'assistant'")
        messages += _messages(entry)
    if messages and messages[-1]["role"] == "assistant":
        body = Body({**body.values, "continue_final_message": True})
    found = {**body.values, "messages": messages, "stop": list(stops_of(body, "stop_sequences")), "n": 1}
    for name in ("system", "stop_sequences", "logprobs", "top_logprobs", "response_format", "max_completion_tokens"):
        found.pop(name, None)
    tools = [_tool(tool) for tool in body.objects("tools")]
    found["tools"] = tools or None
    found["tool_choice"] = _tool_choice(body, tools)
    return Body(found)


def _messages(entry: Body) -> list[dict[str, Any]]:
    """A message of theirs: results of tools are messages of their own, before the rest."""
    role = str(entry.get("role"))
    if not isinstance(entry.get("content"), list):
        return [{"role": role, "content": content_of(entry)}]
    text, results, calls = "", [], []
    for block in entry.objects("content"):
        kind = block.get("type")
        if kind == "text":
            text += block.text("text") or ""
        elif kind == "tool_result":
            results.append(
                {"role": "tool", "tool_call_id": block.text("tool_use_id") or "", "content": content_of(block)}
            )
        elif kind == "tool_use":
            given = block.object("input")
            arguments = {} if given is None else dict(given.values)
            function = {"name": block.text("name"), "arguments": json.dumps(arguments)}
            calls.append({"id": block.text("id"), "type": "function", "function": function})
        elif kind not in ("thinking", "redacted_thinking"):
            raise block.wrong("type", "'text', 'tool_use' or 'tool_result': this server reads no images or files")
    if role == "assistant":
        return [{"role": role, "content": text} | ({"tool_calls": calls} if calls else {})]
    return [*results, *([{"role": role, "content": text}] if text or not results else [])]


def _tool(tool: Body) -> dict[str, Any]:
    schema = tool.object("input_schema")
    name = tool.text("name")
    if not name or schema is None:
        raise tool.wrong("input_schema", "a tool with a name and an input_schema")
    function = {"name": name, "description": tool.text("description") or "", "parameters": dict(schema.values)}
    return {"type": "function", "function": function}


def _tool_choice(body: Body, tools: Sequence[dict[str, Any]]) -> Any:
    choice = body.object("tool_choice")
    if choice is None:
        return None
    if choice.get("type") == "tool":
        return {"type": "function", "function": {"name": choice.text("name")}}
    if choice.get("type") not in _CHOICES:
        raise choice.wrong("type", "'auto', 'any', 'tool' or 'none'")
    return _CHOICES[str(choice.get("type"))]


class MessageShape:
    """``/v1/messages``."""

    def __init__(self, model: str) -> None:
        self.model, self.id = model, f"msg_{uuid.uuid4().hex[:24]}"

    def whole(self, choice: Choice) -> dict[str, Any]:
        """The answer in one object."""
        content: list[dict[str, Any]] = []
        if choice.reasoning:
            content.append({"type": "thinking", "thinking": choice.reasoning, "signature": ""})
        if choice.content or not choice.calls:
            content.append({"type": "text", "text": choice.content})
        content += [_use(call) | {"input": _input(call)} for call in choice.calls]
        return self._head(choice, content) | _ending(choice)

    async def stream(
        self, choice: Choice, events: AsyncIterator[tuple[int, Event] | None]
    ) -> AsyncIterator[NamedEvent]:
        """The events of an answer."""
        head = self._head(choice, []) | {"stop_reason": None, "stop_sequence": None}
        yield "message_start", {"type": "message_start", "message": head}
        place, kind = -1, ""
        async for happened in events:
            if happened is None or not isinstance(happened[1], Failed | Piece):
                yield "ping", {"type": "ping"}
                continue
            event = happened[1]
            if isinstance(event, Failed):
                yield "error", {"type": "error", "error": failure_object(failure(event))}
                return
            for part, value in choice.add(event):
                if part != kind or part == "call":
                    if place >= 0:
                        yield "content_block_stop", {"type": "content_block_stop", "index": place}
                    place, kind = place + 1, part
                    block = _use(value) | {"input": {}} if part == "call" else _EMPTY[part]
                    start = {"type": "content_block_start", "index": place, "content_block": block}
                    yield "content_block_start", start
                delta = {"type": "content_block_delta", "index": place, "delta": _delta(part, value)}
                yield "content_block_delta", delta
        if place >= 0:
            yield "content_block_stop", {"type": "content_block_stop", "index": place}
        ending = _ending(choice)
        yield "message_delta", {"type": "message_delta", "delta": ending, "usage": _usage(choice)}
        yield "message_stop", {"type": "message_stop"}

    def _head(self, choice: Choice, content: list[dict[str, Any]]) -> dict[str, Any]:
        found = {"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content}
        return found | {"usage": _usage(choice)}


_EMPTY: dict[str, dict[str, Any]] = {
    "content": {"type": "text", "text": ""},
    "reasoning": {"type": "thinking", "thinking": "", "signature": ""},
}


def _delta(part: str, value: Any) -> dict[str, Any]:
    if part == "call":
        return {"type": "input_json_delta", "partial_json": value["function"]["arguments"]}
    if part == "reasoning":
        return {"type": "thinking_delta", "thinking": value}
    return {"type": "text_delta", "text": value}


def _use(call: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call["id"].replace("call_", "toolu_"), "name": call["function"]["name"]}


def _input(call: dict[str, Any]) -> Any:
    try:
        return json.loads(call["function"]["arguments"])
    except ValueError:
        return {}


def _ending(choice: Choice) -> dict[str, Any]:
    """Why the answer ended."""
    reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
    reason = reasons.get(str(choice.finish_reason), "end_turn" if choice.stop_string is None else "stop_sequence")
    return {"stop_reason": reason, "stop_sequence": choice.stop_string if reason == "stop_sequence" else None}


def _usage(choice: Choice) -> dict[str, Any]:
    return {
        "input_tokens": choice.prompt_tokens - choice.cached_tokens,
        "cache_read_input_tokens": choice.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": choice.num_tokens,
    }


def error_object(error: BadRequest) -> dict[str, Any]:
    """Their error."""
    return {"type": "error", "error": failure_object(error)}
