"""The program on a fake library, in this process."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_library import Library

from specstream_cli.app import main

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str


Run = Callable[..., Outcome]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    fake = Library()
    for module, name, value in fake.patches():
        monkeypatch.setattr(module, name, value)
    return fake


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def invoke(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = main(arguments)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return invoke


@pytest.fixture
def child() -> Callable[..., "subprocess.Popen[bytes]"]:
    """Start Python code in a process of its own, with this checkout and the fake library importable."""
    paths = [ROOT, ROOT / "convert", ROOT / "cli", Path(__file__).parent]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONWARNINGS": ""}

    def start(code: str, *arguments: str, **options: object) -> "subprocess.Popen[bytes]":
        defaults = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.Popen(command, env=environment, **(defaults | options))  # type: ignore[call-overload,no-any-return]

    return start
