"""A library that says what it is told to: the command line is tested without a model.

Importable from subprocesses too, where ``run`` installs it before the program starts.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import specstream_mlx
from specstream_mlx import bundled


@dataclass
class Draft:
    mode: str = "tree"
    gamma: int = 4
    nodes: int = 6
    insertion: str = "deferred"
    plan: str = "default"
    note: str | None = None
    drafter: str = "streams"


@dataclass
class Response:
    text: str
    tokens: list[int]
    finish_reason: str | None
    generation_tokens: int
    target_passes: int
    tokens_per_pass: float
    prompt_tokens: int = 5
    prompt_tps: float = 100.0
    generation_tps: float = 50.0
    stream_passes: int = 1
    drafted_by_depth: list[int] = field(default_factory=lambda: [2, 2, 1, 0])
    accepted_by_depth: list[int] = field(default_factory=lambda: [2, 1, 0, 0])
    peak_memory: float = 0.25
    draft: Draft = field(default_factory=Draft)
    drafted: list[list[int]] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)


class Tokenizer:
    has_chat_template = False
    eos_token_ids = (2,)

    def __init__(self) -> None:
        self.added: list[str] = []

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def get_vocab(self) -> dict[str, int]:
        return {"</s>": 2, "END": 7}

    def add_eos_token(self, token: str) -> None:
        self.added.append(token)

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **arguments: Any) -> str:
        assert arguments.pop("tokenize") is False
        assert arguments.pop("add_generation_prompt") is True
        if arguments.get("fail"):
            raise ValueError("roles must\nalternate")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "".join(sorted(arguments))


class Library:
    """Records the calls made to it; ``script`` is what the responses say, an exception in it is raised."""

    def __init__(self) -> None:
        self.script: list[Any] = [("SELECT ", [10, 11]), ("name", [12]), ("", []), ("", [2])]
        self.pause = 0.0
        self.loaded: tuple[Any, Any] | None = None
        self.call: dict[str, Any] = {}
        self.prompt: Any = None
        self.tokenizer = Tokenizer()
        self.load_error: BaseException | None = None
        self.on_step: Callable[[int], None] = lambda index: None

    def load(self, path_or_repo: Any = None, adapter: Any = None) -> tuple[object, Tokenizer]:
        print("library noise")  # must not reach standard output
        self.loaded = (path_or_repo, adapter)
        if self.load_error is not None:
            raise self.load_error
        return SimpleNamespace(vocab_size=50), self.tokenizer

    def stream_generate(self, model: object, tokenizer: Tokenizer, prompt: Any, **call: Any) -> Iterator[Response]:
        self.prompt, self.call = prompt, call
        total = 0
        for index, step in enumerate(self.script):
            if isinstance(step, BaseException):
                raise step
            text, tokens = step
            self.on_step(index)
            total += len(tokens)
            last = index == len(self.script) - 1
            yield Response(text, tokens, "stop" if last else None, total, index + 1, total / (index + 1))
            time.sleep(self.pause)  # gives a test the time to interrupt the process

    def install(self) -> None:
        """Take the place of the library's own functions in this process."""
        for module, name, value in self.patches():
            setattr(module, name, value)

    def patches(self) -> list[tuple[ModuleType, str, Any]]:
        """What the command line asks the library for: where it is, its name, what stands for it."""
        return [
            (specstream_mlx, "load", self.load),
            (specstream_mlx, "stream_generate", self.stream_generate),
            (specstream_mlx, "DraftOptions", lambda **options: options),
            (specstream_mlx, "default_model_path", lambda: "bundled-model"),
            (bundled, "sample_prompt", lambda: "a sample question"),
        ]


def run(arguments: list[str], pause: float = 0.0, script: list[Any] | None = None) -> int:
    """Run the program on a fake library; the body of subprocess tests."""
    library = Library()
    library.pause = pause
    library.script = script or library.script
    library.install()
    from specstream_cli.app import main

    return main(arguments)
