"""Where contestants stand: from paired differences alone."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.studies.engine.standing import overall, standings

SEEDS = [[0.90, 0.91, 0.92, 0.90, 0.91], [0.80, 0.81, 0.82, 0.80, 0.81], [0.70, 0.95, 0.85, 0.99, 0.60]]


def test_surely_ahead_level_and_surely_behind():
    found = standings(dict(zip("abc", SEEDS, strict=True)), "max")
    assert list(found) == ["a", "c", "b"]
    assert (found["a"].rank, found["a"].ahead, found["a"].behind, found["a"].level) == (1, ("b",), (), ("c",))
    assert (found["b"].rank, found["b"].ahead, found["b"].behind, found["b"].level) == (3, (), ("a",), ("c",))


def test_differences_are_paired():
    """What the seeds have in common drops out: a small but steady lead is sure, whatever the seeds do to both."""
    base = [0.1, 0.5, 0.9, 0.3, 0.7]
    lead = [0.011, 0.010, 0.009, 0.010, 0.010]
    found = standings({"a": base, "b": [x + d for x, d in zip(base, lead, strict=True)]}, "max")
    assert found["b"].ahead == ("a",)
    assert standings({"a": base, "b": base[::-1]}, "max")["b"].level == ("a",)


def test_what_diverged_is_behind():
    found = standings({"a": [1.0, 1.0], "b": [math.nan, 1.0], "c": [math.inf, 1.0]}, "min")
    assert found["a"].ahead == ("b", "c")
    assert found["b"].level == ("c",)
    assert (found["b"].rank, found["c"].rank) == (2, 2)


def test_one_seed_decides_nothing():
    found = standings({"a": [1.0], "b": [0.0]}, "max")
    assert [found[name].level for name in "ab"] == [("b",), ("a",)]


@given(st.lists(st.lists(st.floats(-10, 10), min_size=4, max_size=4), min_size=2, max_size=5))
def test_standings_are_antisymmetric_and_turn_with_the_direction(values):
    named = {str(place): row for place, row in enumerate(values)}
    up, down = standings(named, "max"), standings({n: [-v for v in row] for n, row in named.items()}, "min")
    for name, held in up.items():
        assert all(name in up[other].behind for other in held.ahead)
        assert all(name in up[other].level for other in held.level)
        assert {*held.ahead, *held.behind, *held.level} == set(named) - {name}
        assert held == down[name]


def test_overall_ranks_and_wins():
    boards = [{"a": [3.0, 3.0], "b": [2.0, 2.0], "c": [1.0, 1.0]}, {"a": [3.0, 3.0], "b": [1.0, 2.0], "c": [2.0, 1.0]}]
    found = overall(boards, "max")
    assert list(found) == ["a", "b", "c"]
    assert (found["a"].rank, found["a"].wins) == (1.0, 1.0)
    assert found["b"].rank == pytest.approx((2.0 + 2.5) / 2)
    assert found["b"].wins == pytest.approx((0.5 + 0.25) / 2)
    assert sum(held.wins for held in found.values()) == pytest.approx(1.5)


def test_overall_counts_a_tie_half_and_leaves_out_who_missed_a_variant():
    found = overall([{"a": [1.0], "b": [1.0], "c": [9.0]}, {"a": [1.0], "b": [1.0]}], "max")
    assert set(found) == {"a", "b"}
    assert (found["a"].rank, found["a"].wins) == (1.5, 0.5)
    assert overall([], "max") == {}
