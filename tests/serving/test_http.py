"""The HTTP surface in process: every endpoint on the model that ships with the package, or on a tiny random one."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from specstream_mlx import load, stream_generate
from specstream_mlx.bundled import samples
from specstream_mlx.drafters.streams.parameters import Streams
from specstream_mlx.serving.app import Surface, make_app
from specstream_mlx.serving.jobs import SamplingWish
from specstream_mlx.serving.scheduler import Scheduler, ServerSettings
from tests.tiny import make_model, randomise, save_streams, stream_config

PROMPTS = [sample["prompt"] for sample in samples()[:4]]
NAME = "specstream-text-to-sql"


@pytest.fixture(scope="module")
def scheduler():
    found = Scheduler(ServerSettings(max_concurrency=4, cache_size=4))
    found.start()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def reference():
    """The bundled model and its tokenizer, as the library runs them."""
    return load()


def ask(scheduler: Scheduler, work: Any, **surface: Any) -> Any:
    """Run ``work(client)`` against the application."""

    @asynccontextmanager
    async def client() -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(make_app(scheduler, Surface(**surface)), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120) as found:
            yield found

    async def main() -> Any:
        async with client() as found:
            return await work(found)

    return asyncio.run(main())


def post(scheduler: Scheduler, path: str, body: Any, **surface: Any) -> httpx.Response:
    async def work(client: httpx.AsyncClient) -> httpx.Response:
        how = {"content": body} if isinstance(body, bytes) else {"json": body}
        return await client.post(path, **how)

    return ask(scheduler, work, **surface)


def get(scheduler: Scheduler, path: str, headers: Any = None, **surface: Any) -> httpx.Response:
    async def work(client: httpx.AsyncClient) -> httpx.Response:
        return await client.get(path, headers=headers)

    return ask(scheduler, work, **surface)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def text_of(reference: Any, prompt: str, **how: Any) -> str:
    model, tokenizer = reference
    return "".join(response.text for response in stream_generate(model, tokenizer, prompt, draft="off", **how))


def test_answers_at_once_are_those_of_plain_decoding(scheduler, reference):
    async def work(client):
        bodies = [{"prompt": prompt, "max_tokens": 40} for prompt in PROMPTS]
        return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))

    for prompt, response in zip(PROMPTS, ask(scheduler, work), strict=True):
        answer = response.json()
        assert answer["object"] == "text_completion"
        assert answer["choices"][0]["text"] == text_of(reference, prompt, max_tokens=40)
        assert answer["usage"]["tokens_per_pass"] >= 1


def test_chat_streams_what_it_answers_whole(scheduler, reference):
    body = {"messages": [{"role": "user", "content": PROMPTS[0]}], "max_tokens": 30}
    whole = post(scheduler, "/v1/chat/completions", body).json()
    choice = whole["choices"][0]
    assert choice["message"]["content"] == text_of(reference, PROMPTS[0], max_tokens=30)
    assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] + whole["usage"]["completion_tokens"]
    body |= {"stream": True, "stream_options": {"include_usage": True, "include_passes": True}}
    chunks = events(post(scheduler, "/v1/chat/completions", body))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert (
        "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
        == (choice["message"]["content"])
    )
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] == choice["finish_reason"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0  # of the first answer
    assert any(chunk.get("passes", {}).get("accepted") for chunk in chunks)


def test_a_seed_repeats_and_choices_differ(scheduler, reference):
    body = {"prompt": PROMPTS[1], "max_tokens": 12, "temperature": 4, "seed": 11, "n": 3}
    first, second = (post(scheduler, "/v1/completions", body).json() for _ in range(2))
    texts = [choice["text"] for choice in first["choices"]]
    assert texts == [choice["text"] for choice in second["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert len(set(texts)) > 1


def test_stop_is_of_the_text(scheduler, reference):
    text = text_of(reference, PROMPTS[0], max_tokens=30)
    stop = text[5:9]
    answer = post(scheduler, "/v1/completions", {"prompt": PROMPTS[0], "max_tokens": 30, "stop": stop}).json()
    assert answer["choices"][0]["text"] == text[: text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_logprobs_whole_and_streamed(scheduler):
    body = {"messages": [{"role": "user", "content": PROMPTS[0]}], "max_tokens": 8, "logprobs": True, "top_logprobs": 3}
    whole = post(scheduler, "/v1/chat/completions", body).json()
    content = whole["choices"][0]["logprobs"]["content"]
    assert len(content) == whole["usage"]["completion_tokens"]
    for entry in content:
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]  # greedy
        assert len(entry["top_logprobs"]) == 3
        assert entry["bytes"] == list(entry["token"].encode())
    chunks = events(post(scheduler, "/v1/chat/completions", body | {"stream": True}))
    streamed = [
        entry["id"] for c in chunks if c["choices"][0]["logprobs"] for entry in c["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == [entry["id"] for entry in content]
    answer = post(scheduler, "/v1/completions", {"prompt": PROMPTS[0], "max_tokens": 4, "logprobs": 2}).json()
    told = answer["choices"][0]["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["text_offset"]) == 4


def test_json_follows_a_schema(scheduler):
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["a", "b"]}, "sure": {"type": "boolean"}},
        "required": ["kind", "sure"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": [{"role": "user", "content": PROMPTS[0]}], "max_tokens": 60, "response_format": wanted}
    for more in ({}, {"temperature": 1.0, "seed": 3}):
        answer = post(scheduler, "/v1/chat/completions", body | more).json()
        found = json.loads(answer["choices"][0]["message"]["content"])
        assert found["kind"] in ("a", "b")
        assert isinstance(found["sure"], bool)
    bad = body | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}}
    response = post(scheduler, "/v1/chat/completions", bad)
    assert response.status_code == 400
    assert "schema" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"[]", None),
        (b'{"messages": NaN}', None),
        (b"\xff", None),
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x"}], "temperature": -1}, "temperature"),
        ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x"}], "n": 99}, "n"),
        ({"messages": [{"role": "user", "content": "x"}], "stop": [""]}, "stop"),
        ({"messages": [{"role": "user", "content": "x"}], "seed": "x"}, "seed"),
        ({"messages": [{"role": "user", "content": "x"}], "logit_bias": {"x": 1}}, "logit_bias"),
        ({"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}, "tool_choice"),
        ({"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "xml"}}, "response_format"),
        ({"messages": [{"role": "user", "content": "x"}], "draft": "often"}, "draft"),
        ({"messages": [{"role": "user", "content": "x"}], "logit_bias": {"99999999": 1}}, None),
        ({"messages": [{"role": "user", "content": ""}]}, None),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, None),
    ],
)
def test_bad_requests_are_refused_in_openais_shape(scheduler, body, param):
    response = post(scheduler, "/v1/chat/completions", body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert error["param"] == param


def test_unknown_places_and_methods(scheduler):
    for path in ("/v1/embeddings", "/etc/passwd", "/v1/models/none"):
        response = get(scheduler, path)
        assert response.status_code == 404
        assert response.json()["error"]["message"]
    assert get(scheduler, "/v1/chat/completions").status_code == 405
    body = {"model": "/etc", "messages": [{"role": "user", "content": "x"}]}
    response = post(scheduler, "/v1/chat/completions", body)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_models_health_metrics_and_the_page(scheduler):
    found = get(scheduler, "/v1/models").json()
    assert [entry["id"] for entry in found["data"]] == [NAME]
    assert get(scheduler, f"/v1/models/{NAME}").json()["id"] == NAME
    assert get(scheduler, "/health").json() == {"status": "ok"}
    metrics = get(scheduler, "/metrics").text
    assert "# TYPE specstream_generated_tokens_total counter" in metrics
    page = get(scheduler, "/")
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text
    assert "https://" not in page.text


def test_the_key_is_demanded(scheduler):
    assert get(scheduler, "/v1/models", api_key="secret").status_code == 401
    for headers in ({"authorization": "Bearer secret"}, {"x-api-key": "secret"}):
        assert get(scheduler, "/v1/models", headers, api_key="secret").status_code == 200
    assert get(scheduler, "/v1/models", {"authorization": "Bearer secre"}, api_key="secret").status_code == 401
    assert get(scheduler, "/health", api_key="secret").status_code == 200


def test_other_names_of_this_machine_are_refused(scheduler):
    assert get(scheduler, "/v1/models", {"host": "evil.example"}).status_code == 403
    assert get(scheduler, "/v1/models", {"host": "evil.example"}, local=False).status_code == 200


def test_origins_are_let_in_by_name(scheduler):
    headers = {"origin": "http://page.example"}
    assert "access-control-allow-origin" not in get(scheduler, "/health", headers).headers
    allowed = get(scheduler, "/health", headers, origins=("http://page.example",))
    assert allowed.headers["access-control-allow-origin"] == "http://page.example"


def test_large_bodies_are_refused(scheduler):
    body = {"messages": [{"role": "user", "content": "x" * 2000}]}
    assert post(scheduler, "/v1/chat/completions", body, most_bytes=1000).status_code == 413


def test_the_servers_defaults_hold_where_a_request_says_nothing(scheduler):
    body = {"prompt": PROMPTS[1], "seed": 5}
    how = {"defaults": SamplingWish(temperature=1.5), "max_tokens": 9}
    default = post(scheduler, "/v1/completions", body, **how).json()
    asked = post(scheduler, "/v1/completions", body | {"temperature": 1.5, "max_tokens": 9}).json()
    assert default["choices"] == asked["choices"]
    assert default["usage"]["completion_tokens"] <= 9


def test_messages_of_anthropics_form(scheduler, reference):
    text = text_of(reference, PROMPTS[0], max_tokens=30)
    body = {"model": NAME, "max_tokens": 30, "messages": [{"role": "user", "content": PROMPTS[0]}]}
    whole = post(scheduler, "/v1/messages", body).json()
    assert whole["content"] == [{"type": "text", "text": text}]
    assert whole["stop_reason"] in ("end_turn", "max_tokens")
    stopped = post(scheduler, "/v1/messages", body | {"stop_sequences": ["no such", text[5:9]]}).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", text[5:9])
    assert stopped["content"][0]["text"] == text[: text.index(text[5:9])]
    lines = post(scheduler, "/v1/messages", body | {"stream": True}).text.split("\n\n")
    named = [line.split("\n") for line in lines if line]
    data = [json.loads(second.removeprefix("data: ")) for _, second in named]
    assert [first.removeprefix("event: ") for first, _ in named] == [entry["type"] for entry in data]
    kinds = [entry["type"] for entry in data if entry["type"] != "ping"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    deltas = [entry["delta"]["text"] for entry in data if entry["type"] == "content_block_delta"]
    assert "".join(deltas) == text
    assert data[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    blocks = [
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "3"}]},
    ]
    tools = [{"name": "f", "input_schema": {"type": "object"}}]
    answer = post(scheduler, "/v1/messages", body | {"messages": blocks, "tools": tools, "system": "be brief"})
    assert answer.status_code == 200
    for change, word in (
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image"),
        ({"tools": [{"name": "f"}]}, "input_schema"),
        ({"tool_choice": {"type": "tool", "name": "g"}}, "tool_choice"),
    ):
        refused = post(scheduler, "/v1/messages", body | change)
        assert refused.status_code == 400
        assert refused.json()["type"] == "error"
        assert word in refused.json()["error"]["message"]


def test_adapters_are_models(tmp_path, reference):
    """A request names the adapter; answers of several adapters are made at once."""
    config = stream_config(num_stream_layers=3, prune=None)
    holder = make_model("llama")
    holder.stream_config, holder.streams = config, Streams(config, 192)
    randomise(holder.streams, 5, 0.02)
    save_streams(holder, tmp_path / "other")
    found = Scheduler(ServerSettings(adapters={"second": str(tmp_path / "other")}, cache_size=4))
    found.start()

    async def work(client):
        bodies = [
            {"model": name, "prompt": prompt, "max_tokens": 20} for prompt in PROMPTS[:2] for name in ("second", NAME)
        ]
        return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))

    try:
        assert [entry["id"] for entry in get(found, "/v1/models").json()["data"]] == ["second", NAME]
        answers = [response.json() for response in ask(found, work)]
        assert [answer["model"] for answer in answers] == ["second", NAME] * 2
        texts = [answer["choices"][0]["text"] for answer in answers]
        assert texts == [text_of(reference, prompt, max_tokens=20) for prompt in PROMPTS[:2] for _ in range(2)]
        assert max(found._batch.counts.history) > 2  # streams of both rode in one pass: their base is the same
    finally:
        found.stop()
