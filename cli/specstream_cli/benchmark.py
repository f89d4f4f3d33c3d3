"""``specstream-mlx benchmark``: stock mlx-lm and ours on the same weights, prompt by prompt in turn."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from specstream_cli.arms import (
    BASELINE,
    DRAFT_MODEL,
    LOOKUP,
    Arm,
    Workload,
    differences,
    judge,
    measure,
    row,
    stock_arm,
    stream_arm,
    warm_up,
)
from specstream_cli.costs import cost_lines, cost_table
from specstream_cli.options import Revision, TrustRemoteCode
from specstream_cli.plots import check_plot, draw
from specstream_cli.quality import quality
from specstream_cli.tables import table
from specstream_cli.terminal import Progress, answer, progress_bar, quieten_libraries, to_stderr
from specstream_cli.validation import any_repo_id, tree_spec, within
from specstream_mlx.errors import InvalidInputError, UsageError, VerificationError
from specstream_mlx.options import Insertion

DRAFT_MODES = ("auto", "tree", "chain", "off")
MOST_LINES = 8
REFERENCES = ("answer", "reference", "completion", "target")


def _draft_modes(values: list[str] | None) -> list[str] | None:
    for value in values or []:
        if value not in DRAFT_MODES:
            raise typer.BadParameter(f"got {value!r}, expected one of {', '.join(DRAFT_MODES)}")
    return values


def benchmark(
    model: Annotated[
        str | None,
        typer.Option(help="MLX model directory or Hugging Face repository; default: the model shipped here."),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            "--adapter-path",
            help="Directory with an adapter for this base; mlx-lm runs the base, or its fine-tune by a LoRA.",
        ),
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    prompts_file: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSON lines with a 'prompt' each and, for quality, an 'answer'; one file per task, may be repeated. "
            "Default: samples.jsonl of the model."
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(callback=within(1), help="Prompts of each file to use.")] = 12,
    repeats: Annotated[int, typer.Option(callback=within(1), help="Timed rounds.")] = 5,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", callback=within(1), help="Most tokens per answer.")
    ] = 128,
    context: Annotated[
        list[int] | None,
        typer.Option(
            help="Also measure with the prompts at this length, filled up with text of the file; may be repeated."
        ),
    ] = None,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            callback=_draft_modes,
            help="An arm of ours: auto, tree, chain or off; may be repeated. Default: auto and off.",
        ),
    ] = None,
    tree: Annotated[
        str | None, typer.Option(callback=tree_spec, metavar="SPEC", help="Tree of the tree and auto arms.")
    ] = None,
    insertion: Annotated[Insertion | None, typer.Option(help="How streams run: leaf, deferred or parallel.")] = None,
    draft_model: Annotated[
        str | None, typer.Option(help="A second, smaller model: mlx-lm's own speculative decoding as an arm.")
    ] = None,
    num_draft_tokens: Annotated[
        int, typer.Option(callback=within(1), help="Tokens that the draft model or prompt lookup drafts.")
    ] = 4,
    prompt_lookup: Annotated[
        bool, typer.Option("--prompt-lookup", help="Drafting from earlier text, without streams, as an arm.")
    ] = False,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after end-of-text, up to --max-tokens.")
    ] = False,
    noise_streams: Annotated[
        bool, typer.Option("--noise-streams", help="Replace the streams by noise: the worst that drafting can meet.")
    ] = False,
    allow_differences: Annotated[
        bool,
        typer.Option("--allow-differences", help="Give figures although ties within rounding swapped some tokens."),
    ] = False,
    costs: Annotated[bool, typer.Option("--costs", help="Also time passes by rows.")] = False,
    random_weights: Annotated[
        str | None,
        typer.Option(metavar="SHAPE", help="Time passes of a model of this shape with random weights, nothing else."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Type of random weights: float32, float16 or bfloat16.")] = None,
    q_bits: Annotated[int | None, typer.Option(help="Quantise random weights to so many bits.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Also draw speed-up, acceptance and costs.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress and no remarks on standard error.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")] = False,
) -> None:
    """Measure speed, passes and answers of plain decoding and ours; no figure before all tokens are equal."""
    for length in context or []:
        within(1)(length)
    if random_weights is None and (dtype is not None or q_bits is not None):
        raise UsageError(f"--{'dtype' if dtype is not None else 'q-bits'}: goes with --random-weights")
    for option, value in (("--model", model), ("--adapter", adapter)):
        if random_weights is not None and value is not None:
            raise UsageError(f"--random-weights: contradicts {option}; drop one")
    check_plot(plot)
    places = {"--model": model, "--adapter": adapter, "--draft-model": draft_model}
    quieten_libraries(offline=not any_repo_id(places, revision), debug=debug)

    def remark(line: str) -> None:
        if not quiet:
            to_stderr(line)

    with answer() as out, progress_bar(quiet=quiet) as progress:
        from specstream_mlx.models.load import model_directory
        from specstream_mlx.target import machine

        document: dict[str, Any] = {
            "benchmark": "costs of random weights" if random_weights else "side by side",
            "machine": machine.describe(),
            "versions": machine.versions(),
        }
        if random_weights is not None:
            document |= _random_costs(random_weights, dtype or "float16", q_bits, context, repeats, progress)
        else:
            directory = model_directory(model, revision, trust_remote_code=trust_remote_code)
            arms, tokenizer, target, about = load_arms(
                model,
                draft,
                max_tokens,
                remark,
                revision=revision,
                trust_remote_code=trust_remote_code,
                adapter=adapter,
                tree=tree,
                insertion=insertion,
                draft_model=draft_model,
                num_draft_tokens=num_draft_tokens,
                prompt_lookup=prompt_lookup,
            )
            document |= about | {"repeats": repeats, "max_tokens": max_tokens, "noise_streams": noise_streams}
            if ignore_eos:
                tokenizer._eos_token_ids = set()
            if noise_streams:
                _make_noise(target)
            loads = workloads(str(directory), prompts_file, prompts, context, tokenizer, target, max_tokens, remark)
            document["workloads"] = measure_all(arms, loads, repeats, allow_differences, progress)
            if costs:
                document["costs"] = _costs(target, context, repeats, progress)
        if plot is not None:
            draw(plot, _panels(document), f"{document['machine']['processor']}, {document['machine']['device']}")
        if as_json:
            out.write_json(document)
        else:
            out.write(tables(document))


def load_arms(
    name: str | None,
    draft: Sequence[str] | None,
    max_tokens: int,
    remark: Callable[[str], None],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    adapter: str | None = None,
    tree: str | None = None,
    insertion: Insertion | None = None,
    draft_model: str | None = None,
    num_draft_tokens: int = 4,
    prompt_lookup: bool = False,
) -> tuple[list[Arm], Any, Any, dict[str, Any]]:
    """Every arm, the baseline first; mlx-lm's model and ours share the arrays of their weights."""
    import mlx_lm
    from mlx.utils import tree_flatten

    from specstream_mlx import DraftOptions, load
    from specstream_mlx.engine.exactness import plain_model
    from specstream_mlx.models.identity import calibration_key
    from specstream_mlx.models.load import model_directory

    path = model_directory(name, revision, trust_remote_code=trust_remote_code)
    target, tokenizer = load(path, adapter=adapter, trust_remote_code=trust_remote_code)
    stock = plain_model(target, path, adapter)
    in_use = target.adapter
    stock_bytes = sum(value.nbytes for _, value in tree_flatten(stock.parameters()))
    our_bytes = sum(value.nbytes for _, value in tree_flatten(target.parameters()))
    modes = list(dict.fromkeys(draft or ["auto", "off"]))
    if target.gamma == 0:
        needing = [mode for mode in modes if mode in ("tree", "chain")]
        if needing:
            remark(f"this model has no streams: no arm for --draft {', '.join(needing)}")
        remark("this model has no streams: ours decodes plainly; nothing is said about drafting with streams")
        modes = [mode for mode in modes if mode not in needing and mode != "auto"] or ["off"]
    arms = [stock_arm(BASELINE, stock, tokenizer, stock_bytes, max_tokens)]
    for mode in modes:
        options = DraftOptions(
            tree=tree if mode in ("tree", "auto") else None, insertion=insertion if mode != "off" else None
        )
        arms.append(stream_arm(mode, target, tokenizer, our_bytes, max_tokens, draft=mode, draft_options=options))
    if prompt_lookup:
        more = {"drafter": "prompt-lookup", "num_draft_tokens": num_draft_tokens, "draft": "chain"}
        arms.append(stream_arm(LOOKUP, target, tokenizer, our_bytes, max_tokens, **more))
    if draft_model is not None:
        try:
            second, _, *_ = mlx_lm.load(draft_model)
        except (ValueError, KeyError, OSError) as error:
            raise InvalidInputError(
                f"--draft-model: {draft_model} cannot be loaded ({' '.join(str(error).split())})"
            ) from error
        if second.args.vocab_size != target.args.vocab_size:
            raise InvalidInputError(
                f"--draft-model: vocabulary of {second.args.vocab_size} tokens, the model has "
                f"{target.args.vocab_size}; give a draft model with the same tokenizer"
            )
        second_bytes = sum(value.nbytes for _, value in tree_flatten(second.parameters()))
        more = {"draft_model": second, "num_draft_tokens": num_draft_tokens}
        arms.append(stock_arm(DRAFT_MODEL, stock, tokenizer, stock_bytes + second_bytes, max_tokens, **more))
    key = calibration_key(target)
    about = {
        "model": path.name if name is None or Path(name).expanduser().is_dir() else name,
        "model_type": target.model_type,
        "dtype": key["dtype"],
        "quantization": key["quantization"],
        "gamma": target.gamma,
        "adapter": None if adapter is None else target.adapter,
        "adapter_bytes": target.adapters[in_use].num_bytes if in_use is not None else 0,
        "weights_gb": our_bytes / 1e9,
        "tree": tree,
        "insertion": insertion,
    }
    return arms, tokenizer, target, about


def workloads(
    name: str | None,
    files: Sequence[Path] | None,
    count: int,
    contexts: Sequence[int] | None,
    tokenizer: Any,
    target: Any,
    max_tokens: int,
    remark: Callable[[str], None],
) -> list[Workload]:
    from specstream_mlx.calibration.measure import find_samples
    from specstream_mlx.formats.prompts import encode_prompt, read_prompts
    from specstream_mlx.models.load import model_directory

    samples = find_samples(model_directory(name))
    if not files and samples is None:
        raise InvalidInputError("no samples.jsonl beside the model; give --prompts-file")
    limit = target.context_length or 1 << 30
    loads = []
    for file in files or ([samples] if samples is not None else []):
        rows = read_prompts(file)
        own = [encode_prompt(tokenizer, row) for row in rows]
        found = [next((row.row[key] for key in REFERENCES if isinstance(row.row.get(key), str)), None) for row in rows]
        texts = [row.text for row in rows]
        references = [text for text in found[:count] if text is not None]
        complete = references if len(references) == len(found[:count]) else None
        loads.append(Workload(file.name, own[:count], texts[:count], complete))
        filler = [
            token
            for ids, text in zip(own, found, strict=True)
            for token in [*ids, *tokenizer.encode(f" {text or ''}\n", add_special_tokens=False)]
        ]
        for length in contexts or []:
            if length + max_tokens + 64 > limit:
                remark(f"--context {length}: does not fit the model's {limit} positions with the answer; left out")
                continue
            prompts = [_filled(ids, filler, length, index) for index, ids in enumerate(own[:count])]
            loads.append(Workload(file.name, prompts, texts[:count], None, length))
    return loads


def _filled(ids: list[int], filler: list[int], length: int, turn: int) -> list[int]:
    """``ids`` after as much of ``filler`` as makes ``length`` tokens; each prompt begins elsewhere in it."""
    missing = length - len(ids)
    if missing <= 0:
        return ids[-length:]
    begin = 37 * turn % len(filler)
    around = filler[begin:] + filler[:begin]
    return (around * (missing // len(around) + 1))[-missing:] + ids


def measure_all(
    arms: list[Arm], loads: Sequence[Workload], repeats: int, allow_differences: bool, progress: Progress | None
) -> list[dict[str, Any]]:
    total = sum(len(load.prompts) for load in loads) * len(arms) * (repeats + 1)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("answers", done, total)

    results = []
    for load in loads:
        warm_up(arms, load.prompts, tick)
        different = differences(arms)
        _refuse_differences(arms, load, different, allow_differences)
        answers = {arm.name: [run.text for run in arm.runs[0]] for arm in arms}
        for arm in arms:
            arm.runs.clear()
        for repeat in range(repeats):
            measure(arms, load.prompts, repeat, tick)
        rows = [row(arm, arms[0], len(different.get(arm.name, []))) for arm in arms]
        for found in rows:
            found["peak_memory_ratio"] = found["peak_memory_gb"] / rows[0]["peak_memory_gb"]
        if load.references is not None:
            for found in rows:
                found["quality"] = quality(answers[found["arm"]], load.references)
        results.append(
            {
                "task": load.name,
                "sample": {"prompt": load.texts[0], "answer": answers[BASELINE][0]},
                "context": load.context,
                "prompt_tokens": sum(len(prompt) for prompt in load.prompts) / len(load.prompts),
                "arms": rows,
            }
        )
    return results


def _refuse_differences(arms: Sequence[Arm], load: Workload, different: dict[str, list[int]], allowed: bool) -> None:
    """Raise VerificationError for other tokens than the baseline's; where ``allowed``, unless rounding explains all."""
    lines, explained = [], True
    for arm in arms[1:]:
        for index in different[arm.name]:
            verdict, is_tie = judge(arms[0].model, load.prompts[index], arm.runs[0][index])
            lines.append(f"{load.name}: {arm.name}: prompt {index}: {verdict}")
            explained = explained and is_tie
    if not lines or (allowed and explained):
        return

    why = "ties within rounding: --allow-differences" if explained else "rounding does not explain it: please report it"
    rest = [f"and {len(lines) - MOST_LINES} answers more"] if len(lines) > MOST_LINES else []
    raise VerificationError("\n".join([*lines[:MOST_LINES], *rest, f"so no figure is given ({why})"]))


def _make_noise(target: Any) -> None:
    """Fill the stream tensors with noise of the size of the hidden states."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    if target.gamma == 0:
        raise UsageError("--noise-streams: this model has no streams")
    filled = [
        (name, mx.random.normal(value.shape, scale=4.0, key=mx.random.key(index)).astype(value.dtype))
        for index, (name, value) in enumerate(tree_flatten(target.streams.parameters()))
    ]
    target.streams.update(tree_unflatten(filled))


def _costs(
    target: Any, contexts: Sequence[int] | None, repeats: int, progress: Progress | None
) -> list[dict[str, Any]]:
    from specstream_mlx.calibration.costs import CONTEXTS, measure_costs, usable_contexts
    from specstream_mlx.planning.calibration import costs_to_dict

    lengths = usable_contexts(target, contexts or CONTEXTS)
    return [
        costs_to_dict(context, found)
        for context, found in measure_costs(target, lengths, repeats=repeats, progress=progress)
    ]


def _random_costs(
    shape: str,
    dtype: str,
    bits: int | None,
    contexts: Sequence[int] | None,
    repeats: int,
    progress: Progress | None,
) -> dict[str, Any]:
    from mlx.utils import tree_flatten

    from specstream_mlx.calibration.shapes import random_model

    target = random_model(shape, dtype, bits)
    size = sum(value.nbytes for _, value in tree_flatten(target.parameters()))
    return {
        "model": f"{shape}, random weights",
        "dtype": dtype,
        "quantization": f"{bits} bits" if bits else None,
        "gamma": target.gamma,
        "weights_gb": size / 1e9,
        "repeats": repeats,
        "costs": _costs(target, contexts, repeats, progress),
    }


def tables(document: dict[str, Any]) -> str:
    """The document for people."""
    kind = document["quantization"] or document["dtype"]
    text = [f"{document['model']}, {kind}, {document['machine']['processor']}, {document['machine']['device']}\n\n"]
    if "workloads" not in document:
        text.insert(0, "RANDOM WEIGHTS: what passes cost, and nothing about acceptance or answers\n")
    for load in document.get("workloads", ()):
        rows = load["arms"]
        at = f", context {load['context']}" if load["context"] else ""
        text.append(
            f"{load['task']}{at}: {rows[0]['prompts']} prompts of {load['prompt_tokens']:.0f} tokens, "
            f"{rows[0]['tokens']} tokens answered, {document['repeats']} rounds\n"
            "medians of the rounds; speed-up over mlx-lm: ratio of medians (least..most of the rounds)\n"
        )
        header = ["arm", "same text", "passes", "tok/pass", "accepted by depth", "first token ms", "decode tok/s"]
        header += ["decode speed-up", "total s", "total speed-up", "peak GB"]
        text.append(table(header, [_table_row(found) for found in rows]))
        for found in rows:
            if "quality" in found:
                text.append(f"{found['arm']}: {_quality_line(found['quality'])}\n")
        text.append("\n")
    for costs in document.get("costs", ()):
        text.append(f"{cost_table(costs)}\n")
    return "".join(text)


def _table_row(found: dict[str, Any]) -> list[str]:
    baseline = found["arm"] == BASELINE
    equal, count = found["prompts_with_equal_tokens"], found["prompts"]
    speedups = [found[f"{kind}_speedup"] for kind in ("decode", "total")]
    decode, total = (f"{s['of_medians']:.2f}x ({s['min']:.2f}..{s['max']:.2f})" for s in speedups)
    depths = zip(found["accepted_by_depth"], found["drafted_by_depth"], strict=True)
    return [
        found["arm"],
        "-" if baseline else "yes" if equal == count else f"{equal} of {count}",
        str(found["passes"]),
        f"{found['tokens_per_pass']:.2f}",
        " ".join(f"{accepted / drafted:.2f}" for accepted, drafted in depths if drafted) or "-",
        f"{found['time_to_first_token_ms']['median']:.1f}",
        f"{found['decode_tokens_per_second']:.1f}",
        "1" if baseline else decode,
        f"{found['total_seconds']['median']:.3f}",
        "1" if baseline else total,
        f"{found['peak_memory_gb']:.3f}",
    ]


def _quality_line(found: dict[str, Any]) -> str:
    scores = [f"exact match {found['exact_match']:.1f}%"]
    scores += [f"{kind} {found[kind]:.1f}" for kind in ("rouge1", "rougeLsum") if found[kind] is not None]
    if found["rouge1"] is None:
        scores.append("ROUGE not computed (pip install rouge-score)")
    return ", ".join(scores)


def _panels(document: dict[str, Any]) -> list[dict[str, Any]]:
    panels = []
    loads = document.get("workloads", [])
    if loads:
        names = [found["arm"] for found in loads[0]["arms"][1:]]
        lines = [
            (
                name,
                [load["prompt_tokens"] for load in loads],
                [
                    found["decode_speedup"]["of_medians"]
                    for load in loads
                    for found in load["arms"]
                    if found["arm"] == name
                ],
            )
            for name in names
        ]
        panels.append({"title": "decode speed-up", "x": "prompt tokens", "y": "times mlx-lm", "lines": lines})
        lines = []
        for found in loads[0]["arms"]:
            pairs = [(a, d) for a, d in zip(found["accepted_by_depth"], found["drafted_by_depth"], strict=True) if d]
            if pairs:
                lines.append((found["arm"], list(range(1, len(pairs) + 1)), [a / d for a, d in pairs]))
        if lines:
            panels.append({"title": "acceptance", "x": "depth", "y": "passes that accepted it", "lines": lines})
    for costs in document.get("costs", ()):
        panels.append(
            {
                "title": f"cost at context {costs['context']}",
                "x": "rows of a pass",
                "y": "milliseconds",
                "lines": cost_lines(costs),
            }
        )
    return panels
