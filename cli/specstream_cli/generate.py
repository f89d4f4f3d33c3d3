"""``specstream-mlx generate``: stream the answer to one prompt, or to those of a file."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from specstream_cli.batch import SEPARATOR, Batch, totals, totals_line
from specstream_cli.chat_template import ask, chat_template
from specstream_cli.drafting import ChosenDrafter, DraftModel, NumDraftTokens, check_drafter, drafter_arguments
from specstream_cli.exact import ExactCheck
from specstream_cli.options import Adapter, Revision, TrustRemoteCode, place_of
from specstream_cli.passes import Decode, Pass, PassLines, is_coloured, legend
from specstream_cli.sampling import (
    ContextSize,
    FrequencyPenalty,
    LogitBias,
    MinP,
    MinTokensToKeep,
    ModelDefaults,
    PresencePenalty,
    RepetitionPenalty,
    Sampling,
    Seed,
    Temp,
    TopK,
    TopP,
    XtcProbability,
    XtcThreshold,
)
from specstream_cli.terminal import (
    Answer,
    Progress,
    ReaderGone,
    answer,
    is_terminal,
    progress_bar,
    quieten_libraries,
    to_stderr,
)
from specstream_cli.validation import any_repo_id, tree_spec, unescaped, unescaped_each, utf8, utf8_each, within
from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.options import DrafterName, DraftMode, Insertion


def generate(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(help="MLX model directory or Hugging Face repository; default: the model shipped here."),
    ] = None,
    adapter: Adapter = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            callback=utf8,
            help="The prompt; '-' reads standard input. Without --model a sample question is answered.",
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(help="Answer the prompts of a file in turn: JSON lines with a 'prompt' or 'messages', or text."),
    ] = None,
    system_prompt: Annotated[
        str | None, typer.Option(callback=utf8, help="System message of the chat template.")
    ] = None,
    chat_template_config: Annotated[
        str | None, typer.Option(metavar="JSON", help="Further arguments of the chat template, a JSON object.")
    ] = None,
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Give the model the raw prompt.")
    ] = False,
    prefill_response: Annotated[
        str | None, typer.Option(callback=utf8, help="Beginning of the answer, which the model goes on with.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", callback=within(1), help="Most tokens to generate.")
    ] = 256,
    stop: Annotated[
        list[str] | None,
        typer.Option(callback=unescaped_each, help=r"End the answer before this text, \n a new line; may be repeated."),
    ] = None,
    extra_eos_token: Annotated[
        list[str] | None,
        typer.Option(callback=utf8_each, help="A further end-of-text token, as text or id; may be repeated."),
    ] = None,
    temp: Temp = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    min_tokens_to_keep: MinTokensToKeep = 1,
    xtc_probability: XtcProbability = 0.0,
    xtc_threshold: XtcThreshold = 0.1,
    repetition_penalty: RepetitionPenalty = 0.0,
    repetition_context_size: ContextSize = 20,
    presence_penalty: PresencePenalty = 0.0,
    presence_context_size: ContextSize = 20,
    frequency_penalty: FrequencyPenalty = 0.0,
    frequency_context_size: ContextSize = 20,
    logit_bias: LogitBias = None,
    use_generation_config: ModelDefaults = False,
    seed: Seed = None,
    drafter: ChosenDrafter = None,
    draft_model: DraftModel = None,
    num_draft_tokens: NumDraftTokens = None,
    draft: Annotated[
        DraftMode,
        typer.Option(help="How to draft; every choice gives the same tokens. 'off' decodes plainly."),
    ] = "auto",
    tree: Annotated[
        str | None,
        typer.Option(
            callback=tree_spec, metavar="SPEC", help="Draft tree: chain:4, cartesian:2x2x1x1 or best-first:8."
        ),
    ] = None,
    insertion: Annotated[
        Insertion | None,
        typer.Option(
            help="Run streams along with the tree, those of its likeliest end (leaf) or of every node (parallel), "
            "or once the node is known (deferred)."
        ),
    ] = None,
    prune_threshold: Annotated[
        float | None,
        typer.Option(callback=within(0, 1), help="Drop drafted tokens that the early exit finds less likely."),
    ] = None,
    prefill_step_size: Annotated[
        int, typer.Option(callback=within(1), help="Prompt tokens per prefill pass; less needs less memory.")
    ] = 2048,
    kv_bits: Annotated[
        int | None, typer.Option(help="Quantise the key-value cache to so many bits: 2, 3, 4, 5, 6 or 8.")
    ] = None,
    kv_group_size: Annotated[int, typer.Option(help="Numbers that share a scale in the quantised cache.")] = 64,
    quantized_kv_start: Annotated[
        int, typer.Option(callback=within(0), help="With --kv-bits, tokens after which the cache is quantised.")
    ] = 5000,
    max_kv_size: Annotated[
        int | None,
        typer.Option(callback=within(5), help="Most tokens in the cache; a longer text forgets all but the first 4."),
    ] = None,
    prompt_cache_file: Annotated[
        str | None, typer.Option(help="Go on from a prompt cache of cache_prompt or mlx-lm; --prompt is what follows.")
    ] = None,
    show_passes: Annotated[
        bool,
        typer.Option(
            "--show-passes", help="Also print each pass as a line: drafts accepted and rejected, and the certain token."
        ),
    ] = False,
    check_exact: Annotated[
        bool,
        typer.Option("--check-exact", help="Compare with plain decoding by mlx-lm; exit code 5 beyond rounding."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No statistics on standard error.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")] = False,
) -> None:
    """Answer a prompt, printing the text as it is made."""
    refuse_contradictions(draft, tree, insertion, prune_threshold, drafter)
    if show_passes and quiet and not as_json:
        raise UsageError("--show-passes: contradicts --quiet, which leaves nothing to show; drop one, or add --json")
    sampling = Sampling.of(locals())
    chat = chat_template(system_prompt, chat_template_config, ignore_chat_template, prefill_response)
    if prompts_file is not None and prompt is not None:
        raise UsageError("--prompts-file: contradicts --prompt; drop one")
    if prompt is None and prompts_file is None and (model is not None or prompt_cache_file is not None):
        option = "--model" if model is not None else "--prompt-cache-file"
        raise UsageError(f"--prompt: missing; {option} needs a prompt ('-' reads standard input)")
    if prompt_cache_file is not None and (prompts_file is not None or check_exact):
        option = "--prompts-file" if prompts_file is not None else "--check-exact"
        raise UsageError(f"--prompt-cache-file: an answer uses the cache up, which {option} cannot do; drop one")
    if check_exact and (temp > 0 or use_generation_config) and seed is None:
        raise UsageError("--check-exact: sampled text can be compared for the same seed only; give --seed")
    question = None if prompt is None else read_prompt(prompt)
    places = {"--model": model, "--adapter": adapter, "--draft-model": draft_model}
    quieten_libraries(offline=not any_repo_id(places, revision), debug=debug)
    with answer() as out:
        check_drafter(drafter, draft_model, num_draft_tokens)
        from specstream_mlx import DraftOptions, load, stream_generate

        batch = None if prompts_file is None else Batch.read(prompts_file)
        if question is None and batch is None:
            from specstream_mlx.bundled import sample_prompt

            question = sample_prompt()
            if not quiet:
                to_stderr(question)
        caches = None
        place = place_of(revision, trust_remote_code)
        if prompt_cache_file is None:
            target, tokenizer = load(model, adapter=adapter, **place)
        else:
            from specstream_mlx.target.prompt_cache import load_prompt_cache, model_of, revision_of

            cache_file = Path(prompt_cache_file).expanduser()
            named = model_of(cache_file, model)
            place = place_of(revision_of(cache_file, revision), trust_remote_code)
            target, tokenizer = load(named, adapter=adapter, **place)
            if system_prompt is not None:
                to_stderr("note: --system-prompt has no effect: the prompt cache holds what comes before the question")
            caches = load_prompt_cache(cache_file, target)
        add_eos_tokens(tokenizer, extra_eos_token or [])
        if use_generation_config:
            sampling = sampling.with_model_defaults(Path(tokenizer.name_or_path), context)
        sampling.check(target.args.vocab_size)
        how: dict[str, Any] = {
            "sampler": sampling.sampler(tokenizer),
            "logits_processors": sampling.logits_processors(),
            "seed": seed,
            "prefill_step_size": prefill_step_size,
            "kv_bits": kv_bits,
            "kv_group_size": kv_group_size,
            "quantized_kv_start": quantized_kv_start,
            "max_kv_size": max_kv_size,
        }
        drafting = drafter_arguments(target, drafter, draft_model, num_draft_tokens, trust_remote_code)
        continued: dict[str, Any] = {} if prefill_response is None else {"continues_text": True}
        check = ExactCheck(target, model, adapter, how, revision) if check_exact else None

        def start(prompt: str | list[int], progress: Progress | None) -> Iterator[Any]:
            return iter(
                stream_generate(
                    target,
                    tokenizer,
                    prompt,
                    max_tokens=max_tokens,
                    draft=draft,
                    draft_options=DraftOptions(tree=tree, insertion=insertion, prune_threshold=prune_threshold),
                    stop=tuple(stop or ()),
                    prompt_progress_callback=prompt_progress(progress, prefill_step_size),
                    prompt_cache=caches,
                    **drafting,
                    **how,
                    **continued,
                )
            )

        session = _Session(out, as_json, quiet, tokenizer, start, check, show_passes)
        if batch is not None:
            statistics = session.answer_batch(batch, batch.encode(target, tokenizer, chat))
        else:
            assert question is not None
            statistics = session.answer_prompt(ask(chat, tokenizer, question, cached=caches is not None))
    if not quiet:
        to_stderr(statistics)
    if check is not None:
        check.finish(quiet=quiet)


@dataclass(frozen=True)
class _Session:
    """Answers with one model and one set of flags, on their way to standard output."""

    out: Answer
    as_json: bool
    quiet: bool
    tokenizer: Any
    start: Callable[[str | list[int], Progress | None], Iterator[Any]]
    check: ExactCheck | None
    show_passes: bool

    def run(self, name: str = "") -> "_Run":
        """An answer to begin; ``name`` is said before its passes."""
        out = None if self.as_json else self.out
        if not self.show_passes:
            return _Run(out)
        drawn = None if self.quiet else _Drawn(self.tokenizer.decode, name, is_coloured(sys.stderr))
        # Text and passes on one terminal would stand in one line, so the text follows there.
        held = drawn is not None and is_terminal() and self.out.stream.isatty()
        return _Run(out, passes=[], drawn=drawn, held=held)

    def answer_prompt(self, prompt: str | list[int]) -> str:
        """Answer one prompt; the line of statistics."""
        run = self.run()
        with progress_bar(quiet=self.quiet) as progress:
            responses = self.start(prompt, progress)
            first = next(responses)
        if first.draft.note:
            to_stderr(f"warning: {first.draft.note}")
        with _keeping(run.end_line if not self.as_json else lambda: self.out.write_json(run.document())):
            self._consume(run, prompt, chain([first], responses))
        return statistics_line(run.last)

    def answer_batch(self, batch: Batch, encoded: list[list[int]]) -> str:
        """Answer the prompts of a file in turn; the line of statistics."""
        answers: list[dict[str, Any]] = []

        def finish() -> None:
            if self.as_json:
                self.out.write_json({"answers": answers} | totals(answers))

        # A bar and a text on one terminal would overwrite each other.
        hidden = self.quiet or (not self.as_json and self.out.stream.isatty())
        with _keeping(finish), progress_bar(quiet=hidden) as progress:
            for index, (prompt, ids) in enumerate(zip(batch.prompts, encoded, strict=True)):
                if index and not self.as_json:
                    self.out.write(f"{SEPARATOR}\n")
                run = self.run(prompt.place)

                def keep(run: _Run = run, asked: Any = prompt.asked) -> None:
                    run.end_line()
                    if run.last is not None:
                        answers.append({"prompt": asked} | run.document())

                with _keeping(keep):
                    self._consume(run, ids, self.start(ids, None), f"{prompt.place}: ")
                if progress is not None:
                    progress("prompts", index + 1, len(encoded))
        return totals_line(answers)

    def _consume(self, run: "_Run", prompt: str | list[int], responses: Iterable[Any], name: str = "") -> None:
        run.consume(responses)
        if self.check is not None:
            run.exact = self.check.compare(self.tokenizer, prompt, run.token_ids, name)


@contextlib.contextmanager
def _keeping(finish: Callable[[], None]) -> Iterator[None]:
    """Run ``finish`` in the end. Ctrl-C and errors keep the answer: what was generated is on standard output then."""
    try:
        yield
    except ReaderGone:
        raise
    except BaseException:
        finish()
        raise
    finish()


class _Drawn:
    """The passes of an answer as lines on standard error."""

    def __init__(self, decode: Decode, name: str, coloured: bool) -> None:
        self._lines = PassLines(decode, coloured=coloured)
        to_stderr(f"{name + ': ' if name else ''}passes: {legend(coloured=coloured)}")

    def add(self, one: Pass) -> None:
        """Draw the next pass."""
        to_stderr(self._lines.line(one))


@dataclass
class _Run:
    """One answer so far, printed as it is made where ``out`` is given, or at the end where it is ``held``.

    ``passes``: kept for ``--json`` where they are asked for.
    """

    out: Answer | None
    passes: list[Pass] | None = None
    drawn: _Drawn | None = None
    held: bool = False
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    last: Any = None
    exact: dict[str, Any] | None = None

    def consume(self, responses: Iterable[Any]) -> None:
        for response in responses:
            self.last = response
            self.texts.append(response.text)
            self.token_ids.extend(int(token) for token in response.tokens)
            if self.out is not None and response.text and not self.held:
                self.out.write(response.text)
            if self.passes is not None:
                one = Pass.of(response)
                self.passes.append(one)
                if self.drawn is not None:
                    self.drawn.add(one)

    def end_line(self) -> None:
        if self.out is not None and self.last is not None:
            self.out.write("".join(self.texts) + "\n" if self.held else "\n")

    def document(self) -> dict[str, Any]:
        found = to_json("".join(self.texts), self.token_ids, self.last)
        if self.passes is not None:
            found["passes"] = [one.to_json() for one in self.passes]
        return found if self.exact is None else found | {"exact": self.exact}


def prompt_progress(progress: Progress | None, step_size: int) -> Callable[[int, int], None] | None:
    """Show the prompt's progress where it takes more than one pass."""
    if progress is None:
        return None

    def report(done: int, total: int) -> None:
        if total > step_size:
            progress("prompt", done, total)

    return report


def refuse_contradictions(
    draft: DraftMode,
    tree: str | None,
    insertion: Insertion | None,
    prune_threshold: float | None,
    drafter: DrafterName | None = None,
) -> None:
    given = {"--tree": tree, "--insertion": insertion, "--prune-threshold": prune_threshold}
    nothing = ("--tree", "--insertion", "--prune-threshold")
    useless = {"--draft off": nothing, "--draft chain": ("--tree", "--prune-threshold"), "--drafter none": nothing}
    for choice in (f"--draft {draft}", f"--drafter {drafter}"):
        for option in useless.get(choice, ()):
            if given[option] is not None:
                raise UsageError(f"{option}: has no meaning with {choice}; drop one")
    if drafter == "none" and draft in ("tree", "chain"):
        raise UsageError(f"--draft {draft}: has no meaning with --drafter none; drop one")


def read_prompt(prompt: str) -> str:
    """The text of ``--prompt``; ``-`` is standard input, taken as it is."""
    if prompt != "-":
        text = unescaped(prompt)
    elif sys.stdin is None:
        raise InvalidInputError("standard input is closed; pipe the prompt in, or give --prompt TEXT")
    else:
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidInputError(f"standard input: not valid UTF-8 (byte {error.start})") from None
        except OSError as error:
            raise InvalidInputError(f"standard input: cannot be read ({error.strerror})") from None
    if not text:
        raise InvalidInputError("the prompt is empty; give --prompt TEXT, or '-' and text on standard input")
    return text


def add_eos_tokens(tokenizer: Any, tokens: list[str]) -> None:
    """Add end-of-text tokens given as text or id; those the tokenizer does not know are reported together."""
    if not tokens:
        return
    vocabulary = tokenizer.get_vocab()
    ids = set(vocabulary.values())
    unknown = [token for token in tokens if token not in vocabulary and not (token.isdecimal() and int(token) in ids)]
    if unknown:
        raise InvalidInputError(
            "\n".join(f"--extra-eos-token: {token!r} is not a token of this tokenizer" for token in unknown)
        )
    for token in tokens:
        tokenizer.add_eos_token(token if token.isdecimal() else str(vocabulary[token]))


def to_json(text: str, token_ids: list[int], last: Any) -> dict[str, Any]:
    """The object of ``--json``; ``last`` is the last response, whose counters are running totals."""
    return {
        "text": text,
        "token_ids": token_ids,
        "finish_reason": last.finish_reason,
        "prompt_tokens": last.prompt_tokens,
        "generation_tokens": last.generation_tokens,
        "target_passes": last.target_passes,
        "stream_passes": last.stream_passes,
        "tokens_per_pass": _finite(last.tokens_per_pass),
        "drafted_by_depth": list(last.drafted_by_depth),
        "accepted_by_depth": list(last.accepted_by_depth),
        "prompt_tps": _finite(last.prompt_tps),
        "generation_tps": _finite(last.generation_tps),
        "peak_memory_gb": _finite(last.peak_memory),
        "draft": {
            "drafter": last.draft.drafter,
            "mode": last.draft.mode,
            "gamma": last.draft.gamma,
            "nodes": last.draft.nodes,
            "insertion": last.draft.insertion,
            "plan": last.draft.plan,
        },
    }


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def statistics_line(last: Any) -> str:
    """One line for people, from the last response."""
    passes = "pass" if last.target_passes == 1 else "passes"
    parts = [
        f"{last.generation_tokens} tokens in {last.target_passes} {passes} ({last.tokens_per_pass:.2f} per pass)",
        f"{_finite(last.generation_tps):.1f} tok/s",
        f"prompt {last.prompt_tokens} at {_finite(last.prompt_tps):.1f} tok/s",
    ]
    if any(last.drafted_by_depth):
        pairs = zip(last.accepted_by_depth, last.drafted_by_depth, strict=True)
        rates = [f"{accepted}/{drafted}" for accepted, drafted in pairs if drafted]
        parts.append("accepted by depth " + " ".join(rates))
    gigabytes = last.peak_memory
    parts.append(f"peak {gigabytes:.2f} GB" if gigabytes >= 1 else f"peak {gigabytes * 1000:.0f} MB")
    return ", ".join(parts)
