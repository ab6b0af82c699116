"""What every minimiser of plain functions keeps. A new one joins by a line in MEMBERS.

A member maps a function of rows, a start and a generator to a result with `x` and `fun`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from trimtab.optim import CBO, ConsensusHopping, gradient_normalized_newton

Function = Callable[[Tensor], Tensor]


def cbo(f: Function, start: Tensor, generator: torch.Generator) -> Any:
    cloud = start + torch.randn(200, *start.shape, generator=generator).to(start)
    return CBO(cloud, alpha=1e4, sigma=1.0, dt=0.05, generator=generator).minimize(f, steps=200)


def hopping(f: Function, start: Tensor, generator: torch.Generator) -> Any:
    return ConsensusHopping(
        start, alpha=100.0, sigma=lambda step: 0.97**step, generator=generator
    ).minimize(f, steps=200)  # fmt: skip


def newton(f: Function, start: Tensor, generator: torch.Generator) -> Any:
    return gradient_normalized_newton(f, start, grad_tol=1e-3)


class Member(NamedTuple):
    minimize: Callable[[Function, Tensor, torch.Generator], Any]
    random: bool
    """Whether it draws from the generator."""
    descends: bool
    """Whether it promises to end no higher than it starts."""


MEMBERS = {
    "CBO": Member(cbo, random=True, descends=False),
    "ConsensusHopping": Member(hopping, random=True, descends=False),
    "gradient_normalized_newton": Member(newton, random=False, descends=True),
}

START = (2.0, -1.0)


@pytest.fixture(params=MEMBERS.values(), ids=MEMBERS)
def member(request: pytest.FixtureRequest) -> Member:
    return request.param


def bowl(x: Tensor) -> Tensor:
    return ((x - 1) ** 2).sum(-1) + 0.3 * ((x[..., 0] - 1) * (x[..., 1] - 1))


def bumpy(x: Tensor) -> Tensor:
    return (x**2 + 2.5 * (1 - torch.cos(2 * torch.pi * x))).sum(-1)


def run(member: Member, f: Function = bowl, start: tuple[float, ...] = START, seed: int = 0, dtype=torch.float64):
    return member.minimize(f, torch.tensor(start, dtype=dtype), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finds_the_minimum_in_the_given_precision(member: Member, dtype: torch.dtype) -> None:
    result = run(member, dtype=dtype)
    assert result.x.dtype == dtype
    torch.testing.assert_close(result.x, torch.ones(2, dtype=dtype), atol=0.03, rtol=0)
    assert float(result.fun) == pytest.approx(float(bowl(result.x)), abs=1e-6)


def test_the_generator_decides(member: Member) -> None:
    first, again, other = (run(member, bumpy, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.x, other.x) is not member.random


def test_global_draws_are_left_alone(member: Member) -> None:
    before = torch.random.get_rng_state()
    run(member, bumpy)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("start", [(2.0, -1.0), (0.3, 7.4), (-5.2, 3.6)])
def test_ends_no_higher_than_it_starts_where_that_is_promised(member: Member, start: tuple[float, ...]) -> None:
    if member.descends:
        assert float(run(member, bumpy, start).fun) <= float(bumpy(torch.tensor(start, dtype=torch.float64)))


def test_a_shifted_function_has_the_shifted_minimum(member: Member) -> None:
    shift = torch.tensor([3.0, -2.0], dtype=torch.float64)
    moved = run(member, lambda x: bowl(x - shift), (START[0] + 3, START[1] - 2))
    torch.testing.assert_close(moved.x - shift, run(member).x, atol=1e-6, rtol=0)


def test_the_start_and_gradients_are_left_alone(member: Member) -> None:
    start = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    result = member.minimize(bowl, start, torch.Generator().manual_seed(0))
    assert start.tolist() == list(START)
    assert start.grad is None
    assert not result.x.requires_grad


def test_results_are_frozen(member: Member) -> None:
    with pytest.raises(FrozenInstanceError):
        run(member).x = None


BAD: dict[str, tuple[Function, torch.Tensor, Any, str]] = {
    "NaN start": (bowl, torch.tensor([0.0, torch.nan]), ValueError, "finite"),
    "infinite start": (bowl, torch.tensor([0.0, torch.inf]), ValueError, "finite"),
    "integers": (bowl, torch.tensor([0, 1]), TypeError, "float32 or float64"),
    "empty start": (bowl, torch.zeros(0), ValueError, "shape"),
    "NaN value": (lambda x: bowl(x) * torch.nan, torch.zeros(2), ValueError, "finite"),
    "infinite value": (lambda x: bowl(x) + torch.inf, torch.zeros(2), ValueError, "finite"),
    "too many values": (lambda x: x, torch.zeros(2), (ValueError, RuntimeError), "shape|scalar"),
}


@pytest.mark.parametrize(("f", "start", "error", "message"), BAD.values(), ids=BAD)
def test_degenerate_input_is_refused(member: Member, f: Function, start: Tensor, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        member.minimize(f, start, torch.Generator().manual_seed(0))
