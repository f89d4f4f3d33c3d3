"""The control: it finds the best tree, parks when nothing pays, and probes for little."""

import random

import numpy as np
import pytest

from benchmarks.planner_simulation import PROFILES, controlled_speed, pass_costs, read_curves, simulate
from specstream_mlx.planning.control import Acceptance, Control, LearnedCosts, PassTimes
from specstream_mlx.planning.planner import Candidates, Curve, PassCosts, candidate_trees, solve
from specstream_mlx.planning.tabulated import TabulatedCosts
from specstream_mlx.planning.times import RECENT
from specstream_mlx.target.tree import DraftTree

COSTS = pass_costs(read_curves()["m5max-12b-4bit-model"])


def control(prior, costs=COSTS, max_rows=16):
    trees = candidate_trees(prior, max_rows)
    return Control(Candidates(trees, len(prior[0])), prior, TabulatedCosts(trees, [(0, costs)]))


def test_planner_and_control_on_published_curves():
    """Red when: plain decoding is left out of the plan, failed probes do not lengthen the pause, or are long."""
    results = simulate(tokens=1500)
    assert len(results) == 8 * len(PROFILES)
    for row in results:
        assert row.planned >= row.fixed - 1e-9, row
        assert row.planned >= 1, row
        assert min(row.control, row.control_misled) >= 0.98, row
        assert row.control_learning >= 0.97, row


@pytest.mark.parametrize("curve", ["m4pro-4bit-matmul", "m2ultra-7b-fp16-model", "m1-4bit-linear"])
def test_noise_costs_little_over_500_tokens_whatever_was_planned(curve):
    costs = pass_costs(read_curves()[curve])
    for prior in PROFILES.values():
        assert controlled_speed(control(prior, costs), costs, PROFILES["noise"], seed=3, tokens=500) >= 0.97


@pytest.mark.parametrize(("before", "after"), [("noise", "structured"), ("structured", "noise")])
def test_the_control_follows_a_text_that_changes(before, after):
    """Red when: what was seen long ago counts as much as what is seen now."""
    steered = control(PROFILES[before])
    controlled_speed(steered, COSTS, PROFILES[before], seed=1, tokens=1000)
    best = solve(COSTS, PROFILES[after], 16).speedup
    assert controlled_speed(steered, COSTS, PROFILES[after], seed=2, tokens=3000) >= 0.75 * best


def test_parking_and_pauses_that_double():
    steered = control(PROFILES["good"])
    root, pauses, plain, drafted = DraftTree.chain(0), [], 0, []
    for _ in range(1000):
        choice = steered.choose(0)
        if choice is None:
            plain += 1
        elif plain:
            pauses.append(plain)
            drafted.append(0)
            plain = 0
        if choice is not None and drafted:
            drafted[-1] += 1
        steered.record(choice is not None, choice[0] if choice else root, [0])
    assert pauses[:4] == [48, 96, 192, 384]
    assert set(drafted[:3]) == {Control.PROBE}


def test_stays_plain_until_the_last_pass_of_a_pause():
    """Red when: a pass is launched ahead of a probe, or none is in a pause."""
    steered = control(PROFILES["noise"])
    flags = []
    for _ in range(Control.FIRST_PAUSE):
        assert steered.choose(0) is None
        flags.append(steered.stays_plain)
        steered.record(False, DraftTree.chain(0), [0])
    assert flags == [True] * (Control.FIRST_PAUSE - 1) + [False]
    assert steered.choose(0) is not None, "the probe"


def test_acceptance_by_depth_and_rank():
    seen = Acceptance([[0.5, 0.2], [0.5, 0.2]])
    tree = DraftTree.from_paths([(0, 0), (1,)])
    for _ in range(400):
        seen.record(tree, [0, tree.paths.index((1,))])
    rates = seen.rates()
    assert rates[0, 1] > 0.95
    assert rates[0, 0] < 0.05
    assert rates[1, 0] < 0.1, "a depth that is not reached follows the one before it"
    assert np.all(rates.sum(axis=1) <= 1 + 1e-9)


def test_costs_are_straight_between_contexts_and_the_nearest_beyond():
    def costs(scale, parallel):
        curve = Curve(((1, scale), (8, 2 * scale)))
        more = Curve(tuple((rows, cost + 0.5 * scale) for rows, cost in curve.points))
        return PassCosts(scale, curve, curve, Curve(((1, parallel), (8, parallel))), more, leaf_costs(scale))

    def leaf_costs(scale):
        return Curve(((8, 2.2 * scale),))

    trees, never, always = [DraftTree.chain(7)], np.zeros(1), np.ones(1)
    table = TabulatedCosts(trees, [(100, costs(1.0, 9.0)), (200, costs(3.0, 4.5))])
    assert [float(table.at(context, never)[0][0]) for context in (0, 100, 150, 200, 900)] == [2.5, 2.5, 3.5, 4.5, 4.5]
    assert [table.at(context, never)[1] for context in (0, 150, 900)] == [1.0, 2.0, 3.0]
    assert [table.insertion(0, context, 0.0) for context in (0, 149, 151)] == ["deferred", "deferred", "parallel"]
    assert table.at(0, always)[0].tolist() == pytest.approx([2.2])
    assert table.at(0, 0.9 * always)[0].tolist() == pytest.approx([2.25])
    assert [table.insertion(0, 0, end) for end in (1.0, 0.5, 0.3)] == ["leaf", "leaf", "deferred"]
    assert TabulatedCosts(trees, [(0, costs(1.0, 0.1))], "deferred").insertion(0, 0, 1.0) == "deferred"


def test_costs_are_learned_from_passes_and_kept_for_the_next_generation():
    """Red when: plain passes are never tried, tried again and again, or their times are forgotten."""
    chain, root, times = DraftTree.chain(4), DraftTree.chain(0), PassTimes()
    rng = random.Random(0)
    plain_passes = []
    for _ in range(2):
        steered = Control(Candidates([chain], 1), [[0.9]] * 4, LearnedCosts(chain, "deferred", times))
        plain_passes.append(0)
        for _ in range(60):
            choice = steered.choose(0)
            plain_passes[-1] += choice is None
            nodes = range(1 + (rng.choice((3, 4)) if choice else 0))
            steered.record(choice is not None, choice[0] if choice else root, nodes)
            steered.observe(choice is not None, choice[0] if choice else root, 0.003 if choice else 0.001)
    assert plain_passes == [Control.LEARNING_PAUSE, 0]
    costs, plain = LearnedCosts(chain, "deferred", times).at(0, np.ones(1))
    assert (costs.tolist(), plain) == ([0.003], 0.001)


def test_a_busy_moment_is_forgotten_by_short_generations():
    """Red when: costs remembered of one generation keep the next ones from drafting, so that they stay as they are."""
    chain, root, times = DraftTree.chain(4), DraftTree.chain(0), PassTimes()
    times.plain.extend([0.001] * RECENT)
    times.of(chain, "deferred").extend([0.02] * RECENT)
    drafted = []
    for _ in range(12):
        steered = Control(Candidates([chain], 1), [[0.9]] * 4, LearnedCosts(chain, "deferred", times))
        choices = []
        for _ in range(8):
            choices.append(steered.choose(0))
            steered.record(choices[-1] is not None, chain if choices[-1] else root, range(5 if choices[-1] else 1))
            steered.observe(choices[-1] is not None, chain if choices[-1] else root, 0.0015 if choices[-1] else 0.001)
        drafted.append(sum(choice is not None for choice in choices))
    assert drafted[0] == Control.PROBE
    assert drafted[-1] == 8


def test_learned_costs_park_a_tree_that_is_accepted_and_still_too_dear():
    chain, root = DraftTree.chain(4), DraftTree.chain(0)
    steered = Control(Candidates([chain], 1), [[0.9]] * 4, LearnedCosts(chain, "deferred", PassTimes()))
    drafted = 0
    for _ in range(300):
        choice = steered.choose(0)
        drafted += choice is not None
        steered.record(choice is not None, choice[0] if choice else root, [0, 1] if choice else [0])
        steered.observe(choice is not None, choice[0] if choice else root, 0.005 if choice else 0.001)
    assert drafted < 20
