"""``specstream-mlx calibrate``: measure this machine and model once, and store the plan that ``generate`` uses."""

from pathlib import Path
from typing import Annotated, Any

import typer

from specstream_cli.costs import cost_lines, cost_table
from specstream_cli.drafting import (
    ChosenDrafter,
    DraftModel,
    NumDraftTokens,
    check_drafter,
    choose_drafters,
    load_draft_model,
)
from specstream_cli.options import Adapter, Revision, TrustRemoteCode
from specstream_cli.plots import check_plot, draw
from specstream_cli.tables import table
from specstream_cli.terminal import answer, progress_bar, quieten_libraries, to_stderr
from specstream_cli.validation import any_repo_id, within
from specstream_mlx.errors import UsageError


def calibrate(
    model: Annotated[
        str | None,
        typer.Option(help="MLX model directory or Hugging Face repository; default: the model shipped here."),
    ] = None,
    adapter: Adapter = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    drafter: ChosenDrafter = None,
    draft_model: DraftModel = None,
    num_draft_tokens: NumDraftTokens = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(help="JSON lines with a 'prompt' each; default: samples.jsonl of the model, or text it samples."),
    ] = None,
    prompts: Annotated[int, typer.Option(callback=within(1), help="Prompts to measure acceptance on.")] = 24,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", callback=within(2), help="Most tokens per answer.")
    ] = 128,
    context: Annotated[
        list[int] | None,
        typer.Option(help="Length of context to time passes at; may be repeated. Default: 128, 512 and 2048."),
    ] = None,
    repeats: Annotated[int, typer.Option(callback=within(1), help="Times every kind of pass is timed.")] = 7,
    store: Annotated[bool, typer.Option("--store/--no-store", help="Keep the result for 'generate'.")] = True,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Also draw costs and acceptance.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress and no remarks on standard error.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")] = False,
) -> None:
    """Measure what passes cost here and how often drafts are right, and store the drafter's plan."""
    if drafter == "none":
        raise UsageError("--drafter none: plain decoding needs no plan; choose another drafter")
    for length in context or []:
        within(1)(length)
    check_plot(plot)
    places = {"--model": model, "--adapter": adapter, "--draft-model": draft_model}
    quieten_libraries(offline=not any_repo_id(places, revision), debug=debug)
    with answer() as out:
        check_drafter(drafter, draft_model, num_draft_tokens)
        from specstream_mlx import load
        from specstream_mlx.calibration.measure import find_samples, measure
        from specstream_mlx.formats.prompts import encode_prompt, read_prompts
        from specstream_mlx.models.load import model_directory
        from specstream_mlx.planning.store import save

        directory = model_directory(model, revision, trust_remote_code=trust_remote_code)
        file = prompts_file if prompts_file is not None else find_samples(directory)
        rows = read_prompts(file)[:prompts] if file is not None else None
        target, tokenizer = load(directory, adapter=adapter, trust_remote_code=trust_remote_code)
        second = None if draft_model is None else load_draft_model(target, draft_model, trust_remote_code)
        who = "two-model" if second is not None else drafter
        chosen = choose_drafters(target, [who], second, num_draft_tokens)[who]
        with progress_bar(quiet=quiet) as progress:
            calibration = measure(
                target,
                tokenizer,
                [encode_prompt(tokenizer, row) for row in rows] if rows is not None else None,
                drafter=chosen,
                text=f"{file.name}, {len(rows)} prompts" if file is not None and rows is not None else None,
                contexts=context,
                repeats=repeats,
                max_tokens=max_tokens,
                progress=progress,
            )
        found = calibration.to_dict()
        if plot is not None:
            draw(plot, _panels(found), f"{found['key']['processor']}, {found['key']['device']}")
        if store:
            path = save(calibration)
            found["stored"] = str(path)
            if not quiet:
                to_stderr(f"stored in {path}")
        if as_json:
            out.write_json(found)
        else:
            out.write(_tables(found))


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"


def _tables(found: dict[str, Any]) -> str:
    text = []
    drafter = _drafter(found)
    for costs, plan in zip(found["costs"], found["plans"], strict=True):
        text.append(f"{cost_table(costs, drafter)}plan: {plan_line(plan, drafter)}\n\n")
    acceptance = found["acceptance"]
    ranks = range(len(acceptance["rates"][0]))
    rows = [
        [depth, anchors, *(f"{rate:.3f}" for rate in rates)]
        for depth, (anchors, rates) in enumerate(zip(acceptance["anchors"], acceptance["rates"], strict=True), start=1)
    ]
    text.append(
        f"acceptance on {acceptance['text']}\n" + table(["depth", "tried", *(f"rank {r}" for r in ranks)], rows)
    )
    return "".join(text)


def _drafter(found: dict[str, Any]) -> str:
    """Who drafts, by a calibration's document."""
    return str(found["key"].get("drafter", "streams"))


def plan_line(plan: dict[str, Any], drafter: str = "streams") -> str:
    """A plan in words."""
    if plan["nodes"] == 0:
        return "plain decoding; no draft pays here"
    shape = "chain" if plan["nodes"] == plan["depth"] else "tree"
    insertion = f", {plan['insertion']} insertion" if drafter == "streams" else f", drafter {drafter}"
    return (
        f"{shape} of {plan['nodes']} nodes, depth {plan['depth']}{insertion}: "
        f"{plan['expected_tokens_per_pass']:.2f} tokens in {_milliseconds(plan['seconds_per_pass'])} ms, "
        f"{plan['expected_speedup']:.2f}x plain decoding expected"
    )


def _panels(found: dict[str, Any]) -> list[dict[str, Any]]:
    panels = []
    for costs, plan in zip(found["costs"], found["plans"], strict=True):
        panels.append(
            {
                "title": f"context {costs['context']}",
                "x": "rows of a pass",
                "y": "milliseconds",
                "lines": cost_lines(costs, _drafter(found)),
                "marks": [
                    ("plain step", [1], [1000 * costs["plain"]]),
                    ("plan, drafting included", [plan["nodes"] + 1], [1000 * plan["seconds_per_pass"]]),
                ],
            }
        )
    rates = found["acceptance"]["rates"]
    depths = list(range(1, len(rates) + 1))
    lines = [(f"rank {rank}", depths, [row[rank] for row in rates]) for rank in range(min(4, len(rates[0])))]
    panels.append({"title": "acceptance", "x": "depth", "y": "right, when the guesses before were", "lines": lines})
    return panels
