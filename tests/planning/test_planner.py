"""The planner against brute force: every tree, every insertion."""

import itertools
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specstream_mlx.options import Insertion
from specstream_mlx.planning.planner import Candidates, Curve, PassCosts, best_paths, solve
from specstream_mlx.target.tree import DraftTree
from tests.tolerances import FLOAT64

GAMMA, WIDTH = 3, 2
ALL_PATHS = [path for depth in range(1, GAMMA + 1) for path in itertools.product(range(WIDTH), repeat=depth)]
MAX_NODES = 5


def all_trees():
    """Every tree of up to five drafted nodes over two ranks and three depths."""
    for size in range(1, MAX_NODES + 1):
        for paths in itertools.combinations(ALL_PATHS, size):
            chosen = set(paths)
            if all(len(path) == 1 or path[:-1] in chosen for path in paths):
                yield DraftTree.from_paths(paths)


TREES = tuple(all_trees())
rate = st.one_of(st.just(0.0), st.floats(0.001, 1))  # no products that underflow
rates = st.lists(
    st.tuples(rate, rate).map(lambda pair: (pair[0], pair[1] * (1 - pair[0]) if pair[0] < 0.999 else 0.0)),
    min_size=GAMMA,
    max_size=GAMMA,
)
cost = st.floats(0.1, 5)


@st.composite
def pass_costs(draw):
    def curve():
        return Curve(tuple((rows, draw(cost)) for rows in range(1, MAX_NODES + 2)))

    tree = curve()
    chain = Curve(tuple((rows, min(seconds, draw(cost))) for rows, seconds in tree.points))
    streams = draw(cost)
    leaf = streams * draw(st.floats(0, 1))
    deferred, with_leaf = (Curve(tuple((n, c + more) for n, c in chain.points)) for more in (streams, leaf))
    return PassCosts(draw(cost), chain, tree, curve(), deferred, with_leaf)


@settings(max_examples=150, deadline=None)
@given(costs=pass_costs(), rates=rates)
def test_no_tree_and_no_insertion_beats_the_plan(costs, rates):
    """Red when: costs are taken to rise with rows, an insertion is left out, or rates are added up."""
    rates = [sorted(row, reverse=True) for row in rates]
    plan = solve(costs, rates)
    best = 1 / costs.plain
    trees = [tree for tree in TREES if tree.depths[tree.leaf] == tree.max_depth]
    for tree, insertion in itertools.product(trees, get_args(Insertion)):
        tokens = 1 + sum(_by_hand(tree, rates))
        best = max(best, tokens / costs.of(tree, insertion, _end_by_hand(tree, rates)))
    assert plan.tokens / plan.seconds == pytest.approx(best, rel=1e-9, abs=FLOAT64)
    if plan.tree.size > 1:
        assert plan.seconds == pytest.approx(costs.of(plan.tree, plan.way, _end_by_hand(plan.tree, rates)))
        assert plan.tokens == pytest.approx(1 + sum(_by_hand(plan.tree, rates)))


def _end_by_hand(tree, rates):
    path, value = (), 1.0
    while (*path, 0) in tree.paths:
        value *= rates[len(path)][0]
        path = (*path, 0)
    return value


def _by_hand(tree, rates):
    for path in tree.paths[1:]:
        value = 1.0
        for depth, rank in enumerate(path):
            value *= rates[depth][rank]
        yield value


@given(rates=rates)
def test_best_paths_fall_and_are_closed_under_prefix(rates):
    """Red when: ranks are taken in their order although a later rank is right more often."""
    seen, values = {()}, []
    for path in best_paths(rates):
        assert path[:-1] in seen
        seen.add(path)
        values.append(list(_by_hand(DraftTree.from_paths([path]), rates))[-1])
    assert values == sorted(values, reverse=True)
    assert seen == {(), *ALL_PATHS}


@given(rates=rates)
def test_expected_tokens_of_many_trees_at_once(rates):
    """Red when: a node takes the probability of another node's parent, or of another rank."""
    trees = [DraftTree.chain(0), *TREES[::7], DraftTree.from_paths([(0, 0), (5,), (0, 0, 1, 0)])]
    together = Candidates(trees, WIDTH).tokens(rates)
    for tree, tokens in zip(trees[:-1], together[:-1], strict=True):
        assert tokens == pytest.approx(1 + sum(_by_hand(tree, rates)))
    known = DraftTree.from_paths([(0, 0, 1)])
    assert together[-1] == pytest.approx(1 + sum(_by_hand(known, rates))), "unknown ranks and depths are never right"


def test_plain_decoding_is_a_plan_like_any_other():
    flat = Curve(((1, 1.0), (8, 1.0)))
    dear = Curve(((1, 9.0), (8, 9.0)))
    deferred = Curve(((2, 1.2), (8, 1.2)))
    hopeless = solve(PassCosts(1.0, flat, flat, dear, deferred, dear), [[0.1], [0.1]])
    assert (hopeless.tree, hopeless.speedup) == (DraftTree.chain(0), 1.0)
    forced = solve(PassCosts(1.0, flat, flat, dear, deferred, dear), [[0.1], [0.1]], drafting=True)
    assert (forced.tree.size, forced.way) == (3, "deferred")
    assert forced.speedup == pytest.approx(1.11 / 1.2)
    assert solve(PassCosts(1.0, flat, flat, flat, flat, flat), [], drafting=True).tree.size == 1


def test_leaf_insertion_pays_where_the_text_mostly_ends_there():
    """Red when: the stream pass after a miss is forgotten, or taken for granted."""
    flat, dear = Curve(((1, 1.0), (8, 1.0))), Curve(((1, 9.0),))
    costs = PassCosts(1.0, flat, flat, dear, Curve(((2, 1.5),)), Curve(((2, 1.2),)))
    for rate, insertion, seconds in ((0.9, "leaf", 1.2 + 0.1 * 0.5), (0.3, "deferred", 1.5)):
        plan = solve(costs, [[rate]], 2, drafting=True)
        assert (plan.way, plan.seconds) == (insertion, pytest.approx(seconds))


def test_a_cheaper_pass_of_more_rows_is_found():
    curve = Curve(((1, 1.0), (4, 3.0), (8, 1.5)))
    dear = Curve(((1, 9.0),))
    plan = solve(PassCosts(1.0, curve, curve, dear, curve, dear), [[0.6, 0.2, 0.1], [0.5, 0.2, 0.1]])
    assert plan.tree.size == 8


@pytest.mark.parametrize(
    ("rows", "expected"), [(1, 1.0), (2, 2.0), (3, 3.0), (5, 2.0), (7, 1.0), (9, 1.0)], ids=lambda value: f"{value}"
)
def test_curves_are_straight_between_points_and_never_fall_beyond_the_last(rows, expected):
    assert Curve(((1, 1.0), (3, 3.0), (7, 1.0))).at(rows) == expected
    assert Curve(((1, 1.0), (3, 3.0))).at(rows) == rows
    assert Curve(((4, 2.0),)).at(rows) == 2.0
