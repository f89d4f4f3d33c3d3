"""The HTTP surface: an ASGI application on Starlette, beside the thread that owns the model.

Nothing is read, fetched or run because a request says so. A request is refused, or ends, without another noticing.
"""

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from specstream_mlx.serving import body as bodies
from specstream_mlx.serving.answers import (
    ChatShape,
    Choice,
    CompletionShape,
    Shape,
    admitted,
    failure,
    failure_object,
)
from specstream_mlx.serving.body import BadRequest, Body
from specstream_mlx.serving.jobs import Admitted, Event, Failed, Job, Piece, Question, SamplingWish
from specstream_mlx.serving.messages import MessageShape, NamedEvent, as_chat, error_object
from specstream_mlx.serving.scheduler import Scheduler

_MESSAGES = "/v1/messages"
KEEP_ALIVE = 10.0  # seconds without a word in a stream
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]", "testserver")
_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


@dataclass(frozen=True)
class Surface:
    """How requests are taken.

    Attributes:
        api_key: demanded of every request but those for the page and the health; None: nobody is asked.
        local: the server is on loopback, and is addressed as such.
        origins: web pages of these origins may ask.
        most_bytes, read_seconds: of a body.
    """

    defaults: SamplingWish = field(default_factory=SamplingWish)
    max_tokens: int = 512
    api_key: str | None = None
    local: bool = True
    origins: tuple[str, ...] = ()
    most_bytes: int = 16 << 20
    read_seconds: float = 30.0


def make_app(scheduler: Scheduler, surface: Surface) -> Starlette:
    """The application; ``scheduler`` is started already, and stopped by whoever started it."""
    server = _Server(scheduler, surface)
    routes = [
        Route("/", server.page, methods=["GET"]),
        Route("/health", server.health, methods=["GET"]),
        Route("/metrics", server.metrics, methods=["GET"]),
        Route("/v1/models", server.models, methods=["GET"]),
        Route("/v1/models/{name:path}", server.model, methods=["GET"]),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route(_MESSAGES, server.messages, methods=["POST"]),
    ]
    middleware = [Middleware(_Gate, surface=surface)]
    if surface.origins:
        cors = Middleware(
            CORSMiddleware, allow_origins=list(surface.origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
        middleware.insert(0, cors)
    handlers: dict[Any, Callable[[Request, Any], Response]] = {
        BadRequest: lambda request, error: (
            JSONResponse(error_object(error), status_code=error.status)
            if request.url.path == _MESSAGES
            else _refuse(error)
        ),
        HTTPException: lambda request, error: _refuse(
            BadRequest(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code), error.headers
        ),
        Exception: lambda request, error: _refuse(BadRequest("an error of the server; see its log", status=500)),
    }
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


class _Gate:
    """Who may ask: whoever knows the key, at a name of this machine."""

    def __init__(self, app: ASGIApp, surface: Surface) -> None:
        self._app, self._surface = app, surface

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self._surface.local and name.lower() not in _LOCAL_NAMES:
            # A web page that points a name of its own at this machine would pass for it otherwise.
            error = BadRequest(f"host {host!r} is not a name of this machine; use localhost", status=403)
            await _refuse(error)(scope, receive, send)
            return
        key = self._surface.api_key
        if key is not None and scope["path"] not in ("/", "/health"):
            given = headers.get(b"authorization", b"")
            given = given[7:] if given[:7].lower() == b"bearer " else headers.get(b"x-api-key", b"")
            if not hmac.compare_digest(given, key.encode("utf-8")):
                error = BadRequest("the API key is missing or wrong", status=401, code="invalid_api_key")
                await _refuse(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _refuse(error: BadRequest, headers: Any = None) -> JSONResponse:
    return JSONResponse({"error": failure_object(error)}, status_code=error.status, headers=headers)


class _Server:
    """The endpoints."""

    def __init__(self, scheduler: Scheduler, surface: Surface) -> None:
        self._scheduler, self._surface = scheduler, surface
        self._started = int(time.time())

    async def page(self, request: Request) -> Response:
        """A chat in the browser."""
        text = resources.files("specstream_mlx.serving").joinpath("page.html").read_text("utf-8")
        return HTMLResponse(text, headers={"content-security-policy": _PAGE_POLICY})

    async def health(self, request: Request) -> Response:
        """Whether requests can be answered."""
        alive = self._scheduler.alive
        return JSONResponse({"status": "ok" if alive else "down"}, status_code=200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        """Counts for Prometheus."""
        return PlainTextResponse(self._scheduler.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """The model and its adapters."""
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self._scheduler.names]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        return JSONResponse(self._card(self._named(request.path_params["name"])))

    async def chat(self, request: Request) -> Response:
        """``/v1/chat/completions``."""
        body = await self._body(request)
        model = self._named(body.text("model"))
        questions = bodies.chat_questions(body, self._surface.defaults, self._surface.max_tokens, model)
        return await self._answer(request, body, questions, ChatShape)

    async def completions(self, request: Request) -> Response:
        """``/v1/completions``."""
        body = await self._body(request)
        model = self._named(body.text("model"))
        questions = bodies.completion_questions(body, self._surface.defaults, self._surface.max_tokens, model)
        return await self._answer(request, body, questions, CompletionShape)

    async def messages(self, request: Request) -> Response:
        """``/v1/messages``, Anthropic's."""
        body = as_chat(await self._body(request))
        model = self._named(body.text("model"))
        questions = bodies.chat_questions(body, self._surface.defaults, self._surface.max_tokens, model)
        shape = MessageShape(model)
        answers = Answers(self._scheduler, questions)
        try:
            choices = await answers.admitted()
            if not body.flag("stream"):
                await self._collect(request, answers, choices)
                return JSONResponse(shape.whole(choices[0]))
        except BaseException:
            answers.cancel()
            raise
        return _streamed(_named_lines(answers, shape.stream(choices[0], answers.events())))

    def _card(self, name: str) -> dict[str, Any]:
        card = {"id": name, "object": "model", "created": self._started, "owned_by": "specstream-mlx"}
        length = self._scheduler.context_length
        return card if length is None else card | {"context_length": length}

    def _named(self, name: str | None) -> str:
        """The model that a request names; none, or "default_model" as in mlx-lm: the first."""
        names = self._scheduler.names
        if name in (None, "", "default_model"):
            return names[0]
        if name not in names:
            known = ", ".join(map(repr, names))
            raise BadRequest(
                f"model {name!r} is not served here; there is {known}", "model", status=404, code="model_not_found"
            )
        return str(name)

    async def _body(self, request: Request) -> Body:
        """The body, of limited size and read in limited time."""
        most = self._surface.most_bytes
        too_large = BadRequest(f"the body has more than {most} bytes", status=413)
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise too_large
        data = bytearray()
        try:
            async with asyncio.timeout(self._surface.read_seconds):
                async for part in request.stream():
                    data += part
                    if len(data) > most:
                        raise too_large
        except TimeoutError:
            raise BadRequest("the body took too long to arrive", status=408) from None
        except ClientDisconnect:
            raise BadRequest("the client went away", status=400) from None
        return Body.parse(bytes(data))

    async def _answer(self, request: Request, body: Body, questions: Sequence[Question], kind: type[Shape]) -> Response:
        streaming = body.flag("stream")
        options = body.object("stream_options")
        shape = kind(questions[0].model, {} if options is None else options.values)
        answers = Answers(self._scheduler, questions)
        try:
            choices = await answers.admitted()
            if not streaming:
                return JSONResponse(shape.whole(await self._collect(request, answers, choices)))
        except BaseException:
            answers.cancel()
            raise
        return _streamed(_lines(answers, shape.stream(choices, answers.events())))

    async def _collect(self, request: Request, answers: "Answers", choices: list[Choice]) -> list[Choice]:
        """All of an answer, unless the client goes away first."""

        async def all_of_it() -> None:
            async for happened in answers.events():
                if happened is None:
                    continue
                index, event = happened
                if isinstance(event, Failed):
                    raise failure(event)
                if isinstance(event, Piece):
                    choices[index].add(event)

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.create_task(all_of_it()), asyncio.create_task(gone())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0] not in done:
                raise BadRequest("the client went away", status=400)
            tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return choices


def _streamed(lines: AsyncIterator[bytes]) -> StreamingResponse:
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(lines, media_type="text/event-stream", headers=headers)


async def _named_lines(answers: "Answers", events: AsyncIterator[NamedEvent]) -> AsyncIterator[bytes]:
    """Server-sent events with names; the answer ends when the client is gone."""
    try:
        async for name, data in events:
            yield f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
    finally:
        answers.cancel()


async def _lines(answers: "Answers", chunks: AsyncIterator[dict[str, Any] | str | None]) -> AsyncIterator[bytes]:
    """Server-sent events; the answers end when the client is gone."""
    try:
        async for chunk in chunks:
            if chunk is None:
                yield b"data: [DONE]\n\n"
            elif isinstance(chunk, str):
                yield f": {chunk}\n\n".encode()
            else:
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()
    finally:
        answers.cancel()


class Answers:
    """The answers to the questions of one request, as events in this event loop."""

    def __init__(self, scheduler: Scheduler, questions: Sequence[Question]) -> None:
        self._scheduler = scheduler
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._early: list[tuple[int, Event]] = []
        self._left = set(range(len(questions)))
        self.jobs = [Job(question, self._emitter(index)) for index, question in enumerate(questions)]
        for job in self.jobs:
            scheduler.submit(job)

    def _emitter(self, index: int) -> Callable[[Event], None]:
        def emit(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

        return emit

    async def admitted(self) -> list[Choice]:
        """The choices, once all questions can be answered.

        Raises:
            BadRequest: one of them cannot.
        """
        choices: dict[int, Choice] = {}
        while len(choices) < len(self.jobs):
            index, event = await self._queue.get()
            if isinstance(event, Failed):
                raise failure(event)
            if isinstance(event, Admitted):
                question = self.jobs[index].question
                splitter = None
                if question.prompt is None:
                    splitter = self._scheduler.splitter(reasoning=event.reasoning, tools=question.tools)
                choices[index] = Choice(splitter)
                admitted(choices[index], event)
            else:
                self._early.append((index, event))
        return [choices[index] for index in range(len(self.jobs))]

    async def events(self) -> AsyncIterator[tuple[int, Event] | None]:
        """What happens, by question, until all are answered or one has failed; None: nothing for a while."""
        while self._left:
            if self._early:
                index, event = self._early.pop(0)
            else:
                try:
                    index, event = await asyncio.wait_for(self._queue.get(), KEEP_ALIVE)
                except TimeoutError:
                    yield None
                    continue
            if isinstance(event, Failed) or (isinstance(event, Piece) and event.finish_reason is not None):
                self._left.discard(index)
            yield index, event
            if isinstance(event, Failed):
                return

    def cancel(self) -> None:
        """Nobody waits for the rest."""
        for job in self.jobs:
            job.cancel()
        self._scheduler.wake()
