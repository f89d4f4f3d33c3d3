"""A simulation, not a measurement: the planner and the control on published cost curves.

    python -m benchmarks.planner_simulation [--json FILE]

Curves are what third parties published for Apple silicon (benchmarks/row_cost.json, with sources): the cost of a pass
by rows, relative to one row. Acceptance profiles are made up, from structured text to noise. For each pair the table
gives the expected speed-up over plain decoding of the planner's choice and of the best fixed tree, and what the control
reaches on random draws from the profile: starting from costs and acceptance that are right, from the acceptance of
another text, and from nothing, when it learns what passes cost as it goes.

Curves say nothing of streams, so their cost is assumed: 1/8 of the layers for the streams' rows, an LM head of 1/50 of
the model. Parallel insertion is taken to run T * (1 + gamma) rows in that eighth, leaf insertion the rows of the tree
and of one node's streams in both, and a stream pass besides where the text ends elsewhere.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specstream_mlx.planning.control import Control, Costs, LearnedCosts, PassTimes
from specstream_mlx.planning.plan import ASSUMED_ACCEPTANCE
from specstream_mlx.planning.planner import (
    Candidates,
    Curve,
    PassCosts,
    Rates,
    candidate_trees,
    solve,
)
from specstream_mlx.planning.tabulated import TabulatedCosts
from specstream_mlx.target.tree import DraftTree

CURVES = Path(__file__).with_name("row_cost.json")
GAMMA = 4
MAX_ROWS = 64
STREAM_SHARE = 1 / 8
HEAD_SHARE = 1 / 50
TOKENS = 3000  # per simulated generation


def profile(first: Sequence[float], ratio: float, ranks: int = 10) -> list[list[float]]:
    """Rates whose first guess is right as often as ``first`` says; of the rest each rank takes ``ratio``."""
    rows = []
    for rate in first:
        row = [rate]
        while len(row) < ranks:
            row.append((1 - sum(row)) * ratio)
        rows.append(row)
    return rows


PROFILES: dict[str, list[list[float]]] = {
    "structured": profile((0.93, 0.90, 0.87, 0.84), 0.5),
    "good": profile((0.80, 0.72, 0.66, 0.60), 0.4),
    "fair": profile((0.62, 0.52, 0.45, 0.40), 0.3),
    "flat": profile((0.40, 0.35, 0.30, 0.28), 0.3),
    "poor": profile((0.30, 0.20, 0.15, 0.12), 0.15),
    "noise": profile((0.01, 0.01, 0.01, 0.01), 0.01),
}
FIXED = {
    **{f"chain:{depth}": DraftTree.chain(depth) for depth in range(1, GAMMA + 1)},
    **{
        f"cartesian:{'x'.join(map(str, widths))}": DraftTree.cartesian(widths)
        for width in (2, 3)
        for widths in ((width, width), (width,) * 3, (width, width, 1, 1), (width, 1, 1, 1))
    },
    "63 nodes": DraftTree.best_first(
        [[math.log(rate) for rate in row] for row in profile((0.6, 0.5, 0.45, 0.4), 0.3)], 63
    ),
}


@dataclass(frozen=True)
class Result:
    """Expected or simulated tokens per second on one curve and profile, plain decoding being 1."""

    curve: str
    profile: str
    planned: float
    tree: str
    insertion: str
    fixed: float
    fixed_tree: str
    control: float
    control_misled: float
    control_learning: float


def read_curves() -> dict[str, Curve]:
    """The published curves by id."""
    raw = json.loads(CURVES.read_text(encoding="utf-8"))["curves"]
    return {
        entry["id"]: Curve(tuple(sorted((int(rows), cost) for rows, cost in entry["rows"].items()))) for entry in raw
    }


def pass_costs(curve: Curve) -> PassCosts:
    """Costs of whole passes under the assumptions of the module."""

    def parallel(rows: int) -> float:
        own = curve.at(rows)
        return own + STREAM_SHARE * (curve.at(rows * (1 + GAMMA)) - own) + HEAD_SHARE * curve.at(GAMMA)

    def deferred(rows: int) -> float:
        return curve.at(rows) + (STREAM_SHARE + HEAD_SHARE) * curve.at(rows - 1)

    def leaf(rows: int) -> float:
        own = curve.at(rows)
        return own + (STREAM_SHARE + HEAD_SHARE) * (curve.at(2 * rows - 1) - own)

    beside = Curve(tuple((rows, parallel(rows)) for rows in range(1, MAX_ROWS + 1)))
    streams = (Curve(tuple((rows, of(rows)) for rows in range(2, GAMMA + 2))) for of in (deferred, leaf))
    return PassCosts(curve.at(1), curve, curve, beside, *streams)


def fixed_speed(costs: PassCosts, tree: DraftTree, rates: Rates) -> float:
    """A fixed tree's speed-up with the best insertion."""
    way = Candidates([tree], len(rates[0]))
    return float(way.tokens(rates)[0]) * costs.plain / costs.best_of(tree, float(way.ends(rates)[0]))[0]


def controlled_speed(control: Control, costs: PassCosts, truth: Rates, seed: int, tokens: int = TOKENS) -> float:
    """Let the control decode: every depth is right at a rank drawn from ``truth``; its speed-up over plain decoding."""
    rng = random.Random(seed)
    made, spent = 0, 0.0
    root = DraftTree.chain(0)
    while made < tokens:
        choice = control.choose(0)
        tree = choice[0] if choice is not None else root
        nodes = list(_accepted(tree, truth, rng))
        seconds = costs.of(*choice, float(nodes[-1] == tree.leaf)) if choice is not None else costs.plain
        control.record(choice is not None, tree, nodes)
        control.observe(choice is not None, tree, seconds)
        made += len(nodes)
        spent += seconds
    return made * costs.plain / spent


def _accepted(tree: DraftTree, truth: Rates, rng: random.Random) -> Iterator[int]:
    index = {path: node for node, path in enumerate(tree.paths)}
    path: tuple[int, ...] = ()
    while path in index:
        yield index[path]
        if len(path) == len(truth):
            return
        row = truth[len(path)]
        path = (*path, rng.choices(range(len(row) + 1), [*row, max(1 - sum(row), 0)])[0])


def simulate(tokens: int = TOKENS) -> list[Result]:
    """Every curve with every profile."""
    results = []
    for curve_id, curve in read_curves().items():
        costs = pass_costs(curve)
        for name, rates in PROFILES.items():
            plan = solve(costs, rates, MAX_ROWS)
            fixed = {label: fixed_speed(costs, tree, rates) for label, tree in FIXED.items()}
            best = max(fixed, key=fixed.__getitem__)

            def controlled(prior: Rates, truth: Rates = rates, learning: bool = False, of: PassCosts = costs) -> float:
                trees = [DraftTree.chain(GAMMA)] if learning else candidate_trees(prior, MAX_ROWS)
                learned: Costs = LearnedCosts(trees[0], None, PassTimes())
                known = learned if learning else TabulatedCosts(trees, [(0, of)])
                ways = Candidates(trees, len(prior[0]))
                return controlled_speed(Control(ways, prior, known), of, truth, 1, tokens)

            misled = PROFILES["noise" if name in ("structured", "good") else "good"]
            results.append(
                Result(
                    curve_id,
                    name,
                    plan.speedup,
                    _name(plan.tree),
                    plan.way if plan.tree.size > 1 else "-",
                    fixed[best],
                    best,
                    controlled(rates),
                    controlled(misled),
                    controlled(ASSUMED_ACCEPTANCE, learning=True),
                )
            )
    return results


def _name(tree: DraftTree) -> str:
    if tree.size == 1:
        return "plain"
    return f"chain:{tree.max_depth}" if tree.is_chain else f"{tree.size - 1} nodes, depth {tree.max_depth}"


def main() -> int:
    """Print the table; 1 when the planner loses to a fixed tree or to plain decoding anywhere."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    options = parser.parse_args()
    results = simulate()
    print("SIMULATION on published curves; speed-up over plain decoding. No figure was measured on the chips named.\n")
    print(f"{'curve':24}{'profile':12}{'planner':>8}  {'its tree':20}{'best fixed':>10}  {'which':20}", end="")
    print(f"{'control':>8}{'misled':>8}{'learning':>9}")
    for row in results:
        print(
            f"{row.curve:24}{row.profile:12}{row.planned:8.3f}  {row.tree:20}{row.fixed:10.3f}  {row.fixed_tree:20}"
            f"{row.control:8.3f}{row.control_misled:8.3f}{row.control_learning:9.3f}"
        )
    worst_fixed = min(row.planned / row.fixed for row in results)
    worst_plain = min(min(row.planned, row.control, row.control_misled) for row in results)
    document: dict[str, Any] = {
        "simulation": True,
        "planner_over_best_fixed_at_least": worst_fixed,
        "planner_and_control_over_plain_at_least": worst_plain,
        "learning_over_plain_at_least": min(row.control_learning for row in results),
        "results": [vars(row) for row in results],
    }
    print(
        f"\nplanner over best fixed tree, at least {worst_fixed:.3f}; over plain decoding, at least {worst_plain:.3f}"
    )
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0 if worst_fixed >= 1 - 1e-9 and worst_plain >= 0.98 else 1


if __name__ == "__main__":
    sys.exit(main())
