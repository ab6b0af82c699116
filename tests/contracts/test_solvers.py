"""What every transport solver keeps: arrays in and out of one kind, refusal of degenerate input, agreement with POT.

A new solver joins by one line in MEMBERS: how it is called on a cost, two marginals and a regularisation, arguments
that leave it too little time, and POT's function for the same problem.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from trimtab.ops.sinkhorn import sinkhorn
from trimtab.solvers import sinkhorn_newton_sparse, sparse_transport

REG = 0.02


def entropic(a: np.ndarray, b: np.ndarray, cost: np.ndarray, reg: float) -> np.ndarray:
    ot = pytest.importorskip("ot")
    return ot.sinkhorn(a, b, cost, reg, method="sinkhorn_log", stopThr=1e-14, numItermax=20_000, warn=False)


def quadratic(a: np.ndarray, b: np.ndarray, cost: np.ndarray, reg: float) -> np.ndarray:
    ot = pytest.importorskip("ot")
    return ot.smooth.smooth_ot_semi_dual(a, b, cost, reg, reg_type="l2", stopThr=1e-15, numItermax=5000)


class Member(NamedTuple):
    solve: Callable[..., Any]
    too_little: dict[str, int]
    """Arguments that leave it no time to converge."""
    peer: Callable[..., np.ndarray] = entropic
    regs: tuple[float, float] = (0.1, REG)
    agreement: float = 1e-11
    """With the peer's plan, in every entry."""


MEMBERS: dict[str, Member] = {
    "sinkhorn": Member(sinkhorn, {"max_iter": 2}),
    "sinkhorn_newton_sparse": Member(sinkhorn_newton_sparse, {"n_sinkhorn": 1, "max_newton": 1}),
    "sparse_transport": Member(
        partial(sparse_transport, k=25), {"max_iter": 2, "max_proximal": 0}, quadratic, (5.0, 1.0), 1e-6
    ),
}


@pytest.fixture(params=MEMBERS.values(), ids=MEMBERS)
def member(request: pytest.FixtureRequest) -> Member:
    return request.param


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(25, 30, generator=generator, dtype=torch.float64)
    a = torch.rand(25, generator=generator, dtype=torch.float64) + 0.05
    b = torch.rand(30, generator=generator, dtype=torch.float64) + 0.05
    return cost, a / a.sum(), b / b.sum()


def test_same_input_same_bits(member: Member, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    first, second = member.solve(*problem, member.regs[1]), member.solve(*problem, member.regs[1])
    assert torch.equal(first.plan, second.plan)
    assert first.errors == second.errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_in_torch_out(member: Member, problem: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> None:
    result = member.solve(*(value.to(dtype) for value in problem), member.regs[1])
    for value in (result.plan, *result.potentials):
        assert isinstance(value, Tensor)
        assert value.dtype == dtype
    assert result.converged
    torch.testing.assert_close(result.plan.double(), member.solve(*problem, member.regs[1]).plan, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_in_numpy_out(member: Member, problem: tuple[Tensor, Tensor, Tensor], dtype: type) -> None:
    result = member.solve(*(value.numpy().astype(dtype) for value in problem), member.regs[1])
    for value in (result.plan, *result.potentials):
        assert isinstance(value, np.ndarray)
        assert value.dtype == dtype
    assert isinstance(result.cost, float)
    np.testing.assert_allclose(result.plan, member.solve(*problem, member.regs[1]).plan.numpy(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("which", [0, 1])
def test_agrees_with_pot(member: Member, problem: tuple[Tensor, Tensor, Tensor], which: int) -> None:
    cost, a, b = (value.numpy() for value in problem)
    reg = member.regs[which]
    result = member.solve(cost, a, b, reg, tol=0.1 * member.agreement)
    expected = member.peer(a, b, cost, reg)
    np.testing.assert_allclose(result.plan, expected, rtol=0, atol=member.agreement)
    error = np.abs(result.plan.sum(1) - a).sum() + np.abs(result.plan.sum(0) - b).sum()
    assert error <= 0.1 * member.agreement


def test_too_little_time_warns_and_returns(member: Member, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    with pytest.warns(ConvergenceWarning, match=r"(marginal error|duality gap) of .*, wanted") as caught:
        result = member.solve(*problem, member.regs[1], **member.too_little)
    assert caught[0].filename == __file__
    assert not result.converged
    assert result.plan.isfinite().all()


Change = Callable[[Tensor, Tensor, Tensor], tuple[Any, Any, Any]]

DEGENERATE: dict[str, tuple[Change, type[Exception], str]] = {
    "NaN cost": (lambda c, a, b: (c.masked_fill(c == c.max(), torch.nan), a, b), ValueError, "cost must be finite"),
    "infinite cost": (lambda c, a, b: (c.masked_fill(c == c.max(), torch.inf), a, b), ValueError, "cost must be fin"),
    "NaN marginal": (lambda c, a, b: (c, a, b * torch.nan), ValueError, "b must be finite"),
    "negative marginal": (lambda c, a, b: (c, a - 0.02, b), ValueError, "a must be at least 0"),
    "marginal of zeros": (lambda c, a, b: (c, a, b * 0), ValueError, "b must have mass"),
    "sums differ": (
        lambda c, a, b: (c, a, b * (1 + 1e-5)),
        ValueError,
        r"a and b must have the same sum, got 1\.00000000 and 1\.00001000",
    ),
    "transposed": (lambda c, a, b: (c.T, a, b), ValueError, r"a must have shape \(30,\)"),
    "short b": (lambda c, a, b: (c, a, b[:-1]), ValueError, r"b must have shape \(30,\)"),
    "batched": (lambda c, a, b: (c[None], a, b), ValueError, "cost must be a non-empty matrix"),
    "empty": (lambda c, a, b: (c[:0], a[:0], b), ValueError, "cost must be a non-empty matrix"),
    "integers": (lambda c, a, b: (c.long(), a, b), TypeError, "cost must be floating point"),
    "a list": (lambda c, a, b: (c, a.tolist(), b), TypeError, "a must be a tensor or a NumPy array"),
}


@pytest.mark.parametrize(("change", "error", "message"), DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_input_is_refused(
    member: Member, problem: tuple[Tensor, Tensor, Tensor], change: Change, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        member.solve(*change(*problem), member.regs[1])


@pytest.mark.parametrize("reg", [0.0, -1.0, float("nan"), float("inf")])
def test_regularisation_must_be_positive(member: Member, problem: tuple[Tensor, Tensor, Tensor], reg: float) -> None:
    with pytest.raises(ValueError, match="reg must be positive and finite"):
        member.solve(*problem, reg)
