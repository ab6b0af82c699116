from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor

from trimtab.ops.point_costs import point_costs, sphere_distance
from trimtab.solvers import MongeGap, MongeMap, ResidualMLP, monge_gap, sinkhorn_divergence, transport_cost
from trimtab.studies.solvers.monge_gap.maps import ridge_map, spherical_map, squared_sphere_distance


def cloud(n: int = 40, dim: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_sphere(n: int = 60, seed: int = 0) -> Tensor:
    x = cloud(n, 3, seed)
    return x / x.norm(dim=1, keepdim=True)


SPREAD = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)  # positive definite
TURN = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    "optimal",
    [lambda x: x, lambda x: x + 3, lambda x: x @ SPREAD + 1, ridge_map(2, torch.Generator().manual_seed(1))],
    ids=["identity", "translation", "positive linear", "gradient of convex"],
)
def test_exact_gap_is_zero_for_optimal_maps(optimal: Any) -> None:
    x = cloud()
    assert float(monge_gap(x, optimal(x), reg=0.0)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("wrong", [lambda x: x @ TURN, lambda x: -x], ids=["quarter turn", "half turn"])
def test_exact_gap_is_positive_for_others(wrong: Any) -> None:
    x = cloud()
    assert float(monge_gap(x, wrong(x), reg=0.0)) > 0.5


def test_optimal_map_on_the_sphere() -> None:
    x = on_sphere(200)
    y = spherical_map(torch.Generator().manual_seed(2))(x)
    torch.testing.assert_close(y.norm(dim=1), torch.ones(200, dtype=torch.float64))
    assert float((y - x).norm(dim=1).mean()) > 0.05
    assert float(monge_gap(x, y, squared_sphere_distance, reg=0.0)) == pytest.approx(0, abs=1e-12)


@given(st.integers(0, 999), st.sampled_from(["sqeuclidean", "euclidean", 1.5, 3.0]))
@settings(max_examples=20, deadline=None)
def test_exact_gap_is_never_negative(seed: int, cost: Any) -> None:
    assert float(monge_gap(cloud(12, 3, seed), cloud(12, 3, seed + 1), cost, reg=0.0)) >= -1e-12


def test_exact_gap_is_that_of_pot() -> None:
    ot = pytest.importorskip("ot")
    x, y = cloud(), cloud(seed=1)
    costs = point_costs(x, y, "euclidean")
    expected = float(costs.diagonal().mean()) - ot.emd2([], [], costs.numpy())
    assert float(monge_gap(x, y, "euclidean", reg=0.0)) == pytest.approx(expected, abs=1e-10)


def test_entropic_gap_is_that_of_pot() -> None:
    ot = pytest.importorskip("ot")
    x, y, eps = cloud(), cloud(seed=1), 0.3
    costs = point_costs(x, y).numpy()
    uniform = np.full(40, 1 / 40)
    plan = ot.sinkhorn(uniform, uniform, costs, eps, method="sinkhorn_log", stopThr=1e-13, numItermax=20_000)
    regularised = (plan * costs).sum() + eps * (plan * np.log(plan * 40 * 40)).sum()
    found = monge_gap(x, y, reg=eps, relative=False, tol=1e-11)
    assert float(found) == pytest.approx(np.diag(costs).mean() - regularised, abs=1e-8)


def test_weak_entropy_tends_to_the_exact_gap_from_below() -> None:
    x, y = cloud(), cloud(seed=1)
    exact = float(monge_gap(x, y, reg=0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        gaps = [float(monge_gap(x, y, reg=reg, tol=1e-7)) for reg in (1.0, 0.1, 0.01, 0.002)]
    assert gaps == sorted(gaps)
    assert gaps[-1] <= exact
    assert gaps[-1] == pytest.approx(exact, rel=0.01)
    assert float(monge_gap(x, x)) < 0  # the bias that the docstring warns of


def test_relative_regularisation_is_a_share_of_the_mean_cost() -> None:
    x, y = cloud(), cloud(seed=1)
    mean = float(point_costs(x, y).mean())
    one = monge_gap(x, y, reg=0.1, tol=1e-9)
    other = monge_gap(x, y, reg=0.1 * mean, relative=False, tol=1e-9)
    assert float(one) == pytest.approx(float(other))
    assert float(monge_gap(3 * x, 3 * y, reg=0.1, tol=1e-9)) == pytest.approx(9 * float(one))


def test_invariances() -> None:
    x, y = cloud(), cloud(seed=1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for reg in (0.0, 0.5):
        value = float(monge_gap(x, y, reg=reg, relative=False, tol=1e-10))
        assert float(monge_gap(x[order], y[order], reg=reg, relative=False, tol=1e-10)) == pytest.approx(value)
        assert float(monge_gap(x, y + 2, reg=reg, relative=False, tol=1e-10)) == pytest.approx(value)


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", 3.0, "sphere", squared_sphere_distance])
@pytest.mark.parametrize("reg", [0.0, 0.3])
def test_gradient_is_danskins(cost: Any, reg: float) -> None:
    x, y = (on_sphere(8, seed) for seed in (0, 1)) if cost == "sphere" or callable(cost) else (cloud(8), cloud(8, 2, 1))
    y = y.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y: monge_gap(x, y, cost, reg, relative=False, tol=1e-12, max_iter=20_000), (y,), atol=1e-5
    )


def test_gradient_is_finite_where_points_stay() -> None:
    for points in (cloud(8), on_sphere(8)):
        for cost in ("euclidean", "sqeuclidean", 1.5, *(["sphere"] if points.shape[1] == 3 else [])):
            y = points.clone().requires_grad_()
            monge_gap(points, y, cost).backward()
            assert y.grad is not None
            assert y.grad.isfinite().all()


def test_sphere_distance() -> None:
    x, y = on_sphere(20), on_sphere(30, 1)
    torch.testing.assert_close(sphere_distance(x, y), (x @ y.T).clamp(-1, 1).acos())
    angle = torch.tensor([1e-9, math.pi - 1e-9], dtype=torch.float64)
    points = torch.stack([angle.cos(), angle.sin()], 1)
    torch.testing.assert_close(
        sphere_distance(points[:0].new_tensor([[1.0, 0.0]]), points)[0], angle, rtol=1e-7, atol=0
    )


def test_divergence_is_zero_between_equals_and_differentiable() -> None:
    x, y = cloud(), cloud(seed=1) + 1
    assert float(sinkhorn_divergence(x, x, tol=1e-9)) == pytest.approx(0, abs=1e-9)
    assert float(sinkhorn_divergence(x, y)) == pytest.approx(float(sinkhorn_divergence(y, x)), abs=1e-2)
    small = cloud(6).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: sinkhorn_divergence(x, y[:7], reg=0.5, relative=False, tol=1e-12), (small,), atol=1e-5
    )
    moved = x.clone().requires_grad_()
    sinkhorn_divergence(moved, y).backward()
    assert (moved.grad.sum(0) < 0).all()  # type: ignore[union-attr]


def test_map_learns_the_optimal_map_where_fitting_alone_does_not() -> None:
    # A start that turns by a quarter: it fits a Gaussian as well as the translation does.
    class Turned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)
            self.linear.weight.data = TURN.float()

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    x, y = cloud(300).float(), cloud(300, seed=1).float() + 1
    options: dict[str, Any] = {"lr": 0.05, "max_iter": 60, "batch_size": 100, "random_state": 0}
    fitted = MongeMap(Turned(), strength=0.0, **options).fit(x, y)
    optimal = MongeMap(Turned(), strength=1.0, **options).fit(x, y)
    error = [float((model.transform(x) - x - 1).square().sum(1).mean()) for model in (fitted, optimal)]
    assert error[0] > 1
    assert error[1] < 0.2
    assert len(optimal.gap_curve_) == 60
    assert optimal.gap_curve_[-1] < optimal.gap_curve_[0]
    assert optimal.loss_curve_[-1] == pytest.approx(optimal.fit_curve_[-1] + optimal.gap_curve_[-1])


def test_map_keeps_sklearns_conventions() -> None:
    x, y = cloud(50).numpy(), cloud(60, seed=1).numpy()
    net = torch.nn.Linear(2, 2)
    before = net.weight.clone()
    model = MongeMap(net, max_iter=3, batch_size=20, random_state=0)
    with pytest.raises(NotFittedError):
        model.transform(x)
    first = model.fit_transform(x, y)
    assert isinstance(first, np.ndarray)
    assert first.dtype == x.dtype
    assert torch.equal(net.weight, before)
    again = clone(MongeMap(max_iter=3, batch_size=20, random_state=0))
    assert np.array_equal(again.fit_transform(x, y), clone(again).fit_transform(x, y))


def test_map_takes_lists_tables_and_nets_of_any_precision() -> None:
    x, y = cloud(50).float(), cloud(60, seed=1).float()
    model = MongeMap(max_iter=3, batch_size=20, random_state=0)
    expected = clone(model).fit(x, y).transform(x).numpy()
    listed = clone(model).fit(x.tolist(), y.tolist())
    np.testing.assert_allclose(listed.transform(x.tolist()), expected, rtol=1e-5, atol=1e-6)
    pandas = pytest.importorskip("pandas")
    framed = clone(model).fit(pandas.DataFrame(x.numpy(), columns=["east", "north"]), y)
    assert framed.get_feature_names_out().tolist() == ["east", "north"]
    assert clone(model).fit(x, y).get_feature_names_out().tolist() == ["x0", "x1"]
    exact = MongeMap(ResidualMLP(2).double(), max_iter=3, batch_size=20, random_state=np.int64(0)).fit(x, y)  # type: ignore[arg-type]
    assert next(exact.net_.parameters()).dtype == torch.float64
    assert exact.transform(x).dtype == torch.float32
    assert exact.transform(x.double().numpy()).dtype == np.float64
    drawn = MongeMap(max_iter=3, random_state=np.random.RandomState(0)).fit(x, y)
    assert torch.equal(
        drawn.transform(x), clone(drawn).set_params(random_state=np.random.RandomState(0)).fit(x, y).transform(x)
    )


class OntoItself(MongeMap):
    """With the sample as its own target: scikit-learn's checks give labels where this takes points."""

    def fit(self, X: Any, y: Any = None) -> Any:
        return super().fit(X, X)

    def fit_transform(self, X: Any, y: Any = None) -> Any:
        return self.fit(X).transform(X)


@parametrize_with_checks([OntoItself(max_iter=2, batch_size=8, random_state=0)])
def test_scikit_learn_estimator(estimator: OntoItself, check: Any) -> None:
    check(estimator)


def test_map_refused_stays_as_it_was() -> None:
    model = MongeMap(max_iter=2, batch_size=20, random_state=0).fit(cloud(), cloud(seed=1))
    before = {name: copy.deepcopy(value) for name, value in vars(model).items() if name != "net_"}
    mapped = model.transform(cloud())
    for x, y in ((cloud(), cloud()[:, :1]), (cloud().numpy()[:, :1], cloud()), (cloud() * torch.nan, cloud())):
        with pytest.raises(ValueError, match=r"must|contains"):
            model.fit(x, y)
    assert {name: value for name, value in vars(model).items() if name != "net_"} == before
    assert torch.equal(model.transform(cloud()), mapped)


@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_gap_goes_with_the_unit_and_not_with_the_origin(unit: float) -> None:
    x, y = cloud().float(), cloud(seed=1).float()
    for reg in (0.0, 0.05):
        plain = monge_gap(x, y, reg=reg)
        torch.testing.assert_close(monge_gap(unit * x, unit * y, reg=reg), unit**2 * plain, rtol=1e-3, atol=0)
        # A common shift by a few hundred spreads: 1e-5 of a spread is what float32 has left.
        torch.testing.assert_close(monge_gap(x + 300, y + 300, reg=reg), plain, rtol=1e-2, atol=0)
        far = monge_gap(x.double() + 1e4, y.double() + 1e4, reg=reg)
        torch.testing.assert_close(far, monge_gap(x.double(), y.double(), reg=reg), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, y: (x[0], y), ValueError, "X must be"),
        (lambda x, y: (x, y[:, :1]), ValueError, "y must have points of the 2"),
        (lambda x, y: (x * torch.nan, y), ValueError, "X must be finite"),
        (lambda x, y: (x.long(), y), TypeError, "X must be floating point, got torch.int64"),
        (lambda x, y: (x.tolist(), y[0].tolist()), ValueError, "Expected 2D array, got 1D"),
        (lambda x, y: (x.numpy(), y.numpy() * np.inf), ValueError, "Input y contains"),
        (lambda x, y: (x, y[:1]), ValueError, "y must be .* at least 2 points"),
        (lambda x, y: (x, None), ValueError, "requires y to be passed"),
    ],
)
def test_map_refuses(change: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MongeMap(max_iter=1).fit(*change(cloud(), cloud(seed=1)))


@pytest.mark.parametrize("options", [{"strength": -1.0}, {"max_iter": 0}, {"batch_size": 1}, {"reg": -1.0}])
def test_map_refuses_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        MongeMap(**options).fit(cloud(), cloud(seed=1))


def test_bad_arguments() -> None:
    x = cloud()
    with pytest.raises(ValueError, match=r"y must be of shape \(40, 2\) as x, got shape \(5, 2\)"):
        monge_gap(x, x[:5])
    with pytest.raises(ValueError, match="reg"):
        MongeGap(reg=-0.1)
    with pytest.raises(ValueError, match="reg must be positive"):
        transport_cost(torch.zeros(2, 3), reg=0.0)
    with pytest.raises(ValueError, match="x and y must be finite"):
        monge_gap(x, x * torch.inf, reg=0.0)
    for cost in ("cosine", 0.5, lambda x, y: torch.zeros(3)):
        with pytest.raises(ValueError, match="cost must"):
            monge_gap(x, x, cost)


def test_where_all_costs_are_zero_so_is_the_cost_of_transport() -> None:
    assert transport_cost(torch.zeros(2, 3)).item() == 0
    clouds = torch.ones(4, 2), torch.ones(3, 2)
    assert sinkhorn_divergence(*clouds).item() == 0


def test_a_share_of_costs_below_zero_is_a_regularisation_too() -> None:
    def correlation(x: Tensor, y: Tensor) -> Tensor:
        return -x @ y.mT

    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    # To correlate most is to be nearest: the gap is half of that for squared distances, at half the regularisation.
    y = x.flip(1)
    size = float((x @ y.mT).abs().mean())
    assert monge_gap(x, y, correlation, 0.02).item() == pytest.approx(
        monge_gap(x, y, reg=2 * 0.02 * size, relative=False).item() / 2, abs=1e-4
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_map_learns_wherever_it_is_called(mode: Any) -> None:
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    expected = MongeMap(max_iter=3, batch_size=20, random_state=0).fit(x, x + 2)
    with mode():
        found = MongeMap(max_iter=3, batch_size=20, random_state=0).fit(x.clone(), x + 2)
    assert found.loss_curve_ == expected.loss_curve_


def test_a_map_that_diverges_names_the_learning_rate() -> None:
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="^lr must be so small that the map stays finite"):
        MongeMap(max_iter=20, lr=1e30, random_state=0).fit(x, x + 2)
