"""Text that must follow a grammar: JSON of a schema, or a tool call; by llguidance, as a logits processor.

The processor remembers what it has seen, so it is asked once per token and in order, along the accepted path.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from specstream_mlx.errors import InvalidInputError, UnsupportedError

_WHITESPACE = {"whitespace_flexible": False}


class Grammars:
    """Makes matchers for one tokenizer, whose tables are built when first needed."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._tables: Any = None

    def json(self, schema: Mapping[str, Any], prompt_length: int) -> "Constraint":
        """JSON that a schema allows; an empty one: any object.

        Raises:
            InvalidInputError: the schema is wrong, or says what the library does not know.
            UnsupportedError: llguidance is not installed.
        """
        guidance = _library()
        text = json.dumps(dict(schema) or {"type": "object"})
        return self._constraint(guidance.LLMatcher.grammar_from_json_schema(text, overrides=_WHITESPACE), prompt_length)

    def call(self, tools: Sequence[Mapping[str, Any]], name: str, prompt_length: int) -> "Constraint":
        """A call of one of ``tools`` as JSON between the tokenizer's marks; ``name``: of this one.

        Raises:
            InvalidInputError: no such tool, or as ``json``.
            UnsupportedError: this model writes tool calls in another form.
        """
        guidance = _library()
        parser = getattr(self._tokenizer, "tool_parser", None)
        if parser is None or not parser.__module__.endswith("json_tools"):
            raise UnsupportedError(
                "tool_choice: a call can be demanded of models that write calls as JSON alone; use 'auto'"
            )
        functions = [tool["function"] for tool in tools if not name or tool["function"]["name"] == name]
        if not functions:
            raise InvalidInputError(f"tool_choice: there is no tool {name!r} among the tools")
        kinds = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    "arguments": function.get("parameters") or {"type": "object"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for function in functions
        ]
        marks = [self._mark(mark) for mark in (self._tokenizer.tool_call_start, self._tokenizer.tool_call_end)]
        schema = (kinds[0] if len(kinds) == 1 else {"anyOf": kinds}) | {"x-guidance": _WHITESPACE}
        lark = f'start: {marks[0]} "\\n"? call "\\n"? {marks[1]}\ncall: %json {json.dumps(schema)}\n'
        return self._constraint(guidance.LLMatcher.grammar_from_lark(lark), prompt_length)

    def _mark(self, mark: str) -> str:
        """A mark in a grammar: a special token by its name, other text as a string."""
        ids = self._tokenizer.encode(mark, add_special_tokens=False)
        special = set(getattr(self._tokenizer, "all_special_ids", ()))
        return mark if len(ids) == 1 and ids[0] in special else json.dumps(mark)

    def _constraint(self, grammar: str, prompt_length: int) -> "Constraint":
        guidance = _library()
        if self._tables is None:
            from llguidance.hf import from_tokenizer

            eos = sorted(self._tokenizer.eos_token_ids)
            backend = getattr(self._tokenizer, "_tokenizer", self._tokenizer)
            self._tables = from_tokenizer(backend, n_vocab=self._vocab_size, eos_token=eos)
        problem = guidance.LLMatcher.validate_grammar(grammar, self._tables)
        if problem:
            raise InvalidInputError(f"schema: {' '.join(problem.split())[:400]}")
        return Constraint(guidance.LLMatcher(self._tables, grammar), prompt_length, self._vocab_size)


class Constraint:
    """A logits processor that leaves the tokens alone which a grammar allows."""

    def __init__(self, matcher: Any, prompt_length: int, vocab_size: int) -> None:
        self._matcher, self._seen, self._vocab_size = matcher, prompt_length, vocab_size

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """As mlx-lm's logits processors: all ids so far, (1, V) logits.

        Raises:
            InvalidInputError: the grammar came to an end that it does not know.
        """
        new: list[int] = tokens[self._seen :].tolist()  # type: ignore[assignment]
        self._seen += len(new)
        if (new and not self._matcher.consume_tokens(new)) or self._matcher.is_error():
            raise InvalidInputError(f"grammar: {' '.join(self._matcher.get_error().split())[:400]}")
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        size = logits.shape[-1]
        allowed = np.zeros(size, dtype=np.bool_)
        allowed[: min(size, len(bits))] = bits[:size]
        return mx.where(mx.array(allowed)[None], logits, mx.array(-mx.inf, dtype=logits.dtype))


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise UnsupportedError(
            "response_format: llguidance is not installed; run pip install 'specstream-mlx[serve]'"
        ) from error
    return llguidance
