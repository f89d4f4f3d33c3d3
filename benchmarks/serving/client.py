"""A server under test, and requests to it."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx


class Running:
    """A server in a process of its own, ready to answer."""

    def __init__(self, command: Sequence[str], url: str, ready: str = "/v1/models", seconds: float = 300.0) -> None:
        self.process = subprocess.Popen(list(command), stderr=subprocess.PIPE if url == "" else subprocess.DEVNULL)
        self.url = url
        if url == "":
            assert self.process.stderr is not None
            line = self.process.stderr.readline().decode()
            if not line.startswith("listening on "):
                self.process.kill()
                raise RuntimeError(f"the server did not start: {line}")
            self.url = line.split()[-1]
            return
        until = time.monotonic() + seconds
        while True:
            try:
                urllib.request.urlopen(self.url + ready, timeout=5).read()
                return
            except OSError:
                if time.monotonic() > until or self.process.poll() is not None:
                    self.process.kill()
                    raise
                time.sleep(0.5)

    def end(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def ours(*words: str) -> Running:
    """``specstream-mlx serve`` on a free port."""
    return Running([sys.executable, "-m", "specstream_mlx", "serve", "--port", "0", *words], "")


def stock(model: str, port: int = 18980, *words: str) -> Running:
    """``mlx_lm.server``."""
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", model, "--port", str(port), *words]
    return Running(command, f"http://127.0.0.1:{port}")


@dataclass(frozen=True)
class Timed:
    """One streamed answer."""

    text: str
    tokens: int
    first: float
    seconds: float


def timed(client: httpx.Client, url: str, body: dict[str, Any]) -> Timed:
    """Stream a completion and time it."""
    begin = time.perf_counter()
    first, text, tokens = 0.0, "", 0
    whole = body | {"stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", f"{url}/v1/completions", json=whole) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
            for choice in chunk["choices"]:
                if choice.get("text"):
                    first = first or time.perf_counter() - begin
                    text += choice["text"]
    return Timed(text, tokens, first, time.perf_counter() - begin)
