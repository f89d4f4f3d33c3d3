"""The paper's results (arXiv 2402.11131): A100, float16, one sequence, greedy. Another machine and larger models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """One method on one model; `None` where the paper has no figure. Metrics as they are printed there."""

    task: str
    model: str
    method: str
    speedup: float | None
    tokens_per_pass: float | None
    metric: str
    extra_parameters: str


_EXTRA = {
    "Medusa-2": {"Mistral-Instruct-7B": "5.9e8", "Phi-3-mini-3.8B": "4.3e8", "Llama2-7b": "5.9e8"},
    "EAGLE": {"Mistral-Instruct-7B": "2.4e8", "Phi-3-mini-3.8B": "1.3e8", "Llama2-7b": "2.4e8"},
    "Speculative Streaming": {"Mistral-Instruct-7B": "8.2e4", "Phi-3-mini-3.8B": "6.1e4", "Llama2-7b": "8.2e4"},
}

# task, model, baseline's metric, then speed-up, tokens per pass and metric of Medusa-2, EAGLE, Speculative Streaming.
_TABLE = (
    ("sql", "Mistral-Instruct-7B", "84.16", (2.79, 3.18, "84.18"), (2.75, 3.58, "84.16"), (2.93, 3.67, "84.50")),
    ("sql", "Phi-3-mini-3.8B", "80.92", (2.54, 2.81, "81.07"), (2.62, 3.37, "80.92"), (2.92, 3.65, "84.10")),
    ("sql", "Llama2-7b", "85.37", (2.52, 2.98, "85.31"), (2.59, 3.31, "85.37"), (2.81, 3.57, "85.93")),
    (
        "dialogsum",
        "Mistral-Instruct-7B",
        "44.74 / 36.76",
        (1.89, 2.05, "44.78 / 36.95"),
        (1.95, 2.56, ""),
        (2.04, 2.96, "44.89 / 37.09"),
    ),
    (
        "dialogsum",
        "Phi-3-mini-3.8B",
        "46.08 / 38.28",
        (2.15, 2.26, "45.82 / 37.78"),
        (2.05, 2.31, ""),
        (2.32, 2.85, "46.30 / 38.32"),
    ),
    (
        "dialogsum",
        "Llama2-7b",
        "44.90 / 37.0",
        (1.76, 1.95, "44.17 / 37.02"),
        (1.86, 2.57, ""),
        (1.90, 3.05, "45.0 / 37.85"),
    ),
    (
        "e2e_nlg",
        "Mistral-Instruct-7B",
        "67.82 / 48.99",
        (2.78, 3.19, "67.74 / 48.85"),
        (2.85, 3.52, ""),
        (2.93, 3.67, "68.37 / 49.09"),
    ),
    (
        "e2e_nlg",
        "Phi-3-mini-3.8B",
        "68.72 / 49.31",
        (2.39, 2.63, "68.41 / 49.08"),
        (2.42, 2.76, ""),
        (2.36, 2.72, "69.38 / 50.22"),
    ),
    (
        "e2e_nlg",
        "Llama2-7b",
        "69.47 / 49.54",
        (2.82, 3.19, "69.41 / 49.44"),
        (2.79, 3.26, ""),
        (2.89, 3.38, "69.52 / 49.93"),
    ),
)


def paper_rows(task: str) -> list[PaperRow]:
    """The paper's rows for a task."""
    rows = []
    for name, model, baseline, *methods in _TABLE:
        if name != task:
            continue
        rows.append(PaperRow(name, model, "LoRA alone", 1.0, 1.0, baseline, "0"))
        for method, (speedup, tokens_per_pass, metric) in zip(_EXTRA, methods, strict=True):
            rows.append(PaperRow(name, model, method, speedup, tokens_per_pass, metric, _EXTRA[method][model]))
    return rows
