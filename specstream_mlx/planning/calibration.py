"""What was measured on one machine for one model, and the plans that follow from it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from specstream_mlx.errors import InvalidInputError
from specstream_mlx.planning.planner import Candidates, Curve, PassCosts, Plan, candidate_trees, solve
from specstream_mlx.planning.tabulated import TabulatedCosts
from specstream_mlx.target.tree import DraftTree

FORMAT = "specstream-calibration"
FORMAT_VERSION = 2
_CURVES = ("chain", "tree", "parallel", "deferred", "leaf")


@dataclass(frozen=True)
class Calibration:
    """Costs at rising lengths of context, and acceptance per depth and rank.

    Attributes:
        key: what the measurements hold for: machine, versions, model.
        costs: seconds, by length of context.
        rates: (gamma, K), how often stream d + 1's k-th guess was right when the guesses before it were.
        anchors: how many times streams were compared with what followed, per depth.
        text: what acceptance was measured on.
    """

    key: Mapping[str, Any]
    costs: tuple[tuple[int, PassCosts], ...]
    rates: tuple[tuple[float, ...], ...]
    anchors: tuple[int, ...]
    text: str

    @property
    def way(self) -> str | None:
        """The one way to draft that the drafter has; None: any of the streams'."""
        ways = self.key.get("ways", ())
        return str(ways[0]) if len(ways) == 1 else None

    @property
    def max_rows(self) -> int:
        """The most rows of a pass that were measured at every length of context."""
        return min(max(costs.chain.max_rows, costs.tree.max_rows) for _, costs in self.costs)

    @cached_property
    def candidates(self) -> Candidates:
        """Every tree that can be best here, at least one; those too dear for what they can yield are left out."""
        trees = [
            tree
            for tree in candidate_trees(self.rates, self.max_rows)
            if any(
                costs.best_of(tree, 1.0, self.way)[0] < (tree.max_depth + 1) * costs.plain for _, costs in self.costs
            )
        ]
        return Candidates(trees or [DraftTree.chain(1)], len(self.rates[0]))

    @cached_property
    def _tables(self) -> dict[str | None, TabulatedCosts]:
        return {}

    def tabulated(self, insertion: str | None = None) -> TabulatedCosts:
        """The costs of the candidates; ``insertion``: the only one to use."""
        insertion = insertion or self.way
        if insertion not in self._tables:
            self._tables[insertion] = TabulatedCosts(self.candidates.trees, self.costs, insertion)
        return self._tables[insertion]

    @cached_property
    def _plans(self) -> dict[tuple[int, str | None, bool], Plan]:
        return {}

    def plan(self, context: int = 0, insertion: str | None = None, *, drafting: bool = False) -> Plan:
        """The plan at the measured length of context nearest to ``context``; see ``solve``."""
        insertion = insertion or self.way
        length, costs = min(self.costs, key=lambda entry: abs(entry[0] - context))
        asked = (length, insertion, drafting)
        if asked not in self._plans:
            self._plans[asked] = solve(costs, self.rates, self.max_rows, insertion=insertion, drafting=drafting)
        return self._plans[asked]

    def to_dict(self) -> dict[str, Any]:
        """As JSON; ``plans`` is for readers and not read back."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "key": dict(self.key),
            "costs": [costs_to_dict(context, costs) for context, costs in self.costs],
            "acceptance": {
                "text": self.text,
                "anchors": list(self.anchors),
                "rates": [list(row) for row in self.rates],
            },
            "plans": [plan_to_dict(context, self.plan(context)) for context, _ in self.costs],
        }

    @classmethod
    def from_dict(cls, raw: Any, where: str) -> "Calibration":
        """Read ``to_dict``'s form.

        Raises:
            InvalidInputError: anything missing, of another type, or out of range.
        """
        try:
            if raw["format"] != FORMAT or raw["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format {raw['format']!r} version {raw['format_version']!r}")
            costs = tuple((_whole(entry["context"]), _costs(entry)) for entry in raw["costs"])
            acceptance = raw["acceptance"]
            rates = tuple(tuple(_number(rate, 0.0, 1.0) for rate in row) for row in acceptance["rates"])
            anchors = tuple(_whole(count) for count in acceptance["anchors"])
            if not costs or [context for context, _ in costs] != sorted({context for context, _ in costs}):
                raise ValueError("contexts do not rise")
            if not rates or len({len(row) for row in rates}) != 1 or not rates[0]:
                raise ValueError("rates are not a table")
            if len(anchors) != len(rates):
                raise ValueError("anchors and rates differ in depth")
            return cls(dict(raw["key"]), costs, rates, anchors, str(acceptance["text"]))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            reason = f"{error} missing" if isinstance(error, KeyError) else str(error)
            raise InvalidInputError(
                f"{where}: damaged calibration ({reason}); run specstream-mlx calibrate again"
            ) from error


def costs_to_dict(context: int, costs: PassCosts) -> dict[str, Any]:
    """Costs as JSON: seconds, curves as (rows, seconds)."""
    curves = {name: [list(point) for point in getattr(costs, name).points] for name in _CURVES}
    return {"context": context, "plain": costs.plain, **curves}


def plan_to_dict(context: int, plan: Plan) -> dict[str, Any]:
    """A plan as JSON; the tree is given by its deepest paths of ranks, none of them for plain decoding."""
    inner = {path[:-1] for path in plan.tree.paths}
    return {
        "context": context,
        "nodes": plan.tree.size - 1,
        "depth": plan.tree.max_depth,
        "leaves": [list(path) for path in plan.tree.paths if path and path not in inner],
        "insertion": plan.way,
        "expected_tokens_per_pass": plan.tokens,
        "seconds_per_pass": plan.seconds,
        "plain_seconds": plan.plain_seconds,
        "expected_speedup": plan.speedup,
    }


def _costs(entry: Any) -> PassCosts:
    return PassCosts(_number(entry["plain"]), *(_curve(entry[name]) for name in _CURVES))


def _curve(points: Sequence[Any]) -> Curve:
    read = tuple((_whole(rows), _number(seconds)) for rows, seconds in points)
    if not read or [rows for rows, _ in read] != sorted({rows for rows, _ in read}):
        raise ValueError("rows do not rise")
    return Curve(read)


def _number(value: Any, least: float = 1e-9, most: float = 1e6) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    if not least <= value <= most:
        raise ValueError(f"{value!r} is out of range")
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value
