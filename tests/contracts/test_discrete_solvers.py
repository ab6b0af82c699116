"""What every search over discrete choices keeps: the same draws give the same choice, and arrays keep their kind.

A new one joins by one line: in MEMBERS where it takes arrays, in BANDITS where it pulls arms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.solvers import (
    line_search_elimination,
    minmax_violation,
    sequential_halving,
    successive_rejects,
    unimodal_elimination,
)

# Called with a matrix, a target and the levels; gives the values chosen, and their worth.
MEMBERS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "minmax_violation": lambda A, b, levels: (
        (found := minmax_violation(A, b, levels, restarts=6, max_steps=20)).x,
        found.value,
    ),
}

BANDITS: dict[str, Callable[..., Any]] = {
    "line_search_elimination": line_search_elimination,
    "sequential_halving": sequential_halving,
    "successive_rejects": successive_rejects,
    "unimodal_elimination": unimodal_elimination,
}


@pytest.fixture(params=MEMBERS.values(), ids=MEMBERS)
def member(request: pytest.FixtureRequest) -> Callable[..., tuple[Any, Any]]:
    return request.param


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(20, 8, generator=generator, dtype=torch.float64)
    return A, torch.randn(20, generator=generator, dtype=torch.float64), torch.tensor([-1.0, 0.0, 1.0]).double()


def test_same_input_same_bits(member: Callable[..., Any], problem: tuple[Tensor, ...]) -> None:
    copies = [value.clone() for value in problem]
    (x, value), (again, same) = member(*problem), member(*problem)
    assert torch.equal(x, again)
    assert torch.equal(value, same)
    assert all(torch.equal(now, before) for now, before in zip(problem, copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_in_torch_out(member: Callable[..., Any], problem: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for found in member(*(value.to(dtype) for value in problem)):
        assert isinstance(found, Tensor)
        assert found.dtype == dtype


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_in_numpy_out(member: Callable[..., Any], problem: tuple[Tensor, ...], dtype: type) -> None:
    for found in member(*(value.numpy().astype(dtype) for value in problem)):
        assert isinstance(found, np.ndarray)
        assert found.dtype == dtype


@pytest.mark.parametrize("place", [0, 1, 2])
def test_input_that_is_not_finite_is_refused(
    member: Callable[..., Any], problem: tuple[Tensor, ...], place: int
) -> None:
    broken = [value.clone() for value in problem]
    broken[place].view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        member(*broken)


@pytest.mark.parametrize("identify", BANDITS.values(), ids=BANDITS)
def test_same_rewards_same_arm(identify: Callable[..., Any]) -> None:
    def once() -> Any:
        generator = torch.Generator().manual_seed(3)

        def pull(arms: Tensor, count: int) -> Tensor:
            return torch.randn(len(arms), count, generator=generator)

        return identify(pull, 60, 90, generator=generator)

    assert once() == once()


@pytest.mark.parametrize("identify", BANDITS.values(), ids=BANDITS)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_unit_of_rewards_does_not_matter(identify: Callable[..., Any], scale: float) -> None:
    means = -(torch.arange(15.0, dtype=torch.float64) - 6).abs()
    found = identify(lambda arms, count: scale * means[arms, None].expand(-1, count), 15, 120)
    assert found.arm == 6
