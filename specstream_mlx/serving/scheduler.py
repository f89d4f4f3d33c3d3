"""The thread that owns the model: it takes requests, seats them in a batch, and tells each what was made.

Everything that touches the model, its tokenizer or a cache happens in this one thread, the loading included: MLX's
streams belong to threads.
"""

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from specstream_mlx.drafters.choice import choose_drafter
from specstream_mlx.engine.batch import Batch, Step
from specstream_mlx.engine.generate import new_session
from specstream_mlx.engine.sampling import LogitsProcessor
from specstream_mlx.engine.session import Session
from specstream_mlx.engine.text import Text
from specstream_mlx.engine.wired import wired
from specstream_mlx.errors import InvalidInputError, SpecStreamError, UnsupportedError, UsageError
from specstream_mlx.formats.prompts import prompt_ids
from specstream_mlx.models.identity import stored_calibration
from specstream_mlx.models.load import load
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.options import DraftMode, DraftOptions
from specstream_mlx.serving.conversation import Splitter, begins_in_reasoning, encode_messages
from specstream_mlx.serving.grammar import Grammars
from specstream_mlx.serving.jobs import Admitted, Failed, Job, Piece, Prefilled, Question, TokenLogprob
from specstream_mlx.serving.metrics import Metrics
from specstream_mlx.serving.prefixes import Prefixes

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerSettings:
    """What a server is started with.

    Attributes:
        adapters: directories or repositories by the name under which requests ask for them.
        draft_model: of the drafter "two-model".
        max_concurrency: most answers that are made at once; more wait.
        max_waiting: most requests that wait.
        cache_size, cache_bytes, cache_directory: of kept prompts.
        seconds: most that an answer may take.
    """

    model: str | None = None
    adapters: dict[str, str] = field(default_factory=dict)
    drafter: str | None = None
    draft_model: str | None = None
    num_draft_tokens: int | None = None
    draft: DraftMode = "auto"
    trust_remote_code: bool = False
    max_concurrency: int = 16
    max_waiting: int = 256
    prefill_step_size: int = 512
    cache_size: int = 16
    cache_bytes: int = 4 << 30
    cache_directory: Path | None = None
    chat_template: str | None = None
    seconds: float = 600.0


@dataclass(eq=False)
class _Running:
    """A job with its sequence."""

    job: Job
    session: Session
    adapter: str
    ids: list[int]
    rest: list[int]
    text: Text
    began: float
    generated: list[int] = field(default_factory=list)


class Scheduler:
    """Owns a thread, which owns the model.

    Attributes:
        names: what a request may name as its model; the first one answers a request that names none.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.names: list[str] = []
        self.context_length: int | None = None
        self._wake = threading.Condition()
        self._incoming: deque[Job] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="specstream-model", daemon=True)
        self._loaded: Future[None] = Future()
        self._ended = threading.Event()
        self._waiting: deque[_Running] = deque()
        self._running: dict[int, _Running] = {}

    def start(self) -> None:
        """Load the model, in the thread that will run it.

        Raises:
            SpecStreamError: as ``load`` and ``SpecStreamModel.load_adapter``.
        """
        self._thread.start()
        self._loaded.result()

    def submit(self, job: Job) -> None:
        """Take a job; from any thread. Its events come in the model's thread."""
        with self._wake:
            if self._stopping:
                job.emit(Failed("the server is shutting down", 503, "shutting_down"))
                return
            self._incoming.append(job)
            self._wake.notify()

    def wake(self) -> None:
        """Look for cancelled jobs now."""
        with self._wake:
            self._wake.notify()

    def splitter(self, *, reasoning: bool, tools: Sequence[Mapping[str, Any]] | None) -> Splitter:
        """What tells the parts of an answer apart; it asks the tokenizer for nothing but its marks and parsers."""
        return Splitter(self._tokenizer, reasoning=reasoning, tools=tools)

    def abandon(self) -> None:
        """End all answers with an error; from any thread. Prompts are kept as ever."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def stop(self) -> None:
        """End all answers, write what is to be kept, and end the thread."""
        self.abandon()
        if self._thread.is_alive() and self._loaded.done() and self._loaded.exception() is None:
            self._ended.wait()

    @property
    def alive(self) -> bool:
        """Whether requests can be answered."""
        return self._thread.is_alive() and self._loaded.done() and not self._stopping

    # From here on, everything is in the model's thread.

    def _run(self) -> None:
        try:
            self._load()
        except BaseException as error:
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(None)
        with wired(self._model):
            while self._serve():
                pass
        ended = Failed("the server is shutting down", 503, "shutting_down")
        for job in [*self._incoming, *(running.job for running in self._waiting)]:
            job.emit(ended)
        for running in list(self._running.values()):
            self._batch.remove(running.session)
            self._end(running, ended)
        while self._prefixes.save_one():
            pass
        for name in ("_batch", "_model", "_prefixes", "_how", "_grammars"):
            delattr(self, name)
        self._waiting.clear()
        gc.collect()
        self._ended.set()
        # MLX ends a stream of a thread when the thread ends; where the process ends at the same time, it aborts.
        threading.Event().wait()

    def _load(self) -> None:
        settings = self.settings
        config = {"chat_template": settings.chat_template} if settings.chat_template else {}
        self._model, self._tokenizer = load(
            settings.model, tokenizer_config=config, trust_remote_code=settings.trust_remote_code
        )
        own = settings.model or "specstream-text-to-sql"
        self._adapters: dict[str, str | None] = {own: self._model.adapter}
        for name, place in settings.adapters.items():
            if name in self._adapters:
                raise UsageError(f"adapter {name!r}: the name is taken; give another one as NAME=PLACE")
            self._adapters[name] = self._model.load_adapter(place, name)
        self.names = [*settings.adapters, own]
        second: SpecStreamModel | None = None
        if settings.draft_model is not None:
            second, _ = load(settings.draft_model, trust_remote_code=settings.trust_remote_code)
        self._how: dict[str, dict[str, Any]] = {name: self._drafting(name, second) for name in self.names}
        self.context_length = self._model.context_length
        self._grammars = Grammars(self._tokenizer, self._model.vocab_size)
        self._prefixes = Prefixes(
            own,
            size=settings.cache_size,
            num_bytes=settings.cache_bytes,
            directory=settings.cache_directory,
        )
        found = self._prefixes.load(self._model, self.names, self._use)
        if found:
            _LOG.info("%d kept prompts read from %s", found, settings.cache_directory)
        self._batch = Batch(self._model, prefill_step_size=settings.prefill_step_size)

    def _drafting(self, name: str, second: SpecStreamModel | None) -> dict[str, Any]:
        """How a model of this name drafts; the calibration is looked for once."""
        self._use(name)
        settings = self.settings
        own = self._model.drafter
        wanted = settings.drafter if settings.drafter != "streams" or own is not None else None
        drafter = choose_drafter(wanted, own, second, settings.num_draft_tokens)
        calibration = None
        if drafter is not None and settings.draft in ("auto", "tree"):
            try:
                calibration = stored_calibration(self._model, drafter)
            except InvalidInputError as error:
                _LOG.warning("%s; going on without it", error)
        return {
            "drafter": drafter if drafter is not None else "none",
            "draft": settings.draft if drafter is not None else "off",
            "draft_options": DraftOptions(calibration=calibration),
        }

    def _use(self, name: str) -> None:
        self._model.use_adapter(self._adapters[name])

    def _serve(self) -> bool:
        """One round; False once the server is to stop."""
        with self._wake:
            while not (self._incoming or self._waiting or self._running or self._stopping):
                if not self._prefixes.save_one():
                    self._wake.wait()
            if self._stopping:
                return False
            incoming = list(self._incoming)
            self._incoming.clear()
        for job in incoming:
            self._admit(job)
        self._drop_cancelled()
        while self._waiting and len(self._running) < self.settings.max_concurrency:
            self._seat(self._waiting.popleft())
        self.metrics.running, self.metrics.waiting = len(self._running), len(self._waiting)
        if self._running:
            try:
                steps = self._batch.step()
            except Exception as error:
                self._relieve(error)
                return True
            for step in steps:
                self._take(step)
            self.metrics.rounds = self._batch.counts.passes
        self.metrics.running = len(self._running)
        self.metrics.prefix_entries, self.metrics.prefix_bytes = len(self._prefixes), self._prefixes.num_bytes
        return True

    def _relieve(self, error: Exception) -> None:
        """A round failed as a whole, for want of memory most likely: end the youngest answer."""
        _LOG.exception("a round failed")
        youngest = max(self._running.values(), key=lambda running: running.began)
        self._batch.remove(youngest.session)
        reason = " ".join(str(error).split())[:300]
        self._end(youngest, Failed(f"the answer could not go on: {reason}"), keep=False)
        mx.clear_cache()

    def _admit(self, job: Job) -> None:
        """Make a sequence of a job, or refuse it."""
        if job.cancelled:
            self.metrics.requests["cancelled"] += 1
            return
        try:
            if len(self._waiting) >= self.settings.max_waiting:
                raise _Busy("too many requests are waiting; try again later")
            running = self._prepare(job)
        except _Busy as error:
            job.emit(Failed(str(error), 429, "rate_limit_exceeded"))
        except UnsupportedError as error:
            job.emit(Failed(str(error), 400, "unsupported"))
        except SpecStreamError as error:
            long = "the model's context holds" in str(error)
            job.emit(Failed(str(error), 400, "context_length_exceeded" if long else "invalid_request"))
        except Exception as error:
            _LOG.exception("a request could not be prepared")
            job.emit(Failed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
        else:
            self._waiting.append(running)
            return
        self.metrics.requests["refused"] += 1

    def _prepare(self, job: Job) -> _Running:
        question = job.question
        name = question.model
        self._use(name)
        ids = self._ids(question)
        cached, found = self._prefixes.take(name, ids)
        processors = self._processors(question, len(ids))
        how = dict(self._how[name])
        if question.draft is not None and how["draft"] != "off":
            how["draft"] = question.draft
        session, rest = new_session(
            self._model,
            self._tokenizer,
            ids[found:],
            max_tokens=question.max_tokens,
            sampler=self._sampler(question),
            logits_processors=processors,
            seed=question.seed,
            prompt_cache=cached,
            **how,
        )
        self.metrics.prompt_tokens += len(ids)
        self.metrics.cached_tokens += found
        reasoning = question.prompt is None and begins_in_reasoning(self._tokenizer, ids)
        job.emit(Admitted(len(ids), found, reasoning))
        text = Text(self._tokenizer, question.stop, session.max_tokens)
        return _Running(job, session, name, ids, rest, text, time.monotonic())

    def _ids(self, question: Question) -> list[int]:
        if question.prompt is None:
            ids = encode_messages(
                self._tokenizer,
                question.messages,
                tools=question.tools,
                template=question.template,
                continued=question.continued,
            )
            return prompt_ids(self._tokenizer, ids, self._model.vocab_size)
        return prompt_ids(self._tokenizer, question.prompt, self._model.vocab_size)

    def _sampler(self, question: Question) -> Any:
        wish = question.sampling
        if wish.temperature == 0:
            return None
        if wish.top_k >= self._model.vocab_size:
            raise InvalidInputError(f"top_k is {wish.top_k}, the vocabulary has {self._model.vocab_size} tokens")
        special: list[int] = []
        if wish.xtc_probability > 0:
            special = [*self._tokenizer.encode("\n"), *self._tokenizer.eos_token_ids]
        return make_sampler(
            wish.temperature,
            top_p=wish.top_p,
            min_p=wish.min_p,
            top_k=wish.top_k,
            xtc_probability=wish.xtc_probability,
            xtc_threshold=wish.xtc_threshold,
            xtc_special_tokens=special,
        )

    def _processors(self, question: Question, prompt_length: int) -> list[LogitsProcessor] | None:
        wish, found = question.sampling, []
        bias = dict(wish.logit_bias or {})
        outside = [token for token in bias if token >= self._model.vocab_size]
        if outside:
            raise InvalidInputError(f"logit_bias: the vocabulary has no token {outside[0]}")
        if bias or wish.repetition_penalty or wish.presence_penalty or wish.frequency_penalty:
            found += make_logits_processors(
                bias or None,
                wish.repetition_penalty,
                wish.repetition_context_size,
                wish.presence_penalty,
                wish.presence_context_size,
                wish.frequency_penalty,
                wish.frequency_context_size,
            )
        if question.schema is not None:
            found.append(self._grammars.json(question.schema, prompt_length))
        elif question.forced_tool is not None:
            found.append(self._grammars.call(question.tools or [], question.forced_tool, prompt_length))
        return found or None

    def _seat(self, running: _Running) -> None:
        def progress(done: int, total: int) -> None:
            running.job.emit(Prefilled(done, total))

        before = running.ids[: len(running.ids) - len(running.rest)]
        self._batch.add(running.session, running.rest, before=before, progress=progress)
        self._running[id(running.session)] = running

    def _drop_cancelled(self) -> None:
        now = time.monotonic()
        for running in list(self._running.values()):
            if running.job.cancelled or now - running.began > self.settings.seconds:
                self._batch.remove(running.session)
                late = Failed(f"the answer took more than {self.settings.seconds:g} seconds", 504, "timeout")
                self._end(running, None if running.job.cancelled else late)
        for running in [running for running in self._waiting if running.job.cancelled]:
            self._waiting.remove(running)
            self.metrics.requests["cancelled"] += 1

    def _take(self, step: Step) -> None:
        """Tell a job what a round gave it."""
        running = self._running.get(id(step.session))
        if running is None:
            return
        if step.error is not None:
            if not isinstance(step.error, SpecStreamError):
                _LOG.error("an answer failed", exc_info=step.error)
            reason = " ".join(str(step.error).split())[:300]
            self._end(running, Failed(f"the answer could not go on: {reason}"), keep=False)
            return
        if step.outcome is None:
            return
        outcome, session = step.outcome, step.session
        tokens, segment = running.text.take(outcome.tokens)
        running.generated += tokens
        finish = running.text.finish_reason
        if finish is None and step.ended:
            finish = "length"
        logprobs = []
        if running.job.question.top_logprobs is not None:
            logprobs = [
                self._logprob(token, outcome.drawn.logprobs(node), running.job.question.top_logprobs)
                for token, node in zip(tokens, outcome.accepted.nodes, strict=False)
            ]
        accepted = min(outcome.accepted.num_drafts, len(tokens))
        self.metrics.generated_tokens += len(tokens)
        self.metrics.target_passes += 1
        running.job.emit(
            Piece(
                segment,
                tokens,
                accepted,
                session.statistics.target_passes,
                running.text.num_tokens,
                finish,
                logprobs,
                running.text.stop_string,
            )
        )
        if finish is not None:
            if not step.ended:
                self._batch.remove(session)
            self._end(running, None)

    def _logprob(self, token: int, row: mx.array, count: int) -> TokenLogprob:
        top: list[int] = []
        if count:
            places = mx.argpartition(-row, kth=count - 1)[:count]
            top = places[mx.argsort(-row[places])].tolist()  # type: ignore[assignment]
        values: list[float] = row[mx.array([token, *top])].astype(mx.float32).tolist()  # type: ignore[assignment]
        values = [max(value, -9999.0) for value in values]
        names = [self._tokenizer.decode([place]) for place in (token, *top)]
        return TokenLogprob(token, names[0], values[0], tuple(zip(top, names[1:], values[1:], strict=True)))

    def _end(self, running: _Running, failed: Failed | None, *, keep: bool = True) -> None:
        """Forget a running job; its caches are kept for prompts that begin alike."""
        del self._running[id(running.session)]
        if failed is not None:
            running.job.emit(failed)
        outcome = "failed" if failed is not None else "cancelled" if running.job.cancelled else "answered"
        self.metrics.requests[outcome] += 1
        statistics = running.session.statistics
        self.metrics.count_depths(statistics.drafted_by_depth, statistics.accepted_by_depth)
        if keep:
            self._keep(running)

    def _keep(self, running: _Running) -> None:
        self._prefixes.keep(running.adapter, [*running.ids, *running.generated], running.session.caches)


class _Busy(Exception):
    """No place for another request."""
