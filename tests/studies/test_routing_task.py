from __future__ import annotations

import itertools

import pytest
import torch

from trimtab.solvers import CVRP, TSP, Knapsack
from trimtab.solvers.udc.routing import is_permutation
from trimtab.studies.engine.study import Trial
from trimtab.studies.solvers.udc.routing import Answer, Kind, Routing, fractional_value, heuristic, or_tools_solutions

KINDS: tuple[Kind, ...] = ("tsp", "cvrp", "knapsack")


def test_no_knapsack_is_worth_more_than_the_fractional_one() -> None:
    problem = Knapsack.random(5, 10, capacity=2.0, generator=torch.Generator().manual_seed(0))
    every = torch.tensor(list(itertools.product([False, True], repeat=10))).expand(5, -1, -1)
    best = -problem.cost(every).min(1).values
    bound = fractional_value(problem)
    assert (best <= bound + 1e-5).all()
    assert (bound < best + problem.values.max(1).values).all()
    halves = Knapsack(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]]), torch.tensor([2.0]))
    torch.testing.assert_close(fractional_value(halves), torch.tensor([3.0]))


@pytest.mark.parametrize("kind", KINDS)
def test_heuristics_and_or_tools_solve_every_kind(kind: Kind) -> None:
    pytest.importorskip("ortools")
    task, trial = Routing(kind), Trial(seed=1)
    problem = task.instances(trial, 3, trial.generator())
    quick = heuristic(trial, task)(problem).solution
    peer = or_tools_solutions(problem, 0.05)
    for solution in (quick, peer):
        assert problem.cost(solution[:, None]).isfinite().all()
        if isinstance(problem, TSP):
            assert is_permutation(solution).all()
        if isinstance(problem, CVRP):
            assert is_permutation(solution[..., 0]).all()
            for demand, routes in zip(problem.demand, map(CVRP.routes, solution), strict=True):
                assert all(float(demand[route].sum()) <= 1 + 1e-5 for route in routes)
    assert task.mean_cost(problem, problem.cost(peer[:, None])[:, 0]) <= task.mean_cost(
        problem, problem.cost(quick[:, None])[:, 0]
    )


def test_an_overfull_knapsack_is_no_solution() -> None:
    def greedy(trial: Trial, task: Routing) -> object:
        return lambda problem: Answer(torch.ones_like(problem.weights, dtype=torch.bool))

    with pytest.raises(ValueError, match="exceeds a capacity"):
        Routing("knapsack").run(Trial(), greedy)  # type: ignore[arg-type]


def test_bad_fields() -> None:
    with pytest.raises(ValueError, match="kind must be one of tsp, cvrp, knapsack, got 'atsp'"):
        Routing("atsp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n must be at least 20, got 5"):
        Routing(n=5)
