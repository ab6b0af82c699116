from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from trimtab.compress import GroupEnvelope, ParameterGroups, group_envelope, prox_group_envelope


def drawn(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).abs()


def tensors(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def factors(v: Tensor, k: int, lam: float, d: Tensor | None = None) -> Tensor:
    return prox_group_envelope(v, k, lam, d)


@pytest.mark.parametrize(("norms", "value"), [((3.0, 2.0, 1.0), 9.0), ((4.0, 2.0, 1.0), 12.5), ((1.0, 4.0, 2.0), 12.5)])
def test_worked_examples(norms: tuple[float, ...], value: float) -> None:
    assert group_envelope(torch.tensor(norms), 2).item() == pytest.approx(value)


def test_limits() -> None:
    v, d = drawn(7), drawn(7, 1) + 0.2
    torch.testing.assert_close(group_envelope(v, 7, d), (d * v * v).sum() / 2)
    torch.testing.assert_close(factors(v, 7, 0.6, d), 1 / (1 + 0.6 * d))
    torch.testing.assert_close(group_envelope(v, 1), v.sum() ** 2 / 2)
    few = torch.cat([v[:3], torch.zeros(4, dtype=v.dtype)])
    torch.testing.assert_close(group_envelope(few, 3, d), (d * few * few).sum() / 2)
    torch.testing.assert_close(factors(few, 3, 0.6, d)[:3], 1 / (1 + 0.6 * d[:3]))
    assert group_envelope(torch.zeros(4), 2).item() == 0
    assert torch.equal(factors(v, 3, 0.0), torch.ones_like(v))


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_minimum_over_shares(seed: int) -> None:
    v, d, k = drawn(6, seed), drawn(6, seed + 10) + 0.2, 1 + seed
    e = (d * v * v).numpy()
    found = minimize(
        lambda u: float((e / u).sum() / 2),
        np.full(6, k / 6),
        jac=lambda u: -e / u**2 / 2,
        bounds=[(1e-9, 1)] * 6,
        constraints={"type": "ineq", "fun": lambda u: k - u.sum()},
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert group_envelope(v, k, d).item() == pytest.approx(found.fun, rel=1e-5)


def test_convex_and_falling_in_k() -> None:
    one, other = drawn(8, 1), drawn(8, 2)
    for k in (1, 3, 5):
        middle = group_envelope((one + other) / 2, k)
        assert middle <= (group_envelope(one, k) + group_envelope(other, k)) / 2 + 1e-12
    values = torch.stack([group_envelope(one, k) for k in range(1, 9)])
    assert (values.diff() <= 1e-12).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("lam", [0.05, 0.7, 4.0])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_step_is_optimal(k: int, lam: float, weighted: bool) -> None:
    v, d = drawn(9, k), drawn(9, 20) + 0.3 if weighted else torch.ones(9, dtype=torch.float64)
    w = factors(v, k, lam, d) * v

    def objective(x: Tensor) -> Tensor:
        return lam * group_envelope(x, k, d) + (x - v).square().sum() / 2

    best = objective(w)
    for seed in range(30):  # convex: no direction goes down
        for size in (1e-3, 0.1):
            away = (w + size * torch.randn(9, generator=torch.Generator().manual_seed(seed), dtype=v.dtype)).abs()
            assert objective(away) >= best - 1e-10
    u = factors(v, k, lam, d)
    u = lam * d * u / (1 - u)
    assert u.sum().item() == pytest.approx(k, abs=1e-6)


def test_moreau() -> None:
    """The conjugate of the envelope is half the sum of the k largest a*^2 / d."""
    v, k, lam = drawn(9, 3), 4, 0.8
    w = factors(v, k, lam) * v
    dual = (v - w) / lam
    conjugate = dual.square().topk(k).values.sum() / 2
    assert (group_envelope(w, k) + conjugate - (w * dual).sum()).abs() < 1e-9


def test_steps_bring_points_together() -> None:
    for seed in range(10):
        one, other = drawn(9, seed), drawn(9, seed + 50)
        near = (factors(one, 3, 0.5) * one - factors(other, 3, 0.5) * other).norm()
        assert near <= (one - other).norm() + 1e-12


def test_ties_zeros_and_scales() -> None:
    torch.testing.assert_close(factors(tensors(2, 2, 2, 2), 2, 1.0), torch.full((4,), 1 / 3, dtype=torch.float64))
    found = factors(tensors(2, 0, 2, 0, 2), 2, 1.0)
    torch.testing.assert_close(found, torch.tensor([0.4, 0, 0.4, 0, 0.4], dtype=torch.float64))
    v = drawn(9)
    torch.testing.assert_close(factors(1e6 * v, 3, 0.5), factors(v, 3, 0.5))
    assert factors(1e-30 * v.float(), 3, 0.5).isfinite().all()


def test_the_gradient_is_that_of_the_value() -> None:
    v = drawn(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: group_envelope(x, 3), v)
    zero = torch.zeros(3, requires_grad=True)
    group_envelope(zero, 2).backward()
    assert zero.grad.isfinite().all()


def rule(**options: float | None) -> tuple[Tensor, GroupEnvelope]:
    weight = torch.tensor([[3.0, 4.0], [0.6, 0.8], [1.0, 0.0], [0.0, 2.0]])
    return weight, GroupEnvelope(ParameterGroups([weight]), 2, **{"lam": 0.5, **options})


def test_a_rule_keeps_directions_and_reaches_its_number() -> None:
    weight, envelope = rule()
    before = weight.clone()
    envelope.post_step(0.2)
    expected = prox_group_envelope(before.norm(dim=1), 2, 0.1)
    torch.testing.assert_close(weight, before * expected[:, None])
    for _ in range(100):
        envelope.post_step(0.2)
    assert envelope.live() == 2
    assert torch.equal(envelope.kept(), torch.tensor([0, 3]))


def test_the_penalty_is_the_envelope() -> None:
    _, envelope = rule(lam=3.0)
    assert envelope.penalty().item() == pytest.approx(3.0 * 0.5 * (25 + (2 + 1 + 1) ** 2))


def test_cutting_keeps_the_largest() -> None:
    weight, envelope = rule()
    assert torch.equal(envelope.cut(), torch.tensor([0, 3]))
    assert torch.equal((weight != 0).any(1), torch.tensor([True, False, False, True]))
    weighted = GroupEnvelope(ParameterGroups([torch.ones(3, 1)]), 1, 1.0, torch.tensor([1.0, 2.0, 1.5]))
    assert weighted.kept().item() == 1


def test_the_half_space_zeroes_what_turned() -> None:
    weight, envelope = rule(lam=0.0, half_space=0.1)
    envelope.post_step()
    weight[1] *= -1
    weight[2] *= 0.05
    weight[3] *= 0.5
    envelope.post_step()
    assert torch.equal((weight != 0).any(1), torch.tensor([True, False, False, True]))
    assert weight[3, 1] == 1.0


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((0, 1.0), "k"), ((4, 1.0), "k"), ((2, -1.0), "lam"), ((2, math.nan), "lam")],
)
def test_bad_options_are_refused_by_name(arguments: tuple[int, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        prox_group_envelope(torch.ones(3), *arguments)
    with pytest.raises(ValueError, match=name):
        GroupEnvelope(ParameterGroups([torch.ones(3, 1)]), *arguments)


def test_bad_tensors_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="norms"):
        group_envelope(torch.ones(3, 1), 2)
    with pytest.raises(TypeError, match="norms"):
        group_envelope(torch.ones(3, dtype=torch.long), 2)
    with pytest.raises(ValueError, match="weights"):
        group_envelope(torch.ones(3), 2, torch.ones(2))
    weight, envelope = rule()
    before = weight.clone()
    with pytest.raises(ValueError, match="lr"):
        envelope.post_step(-1.0)
    assert torch.equal(weight, before)


def test_a_state_of_other_groups_is_refused() -> None:
    _, envelope = rule(half_space=0.0)
    envelope.post_step()
    with pytest.raises(ValueError, match="state"):
        envelope.load_state_dict({"steps": 1, "former": [torch.ones(3, 2)]})
    assert envelope.former[0].shape == (4, 2)


@pytest.mark.parametrize("k", [1, 4_000, 19_000])
def test_among_many_groups_the_factors_solve_the_equation_as_among_few(k: int) -> None:
    v, lam = drawn(20_000), 0.3
    low, high = 0.0, 1e9
    for _ in range(200):
        eta = (low + high) / 2
        low, high = (low, eta) if float((eta * lam**0.5 * v - lam).clamp(0, 1).sum()) >= k else (eta, high)
    u = (high * lam**0.5 * v - lam).clamp(0, 1)
    torch.testing.assert_close(factors(v, k, lam), u / (u + lam), atol=1e-9, rtol=0)
