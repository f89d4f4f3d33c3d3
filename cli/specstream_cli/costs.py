"""What passes cost, as ``calibrate`` and ``benchmark`` show it."""

from typing import Any

from specstream_cli.tables import table

CURVES = {
    "chain": "chain",
    "tree": "tree",
    "deferred": "+ stream pass",
    "leaf": "+ leaf streams",
    "parallel": "+ all streams",
}


def cost_table(costs: dict[str, Any]) -> str:
    """One length of context as text: milliseconds by rows.

    *tokens to break even*: how many a pass with its streams must yield to be as fast as plain decoding.
    """
    curves = {name: dict(costs[name]) for name in CURVES}
    rows = []
    for count, seconds in curves["chain"].items():
        whole = [
            curves[name][count] for name in ("deferred", "leaf", "parallel") if count in curves[name] and count > 1
        ]
        rows.append(
            [
                count,
                *(f"{1000 * curve[count]:.2f}" if count in curve else "-" for curve in curves.values()),
                f"{seconds / costs['plain']:.2f}",
                f"{min(whole) / costs['plain']:.2f}" if whole else "-",
            ]
        )
    header = ["rows", *(f"{label} ms" for label in CURVES.values()), "chain / plain", "tokens to break even"]
    return f"context {costs['context']}: plain step {1000 * costs['plain']:.2f} ms\n{table(header, rows)}"


def cost_lines(costs: dict[str, Any]) -> list[tuple[str, list[int], list[float]]]:
    """The same as lines of a plot."""
    return [
        (label, [rows for rows, _ in costs[name]], [1000 * seconds for _, seconds in costs[name]])
        for name, label in CURVES.items()
    ]
