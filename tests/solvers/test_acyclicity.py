"""Acyclicity functions against autograd and known values; graphs and the way back to them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.solvers.acyclicity import h_expm, h_logdet, is_dag, path_weights, to_dag, topological_order


def cyclic(d: int = 5, seed: int = 0, scale: float = 0.2) -> np.ndarray:
    return scale * np.random.default_rng(seed).normal(size=(d, d))


def acyclic(d: int = 6, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    order = rng.permutation(d)
    W = np.zeros((d, d))
    W[np.ix_(order, order)] = np.triu(rng.normal(size=(d, d)) * 3, 1)
    return W


@pytest.mark.parametrize("s", [0.7, 1.0, 1.3])
def test_logdet_gradient_is_that_of_autograd(s: float) -> None:
    W = torch.tensor(cyclic(), requires_grad=True)
    expected = 5 * math.log(s) - torch.logdet(s * torch.eye(5, dtype=torch.float64) - W * W)
    expected.backward()
    value, gradient = h_logdet(W.detach(), s)
    assert value == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, W.grad.numpy(), rtol=1e-10, atol=1e-14)


def test_expm_gradient_is_that_of_autograd() -> None:
    W = torch.tensor(cyclic(scale=0.7), requires_grad=True)
    expected = torch.linalg.matrix_exp(W * W).trace() - 5
    expected.backward()
    value, gradient = h_expm(W.detach().numpy())
    assert value == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, W.grad.numpy(), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("h", [h_logdet, h_expm])
@pytest.mark.parametrize("seed", range(3))
def test_zero_with_zero_gradient_exactly_at_dags(h: object, seed: int) -> None:
    W = acyclic(seed=seed)
    value, gradient = h(W)  # type: ignore[operator]
    assert value == pytest.approx(0, abs=1e-9)
    # The gradient is W times the weight of paths back, of which there are none.
    np.testing.assert_allclose(gradient, 0, atol=1e-9)
    W[topological_order(W)[-1], topological_order(W)[0]] = 1e-2
    first, last = topological_order(acyclic(seed=seed))[[0, -1]]
    W[first, last] = 0.3
    assert h(W)[0] > 1e-7  # type: ignore[operator]


def test_known_values_of_a_cycle_of_two() -> None:
    cycle = [[0.0, 0.5], [0.5, 0.0]]
    assert h_logdet(cycle)[0] == pytest.approx(-math.log(1 - 0.0625), rel=1e-12)
    assert h_logdet(cycle, 2.0)[0] == pytest.approx(2 * math.log(2) - math.log(4 - 0.0625), rel=1e-12)
    assert h_expm(cycle)[0] == pytest.approx(2 * math.cosh(0.25) - 2, rel=1e-12)


def test_outside_the_domain_the_logdet_is_infinite() -> None:
    # Here the determinant is positive again, though the matrix is no M-matrix.
    assert np.linalg.det(np.eye(4) - 4 * np.kron(np.eye(2), [[0, 1], [1, 0]])) > 0
    value, gradient = h_logdet(2 * np.kron(np.eye(2), [[0, 1], [1, 0]]))
    assert value == math.inf
    assert np.isnan(gradient).all()


@given(seed=st.integers(0, 10_000), d=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_an_order_puts_every_edge_forwards(seed: int, d: int) -> None:
    W = acyclic(d, seed)
    order = topological_order(W)
    assert sorted(order) == list(range(d))
    assert not np.tril(W[np.ix_(order, order)]).any()


def test_cycles_have_no_order() -> None:
    assert topological_order(np.roll(np.eye(4), 1, axis=1)) is None
    assert not is_dag([[1.0]])
    assert is_dag([[0.0]])


@given(seed=st.integers(0, 10_000), d=st.integers(2, 8), threshold=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_to_dag_cuts_the_weakest_and_no_more_than_it_must(seed: int, d: int, threshold: float) -> None:
    W = np.random.default_rng(seed).normal(size=(d, d))
    kept = to_dag(W, threshold)
    assert is_dag(kept)
    assert (kept[kept != 0] == W[kept != 0]).all()
    weights = np.abs(W[(np.abs(W) >= threshold) & ~np.eye(d, dtype=bool)])
    cut = np.sort(weights)[: len(weights) - np.count_nonzero(kept)]
    assert set(cut) == set(weights) - set(np.abs(kept[kept != 0]))
    if len(cut):  # with the strongest of those cut, there was still a cycle
        assert not is_dag(np.where((np.abs(W) >= cut[-1]) & ~np.eye(d, dtype=bool), W, 0))


def test_to_dag_leaves_what_it_is_given() -> None:
    W = acyclic()
    np.testing.assert_array_equal(to_dag(W, 0), W)
    cycle = np.array([[0.0, 1.0], [0.5, 0.0]])
    to_dag(cycle)
    assert cycle[1, 0] == 0.5


def test_path_weights_sum_over_paths() -> None:
    W = np.zeros((4, 4))
    W[0, 1], W[1, 2], W[0, 2], W[2, 3] = 2, -3, 5, 7
    paths = path_weights(W)
    assert paths[0, 2] == pytest.approx(2 * 3 + 5)
    assert paths[0, 3] == pytest.approx(7 * (2 * 3 + 5))
    assert paths[3, 0] == 0
    absolute = torch.tensor(np.abs(W), requires_grad=True)
    (-torch.logdet(torch.eye(4, dtype=torch.float64) - absolute)).backward()
    np.testing.assert_allclose(paths.T, absolute.grad.numpy(), atol=1e-12)


@pytest.mark.parametrize("function", [h_logdet, h_expm, topological_order, to_dag])
@pytest.mark.parametrize("W", [np.zeros((2, 3)), np.zeros(4), np.zeros((0, 0)), [[0, np.nan], [0, 0]]])
def test_weights_must_be_square_and_finite(function: object, W: object) -> None:
    with pytest.raises(ValueError, match="W must be"):
        function(W)  # type: ignore[operator]


@pytest.mark.parametrize("function", [h_logdet, h_expm])
@pytest.mark.parametrize("size", [1.0, 1e30, 1e200])
def test_without_cycles_both_are_zero_however_large_the_weights(function: Any, size: float) -> None:
    W = size * np.triu(np.ones((5, 5)), 1)[::-1, ::-1]
    value, gradient = function(W)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, np.zeros((5, 5)))


@pytest.mark.parametrize("size", [1e30, 1e200])
def test_no_nan_from_finite_weights(size: float) -> None:
    cycle = size * np.roll(np.eye(3), 1, 1)
    with pytest.raises(ValueError, match="W must be so small that its .* finite, got weights up to 1e"):
        h_expm(cycle)
    if size < 1e100:
        assert h_logdet(cycle)[0] == math.inf
    else:
        with pytest.raises(ValueError, match="W must be so small that its squares are finite"):
            h_logdet(cycle)


def test_arguments_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="s must be positive"):
        h_logdet(np.zeros((2, 2)), 0)
    with pytest.raises(ValueError, match="threshold must be"):
        to_dag(np.zeros((2, 2)), -1)
