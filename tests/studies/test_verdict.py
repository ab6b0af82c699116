import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from trimtab.studies.engine.study import Claim
from trimtab.studies.engine.verdict import interval, judge

NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=8)


@given(NUMBERS)
def test_interval_is_students(values):
    mean, low, high = interval(values)
    error = stats.sem(values)
    expected = stats.t.interval(0.95, len(values) - 1, loc=stats.tmean(values), scale=error) if error else (mean, mean)
    assert (low, high) == pytest.approx(expected, rel=1e-9, abs=1e-6)
    assert low <= mean <= high


def verdict(differences, **claim):
    base = [10.0 + n for n in range(len(differences))]  # paired: what the seeds have in common drops out
    mine = [a + d for a, d in zip(base, differences, strict=True)]
    return judge(Claim("a", beats="b", on="m", **claim), {"a": mine, "b": base})


@pytest.mark.parametrize(
    ("differences", "by", "word"),
    [
        ([0.10, 0.11, 0.12], 0.05, "holds"),
        ([0.04, 0.05, 0.06], 0.05, "not shown"),  # surely better, not surely by the margin
        ([0.01, 0.011, 0.012], 0.05, "fails"),  # surely better, surely by less than the margin
        ([-0.01, 0.0, 0.01], 0.05, "fails"),
        ([-0.01, 0.0, 0.01], 0.0, "not shown"),
        ([-0.2, -0.21, -0.2], 0.0, "fails"),
        ([-0.5, 0.1, 0.6], 0.05, "not shown"),
        ([0.1, 0.1, 0.1], 0.0, "holds"),
        ([0.0, 0.0, 0.0], 0.0, "fails"),  # equal is not better
        ([-0.001, 0.0, 0.001], -0.01, "holds"),  # no worse than, within a margin
        ([-0.10, -0.11, -0.12], -0.01, "fails"),
    ],
)
def test_words(differences, by, word):
    assert verdict(differences, by=by).word == word


def test_the_effect_is_the_paired_difference():
    found = verdict([0.1, 0.2, 0.3])
    assert found.effect == pytest.approx(0.2)
    assert found.interval == pytest.approx(stats.ttest_1samp([0.1, 0.2, 0.3], 0).confidence_interval(), rel=1e-6)


def test_below_counts_downwards():
    found = judge(Claim("a", below="b", on="m", by=1.0), {"a": [1.0, 1.1, 1.2], "b": [3.0, 3.1, 3.2]})
    assert (found.word, found.effect) == ("holds", pytest.approx(2.0))


def test_ratios():
    values = {"a": [1.0, 2.0, 3.0], "b": [20.0, 41.0, 59.0]}
    assert judge(Claim("a", below="b", on="m", times=10), values).word == "holds"
    assert judge(Claim("a", below="b", on="m", times=20), values).word == "not shown"
    assert judge(Claim("a", below="b", on="m", times=30), values).word == "fails"
    assert judge(Claim("b", below="a", on="m", times=2), values).word == "fails"
    assert judge(Claim("a", below="b", on="m", times=10), values).effect == pytest.approx(20, rel=0.05)
    assert judge(Claim("a", below="b", on="m", times=2), {"a": [0.0, 1.0], "b": [1.0, 1.0]}).word == "not shown"


@pytest.mark.parametrize(
    ("claim", "values", "word"),
    [
        ({"at_most": 0.0}, [0.0, 0.0, 0.0], "holds"),
        ({"at_most": 0.0}, [1.0, 1.0, 1.0], "fails"),
        ({"at_least": 0.9}, [0.95, 0.96, 0.97], "holds"),
        ({"at_least": 0.9}, [0.5, 0.51, 0.52], "fails"),
        ({"at_least": 0.9}, [0.7, 0.9, 1.1], "not shown"),
        ({"at_most": 1.0}, [0.1, 0.1, 0.99], "not shown"),  # a bound is judged by its interval, not by its mean
        ({"at_most": 1.0}, [0.1, 0.1, 0.2], "holds"),
        ({"at_most": 1.0}, [1.1, 1.2, 1.15], "fails"),
    ],
)
def test_bounds(claim, values, word):
    assert judge(Claim("a", on="m", **claim), {"a": values}).word == word


def test_one_seed_shows_nothing():
    found = verdict([5.0])
    assert (found.word, found.interval, found.effect) == ("not shown", None, 5.0)
    assert "one seed" in found.reason


def test_a_diverged_run_shows_nothing():
    assert verdict([0.1, math.nan, 0.1]).word == "not shown"
    assert "diverged" in verdict([0.1, math.inf, 0.1]).reason


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"on": "m"}, "one of beats"),
        ({"on": "m", "beats": "b", "at_most": 1.0}, "one of beats"),
        ({"beats": "b"}, "on must"),
        ({"on": "m", "beats": "b", "times": -1.0}, "times"),
        ({"on": "m", "at_most": 1.0, "times": 2.0}, "times"),
    ],
)
def test_bad_claims(fields, named):
    with pytest.raises(ValueError, match=named):
        Claim("a", **fields)
