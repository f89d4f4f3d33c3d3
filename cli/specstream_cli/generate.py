"""``specstream-mlx generate``: stream the answer to one prompt."""

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import typer

from specstream_cli.terminal import Answer, Progress, ReaderGone, answer, progress_bar, quieten_libraries, to_stderr
from specstream_cli.validation import any_repo_id, invalid_input, tree_spec, usage_error, utf8, utf8_each, within

DraftMode = Literal["auto", "tree", "chain", "off"]
Insertion = Literal["leaf", "deferred", "parallel"]


def generate(
    model: Annotated[
        str | None,
        typer.Option(help="MLX model directory or Hugging Face repository; default: the model shipped here."),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Directory with a stream adapter for this base (convert --adapter-only).")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            callback=utf8,
            help="The prompt; '-' reads standard input. Without --model a sample question is answered.",
        ),
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
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", callback=within(1), help="Most tokens to generate.")
    ] = 256,
    stop: Annotated[
        list[str] | None,
        typer.Option(callback=utf8_each, help="End the answer before this text; may be repeated."),
    ] = None,
    extra_eos_token: Annotated[
        list[str] | None,
        typer.Option(callback=utf8_each, help="A further end-of-text token, as text or id; may be repeated."),
    ] = None,
    temp: Annotated[float, typer.Option(callback=within(0), help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(callback=within(0, 1, above=True), help="Nucleus sampling; 1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(callback=within(0), help="Sample among the k likeliest; 0 is off.")] = 0,
    min_p: Annotated[
        float, typer.Option(callback=within(0, 1), help="Least probability relative to the likeliest token.")
    ] = 0.0,
    xtc_probability: Annotated[
        float, typer.Option(callback=within(0, 1), help="How often XTC removes the likeliest tokens.")
    ] = 0.0,
    xtc_threshold: Annotated[
        float, typer.Option(callback=within(0, 0.5), help="Probability from which XTC may remove a token.")
    ] = 0.1,
    seed: Annotated[
        int | None, typer.Option(callback=within(0, 2**64 - 1), help="Same seed, same text, whatever the draft.")
    ] = None,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No statistics on standard error.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")] = False,
) -> None:
    """Answer a prompt, printing the text as it is made."""
    _refuse_contradictions(draft, tree, insertion, prune_threshold)
    chat = _Chat.of(system_prompt, chat_template_config, ignore_chat_template)
    if model is not None and prompt is None:
        raise usage_error("--prompt: missing; --model needs a prompt ('-' reads standard input)")
    question = _read_prompt(prompt)
    quieten_libraries(offline=not any_repo_id({"--model": model, "--adapter": adapter}), debug=debug)
    with answer() as out:
        from specstream_mlx import DraftOptions, load, stream_generate

        if question is None:
            from specstream_mlx.bundled import sample_prompt

            question = sample_prompt()
            if not quiet:
                to_stderr(question)
        target, tokenizer = load(model, adapter=adapter)
        _add_eos_tokens(tokenizer, extra_eos_token or [])
        sampler = None
        if temp > 0:
            from mlx_lm.sample_utils import make_sampler

            special = [*tokenizer.encode("\n"), *tokenizer.eos_token_ids] if xtc_probability > 0 else []
            sampler = make_sampler(
                temp,
                top_p=top_p,
                min_p=min_p,
                top_k=top_k,
                xtc_probability=xtc_probability,
                xtc_threshold=xtc_threshold,
                xtc_special_tokens=special,
            )
        with progress_bar(quiet=quiet) as progress:
            responses = stream_generate(
                target,
                tokenizer,
                chat.apply(tokenizer, question),
                max_tokens=max_tokens,
                sampler=sampler,
                draft=draft,
                draft_options=DraftOptions(tree=tree, insertion=insertion, prune_threshold=prune_threshold),
                seed=seed,
                stop=tuple(stop or ()),
                prefill_step_size=prefill_step_size,
                prompt_progress_callback=_prompt_progress(progress, prefill_step_size),
            )
            first = next(iter(responses), None)
        if first is not None and first.draft.note:
            to_stderr(f"warning: {first.draft.note}")
        run = _Run(out, as_json)
        run.consume([first] if first is not None else [])
        run.consume(responses)
        run.finish()
    if not quiet and run.last is not None:
        to_stderr(statistics_line(run.last))


@dataclass
class _Run:
    """The answer so far. Ctrl-C keeps it: what was generated is on standard output before the exception goes on."""

    out: Answer
    as_json: bool
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    last: Any = None

    def consume(self, responses: Iterable[Any]) -> None:
        try:
            for response in responses:
                self.last = response
                self.texts.append(response.text)
                self.token_ids.extend(int(token) for token in response.tokens)
                if not self.as_json and response.text:
                    self.out.write(response.text)
        except ReaderGone:
            raise
        except BaseException:
            self.finish()
            raise

    def finish(self) -> None:
        if not self.as_json:
            self.out.write("\n" if self.last is not None else "")
        elif self.last is not None:
            self.out.write_json(to_json("".join(self.texts), self.token_ids, self.last))


@dataclass(frozen=True)
class _Chat:
    """How a question becomes the model's prompt."""

    system_prompt: str | None
    template_arguments: Mapping[str, Any]
    ignored: bool

    @classmethod
    def of(cls, system_prompt: str | None, config: str | None, ignored: bool) -> "_Chat":
        arguments: Any = {}
        if config is not None:
            try:
                arguments = json.loads(config)
            except (ValueError, RecursionError) as error:
                raise usage_error(f"--chat-template-config: not valid JSON ({error}); give an object") from None
            if not isinstance(arguments, dict):
                raise usage_error(f"--chat-template-config: got {config}, expected a JSON object")
        for option, value in (("--system-prompt", system_prompt), ("--chat-template-config", config)):
            if ignored and value is not None:
                raise usage_error(f"{option}: contradicts --ignore-chat-template; drop one")
        return cls(system_prompt, arguments, ignored)

    def apply(self, tokenizer: Any, question: str) -> str | list[int]:
        """The prompt as text, or as ids where the template has already written the special tokens.

        Raises:
            UsageError: an option needs a chat template and the tokenizer has none.
            InvalidInputError: the template refuses the messages.
        """
        if self.ignored or not tokenizer.has_chat_template:
            if self.system_prompt is not None or self.template_arguments:
                option = "--system-prompt" if self.system_prompt is not None else "--chat-template-config"
                raise usage_error(f"{option}: this tokenizer has no chat template; put everything into --prompt")
            return question
        messages = [{"role": "user", "content": question}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self.template_arguments
            )
        except Exception as error:  # the template is a program of the model's author and may raise anything
            reason = " ".join(str(error).split())
            raise invalid_input(f"chat template: refused the messages ({reason})") from error
        return list(tokenizer.encode(text, add_special_tokens=False))


def _prompt_progress(progress: Progress | None, step_size: int) -> Callable[[int, int], None] | None:
    """Show the prompt's progress where it takes more than one pass."""
    if progress is None:
        return None

    def report(done: int, total: int) -> None:
        if total > step_size:
            progress("prompt", done, total)

    return report


def _refuse_contradictions(
    draft: DraftMode, tree: str | None, insertion: Insertion | None, prune_threshold: float | None
) -> None:
    given = {"--tree": tree, "--insertion": insertion, "--prune-threshold": prune_threshold}
    useless = {"off": ("--tree", "--insertion", "--prune-threshold"), "chain": ("--tree", "--prune-threshold")}
    for option in useless.get(draft, ()):
        if given[option] is not None:
            raise usage_error(f"{option}: has no meaning with --draft {draft}; drop one")


def _read_prompt(prompt: str | None) -> str | None:
    """The text of ``--prompt``; ``-`` is standard input, taken as it is."""
    if prompt is None:
        return None
    if prompt != "-":
        text = prompt.replace("\\n", "\n").replace("\\t", "\t")  # as mlx-lm does
    elif sys.stdin is None:
        raise invalid_input("standard input is closed; pipe the prompt in, or give --prompt TEXT")
    else:
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise invalid_input(f"standard input: not valid UTF-8 (byte {error.start})") from None
        except OSError as error:
            raise invalid_input(f"standard input: cannot be read ({error.strerror})") from None
    if not text:
        raise invalid_input("the prompt is empty; give --prompt TEXT, or '-' and text on standard input")
    return text


def _add_eos_tokens(tokenizer: Any, tokens: list[str]) -> None:
    """Add end-of-text tokens given as text or id; those the tokenizer does not know are reported together."""
    if not tokens:
        return
    vocabulary = tokenizer.get_vocab()
    ids = set(vocabulary.values())
    unknown = [token for token in tokens if token not in vocabulary and not (token.isdecimal() and int(token) in ids)]
    if unknown:
        raise invalid_input(
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
        parts.append("accepted by depth " + " ".join(f"{accepted}/{drafted}" for accepted, drafted in pairs))
    gigabytes = last.peak_memory
    parts.append(f"peak {gigabytes:.2f} GB" if gigabytes >= 1 else f"peak {gigabytes * 1000:.0f} MB")
    return ", ".join(parts)
