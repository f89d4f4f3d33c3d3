"""``specstream-mlx chat``: turn after turn, keeping the cache of what the turns have in common."""

import contextlib
import select
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from specstream_cli.chat_template import chat_template, is_used
from specstream_cli.drafting import check_drafter, drafter_arguments
from specstream_cli.generate import (
    add_eos_tokens,
    generate,
    prompt_progress,
    refuse_contradictions,
    statistics_line,
    to_json,
)
from specstream_cli.options import of, place_of
from specstream_cli.sampling import ModelDefaults, Sampling
from specstream_cli.terminal import Answer, answer, progress_bar, quieten_libraries, to_stderr
from specstream_cli.validation import any_repo_id, unescaped, within
from specstream_mlx.errors import InvalidInputError
from specstream_mlx.formats.chat_template import ChatTemplate, Message, answer_message
from specstream_mlx.formats.prompts import prompt_ids, template_ids
from specstream_mlx.options import DrafterName, DraftMode, Insertion

QUOTE = '"""'
HELP = (
    "q: quit   r: reset, forgetting the conversation   h: help   Ctrl-C: stop the answer, or quit   "
    f"{QUOTE}...{QUOTE}: a question of several lines, or one that is a command"
)
PROMPT = "> "
MORE = ". "
PASTE_SECONDS = 0.05  # lines that arrive within it were pasted together


@of(generate)
def chat(
    context: typer.Context,
    model: str | None = None,
    adapter: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    system_prompt: str | None = None,
    chat_template_config: str | None = None,
    ignore_chat_template: bool = False,
    max_tokens: int = 256,
    stop: list[str] | None = None,
    extra_eos_token: list[str] | None = None,
    temp: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    min_tokens_to_keep: int = 1,
    xtc_probability: float = 0.0,
    xtc_threshold: float = 0.1,
    repetition_penalty: float = 0.0,
    repetition_context_size: int = 20,
    presence_penalty: float = 0.0,
    presence_context_size: int = 20,
    frequency_penalty: float = 0.0,
    frequency_context_size: int = 20,
    logit_bias: str | None = None,
    use_generation_config: ModelDefaults = False,
    seed: Annotated[
        int, typer.Option(callback=within(0, 2**64 - 1), help="Same seed and same questions, same answers.")
    ] = 0,
    drafter: DrafterName | None = None,
    draft_model: str | None = None,
    num_draft_tokens: int | None = None,
    draft: DraftMode = "auto",
    tree: str | None = None,
    insertion: Insertion | None = None,
    prune_threshold: float | None = None,
    prefill_step_size: int = 2048,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
    max_kv_size: int | None = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with all turns, at the end, instead of the text.")
    ] = False,
    quiet: bool = False,
    debug: bool = False,
) -> None:
    """Talk with a model; every line is a question. 'q' quits, 'r' forgets the conversation, 'h' helps.

    A question of several lines stands between triple quotes; lines that are pasted on a terminal are one question.
    """
    refuse_contradictions(draft, tree, insertion, prune_threshold, drafter)
    sampling = Sampling.of(locals())
    template = chat_template(system_prompt, chat_template_config, ignore_chat_template)
    places = {"--model": model, "--adapter": adapter, "--draft-model": draft_model}
    quieten_libraries(offline=not any_repo_id(places, revision), debug=debug)
    with answer() as out:
        check_drafter(drafter, draft_model, num_draft_tokens)
        import mlx.core as mx

        from specstream_mlx import DraftOptions, load

        target, tokenizer = load(model, adapter=adapter, **place_of(revision, trust_remote_code))
        add_eos_tokens(tokenizer, extra_eos_token or [])
        if use_generation_config:
            sampling = sampling.with_model_defaults(Path(tokenizer.name_or_path), context)
        sampling.check(target.args.vocab_size)
        mx.random.seed(seed)
        limits = {"kv_bits": kv_bits, "kv_group_size": kv_group_size, "quantized_kv_start": quantized_kv_start}
        options = drafter_arguments(target, drafter, draft_model, num_draft_tokens, trust_remote_code) | {
            "sampler": sampling.sampler(tokenizer),
            "logits_processors": sampling.logits_processors(),
            "draft": draft,
            "draft_options": DraftOptions(tree=tree, insertion=insertion, prune_threshold=prune_threshold),
            "stop": tuple(stop or ()),
            "prefill_step_size": prefill_step_size,
        }
        talk = Conversation(target, tokenizer, template, max_tokens, max_kv_size, options | limits)
        if not talk.has_template and not quiet:
            to_stderr("note: no chat template; turns are plain text, each behind the last, and \\n is a new line")
        try:
            _Session(talk, None if as_json else out, quiet).run()
        except KeyboardInterrupt:
            if as_json:
                out.write_json({"turns": talk.turns})
            raise
        if as_json:
            out.write_json({"turns": talk.turns})


class Stopped(Exception):
    """The user has had enough of this answer."""


@dataclass
class Conversation:
    """What was said, and the caches of as much of it as the next prompt begins with.

    Every turn renders the whole conversation anew, as the template wants it by now, and is answered as a prompt of
    its own would be. Only the part of it that the caches do not hold is run.
    """

    model: Any
    tokenizer: Any
    template: ChatTemplate
    max_tokens: int
    max_kv_size: int | None
    options: dict[str, Any]
    turns: list[dict[str, Any]] = field(default_factory=list)
    num_reused: int = 0  # tokens of the last prompt that were not run again

    def __post_init__(self) -> None:
        self.has_template = is_used(self.template, self.tokenizer)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        from specstream_mlx import PrefixCache

        self.messages: list[Message] = []
        self.kept = PrefixCache(self.model)

    def prompt(self, question: str) -> list[int]:
        """The ids of the whole conversation, ending with ``question``."""
        messages = [*self.messages, {"role": "user", "content": question}]
        if self.has_template:
            text = self.template.render(self.tokenizer, messages)
            return template_ids(self.tokenizer, text)
        ends = {"user": "", "assistant": "\n"}
        text = "".join(message["content"] + ends[message["role"]] for message in messages)
        return prompt_ids(self.tokenizer, text, self.model.args.vocab_size)

    def ask(self, question: str, progress: Any = None) -> Generator[Any, None, None]:
        """The responses to ``question``; however they end, the conversation holds what was answered.

        Raises:
            InvalidInputError: the conversation no longer fits into the model's context.
        """
        from specstream_mlx import PrefixCache, stream_generate

        if not self.has_template:
            question = unescaped(question)  # as the prompt of `generate`
        ids = self.prompt(question)
        limit: dict[str, Any] = {"prompt_cache": None, "max_kv_size": self.max_kv_size}
        rest = ids
        fits = self.max_kv_size is None or len(ids) + self.max_tokens <= self.max_kv_size
        if fits and not self.options["logits_processors"]:
            rest = self.kept.reuse(ids)
            limit = {"prompt_cache": self.kept.caches}
        else:  # rows that were overwritten cannot be had again; processors must see every token
            self.kept = PrefixCache(self.model)
        self.num_reused = len(ids) - len(rest)
        if not self.has_template:
            limit["continues_text"] = True  # the next turn's prompt is this one's and the answer in one text
        responses = stream_generate(
            self.model,
            self.tokenizer,
            rest,
            max_tokens=self.max_tokens,
            prompt_progress_callback=progress,
            **limit,
            **self.options,
        )
        text, tokens, last = "", [], None
        try:
            for response in responses:
                text += response.text
                tokens += [int(token) for token in response.tokens]
                if limit["prompt_cache"] is not None:
                    self.kept.tokens += response.tokens
                last = response
                yield response
        finally:
            responses.close()
            if last is not None:
                self.messages += [{"role": "user", "content": question}, answer_message(text)]
                reused = {"prompt": question, "reused_tokens": self.num_reused}
                self.turns.append(reused | to_json(text, tokens, last))


@dataclass
class _Session:
    """The dialogue on standard input and output; ``out`` is None when nothing is printed before the end."""

    talk: Conversation
    out: Answer | None
    quiet: bool

    def __post_init__(self) -> None:
        if sys.stdin is None:
            raise InvalidInputError("standard input is closed; questions are read from there, one a line")
        self.watched = sys.stdin.isatty()
        self.warned = False

    def run(self) -> None:
        """Answer line after line until there are no more."""
        if self.watched and not self.quiet:
            to_stderr(HELP)
        while (line := self._read()) is not None:
            if line.startswith(QUOTE):
                question = self._quoted(line.removeprefix(QUOTE))
                if question:
                    self._answer(question)
                continue
            if line == "q":
                return
            if line == "r":
                self.talk.reset()
                self._say("reset, the conversation is forgotten")
            elif line == "h":
                to_stderr(HELP)
            elif question := self._pasted(line):
                self._answer(question)

    def _quoted(self, first: str) -> str:
        """The question from behind its opening quotes to the closing ones, or to the end of the input."""
        lines = [first]
        while not lines[-1].rstrip().endswith(QUOTE):
            line = self._read(MORE)
            if line is None:
                return "\n".join(lines)
            lines.append(line)
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTE)
        return "\n".join(lines).strip("\n")

    def _pasted(self, line: str) -> str:
        """The line with those that were pasted along with it: on a terminal they are there already."""
        lines = [line]
        while self.watched and select.select([sys.stdin.fileno()], [], [], PASTE_SECONDS)[0]:
            more = self._read("")
            if more is None:
                break
            lines.append(more)
        return "\n".join(lines).strip("\n")

    def _say(self, line: str) -> None:
        if not self.quiet:
            to_stderr(line)

    def _read(self, prompt: str = PROMPT) -> str | None:
        """The next line, None at the end of the input."""
        if self.watched:
            sys.stderr.write(prompt)
            sys.stderr.flush()
        try:
            line = sys.stdin.buffer.readline()
            return line.decode("utf-8").rstrip("\r\n") if line else None
        except UnicodeDecodeError as error:
            raise InvalidInputError(f"standard input: not valid UTF-8 (byte {error.start} of the line)") from None
        except OSError as error:
            raise InvalidInputError(f"standard input: cannot be read ({error.strerror})") from None

    def _answer(self, question: str) -> None:

        last, stopped = None, False
        try:
            with (
                _stop_on_interrupt(enabled=self.watched) as check,
                contextlib.closing(self._responses(question, check)) as responses,
            ):
                for response in responses:
                    last = response
                    self._warn(last.draft.note)
                    if self.out is not None:
                        self.out.write(last.text)
                    check()
        except Stopped:
            stopped = True
        except InvalidInputError as error:
            if not self.watched or last is not None:
                raise
            to_stderr(f"error: {error} (r forgets the conversation)")
        finally:
            if last is not None and self.out is not None:
                self.out.write("\n")
        if stopped:
            self._say("stopped")
        if last is not None:
            known = f", {self.talk.num_reused} tokens known" if self.talk.num_reused else ""
            self._say(statistics_line(last) + known)

    def _responses(self, question: str, check: Callable[[], None]) -> Generator[Any, None, None]:
        """The responses of a turn, the prompt's progress shown until the first."""
        with progress_bar(quiet=self.quiet) as bar:
            report = prompt_progress(bar, self.talk.options["prefill_step_size"])

            def progress(done: int, total: int) -> None:
                check()
                if report is not None:
                    report(done, total)

            responses = self.talk.ask(question, progress)
            first = next(responses, None)
        with contextlib.closing(responses):
            yield from chain([] if first is None else [first], responses)

    def _warn(self, note: str | None) -> None:
        if note and not self.warned:
            to_stderr(f"warning: {note}")
            self.warned = True


@contextlib.contextmanager
def _stop_on_interrupt(*, enabled: bool) -> Iterator[Callable[[], None]]:
    """Ctrl-C within the block makes the next call of what is yielded raise `Stopped`; a second Ctrl-C quits.

    So an answer ends between two passes, where the caches are whole.
    """
    asked = False

    def note(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    def check() -> None:
        if asked:
            raise Stopped

    before = signal.getsignal(signal.SIGINT)
    enabled = enabled and before is not signal.SIG_IGN
    if enabled:
        try:
            signal.signal(signal.SIGINT, note)
        except ValueError:  # not the main thread
            enabled = False
    try:
        yield check
    finally:
        if enabled:
            signal.signal(signal.SIGINT, before)
