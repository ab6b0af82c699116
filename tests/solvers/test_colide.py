"""CoLiDE: score and noise scale against autograd and search, the path against a plain transcription of its formulas."""

from __future__ import annotations

import contextlib
import io
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import check_estimator

from trimtab.solvers import CoLiDE, colide_score, graph_distance, noise_scale
from trimtab.solvers.colide import _Stage
from trimtab.solvers.order_scores import noise_unit

QUICK = {"warm_iter": 1000, "max_iter": 3000, "lr": 2e-3}


def problem(d: int = 5, n: int = 500, seed: int = 0, std: object = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    order = rng.permutation(d)
    upper = np.triu(rng.uniform(0.7, 2, (d, d)) * rng.choice([-1, 1], (d, d)) * (rng.random((d, d)) < 0.6), 1)
    X = (rng.normal(size=(n, d)) * np.asarray(std)) @ np.linalg.inv(np.eye(d) - upper)
    W, mixed = np.zeros((d, d)), np.zeros((n, d))
    W[np.ix_(order, order)], mixed[:, order] = upper, X
    return mixed, W


def covariance(d: int = 5, seed: int = 0) -> np.ndarray:
    return np.cov(np.random.default_rng(seed).normal(size=(50, d)).T)


def fit(X: np.ndarray, **options: object) -> CoLiDE:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return CoLiDE(**{**QUICK, **options}).fit(X)  # type: ignore[arg-type]


@pytest.mark.parametrize("sigma", [0.7, np.array([0.5, 1.0, 2.0, 3.0, 0.1])])
def test_score_is_the_papers_and_its_gradient_that_of_autograd(sigma: object) -> None:
    S = covariance()
    W = torch.tensor(np.random.default_rng(1).normal(size=(5, 5)), requires_grad=True)
    rest = torch.eye(5, dtype=torch.float64) - W
    scales = torch.as_tensor(np.broadcast_to(np.asarray(sigma, dtype=float), 5).copy())
    expected = ((rest.T @ torch.tensor(S) @ rest).diagonal() / (2 * scales)).sum() + scales.sum() / 2
    expected.backward()
    value, gradient = colide_score(W.detach().numpy(), S, sigma)  # type: ignore[arg-type]
    assert value == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, W.grad.numpy(), rtol=1e-10)


def test_noise_scale_minimises_the_score() -> None:
    S, W = covariance(), 0.3 * np.random.default_rng(1).normal(size=(5, 5))
    best = minimize_scalar(lambda sigma: colide_score(W, S, sigma)[0], bounds=(1e-3, 10), method="bounded")
    assert noise_scale(W, S) == pytest.approx(best.x, rel=1e-4)
    each = noise_scale(W, S, "unequal")
    value = colide_score(W, S, each)[0]
    for j in range(5):
        for factor in (0.98, 1.02):
            assert colide_score(W, S, np.where(np.arange(5) == j, factor * each, each))[0] > value


def test_noise_scale_is_bounded_where_there_is_none() -> None:
    S = np.array([[1.0, 2.0], [2.0, 4.0]])
    W = np.array([[0.0, 2.0], [0.0, 0.0]])
    np.testing.assert_allclose(noise_scale(W, S, "unequal"), [1.0, 0.02])
    perfect = np.array([[1.0, 2.0], [0.0, 0.0]])
    assert noise_scale(perfect, S) == pytest.approx(0.01 * math.sqrt(2.5))


@given(factor=st.floats(0.1, 10), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_score_scales_with_the_data(factor: float, seed: int) -> None:
    S, W = covariance(seed=seed), 0.3 * np.random.default_rng(seed).normal(size=(5, 5))
    for noise in ("equal", "unequal"):
        sigma = noise_scale(W, S, noise)  # type: ignore[arg-type]
        scaled = noise_scale(W, factor**2 * S, noise)  # type: ignore[arg-type]
        np.testing.assert_allclose(scaled, factor * np.asarray(sigma), rtol=1e-10)
        assert colide_score(W, factor**2 * S, scaled)[0] == pytest.approx(factor * colide_score(W, S, sigma)[0])


@pytest.mark.parametrize("noise", ["equal", "unequal"])
def test_data_in_another_unit_are_fitted_as_with_another_lambda(noise: str) -> None:
    """Data times c are fitted as with lambda / c, far or near."""
    X, _ = problem()
    for unit, far in ((3.0, 0.0), (1e4, 1e8), (1e-4, 1.0)):
        one = fit(unit * X + far, noise=noise, lambda1=0.05 * unit)
        other = fit(X, noise=noise, lambda1=0.05)
        np.testing.assert_allclose(one.raw_weights_, other.raw_weights_, atol=1e-6)
        np.testing.assert_allclose(one.noise_std_, unit * other.noise_std_, rtol=1e-6)


def test_data_in_large_units_are_fitted_and_those_in_small_ones_told_of(recwarn: pytest.WarningsRecorder) -> None:
    X, W = problem(n=2000, seed=1)
    assert graph_distance(fit(1e4 * X).weights_, W).shd == 0
    assert not recwarn.list
    with pytest.warns(UserWarning, match="lambda1 = 0.05 leaves no edge .* lambda1 must be below"):
        assert not fit(1e-4 * X).adjacency_.any()
    recwarn.clear()
    assert not fit(np.random.default_rng(0).normal(size=(2000, 4))).adjacency_.any()  # nor are there any
    assert not recwarn.list


def transcription(X: np.ndarray, noise: str, stages: list[tuple[float, float]], steps: int, lr: float) -> np.ndarray:
    """The published path written down plainly, for data that never leave the domain."""
    X = X - X.mean(0)
    n, d = X.shape
    eye, W = np.eye(d), np.zeros((d, d))
    for mu, s in stages:
        first, second = np.zeros((d, d)), np.zeros((d, d))
        for t in range(1, steps + 1):
            residual = X @ (eye - W)
            variances = (residual**2).mean(0)
            sigma = np.sqrt(variances.mean() if noise == "equal" else variances) * np.ones(d)
            inverse = np.linalg.inv(s * eye - W * W)
            assert (inverse > -1e-6).all()
            grad = -mu * X.T @ residual / n @ np.diag(1 / sigma) + mu * 0.05 * np.sign(W) + 2 * W * inverse.T
            first, second = 0.99 * first + 0.01 * grad, 0.999 * second + 0.001 * grad**2
            W = W - lr * first / (1 - 0.99**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
    return W


@pytest.mark.parametrize("noise", ["equal", "unequal"])
def test_follows_the_published_path(noise: str) -> None:
    X, _ = problem(std=[1.0, 2.0, 0.5, 1.5, 3.0])
    X = X / noise_unit(np.cov(X.T, bias=True))
    found = fit(X, noise=noise, mu=(1.0, 0.1), s=(1.0, 0.9), warm_iter=200, max_iter=200, lr=1e-3)
    expected = transcription(X, noise, [(1.0, 1.0), (0.1, 0.9)], 200, 1e-3)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(found.raw_weights_, expected, atol=1e-9)


def test_with_the_noise_scale_fixed_it_is_dagma(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = pytest.importorskip("dagma.linear")
    X, _ = problem()
    X = X / noise_unit(np.cov(X.T, bias=True))
    move = _Stage.move

    def with_unit_scale(self: _Stage, W: np.ndarray) -> np.ndarray | None:
        inverse = move(self, W)
        self.weight = self.mu
        return inverse

    monkeypatch.setattr(_Stage, "move", with_unit_scale)
    found = fit(X, mu=(1.0, 0.1), s=(1.0, 0.9), warm_iter=300, max_iter=300, lr=1e-3)
    with contextlib.redirect_stderr(io.StringIO()):
        expected = linear.DagmaLinear("l2").fit(
            X.copy(), lambda1=0.05, w_threshold=0, T=2, s=[1.0, 0.9], warm_iter=300, max_iter=300, lr=1e-3
        )
    np.testing.assert_allclose(found.raw_weights_, expected, atol=1e-9)


@pytest.mark.parametrize("noise", ["equal", "unequal"])
def test_finds_the_graph_and_the_noise(noise: str) -> None:
    std = np.full(5, 1.5) if noise == "equal" else np.array([1.0, 1.5, 0.8, 1.5, 1.0])
    X, W = problem(n=2000, seed=1, std=std)
    found = fit(X, noise=noise)
    assert graph_distance(found.weights_, W).shd == 0
    np.testing.assert_allclose(found.weights_, W, atol=0.15)
    np.testing.assert_allclose(np.sort(found.noise_std_), np.sort(std), rtol=0.05)
    assert np.abs(found.raw_weights_.diagonal()).max() < 1e-3
    assert found.is_dag_
    assert found.adjacency_.dtype == bool


def test_leaving_the_domain_halves_the_rate_or_begins_again() -> None:
    X, _ = problem(d=6, n=2000, seed=3)
    bold = fit(X, lr=0.5, warm_iter=400, max_iter=3000)
    assert np.isfinite(bold.raw_weights_).all()
    S = np.cov(X.T, bias=True)
    # In a first stage (s = 1) steps are taken back ...
    gentle = _Stage(S, "equal", 0.05, 10.0, 1.0).minimise(np.zeros((6, 6)), 50, 0.5, (0.99, 0.999), 1e-6)
    assert gentle.inside
    assert (np.linalg.inv(np.eye(6) - gentle.W**2) >= -1e-6).all()
    # ... in a late one the stage is given up, and so where the start is outside.
    assert not _Stage(S, "equal", 0.05, 10.0, 0.7).minimise(np.zeros((6, 6)), 50, 0.5, (0.99, 0.999), 1e-6).inside
    outside = _Stage(S, "equal", 0.05, 1.0, 1.0).minimise(2 - 2 * np.eye(6), 50, 1e-3, (0.99, 0.999), 1e-6)
    assert not outside.inside
    assert outside.n_iter == 0


def test_a_stage_leaves_its_start_as_it_was() -> None:
    start = np.zeros((5, 5))
    _Stage(covariance(), "unequal", 0.05, 1.0, 1.0).minimise(start, 5, 1e-2, (0.99, 0.999), 1e-6)
    assert not start.any()


def test_settles_and_says_so(recwarn: pytest.WarningsRecorder) -> None:
    X, _ = problem()
    CoLiDE(**{**QUICK, "max_iter": 30_000}).fit(X)  # type: ignore[arg-type]
    assert not recwarn.list
    with pytest.warns(ConvergenceWarning, match="max_iter") as caught:
        CoLiDE(warm_iter=5, max_iter=5).fit(X)
    assert caught[0].filename == __file__


def test_a_large_lambda_leaves_no_edge() -> None:
    X, _ = problem()
    with pytest.warns(UserWarning, match="lambda1 = 100 leaves no edge"):
        assert not fit(X, lambda1=100.0).adjacency_.any()


def test_columns_may_come_in_any_order() -> None:
    X, _ = problem(std=[1.0, 2.0, 0.5, 1.5, 3.0])
    p = np.array([3, 0, 4, 2, 1])
    for noise in ("equal", "unequal"):
        plain, mixed = fit(X, noise=noise), fit(X[:, p], noise=noise)
        np.testing.assert_allclose(mixed.raw_weights_, plain.raw_weights_[np.ix_(p, p)], atol=1e-5)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("noise", "both"),
        ("lambda1", -0.1),
        ("mu", (1.0,)),
        ("mu", ()),
        ("s", (1.0, 0.9, 0.8, 0.0)),
        ("lr", 0.0),
        ("betas", (0.9, 1.0)),
        ("warm_iter", 0),
        ("max_iter", 0),
        ("tol", -1.0),
        ("threshold", math.nan),
    ],
)
def test_arguments_out_of_range_are_named(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=argument):
        CoLiDE(**{argument: value}).fit(problem()[0])  # type: ignore[arg-type]


def test_bad_data_are_refused() -> None:
    X, _ = problem()
    with pytest.raises(ValueError, match=r"X must be without constant columns, got \[2\]"):
        CoLiDE().fit(np.where(np.arange(5) == 2, 1.0, X))
    with pytest.raises(ValueError, match="X must be so small"), np.errstate(over="ignore"):
        CoLiDE().fit(1e200 * X)
    with pytest.raises(ValueError, match="sigma must be"):
        colide_score(np.zeros((2, 2)), np.eye(2), [1.0, 0.0])
    with pytest.raises(ValueError, match=r"S must be of shape \(2, 2\) as W"):
        colide_score(np.zeros((2, 2)), np.eye(3), 1.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("noise", ["equal", "unequal"])
def test_keeps_scikit_learns_conventions(noise: str) -> None:
    check_estimator(CoLiDE(noise, warm_iter=3, max_iter=3))  # type: ignore[arg-type]
