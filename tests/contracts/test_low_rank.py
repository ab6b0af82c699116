"""What every solver for low-rank matrices keeps: arrays in and out of one kind, refusal of degenerate input, recovery.

A new solver joins by one line in MEMBERS: how it is called on a sample of the entries of a positive semidefinite matrix
and a rank, and arguments that leave it too little time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from trimtab.solvers import complete_matrix, entry_operator, subgradient_recovery

SIZE, RANK = 24, 2


class Member(NamedTuple):
    solve: Callable[..., Any]
    """Of rows, columns, values and rank."""
    values: str
    """What its argument for the values is called."""
    too_little: dict[str, Any]
    """Arguments that leave it no time to converge."""


def subgradient(rows: Any, cols: Any, values: Any, rank: int, **options: Any) -> Any:
    operator = entry_operator(torch.as_tensor(rows), torch.as_tensor(cols), SIZE)
    return subgradient_recovery(values, operator, rank, **options)


def completion(inner: str) -> Callable[..., Any]:
    def solve(rows: Any, cols: Any, values: Any, rank: int, **options: Any) -> Any:
        return complete_matrix(rows, cols, values, (SIZE, SIZE), rank, inner=inner, **options)  # type: ignore[arg-type]

    return solve


MEMBERS: dict[str, Member] = {
    "subgradient_recovery": Member(subgradient, "measurements", {"n_iter": 5}),
    "complete_matrix, sketch": Member(completion("sketch"), "values", {"max_iter": 2}),
    "complete_matrix, cholesky": Member(completion("cholesky"), "values", {"max_iter": 2}),
    "complete_matrix, cg": Member(completion("cg"), "values", {"max_iter": 2}),
}


@pytest.fixture(params=MEMBERS.values(), ids=MEMBERS)
def member(request: pytest.FixtureRequest) -> Member:
    return request.param


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    factor = torch.linalg.qr(torch.randn(SIZE, RANK, generator=generator, dtype=torch.float64)).Q
    truth = factor @ torch.diag(torch.tensor([1.0, 0.8], dtype=torch.float64)) @ factor.T
    rows, cols = (torch.rand(SIZE, SIZE, generator=generator) < 0.8).nonzero(as_tuple=True)
    return truth, rows, cols, truth[rows, cols]


Problem = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recovers_the_matrix_in_the_given_precision(member: Member, problem: Problem, dtype: torch.dtype) -> None:
    truth, rows, cols, values = problem
    result = member.solve(rows, cols, values.to(dtype), RANK)
    assert isinstance(result.matrix, Tensor)
    assert result.matrix.dtype == dtype
    assert result.converged
    assert float((result.matrix.double() - truth).norm() / truth.norm()) < 1e-2


def test_same_input_same_bits_and_global_draws_left_alone(member: Member, problem: Problem) -> None:
    before = torch.random.get_rng_state()
    first, second = (member.solve(*problem[1:], RANK) for _ in range(2))
    assert torch.equal(first.matrix, second.matrix)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_numpy_in_numpy_out(member: Member, problem: Problem) -> None:
    _, rows, cols, values = problem
    result = member.solve(rows.numpy(), cols.numpy(), values.numpy(), RANK)
    assert isinstance(result.matrix, np.ndarray)
    np.testing.assert_allclose(result.matrix, member.solve(rows, cols, values, RANK).matrix.numpy(), atol=1e-6)


def test_too_little_time_warns_and_returns(member: Member, problem: Problem) -> None:
    with pytest.warns(ConvergenceWarning, match="stopped after"):
        result = member.solve(*problem[1:], RANK, **member.too_little)
    assert not result.converged
    assert result.matrix.isfinite().all()


def test_results_are_frozen(member: Member, problem: Problem) -> None:
    with pytest.raises(FrozenInstanceError):
        member.solve(*problem[1:], RANK).converged = True


@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_the_unit_of_the_values_is_that_of_the_matrix(member: Member, problem: Problem, unit: float) -> None:
    _, rows, cols, values = problem
    plain, scaled = (member.solve(rows, cols, factor * values, RANK).matrix for factor in (1.0, unit))
    assert float((scaled / unit - plain).norm() / plain.norm()) < 1e-2


def test_ranks_may_be_numpys(member: Member, problem: Problem) -> None:
    given = member.solve(*problem[1:], np.int64(RANK)).matrix
    assert torch.equal(given, member.solve(*problem[1:], RANK).matrix)


@pytest.mark.parametrize("rank", [0, SIZE + 1])
def test_impossible_ranks_are_refused(member: Member, problem: Problem, rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank must be in \[1, {SIZE}\]"):
        member.solve(*problem[1:], rank)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(member: Member, problem: Problem, bad: float) -> None:
    _, rows, cols, values = problem
    with pytest.raises(ValueError, match=f"{member.values} must be finite"):
        member.solve(rows, cols, torch.where(values == values.max(), bad, values), RANK)


def test_integers_are_refused(member: Member, problem: Problem) -> None:
    _, rows, cols, values = problem
    with pytest.raises(TypeError, match=f"{member.values} must be floating point"):
        member.solve(rows, cols, values.long(), RANK)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_by_name(member: Member, problem: Problem, dtype: torch.dtype) -> None:
    _, rows, cols, values = problem
    with pytest.raises(TypeError, match=f"^{member.values} must be float32 or float64"):
        member.solve(rows, cols, values.to(dtype), RANK)
