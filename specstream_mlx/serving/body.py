"""The JSON of a request, checked field by field; an error names the field and what is expected."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_args

from specstream_mlx.options import DraftMode
from specstream_mlx.serving.jobs import Message, Question, SamplingWish

MOST_CHOICES = 16
MOST_STOPS = 16
MOST_LOGPROBS = 20
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class BadRequest(Exception):
    """A request that cannot be answered as it is."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


class Body:
    """A JSON object whose values are asked for by name, type and range; null is as good as missing."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self.values, self._where = values, where

    @classmethod
    def parse(cls, data: bytes) -> "Body":
        """The body of a request.

        Raises:
            BadRequest: not a JSON object in UTF-8.
        """
        try:
            values = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is not JSON ({error})") from None
        if not isinstance(values, dict):
            raise BadRequest("the body is not a JSON object")
        return cls(values)

    def get(self, name: str) -> Any:
        """Whatever is there."""
        return self.values.get(name)

    def wrong(self, name: str, expected: str) -> BadRequest:
        """The error for a field."""
        return BadRequest(f"{self._where}{name}: expected {expected}", f"{self._where}{name}")

    def text(self, name: str, default: str | None = None) -> str | None:
        """A string."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str) or not _encodes(value):
            raise self.wrong(name, "a string")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number within bounds."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.wrong(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number within bounds."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low} to {high}")
        return value

    def object(self, name: str) -> "Body | None":
        """A JSON object."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Body(value, f"{self._where}{name}.")

    def objects(self, name: str) -> "list[Body]":
        """A list of JSON objects."""
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self.wrong(name, "a list of objects")
        return [Body(entry, f"{self._where}{name}[{index}].") for index, entry in enumerate(value)]


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def question_of(body: Body, defaults: SamplingWish, max_tokens: int, model: str) -> dict[str, Any]:
    """The fields of a ``Question`` that all endpoints share."""
    draft = body.text("draft")
    if draft is not None and draft not in get_args(DraftMode):
        raise body.wrong("draft", f"one of {', '.join(get_args(DraftMode))}")
    wanted = body.whole("max_tokens", max_tokens, 1, 1 << 24)
    return {
        "model": model,
        "max_tokens": body.whole("max_completion_tokens", wanted, 1, 1 << 24),
        "sampling": sampling_of(body, defaults),
        "seed": body.whole("seed", int.from_bytes(os.urandom(7), "big"), -(2**63), 2**64 - 1) % 2**64,
        "stop": stops_of(body, "stop"),
        "draft": draft,
    }


def sampling_of(body: Body, defaults: SamplingWish) -> SamplingWish:
    """mlx-lm's sampling parameters."""
    bounds: dict[str, tuple[float, float]] = {
        "temperature": (0, 100),
        "top_p": (0, 1),
        "min_p": (0, 1),
        "xtc_probability": (0, 1),
        "xtc_threshold": (0, 0.5),
        "repetition_penalty": (0, 100),
        "presence_penalty": (-100, 100),
        "frequency_penalty": (-100, 100),
    }
    found: dict[str, Any] = {}
    for field in fields(SamplingWish):
        default = getattr(defaults, field.name)
        if field.name in bounds:
            found[field.name] = body.number(field.name, default, *bounds[field.name])
        elif field.name != "logit_bias":
            found[field.name] = body.whole(field.name, default, 0, 1 << 20)
    found["top_p"] = found["top_p"] or 1.0  # mlx-lm's way to say that it is off
    found["repetition_penalty"] = 0.0 if found["repetition_penalty"] == 1 else found["repetition_penalty"]
    found["logit_bias"] = _logit_bias(body)
    return SamplingWish(**found)


def _logit_bias(body: Body) -> dict[int, float] | None:
    found = body.object("logit_bias")
    if found is None:
        return None
    bias = {}
    for token, value in found.values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not (token.isascii() and token.isdecimal() and len(token) < 10 and is_number):
            raise body.wrong("logit_bias", "an object of token ids and numbers")
        bias[int(token)] = float(value)
    return bias


def stops_of(body: Body, name: str) -> tuple[str, ...]:
    """A stop string or several."""
    value = body.get(name)
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or not all(isinstance(text, str) and text and _encodes(text) for text in stops)
    ):
        raise body.wrong(name, f"a string that is not empty, or a list of up to {MOST_STOPS}")
    return tuple(stops)


def messages_of(body: Body) -> list[Message]:
    """The messages of a chat, as chat templates take them.

    Raises:
        BadRequest: no messages, an unknown role, or parts that are not text.
    """
    messages: list[Message] = []
    for entry in body.objects("messages"):
        role = entry.text("role")
        if role not in _ROLES:
            raise entry.wrong("role", f"one of {', '.join(_ROLES)}")
        message: Message = {"role": "system" if role == "developer" else role}
        message["content"] = content_of(entry)
        for name in ("name", "tool_call_id", "reasoning_content", "reasoning"):
            if (text := entry.text(name)) is not None:
                message[name] = text
        calls = [_call_of(call) for call in entry.objects("tool_calls")]
        if calls:
            message["tool_calls"] = calls
        messages.append(message)
    if not messages:
        raise body.wrong("messages", "at least one message")
    return messages


def content_of(entry: Body, name: str = "content") -> str:
    """The text of a message: a string, or parts that are text."""
    value = entry.get(name)
    if value is None or isinstance(value, str):
        return entry.text(name) or ""
    texts = []
    for part in entry.objects(name):
        if part.get("type") not in ("text", "input_text", "output_text", "refusal"):
            raise part.wrong("type", "'text': this server reads no images, files or sound")
        texts.append(part.text("refusal" if part.get("type") == "refusal" else "text") or "")
    return "".join(texts)


def _call_of(call: Body) -> dict[str, Any]:
    function = call.object("function")
    name = None if function is None else function.text("name")
    if function is None or not name:
        raise call.wrong("function", "an object with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise function.wrong("arguments", "a string of JSON") from None
    return {
        "type": "function",
        "id": call.text("id") or "",
        "function": {"name": name, "arguments": {} if arguments is None else arguments},
    }


def tools_of(body: Body) -> list[dict[str, Any]] | None:
    """Tools in OpenAI's form."""
    tools = []
    for tool in body.objects("tools"):
        function = tool.object("function")
        if tool.get("type") != "function" or function is None or not function.text("name"):
            raise tool.wrong("function", "a tool of type 'function' with a function that has a name")
        function.object("parameters")
        tools.append(dict(tool.values))
    return tools or None


def tool_choice_of(body: Body, tools: Sequence[Mapping[str, Any]] | None) -> tuple[bool, str | None]:
    """Whether the model is told of the tools, and the call that is demanded: a name, "" for any, None for none."""
    choice = body.get("tool_choice")
    if choice in (None, "auto", "none", "required"):
        if choice == "required" and not tools:
            raise body.wrong("tool_choice", "tools to choose from")
        return choice != "none", "" if choice == "required" else None
    entry = body.object("tool_choice") if isinstance(choice, dict) else None
    function = entry.object("function") if entry is not None else None
    name = function.text("name") if function is not None else None
    if not name or name not in [tool["function"]["name"] for tool in tools or []]:
        raise body.wrong("tool_choice", "'auto', 'none', 'required', or a function among the tools")
    return True, name


def schema_of(body: Body, name: str = "response_format") -> dict[str, Any] | None:
    """The JSON schema that the answer must follow; {}: any object; None: no demand."""
    wanted = body.object(name)
    kind = None if wanted is None else wanted.get("type")
    if wanted is None or kind == "text":
        return None
    if kind == "json_object":
        return {}
    if kind != "json_schema":
        raise body.wrong(name, "type 'text', 'json_object' or 'json_schema'")
    holder = wanted.object("json_schema") or wanted
    schema = holder.object("schema")
    if schema is None:
        raise body.wrong(name, "a json_schema with a schema")
    return dict(schema.values)


def chat_questions(body: Body, defaults: SamplingWish, max_tokens: int, model: str) -> list[Question]:
    """What a chat request asks, once for each choice."""
    tools = tools_of(body)
    told, forced = tool_choice_of(body, tools)
    logprobs = body.whole("top_logprobs", 0, 0, MOST_LOGPROBS)
    template = body.object("chat_template_kwargs")
    common = question_of(body, defaults, max_tokens, model) | {
        "messages": messages_of(body),
        "tools": tools if told else None,
        "template": {} if template is None else _template(template),
        "top_logprobs": logprobs if body.flag("logprobs") else None,
        "schema": schema_of(body),
        "forced_tool": forced,
        "continued": body.flag("continue_final_message"),
    }
    if logprobs and not body.flag("logprobs"):
        raise body.wrong("top_logprobs", "logprobs to be true")
    if forced is not None and common["schema"] is not None:
        raise body.wrong("tool_choice", "'auto' or 'none' beside response_format")
    return _choices(body, common)


def _template(template: Body) -> dict[str, Any]:
    taken = {"tokenize", "add_generation_prompt", "tools", "continue_final_message", "return_dict", "chat_template"}
    if taken & set(template.values):
        raise template.wrong(sorted(taken & set(template.values))[0], "arguments of the template alone")
    return dict(template.values)


def completion_questions(body: Body, defaults: SamplingWish, max_tokens: int, model: str) -> list[Question]:
    """What a completion request asks: every prompt, once for each choice."""
    common = question_of(body, defaults, max_tokens, model)
    logprobs = body.get("logprobs")
    if isinstance(logprobs, bool):
        common["top_logprobs"] = 0 if logprobs else None
    elif logprobs is not None:
        common["top_logprobs"] = body.whole("logprobs", 0, 0, MOST_LOGPROBS)
    common["schema"] = schema_of(body)
    if body.get("suffix"):
        raise body.wrong("suffix", "none: this server does not fill in the middle")
    prompt = body.get("prompt")
    prompts = prompt if isinstance(prompt, list) and not _is_ids(prompt) else [prompt]
    if not prompts or len(prompts) > MOST_CHOICES:
        raise body.wrong("prompt", f"one prompt, or up to {MOST_CHOICES}")
    for one in prompts:
        if not ((isinstance(one, str) and _encodes(one)) or _is_ids(one)):
            raise body.wrong("prompt", "text, a list of token ids, or a list of them")
    found = [question for one in prompts for question in _choices(body, common | {"prompt": one})]
    if len(found) > MOST_CHOICES:
        raise body.wrong("n", f"at most {MOST_CHOICES} answers in all")
    return found


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int and token >= 0 for token in value)


def _choices(body: Body, common: Mapping[str, Any]) -> list[Question]:
    count = body.whole("n", 1, 1, MOST_CHOICES)
    return [Question(**{**common, "seed": (common["seed"] + index) % 2**64}) for index in range(count)]
