"""``specstream-mlx benchmark``: stock mlx-lm and ours on the same weights, prompt by prompt in turn."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from specstream_cli.arms import (
    BASELINE,
    TWO_MODEL,
    Arm,
    Workload,
    differences,
    judge,
    measure,
    our_arm,
    row,
    stock_arm,
    warm_up,
)
from specstream_cli.costs import cost_lines, cost_table
from specstream_cli.drafting import NumDraftTokens, check_drafters, choose_drafters, load_draft_model, one_of
from specstream_cli.options import Revision, TrustRemoteCode
from specstream_cli.plots import check_plot, draw
from specstream_cli.quality import quality
from specstream_cli.tables import table
from specstream_cli.terminal import Progress, answer, progress_bar, quieten_libraries, to_stderr
from specstream_cli.validation import any_repo_id, tree_spec, within
from specstream_mlx.errors import InvalidInputError, UsageError, VerificationError
from specstream_mlx.options import DrafterName, DraftMode, Insertion

MOST_LINES = 8
REFERENCES = ("answer", "reference", "completion", "target")


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
    drafter: Annotated[
        list[str] | None,
        typer.Option(
            metavar=f"[{'|'.join(get_args(DrafterName))}]",
            callback=one_of(get_args(DrafterName)),
            help="Who drafts in our arms; may be repeated. Default: what the model or its adapter has.",
        ),
    ] = None,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            metavar=f"[{'|'.join(get_args(DraftMode))}]",
            callback=one_of(get_args(DraftMode)),
            help="How to draft: for every drafter an arm of ours; may be repeated. Default: auto and off.",
        ),
    ] = None,
    tree: Annotated[
        str | None, typer.Option(callback=tree_spec, metavar="SPEC", help="Tree of the tree and auto arms.")
    ] = None,
    insertion: Annotated[Insertion | None, typer.Option(help="How streams run: leaf, deferred or parallel.")] = None,
    draft_model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|REPO",
            help="Second, smaller model: adds the drafter two-model, and mlx-lm's own two-model decoding as an arm.",
        ),
    ] = None,
    num_draft_tokens: NumDraftTokens = None,
    prompt_lookup: Annotated[
        bool, typer.Option("--prompt-lookup", help="Adds the drafter prompt-lookup, which needs no weights.")
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
    given = {"--model": model, "--adapter": adapter, "--drafter": drafter, "--draft-model": draft_model}
    for option, value in given.items():
        if random_weights is not None and value is not None:
            raise UsageError(f"--random-weights: contradicts {option}; drop one")
    drafters: list[str | None] = list(drafter or ()) or [None]
    if prompt_lookup:
        drafters.append("prompt-lookup")
    if draft_model is not None:
        drafters.append("two-model")
    check_plot(plot)
    places = {"--model": model, "--adapter": adapter, "--draft-model": draft_model}
    quieten_libraries(offline=not any_repo_id(places, revision), debug=debug)

    def remark(line: str) -> None:
        if not quiet:
            to_stderr(line)

    with answer() as out, progress_bar(quiet=quiet) as progress:
        check_drafters(drafters, draft_model, num_draft_tokens)
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
                drafters=drafters,
                draft_model=draft_model,
                num_draft_tokens=num_draft_tokens,
            )
            document |= about | {"repeats": repeats, "max_tokens": max_tokens, "noise_streams": noise_streams}
            if ignore_eos:
                tokenizer._eos_token_ids = set()
            if noise_streams:
                _make_noise(target)
            loads = workloads(str(directory), prompts_file, prompts, context, tokenizer, target, max_tokens, remark)
            document["workloads"] = measure_all(arms, loads, repeats, allow_differences, progress)
            if costs:
                document["costs_of_drafter"] = target.drafter.name if target.drafter is not None else None
                document["costs"] = _costs(target, target.drafter, context, repeats, progress)
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
    drafters: Sequence[str | None] = (None,),
    draft_model: str | None = None,
    num_draft_tokens: int | None = None,
) -> tuple[list[Arm], Any, Any, dict[str, Any]]:
    """Every arm, the baseline first; mlx-lm's models and ours share the arrays of their weights.

    Args:
        drafters: their names, None being the model's own.

    Returns:
        The arms, the tokenizer, the target, and what the JSON document says about them.
    """
    from specstream_mlx import load
    from specstream_mlx.drafters.choice import TAKE_NUM_DRAFT_TOKENS
    from specstream_mlx.engine.exactness import plain_model
    from specstream_mlx.models.identity import calibration_key
    from specstream_mlx.models.load import model_directory

    path = model_directory(name, revision, trust_remote_code=trust_remote_code)
    target, tokenizer = load(path, adapter=adapter, trust_remote_code=trust_remote_code)
    stock = plain_model(target, path, adapter)
    in_use = target.adapter
    second = None if draft_model is None else load_draft_model(target, draft_model, trust_remote_code)
    chosen = choose_drafters(target, drafters, second, num_draft_tokens)
    stock_bytes, our_bytes = _num_bytes(stock), _num_bytes(target)
    arms = [stock_arm(BASELINE, stock, tokenizer, stock_bytes, max_tokens)]
    for label, drafter, mode in _our_arms(chosen, list(dict.fromkeys(draft or ["auto", "off"])), remark):
        size = our_bytes + (_num_bytes(second.base) if second is not None and label.startswith("two-model") else 0)
        options = _draft_options(mode, drafter, tree, insertion)
        arms.append(
            our_arm(label, target, tokenizer, size, max_tokens, drafter=drafter, draft=mode, draft_options=options)
        )
    if second is not None:
        plain_second = plain_model(second, draft_model)
        more = {"draft_model": plain_second, "num_draft_tokens": chosen["two-model"].max_depth}
        size = stock_bytes + _num_bytes(plain_second)
        arms.append(stock_arm(TWO_MODEL, stock, tokenizer, size, max_tokens, **more))
    key = calibration_key(target)
    about = {
        "model": path.name if name is None or Path(name).expanduser().is_dir() else name,
        "model_type": target.model_type,
        "dtype": key["dtype"],
        "quantization": key["quantization"],
        "gamma": target.gamma,
        "adapter": None if adapter is None else target.adapter,
        "adapter_bytes": target.adapters[in_use].num_bytes if in_use is not None else 0,
        "draft_model": None if draft_model is None else Path(draft_model).name,
        "num_draft_tokens": {name: chosen[name].max_depth for name in TAKE_NUM_DRAFT_TOKENS if name in chosen},
        "weights_gb": our_bytes / 1e9,
        "tree": tree,
        "insertion": insertion,
    }
    return arms, tokenizer, target, about


def _our_arms(
    chosen: Mapping[str | None, Any], modes: Sequence[str], remark: Callable[[str], None]
) -> list[tuple[str, Any, str]]:
    """Name, drafter and draft mode of each arm of ours; plain decoding is the same for all drafters, and one arm."""
    off = ("off", chosen.get(None), "off")
    arms = []
    for name, drafter in chosen.items():
        for mode in modes:
            if mode == "off":
                arms.append(off)
            elif drafter is not None:
                arms.append((mode if name is None else f"{name} {mode}", drafter, mode))
        missing = [mode for mode in modes if mode != "off"]
        if name is None and drafter is None and missing:
            remark(
                f"this model has no drafter of its own: no arm for --draft {', '.join(missing)}; without a drafter "
                "ours decodes plainly"
            )
            arms.append(off)
    return list({arm[0]: arm for arm in arms or [off]}.values())


def _draft_options(mode: str, drafter: Any, tree: str | None, insertion: Insertion | None) -> Any:
    """What ``--tree`` and ``--insertion`` say about an arm."""
    from specstream_mlx import DraftOptions

    mine = insertion if drafter is not None and insertion in drafter.ways else None
    return DraftOptions(tree=tree if mode in ("tree", "auto") else None, insertion=mine)


def _num_bytes(model: Any) -> int:
    from mlx.utils import tree_flatten

    return sum(value.nbytes for _, value in tree_flatten(model.parameters()))


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
    target: Any, drafter: Any, contexts: Sequence[int] | None, repeats: int, progress: Progress | None
) -> list[dict[str, Any]]:
    from specstream_mlx.calibration.costs import CONTEXTS, measure_costs, usable_contexts
    from specstream_mlx.planning.calibration import costs_to_dict

    lengths = usable_contexts(target, contexts or CONTEXTS, drafter.max_depth if drafter is not None else 0)
    return [
        costs_to_dict(context, found)
        for context, found in measure_costs(target, lengths, drafter, repeats=repeats, progress=progress)
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
        "costs_of_drafter": target.drafter.name if target.drafter is not None else None,
        "costs": _costs(target, target.drafter, contexts, repeats, progress),
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
        text.append(f"{cost_table(costs, document['costs_of_drafter'])}\n")
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
                "lines": cost_lines(costs, document["costs_of_drafter"]),
            }
        )
    return panels
