"""The plan and the control of one generation, from what the user asked for and what was measured."""

from dataclasses import replace

from specstream_mlx.drafters.protocol import Drafter
from specstream_mlx.errors import InvalidInputError
from specstream_mlx.models.identity import stored_calibration
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.options import DraftMode, DraftOptions
from specstream_mlx.planning.control import Control, LearnedCosts
from specstream_mlx.planning.plan import DraftPlan, assumed_rates, make_plan
from specstream_mlx.planning.planner import Candidates, candidate_trees
from specstream_mlx.planning.tabulated import TabulatedCosts


def steer(
    mode: DraftMode, model: SpecStreamModel, drafter: Drafter | None, options: DraftOptions
) -> tuple[DraftPlan, Control | None]:
    """The plan for a generation, and its control in ``auto``.

    A stored calibration that cannot be used is left aside, and the plan's note says why.

    Raises:
        UsageError: as ``make_plan``.
    """
    if drafter is None:
        return make_plan(mode, 0, options, model.args.vocab_size), None
    plan = make_plan(mode, drafter.max_depth, options, model.args.vocab_size, ways=drafter.ways)
    if mode not in ("auto", "tree"):
        return plan, None
    only = drafter.ways[0] if len(drafter.ways) == 1 else options.way
    calibration, note = options.calibration, None
    if calibration == "stored":
        try:
            calibration = stored_calibration(model, drafter)
        except InvalidInputError as error:
            calibration, note = None, f"{error}; going on without it"
    if calibration is not None and plan.source == "default":
        planned = calibration.plan(0, only, drafting=mode == "tree")
        plan = replace(plan, tree=planned.tree, budget=planned.tree.size - 1, way=planned.way, source="calibrated")
    plan = replace(plan, note=note)
    if mode == "tree":
        return plan, None
    rates = calibration.rates if calibration is not None else assumed_rates(drafter.max_depth)
    if calibration is None or plan.source == "user":
        tree = plan.tree or candidate_trees(rates, plan.budget + 1)[-1]
        candidates = Candidates([tree], len(rates[0]))
    else:
        candidates = calibration.candidates
    if calibration is None:
        return plan, Control(candidates, rates, LearnedCosts(tree, only, model.pass_times(drafter.name)))
    if candidates is calibration.candidates:
        return plan, Control(candidates, rates, calibration.tabulated(only))
    return plan, Control(candidates, rates, TabulatedCosts(candidates.trees, calibration.costs, only))
