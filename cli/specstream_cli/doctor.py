"""``specstream-mlx doctor``: this machine, whether the text is exact on it and what drafting gives, in a minute.

The answer is made to be sent: it holds no names, paths or texts of the user. docs/doctor.md describes its JSON form.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specstream_cli.terminal import Answer, Progress, answer, progress_bar, quieten_libraries
from specstream_mlx.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from specstream_mlx.calibration.surroundings import Finding

FORMAT = "specstream-doctor"
FORMAT_VERSION = 1
LEAST_SPEEDUP = 1.1  # of decoding with the bundled model; less is worth a note


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Ten seconds instead of a minute: fewer and shorter.")] = False,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="SHAPE",
            help="Also time passes of a model of this shape with random 4-bit weights, such as llama-7b, or 'none'. "
            "Default: the largest that is quick here; none with --quick.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, to send, instead of lines.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")] = False,
) -> None:
    """Say what this machine is, whether text is exact on it and what drafting gives; exit code 5 after a problem."""
    quieten_libraries(offline=True, debug=debug)
    with answer() as out, progress_bar(quiet=quiet) as progress:
        from specstream_mlx.calibration.shapes import SHAPES

        if shape is not None and shape not in (*SHAPES, "none"):
            raise UsageError(f"--shape: got {shape!r}, expected one of {', '.join(SHAPES)}, none")
        report = Report(None if as_json else out)
        examine(report, probes(quick=quick, shape=shape, progress=progress))
        if as_json:
            out.write_json(report.document(quick=quick))
    problems = [f"{line['name']}: {line['text']}" for line in report.lines if line["verdict"] == "problem"]
    if problems:
        raise VerificationError("\n".join(problems))


class Report:
    """Findings as they come, and the document that they make."""

    def __init__(self, out: Answer | None) -> None:
        """Findings are written to ``out`` at once; None: they are only kept."""
        self._out = out
        self._started = time.perf_counter()
        self._last = self._started
        self.lines: list[dict[str, Any]] = []
        self.machine: dict[str, Any] = {}
        self.versions: dict[str, str] = {}
        self.exactness: list[dict[str, Any]] = []
        self.costs: list[dict[str, Any]] = []
        self.speedup: dict[str, Any] | None = None

    def add(self, finding: "Finding") -> None:
        """Keep a finding, with the seconds since the one before."""
        now = time.perf_counter()
        about = {"name": finding.name, "verdict": finding.verdict, "text": finding.text, "advice": finding.advice}
        self.lines.append(about | {"seconds": round(now - self._last, 2)})
        self._last = now
        if self._out is not None:
            advice = f"\n{'':9}to do: {finding.advice}" if finding.advice else ""
            self._out.write(f"{finding.verdict:9}{finding.name}: {finding.text}{advice}\n")

    def document(self, *, quick: bool) -> dict[str, Any]:
        """The whole report; docs/doctor.md describes it."""
        from specstream_mlx.calibration.surroundings import VERDICTS

        verdicts = [line["verdict"] for line in self.lines]
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "quick": quick,
            "seconds": round(time.perf_counter() - self._started, 1),
            "verdict": max(verdicts, key=VERDICTS.index),
            "machine": self.machine,
            "versions": self.versions,
            "lines": self.lines,
            "exactness": self.exactness,
            "costs": self.costs,
            "speedup": self.speedup,
        }


Probe = Callable[[Report], None]


def examine(report: Report, steps: Sequence[tuple[str, Probe]]) -> None:
    """Run every probe; one that fails is a problem of its line, and the others run all the same."""
    from specstream_mlx.calibration.surroundings import Finding

    for name, probe in steps:
        try:
            probe(report)
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split()).replace(str(Path.home()), "~")
            report.add(Finding(name, "problem", text, "report it with this output"))


def probes(*, quick: bool, shape: str | None, progress: Progress | None) -> list[tuple[str, Probe]]:
    """What is looked at, in this order; names are those of lines."""
    from specstream_mlx.calibration.probes import QUICK_WEIGHTS, WEIGHTS

    steps: list[tuple[str, Probe]] = [("machine", _machine)]
    steps += [(f"exact {kind}", _exactness(kind, quick, progress)) for kind in (QUICK_WEIGHTS if quick else WEIGHTS)]
    steps.append(("costs bundled float32", _curve(None, quick, progress)))
    if shape != "none" and not (quick and shape is None):
        steps.append(("costs shape", _shape_curve(shape, quick, progress)))
    steps.append(("speed-up", _speedup(quick, progress)))
    return steps


def _machine(report: Report) -> None:
    from specstream_mlx.calibration.surroundings import surrounding_findings, survey, version_finding
    from specstream_mlx.target.machine import versions

    report.machine = survey()
    report.versions = versions()
    for finding in [*surrounding_findings(report.machine), version_finding(report.versions)]:
        report.add(finding)


def _exactness(weights: str, quick: bool, progress: Progress | None) -> Probe:
    def probe(report: Report) -> None:
        from specstream_mlx.calibration.probes import exactness_finding, measure_exactness

        size = {"answers": 2, "max_tokens": 12, "window": 4, "seconds": 0.5} if quick else {}
        found = measure_exactness(weights, progress=progress, **size)  # type: ignore[arg-type]
        report.exactness.append(found)
        report.add(exactness_finding(found))

    return probe


def _curve(shape: str | None, quick: bool, progress: Progress | None) -> Probe:
    def probe(report: Report) -> None:
        from specstream_mlx.calibration.probes import ROWS, curve_finding, measure_curve

        rows, repeats = (ROWS[:4], 2) if quick else (ROWS, 5)
        found = measure_curve(shape, rows=rows, repeats=repeats, progress=progress)
        report.costs.append(found)
        report.add(curve_finding(found))

    return probe


def _shape_curve(shape: str | None, quick: bool, progress: Progress | None) -> Probe:
    def probe(report: Report) -> None:
        from specstream_mlx.calibration.probes import choose_shape, memory_gb, seconds_per_byte
        from specstream_mlx.calibration.surroundings import Finding

        chosen = shape or choose_shape(seconds_per_byte(), memory_gb())
        if chosen is None:
            text = "4-bit models of well-known shapes are too slow or too large here for a short measurement"
            advice = "where time does not matter: --shape llama-1b; or 'specstream-mlx benchmark --costs' on your model"
            report.add(Finding("costs shape", "note", text, advice))
        else:
            _curve(chosen, quick, progress)(report)

    return probe


def _speedup(quick: bool, progress: Progress | None) -> Probe:
    def probe(report: Report) -> None:
        prompts, repeats, max_tokens = (2, 2, 32) if quick else (6, 3, 128)
        report.speedup = measure_speedup(prompts, repeats, max_tokens, progress)
        report.add(speedup_finding(report.speedup))

    return probe


def measure_speedup(prompts: int, repeats: int, max_tokens: int, progress: Progress | None) -> dict[str, Any]:
    """Stock mlx-lm and ours on the bundled model, in turn, after their tokens were compared.

    Raises:
        VerificationError: the tokens differ.
    """
    from specstream_cli.benchmark import load_arms, measure_all, workloads

    arms, tokenizer, target, _ = load_arms(None, ["auto"], max_tokens, lambda line: None)
    loads = workloads(None, None, prompts, None, tokenizer, target, max_tokens, lambda line: None)
    ((stock, ours),) = [load["arms"] for load in measure_all(arms, loads, repeats, False, progress)]
    named = {"mlx-lm": stock, "ours": ours}
    return {
        "model": "bundled",
        "weights": "float32",
        "prompts": ours["prompts"],
        "tokens": ours["tokens"],
        "repeats": repeats,
        "tokens_per_pass": ours["tokens_per_pass"],
        "decode": ours["decode_speedup"],
        "total": ours["total_speedup"],
        "decode_tokens_per_second": {name: arm["decode_tokens_per_second"] for name, arm in named.items()},
        "first_token_ms": {name: arm["time_to_first_token_ms"]["median"] for name, arm in named.items()},
    }


def speedup_finding(found: dict[str, Any]) -> "Finding":
    """The verdict: a note where drafting hardly pays on the bundled model."""
    from specstream_mlx.calibration.surroundings import Finding

    decode, first, speed = found["decode"], found["first_token_ms"], found["decode_tokens_per_second"]
    text = (
        f"decoding {decode['of_medians']:.2f}x stock mlx-lm ({decode['min']:.2f}..{decode['max']:.2f}), "
        f"{speed['ours']:.0f} instead of {speed['mlx-lm']:.0f} tokens/s, {found['tokens_per_pass']:.2f} tokens per "
        f"pass; with the prompt {found['total']['of_medians']:.2f}x; first token after {first['ours']:.1f} ms instead "
        f"of {first['mlx-lm']:.1f} ms"
    )
    if decode["of_medians"] < LEAST_SPEEDUP:
        advice = "run 'specstream-mlx calibrate' on the quiet machine, then doctor again"
        return Finding("speed-up", "note", text, advice)
    return Finding("speed-up", "ok", text)
