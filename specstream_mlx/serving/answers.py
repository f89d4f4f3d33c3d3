"""Answers in OpenAI's shapes: chat completions and completions, whole or as a stream."""

import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from specstream_mlx.serving.body import BadRequest
from specstream_mlx.serving.conversation import Call, Splitter
from specstream_mlx.serving.jobs import Admitted, Event, Failed, Piece, Prefilled, TokenLogprob


@dataclass
class Choice:
    """One answer so far."""

    splitter: Splitter | None
    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_string: str | None = None
    num_tokens: int = 0
    target_passes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def add(self, piece: Piece) -> list[tuple[str, Any]]:
        """Take a piece; what it adds: ("content" or "reasoning", text) or ("call", its entry)."""
        self.num_tokens, self.target_passes = piece.num_tokens, piece.target_passes
        self.logprobs += piece.logprobs
        self.stop_string = piece.stop_string
        final = piece.finish_reason is not None
        parts: list[tuple[Any, Any]] = (
            [("content", piece.text)] if self.splitter is None else list(self.splitter.feed(piece.text, final=final))
        )
        found: list[tuple[str, Any]] = []
        for kind, value in parts:
            if kind == "call":
                assert isinstance(value, Call)
                entry = {
                    "index": len(self.calls),
                    "id": f"call_{uuid.uuid4().hex[:24]}",
                    "type": "function",
                    "function": {"name": value.name, "arguments": value.arguments},
                }
                self.calls.append(entry)
                found.append((kind, entry))
            elif value:
                if kind == "reasoning":
                    self.reasoning += value
                else:
                    self.content += value
                found.append((kind, value))
        if final:
            called = self.calls and piece.finish_reason == "stop"
            self.finish_reason = "tool_calls" if called else piece.finish_reason
        return found


def usage_of(choices: list[Choice]) -> dict[str, Any]:
    """OpenAI's usage, with the target's passes."""
    prompts = sum(choice.prompt_tokens for choice in choices[:1])
    tokens = sum(choice.num_tokens for choice in choices)
    passes = sum(choice.target_passes for choice in choices)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": tokens,
        "total_tokens": prompts + tokens,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in choices[:1])},
        "target_passes": passes,
        "tokens_per_pass": round(tokens / passes, 4) if passes else 0.0,
    }


def failure(failed: Failed) -> BadRequest:
    """What the client is told of an answer that ended."""
    return BadRequest(failed.message, status=failed.status, code=failed.code)


class Shape:
    """How one endpoint writes an answer."""

    stream_object: str
    whole_object: str
    prefix: str

    def __init__(self, model: str, stream_options: Mapping[str, Any]) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.model, self.created = model, int(time.time())
        self.include_usage = bool(stream_options.get("include_usage"))
        self.include_passes = bool(stream_options.get("include_passes"))

    def head(self, kind: str) -> dict[str, Any]:
        """What every object begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        """The answer in one object."""
        entries = [self.choice(index, choice) for index, choice in enumerate(choices)]
        return self.head(self.whole_object) | {"choices": entries, "usage": usage_of(choices)}

    def chunk(self, *entries: dict[str, Any]) -> dict[str, Any]:
        """A part of a streamed answer."""
        found = self.head(self.stream_object) | {"choices": list(entries)}
        return found | {"usage": None} if self.include_usage else found

    async def stream(
        self, choices: list[Choice], events: AsyncIterator[tuple[int, Event] | None]
    ) -> AsyncIterator[dict[str, Any] | str | None]:
        """The chunks of an answer; a string is a comment, None the end."""
        for entry in self.opening(choices):
            yield self.chunk(entry)
        async for happened in events:
            if happened is None:
                yield "keep-alive"
                continue
            index, event = happened
            if isinstance(event, Prefilled):
                yield f"prompt {event.done}/{event.total}"
            elif isinstance(event, Failed):
                yield {"error": failure_object(failure(event))}
                yield None
                return
            elif isinstance(event, Piece):
                for entry in self.pieces(index, choices[index], event):
                    chunk = self.chunk(entry)
                    if self.include_passes:
                        chunk["passes"] = {"tokens": len(event.tokens), "accepted": event.accepted}
                    yield chunk
        if self.include_usage:
            yield self.head(self.stream_object) | {"choices": [], "usage": usage_of(choices)}
        yield None

    def opening(self, choices: list[Choice]) -> list[dict[str, Any]]:
        """Choices that a stream opens with."""
        return []

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """A finished choice."""
        raise NotImplementedError

    def pieces(self, index: int, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        """The choices of the chunks that a piece makes."""
        raise NotImplementedError


class ChatShape(Shape):
    """``/v1/chat/completions``."""

    stream_object, whole_object, prefix = "chat.completion.chunk", "chat.completion", "chatcmpl"

    def opening(self, choices: list[Choice]) -> list[dict[str, Any]]:
        """As ``Shape``: the role."""
        return [
            {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            for index in range(len(choices))
        ]

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """As ``Shape``."""
        message: dict[str, Any] = {"role": "assistant", "content": choice.content, "refusal": None}
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        if choice.calls:
            message["content"] = choice.content or None
            message["tool_calls"] = [
                {name: value for name, value in call.items() if name != "index"} for call in choice.calls
            ]
        return {
            "index": index,
            "message": message,
            "logprobs": _chat_logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def pieces(self, index: int, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        """As ``Shape``."""
        names = {"content": "content", "reasoning": "reasoning_content"}
        deltas: list[dict[str, Any]] = [
            {"tool_calls": [value]} if kind == "call" else {names[kind]: value} for kind, value in choice.add(piece)
        ]
        if not deltas and piece.logprobs:
            deltas = [{"content": ""}]
        entries: list[dict[str, Any]] = [
            {
                "index": index,
                "delta": delta,
                "logprobs": _chat_logprobs(piece.logprobs) if place == 0 else None,
                "finish_reason": None,
            }
            for place, delta in enumerate(deltas)
        ]
        if choice.finish_reason is not None:
            entries.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": choice.finish_reason})
        return entries


class CompletionShape(Shape):
    """``/v1/completions``."""

    stream_object, whole_object, prefix = "text_completion", "text_completion", "cmpl"

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """As ``Shape``."""
        return self._entry(index, choice.content, choice.logprobs, choice.finish_reason, 0)

    def pieces(self, index: int, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        """As ``Shape``."""
        offset = len(choice.content)
        text = "".join(value for _, value in choice.add(piece))
        if not text and choice.finish_reason is None and not piece.logprobs:
            return []
        return [self._entry(index, text, piece.logprobs, choice.finish_reason, offset)]

    def _entry(
        self, index: int, text: str, logprobs: list[TokenLogprob], finish_reason: str | None, offset: int
    ) -> dict[str, Any]:
        offsets, at = [], offset
        for entry in logprobs:
            offsets.append(at)
            at += len(entry.text)
        told = {
            "tokens": [entry.text for entry in logprobs],
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [{name: value for _, name, value in entry.top} for entry in logprobs],
            "text_offset": offsets,
        }
        return {
            "index": index,
            "text": text,
            "logprobs": told if logprobs else None,
            "finish_reason": finish_reason,
        }


def _chat_logprobs(logprobs: list[TokenLogprob]) -> dict[str, Any] | None:
    if not logprobs:
        return None

    def entry(token: int, text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace")), "id": token}

    content = [
        entry(found.id, found.text, found.logprob) | {"top_logprobs": [entry(*other) for other in found.top]}
        for found in logprobs
    ]
    return {"content": content, "refusal": None}


def failure_object(error: BadRequest) -> dict[str, Any]:
    """OpenAI's error."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(error.status, kind)
    return {"message": error.message, "type": kind, "param": error.param, "code": error.code}


def admitted(choice: Choice, event: Admitted) -> None:
    """Note what a choice begins with."""
    choice.prompt_tokens, choice.cached_tokens = event.prompt_tokens, event.cached_tokens
