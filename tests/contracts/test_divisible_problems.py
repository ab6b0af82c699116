"""What every kind of problem that `UDC` divides keeps: pieces fit together whatever is done to each of them.

A new kind joins by one line in MEMBERS: how a batch of it is drawn, and what feasible solutions look like.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.solvers import CVRP, TSP, UDC, Knapsack, dcr_round
from trimtab.solvers.udc import keep_better
from trimtab.solvers.udc.construction import Walk, rollout
from trimtab.solvers.udc.routing import is_permutation


class Member(NamedTuple):
    draw: Callable[[int, int, torch.Generator], Any]
    """Of a batch size and a number of nodes."""
    feasible: Callable[[Any, Tensor], Tensor]
    """Of a problem and solutions (batch, samples, n, ...)."""


def some_routes(batch: int, n: int, generator: torch.Generator) -> CVRP:
    """Demands that are no round numbers, so small that routes run over several pieces."""
    points = torch.rand(batch, n + 1, 2, generator=generator)
    return CVRP(points[:, 0], points[:, 1:], 0.02 + 0.2 * torch.rand(batch, n, generator=generator))


def carried(problem: CVRP, solution: Tensor) -> Tensor:
    """Whether no vehicle carries more than its capacity."""
    rows = [
        max(sum(demand[customer] for customer in route) for route in CVRP.routes(sample)) <= 1 + 1e-6
        for demand, samples in zip(problem.demand.tolist(), solution, strict=True)
        for sample in samples
    ]
    return torch.tensor(rows).view(solution.shape[:2]) & is_permutation(solution[..., 0])


MEMBERS: dict[str, Member] = {
    "TSP": Member(lambda b, n, g: TSP.random(b, n, generator=g), lambda problem, tours: is_permutation(tours)),
    "CVRP": Member(some_routes, carried),
    "Knapsack": Member(
        lambda b, n, g: Knapsack.random(b, n, capacity=n / 5, generator=g),
        lambda problem, taken: (taken * problem.weights[:, None]).sum(-1) <= problem.capacity[:, None] * (1 + 1e-6),
    ),
}
KINDS = {"TSP": TSP, "CVRP": CVRP, "Knapsack": Knapsack}
SMALL: dict[str, Any] = {"divider": {"width": 8, "depth": 1}, "conqueror": {"width": 8, "depth": 1, "hidden": 8}}


def at_random(walk: Walk, allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf).log_softmax(-1)


@pytest.fixture(params=MEMBERS, ids=list(MEMBERS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def start(name: str, n: int, seed: int, batch: int = 2, samples: int = 3) -> tuple[Any, Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    problem = MEMBERS[name].draw(batch, n, generator)
    trace = rollout(problem.walk(samples, generator=generator), at_random, generator=generator)
    return problem, problem.read(trace), generator


sizes = st.tuples(st.integers(3, 9), st.integers(0, 20)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@pytest.mark.parametrize("name", list(MEMBERS))
@given(sizes, st.integers(0, 40), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_pieces_fit_together_whatever_is_done_to_them(name: str, size: tuple[int, int], shift: int, seed: int) -> None:
    sub_len, n = size
    problem, solution, generator = start(name, n, seed)
    assert MEMBERS[name].feasible(problem, solution).all()
    pieces, merge = problem.split(solution, sub_len, shift=shift, generator=generator)
    torch.testing.assert_close(problem.cost(merge(pieces.current)), problem.cost(solution), rtol=1e-5, atol=1e-4)

    found = pieces.read(rollout(pieces.walk(4), at_random, generator=generator))
    cost = pieces.cost(found)
    assert cost.isfinite().all()  # what a walk builds is feasible
    for candidate in range(4):
        merged = merge(found[:, candidate])
        assert merged.shape == solution.shape
        assert MEMBERS[name].feasible(problem, merged).all()
        change = (cost[:, candidate] - pieces.cost(pieces.current[:, None])[:, 0]).view(2, 3, -1).sum(-1)
        torch.testing.assert_close(problem.cost(merged) - problem.cost(solution), change, rtol=1e-3, atol=2e-4)


def test_rounds_never_cost_more_and_stay_feasible(name: str) -> None:
    problem, solution, generator = start(name, 23, seed=5)
    udc = UDC.for_problem(KINDS[name], 6, 8, **SMALL)
    first = problem.cost(solution)
    for number in range(12):
        before = problem.cost(solution)
        solution = dcr_round(
            problem,
            solution,
            lambda pieces: udc.conqueror(pieces, 4, greedy=False, generator=generator),
            6,
            shift=number,
            generator=generator,
        )
        assert (problem.cost(solution) <= before + 1e-4).all()
        assert MEMBERS[name].feasible(problem, solution).all()
    assert (problem.cost(solution) < first).all()


def test_what_costs_more_is_not_taken(name: str) -> None:
    problem, solution, generator = start(name, 20, seed=1)
    for number in range(6):  # something better than chance
        solution = dcr_round(
            problem,
            solution,
            lambda pieces: pieces.read(rollout(pieces.walk(40), at_random, generator=generator)),
            10,
            shift=5 * number,
            generator=generator,
        )
    pieces, _ = problem.split(solution, 5, shift=2, generator=generator)
    found = pieces.read(rollout(pieces.walk(30), at_random, generator=generator))
    worst = found[torch.arange(len(found)), pieces.cost(found).argmax(1)]
    assert (pieces.cost(worst[:, None])[:, 0] > pieces.cost(pieces.current[:, None])[:, 0]).any()
    both = torch.stack([worst, pieces.current], 1)
    kept = pieces.cost(keep_better(pieces, worst)[:, None])[:, 0]
    torch.testing.assert_close(kept, pieces.cost(both).min(1).values)


def test_solving_repeats_with_the_generator_and_reports_its_own_cost(name: str) -> None:
    problem, _, _ = start(name, 18, seed=2)
    udc = UDC.for_problem(KINDS[name], 6, 8, **SMALL).train()
    results = [udc.solve(problem, samples=4, rounds=4, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(results[0].solution, results[1].solution)
    torch.testing.assert_close(problem.cost(results[0].solution[:, None])[:, 0], results[0].cost)
    assert MEMBERS[name].feasible(problem, results[0].solution[:, None]).all()
    assert results[0].history.shape == (5, 2)
    assert torch.equal(results[0].history[-1], results[0].cost)
    assert (results[0].history.diff(dim=0) <= 1e-4).all()
    assert udc.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_double_precision_instances(name: str, dtype: torch.dtype) -> None:
    problem, _, generator = start(name, 18, seed=2)
    fields = {key: value.to(dtype) for key, value in vars(problem).items()}
    udc = UDC.for_problem(KINDS[name], 6, 8, **SMALL)
    loss = udc.loss(type(problem)(**fields), samples=3, candidates=4, generator=generator)
    loss.total.backward()
    assert loss.history.dtype == dtype
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in udc.parameters())
    assert udc.solve(type(problem)(**fields), samples=2, generator=generator).cost.dtype == dtype


def test_each_loss_reaches_its_own_network(name: str) -> None:
    problem, _, generator = start(name, 18, seed=3)
    udc = UDC.for_problem(KINDS[name], 6, 8, **SMALL)
    loss = udc.loss(problem, samples=3, candidates=4, generator=generator)
    divider, conqueror = list(udc.divider.parameters()), list(udc.conqueror.parameters())
    assert all(g is None for g in torch.autograd.grad(loss.divider, conqueror, retain_graph=True, allow_unused=True))
    assert all(g is None for g in torch.autograd.grad(loss.conqueror, divider, retain_graph=True, allow_unused=True))
    assert loss.history.shape == (3,)
    assert (loss.history.diff() <= 1e-5).all()


@pytest.mark.parametrize("instances", [1, 3])
def test_solutions_for_another_number_of_instances_are_refused(name: str, instances: int) -> None:
    problem, solution, _ = start(name, 9, seed=0)
    other = solution[:1].expand(instances, *solution.shape[1:])
    for call in (problem.cost, lambda found: problem.split(found, 3, shift=0)):
        with pytest.raises(ValueError, match="^solution must be"):
            call(other)
