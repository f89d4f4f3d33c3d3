"""What passes cost, as ``calibrate`` and ``benchmark`` show it."""

from typing import Any

from specstream_cli.tables import table

ROWS = {"chain": "chain", "tree": "tree"}
STREAMS = {"deferred": "+ stream pass", "leaf": "+ leaf streams", "parallel": "+ all streams"}
OTHERS = {"deferred": "+ drafting"}


def curves(drafter: str | None) -> dict[str, str]:
    """The curves that say something where this drafter drafts, and what to call them; None: nobody drafts."""
    return ROWS | ({} if drafter is None else STREAMS if drafter == "streams" else OTHERS)


def cost_table(costs: dict[str, Any], drafter: str | None) -> str:
    """One length of context as text: milliseconds by rows.

    *tokens to break even*: how many a pass and what drafts the next one must yield to be as fast as plain decoding.
    """
    labels = curves(drafter)
    points = {name: dict(costs[name]) for name in labels}
    rows = []
    for count, seconds in points["chain"].items():
        whole = [points[name][count] for name in labels if name not in ROWS and count in points[name] and count > 1]
        rows.append(
            [
                count,
                *(f"{1000 * curve[count]:.2f}" if count in curve else "-" for curve in points.values()),
                f"{seconds / costs['plain']:.2f}",
                f"{min(whole) / costs['plain']:.2f}" if whole else "-",
            ]
        )
    header = ["rows", *(f"{label} ms" for label in labels.values()), "chain / plain", "tokens to break even"]
    return f"context {costs['context']}: plain step {1000 * costs['plain']:.2f} ms\n{table(header, rows)}"


def cost_lines(costs: dict[str, Any], drafter: str | None) -> list[tuple[str, list[int], list[float]]]:
    """The same as lines of a plot."""
    return [
        (label, [rows for rows, _ in costs[name]], [1000 * seconds for _, seconds in costs[name]])
        for name, label in curves(drafter).items()
    ]
