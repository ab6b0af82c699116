"""Structural Hamming distance and rates on graphs where they can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.solvers import graph_distance


def graph(*edges: tuple[int, int], d: int = 4) -> np.ndarray:
    W = np.zeros((d, d))
    for i, j in edges:
        W[i, j] = -0.7
    return W


def test_missing_extra_and_reversed_edges_count_one_each() -> None:
    truth = graph((0, 1), (1, 2), (2, 3))
    distance = graph_distance(graph((0, 1), (2, 1), (0, 3)), truth)
    assert distance.shd == 3  # 1-2 reversed, 2-3 missing, 0-3 extra
    assert distance.tpr == pytest.approx(1 / 3)
    assert distance.fdr == pytest.approx(2 / 3)
    assert distance.num_edges == 3


def test_edges_both_ways_count_once() -> None:
    distance = graph_distance(graph((0, 1), (1, 0)), graph((0, 1)))
    assert (distance.shd, distance.tpr, distance.fdr) == (1, 1, 0.5)


def test_empty_graphs_have_rates() -> None:
    assert graph_distance(graph(), graph()).tpr == 1
    assert graph_distance(graph(), graph((0, 1))).fdr == 0


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_a_distance_that_does_not_see_names(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, c = (np.triu(rng.random((5, 5)) < 0.5, 1)[np.ix_(p, p)] for p in (rng.permutation(5) for _ in range(3)))
    assert graph_distance(a, a).shd == 0
    assert graph_distance(a, b).shd == graph_distance(b, a).shd
    assert graph_distance(a, c).shd <= graph_distance(a, b).shd + graph_distance(b, c).shd
    p = rng.permutation(5)
    assert graph_distance(a[np.ix_(p, p)], b[np.ix_(p, p)]) == graph_distance(a, b)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="truth must be a square matrix"):
        graph_distance(np.eye(2), np.ones(2))
    with pytest.raises(ValueError, match="truth must be of shape"):
        graph_distance(np.eye(2), np.eye(3))
