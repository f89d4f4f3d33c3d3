"""A running server and the clients that most people use: the packages of OpenAI and Anthropic."""

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from specstream_mlx import load, stream_generate
from specstream_mlx.bundled import samples

anthropic = pytest.importorskip("anthropic")
openai = pytest.importorskip("openai")

PROMPTS = [sample["prompt"] for sample in samples()[:6]]
NAME = "specstream-text-to-sql"
LONG = {"prompt": PROMPTS[0], "max_tokens": 5000, "logit_bias": {"2": -100}}  # does not end by itself


class Server:
    """A server in a process of its own, which says where it listens."""

    def __init__(self, *words: str) -> None:
        command = [sys.executable, "-m", "specstream_mlx", "serve", "--port", "0", *words]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        assert line.startswith("listening on http://127.0.0.1:"), line + self.process.stderr.read()
        self.url = line.split()[-1]

    def client(self, **how: Any) -> Any:
        how = {"api_key": "none", "max_retries": 0} | how
        return openai.OpenAI(base_url=f"{self.url}/v1", **how)

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"specstream_{name}"))

    def end(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def server(kept):
    found = Server("--prompt-cache-dir", str(kept))
    yield found
    if found.process.poll() is None:
        found.process.kill()
        found.process.communicate()


@pytest.fixture(scope="module")
def plain():
    model, tokenizer = load()

    def text(prompt: str, max_tokens: int) -> str:
        return "".join(r.text for r in stream_generate(model, tokenizer, prompt, max_tokens, draft="off"))

    return text


def test_clients_at_once_get_the_text_of_plain_decoding(server, plain):
    client = server.client()

    def ask(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return client.chat.completions.create(model=NAME, messages=messages, max_tokens=40).choices[0].message.content

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, PROMPTS))
    assert answers == [plain(prompt, 40) for prompt in PROMPTS]
    assert server.metric("tokens_per_pass") > 1


def test_streaming_with_usage_stop_seed_and_logprobs(server, plain):
    client = server.client()
    messages = [{"role": "user", "content": PROMPTS[0]}]
    stream = client.chat.completions.create(
        model=NAME, messages=messages, max_tokens=30, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == plain(PROMPTS[0], 30)
    assert chunks[-1].usage.completion_tokens <= 30
    stopped = client.chat.completions.create(model=NAME, messages=messages, max_tokens=30, stop=[text[4:8]])
    assert stopped.choices[0].message.content == text[: text.index(text[4:8])]
    sampled = [
        client.chat.completions.create(
            model=NAME, messages=messages, max_tokens=12, temperature=1, seed=11, logprobs=True, top_logprobs=2
        )
        for _ in range(2)
    ]
    assert sampled[0].choices[0].message.content == sampled[1].choices[0].message.content
    assert len(sampled[0].choices[0].logprobs.content) == sampled[0].usage.completion_tokens


def test_json_schema_and_models(server):
    client = server.client()
    assert [model.id for model in client.models.list()] == [NAME]
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    answer = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": PROMPTS[0]}],
        max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    assert isinstance(json.loads(answer.choices[0].message.content)["ok"], bool)


def test_anthropics_client(server, plain):
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    how = {"model": NAME, "max_tokens": 30, "messages": [{"role": "user", "content": PROMPTS[0]}]}
    text = plain(PROMPTS[0], 30)
    answer = client.messages.create(**how)
    assert "".join(block.text for block in answer.content) == text
    with client.messages.stream(**how) as stream:
        assert "".join(stream.text_stream) == text
        assert stream.get_final_message().usage.output_tokens == answer.usage.output_tokens
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(**how | {"max_tokens": 0})


def test_errors_are_the_clients_exceptions(server):
    client = server.client()
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model=NAME, prompt="x", temperature=-1)
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.completions.create(model="gpt-none", prompt="x")


def test_a_client_that_goes_away_ends_its_answer(server):
    cancelled = server.metric('requests_total{outcome="cancelled"}')
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | {"stream": True}) as response:
        next(response.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=2)
    until = time.monotonic() + 30
    while server.metric('requests_total{outcome="cancelled"}') < cancelled + 2 and time.monotonic() < until:
        time.sleep(0.1)
    assert server.metric('requests_total{outcome="cancelled"}') == cancelled + 2
    assert server.metric("running_requests") == 0


def test_a_running_answer_is_finished_and_prompts_outlive_the_server(server, kept):
    """The last test on this server: SIGTERM ends it, and another one finds its prompts."""
    with ThreadPoolExecutor(1) as pool:
        body = LONG | {"prompt": PROMPTS[5], "max_tokens": 120}
        future = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=60)
        while server.metric("running_requests") < 1 and not future.done():
            time.sleep(0.02)
        code, errors = server.end()
        assert future.result().status_code == 200
    assert (code, errors) == (0, "")
    files = sorted(kept.glob("*.safetensors"))
    assert files
    files[0].write_bytes(files[0].read_bytes()[:1000])  # damaged
    again = Server("--prompt-cache-dir", str(kept), "--log-level", "error")
    try:
        answer = httpx.post(f"{again.url}/v1/completions", json={"prompt": PROMPTS[5], "max_tokens": 5}, timeout=60)
        found = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        if len(files) > 1:
            assert found > 0
    finally:
        assert again.end() == (0, "")
