from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.ops.partial_transport import PartialPlan, partial_sinkhorn
from trimtab.ops.sinkhorn import sinkhorn

ot = pytest.importorskip("ot")
N, K = 12, 4


def costs(seed: int = 0, n: int = N, k: int = K) -> Tensor:
    return torch.rand(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def solve(cost: Tensor, rho: float, **options: Any) -> PartialPlan:
    return partial_sinkhorn(cost, rho, **{"tol": 1e-12, "max_iter": 20_000, **options})


def uniform(n: int) -> Tensor:
    return torch.full((n,), 1 / n, dtype=torch.float64)


@pytest.mark.parametrize("rho", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("gamma", [0.3, 1.0, math.inf])
def test_mass_and_rows(rho: float, gamma: float) -> None:
    found = solve(costs(), rho, gamma=gamma)
    assert found.converged
    assert float(found.plan.sum()) == pytest.approx(rho, abs=1e-9)
    assert (found.plan.sum(1) <= 1 / N + 1e-12).all()
    torch.testing.assert_close(found.plan.sum(1) + found.kept, uniform(N))


@pytest.mark.parametrize("rho", [0.3, 1.0])
def test_equal_columns_are_plain_transport_with_a_virtual_column(rho: float) -> None:
    cost = costs(1)
    sizes, whole = torch.full((K,), rho / K, dtype=torch.float64), cost
    if rho < 1:
        whole = torch.cat([cost, torch.zeros(N, 1, dtype=torch.float64)], 1)
        sizes = torch.cat([sizes, sizes.new_tensor([1 - rho])])
    found = solve(cost, rho, gamma=math.inf)
    ours = sinkhorn(whole, uniform(N), sizes, 0.1, tol=1e-13).plan
    theirs = ot.sinkhorn(uniform(N).numpy(), sizes.numpy(), whole.numpy(), 0.1, stopThr=1e-15, numItermax=20_000)
    torch.testing.assert_close(found.plan, ours[:, :K], rtol=0, atol=1e-11)
    np.testing.assert_allclose(found.plan, theirs[:, :K], atol=1e-11)


@pytest.mark.parametrize("gamma", [0.2, 1.0, 10.0])
def test_whole_mass_is_unbalanced_transport(gamma: float) -> None:
    cost = costs(2)
    theirs = ot.unbalanced.sinkhorn_unbalanced(
        uniform(N).numpy(),
        uniform(K).numpy(),
        cost.numpy(),
        0.1,
        reg_m=(math.inf, gamma),
        reg_type="entropy",
        stopThr=1e-15,
        numItermax=20_000,
    )
    np.testing.assert_allclose(solve(cost, 1.0, gamma=gamma).plan, theirs, atol=1e-10)


def objective(plan: Tensor, cost: Tensor, rho: float, gamma: float, epsilon: float) -> Tensor:
    whole = torch.cat([plan, (1 / N - plan.sum(1))[:, None]], 1)
    size = plan.sum(0)
    entropy = (torch.special.xlogy(whole, whole) - whole).sum()
    return (plan * cost).sum() + gamma * torch.special.xlogy(size, size / (rho / K)).sum() + epsilon * entropy


def test_no_feasible_change_lowers_the_objective() -> None:
    cost, rho, gamma, epsilon = costs(3), 0.4, 0.7, 0.15
    plan = solve(cost, rho, gamma=gamma, epsilon=epsilon).plan
    best = objective(plan, cost, rho, gamma, epsilon)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        change = torch.randn(N, K, generator=generator, dtype=torch.float64) * plan * 0.1
        change -= plan * change.sum() / plan.sum()  # the mass stays
        moved = plan + change * 0.1
        assert (moved.sum(1) < 1 / N).all()
        assert objective(moved, cost, rho, gamma, epsilon) >= best - 1e-13


def test_a_small_epsilon_agrees_with_a_linear_program() -> None:
    """Without entropy and with equal columns it is a linear program; kernels underflow on the way."""
    cost, rho = costs(4) + 5 * costs(5), 0.45
    found = solve(cost, rho, gamma=math.inf, epsilon=0.01, tol=1e-6, max_iter=5_000)
    assert found.plan.isfinite().all()
    assert float(found.plan.sum()) == pytest.approx(rho, abs=1e-3)
    whole = torch.cat([cost, torch.zeros(N, 1, dtype=torch.float64)], 1)
    sizes = np.array([rho / K] * K + [1 - rho])
    exact = ot.emd(uniform(N).numpy(), sizes, whole.numpy())
    assert float((found.plan * cost).sum()) == pytest.approx((exact * whole.numpy()).sum(), rel=0.01)


def test_absorbing_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.ops import partial_transport

    cost = costs(6)
    plain = solve(cost, 0.5, epsilon=0.05)
    monkeypatch.setattr(partial_transport, "_MAX_LOG_SCALING", 1e-3)
    often = solve(cost, 0.5, epsilon=0.05)
    torch.testing.assert_close(plain.plan, often.plan, rtol=1e-9, atol=1e-12)


def test_units_rows_columns_and_types() -> None:
    cost = costs(7)
    found = solve(cost, 0.5, gamma=1.0, epsilon=0.1).plan
    torch.testing.assert_close(solve(cost * 1e4, 0.5, gamma=1e4, epsilon=1e3).plan, found, rtol=1e-8, atol=1e-12)
    rows, columns = torch.randperm(N), torch.randperm(K)
    torch.testing.assert_close(solve(cost[rows][:, columns], 0.5).plan, found[rows][:, columns], rtol=1e-8, atol=1e-12)
    single = partial_sinkhorn(cost.float().numpy(), 0.5, tol=1e-12)
    assert isinstance(single.plan, np.ndarray)
    assert single.plan.dtype == np.float32
    np.testing.assert_allclose(single.plan, found, atol=1e-6)
    # Confident rows are moved first: to shift the costs of all is to say how much keeping is worth, which has no say.
    torch.testing.assert_close(solve(cost + 5, 0.5).plan, found, rtol=1e-6, atol=1e-9)


def test_a_warm_start_needs_fewer_sweeps_for_the_same_plan() -> None:
    cost = costs(8)
    cold = solve(cost, 0.6)
    warm = solve(cost + 1e-6, 0.6, scaling=cold.scaling)
    assert warm.n_iter < cold.n_iter
    torch.testing.assert_close(warm.plan, cold.plan, rtol=1e-5, atol=1e-8)


def test_stopping_early_keeps_mass_and_rows_and_says_so() -> None:
    found = partial_sinkhorn(costs(9), 0.5, max_iter=1)
    assert not found.converged
    assert found.n_iter == 1
    torch.testing.assert_close(found.plan.sum(1) + found.kept, uniform(N))
    assert float(found.plan.sum()) == pytest.approx(0.5, abs=1e-12)


def test_one_row_and_one_column() -> None:
    assert float(solve(costs(0, 1, 1), 0.25).plan.sum()) == pytest.approx(0.25)
    assert solve(costs(0, 1, 3), 1.0).plan.shape == (1, 3)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"rho": 0.0}, "rho"),
        ({"rho": 1.1}, "rho"),
        ({"rho": math.nan}, "rho"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": -math.inf}, "gamma"),
        ({"gamma": math.nan}, "gamma"),
        ({"tol": 0.0}, "tol"),
        ({"max_iter": 0}, "max_iter"),
        ({"scaling": torch.zeros(K + 1)}, "scaling"),
        ({"cost": torch.zeros(0, 3)}, "cost"),
        ({"cost": torch.zeros(3)}, "cost"),
        ({"cost": torch.full((2, 2), math.nan)}, "cost"),
    ],
)
def test_bad_input_is_refused_by_name(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        partial_sinkhorn(**{"cost": costs(), "rho": 0.5, **options})
    with pytest.raises(TypeError, match="cost must be floating point"):
        partial_sinkhorn(torch.ones(2, 2, dtype=torch.int64), 0.5)


def test_it_does_not_linger() -> None:
    cost, started = costs(0, 2000, 10), time.process_time()
    partial_sinkhorn(cost, 0.3)
    assert time.process_time() - started < 5
