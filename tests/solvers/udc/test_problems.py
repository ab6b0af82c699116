from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.solvers import CVRP, TSP, Knapsack, OpenPaths, OpenRoutes


def routes(demand: list[float], n: int | None = None) -> CVRP:
    n = n or len(demand)
    generator = torch.Generator().manual_seed(n)
    points = torch.rand(1, n + 1, 2, generator=generator, dtype=torch.float64)
    return CVRP(points[:, 0], points[:, 1:], torch.tensor([demand], dtype=torch.float64))


def route_cost(problem: CVRP, plan: list[list[int]]) -> float:
    depot, coords = problem.depot[0].tolist(), problem.coords[0].tolist()
    stops = [[depot, *(coords[i] for i in route), depot] for route in plan]
    return sum(math.dist(a, b) for route in stops for a, b in itertools.pairwise(route))


def solution_of(plan: list[list[int]]) -> Tensor:
    return torch.tensor([[[(i, int(i == route[-1])) for route in plan for i in route]]])


def test_route_costs_by_hand() -> None:
    problem = routes([0.2, 0.3, 0.1, 0.4, 0.2, 0.3])
    plan = [[2, 0], [5], [1, 4, 3]]
    solution = solution_of(plan)
    assert float(problem.cost(solution)) == pytest.approx(route_cost(problem, plan))
    for shift in range(6):  # where the circle is opened does not matter
        torch.testing.assert_close(problem.cost(solution.roll(shift, 2)), problem.cost(solution))
        assert sorted(CVRP.routes(solution.roll(shift, 2)[0, 0])) == sorted(plan)


def test_cut_routes_get_their_share_of_the_free_capacity() -> None:
    problem = routes([0.1] * 8)
    # One route of demand 0.5 that three pieces share, and one of 0.3 that closes a piece.
    plan = [[0, 1, 2, 3, 4], [5, 6, 7]]
    pieces, _ = problem.split(solution_of(plan), 2, shift=0)
    assert isinstance(pieces, OpenRoutes)
    ends = pieces.ends.tolist()
    # Routes are sorted by angle, so the short one may come first.
    if ends == [[0, 0], [0, 0], [1, 0], [0, 1]]:
        used, limit = [0, 0.4, 0.8, 1 / 3], [0.4, 0.8, 1 / 3, 0]
    else:
        assert ends == [[0, 0], [1, 0], [0, 0], [0, 1]]
        used, limit = [0, 2 / 3, 0.2, 0.6], [2 / 3, 0.2, 0.6, 0]
    torch.testing.assert_close(pieces.used, torch.tensor(used).double())
    torch.testing.assert_close(pieces.limit, torch.tensor(limit).double())
    assert pieces.closes.tolist() == [False, False, False, True]


def test_routes_are_cut_in_the_order_of_their_angle() -> None:
    angles = torch.tensor([2.0, -2.5, 0.3, 2.2, -2.3, 0.1, 0.4, 3.0])
    coords = torch.stack([angles.cos(), angles.sin()], -1)[None]
    problem = CVRP(torch.zeros(1, 2), coords, torch.full((1, 8), 0.25))
    solution = solution_of([[2, 6], [3, 0], [1, 4], [7], [5]]).roll(3, 2)
    _, merge = problem.split(solution, 4, shift=0)
    customers, ends = merge(problem.split(solution, 4, shift=0)[0].current)[0, 0].T.tolist()
    assert customers == [1, 4, 5, 2, 6, 3, 0, 7]
    assert ends == [0, 1, 1, 0, 1, 0, 1, 1]


def test_candidates_over_a_capacity_cost_infinity() -> None:
    pieces = OpenRoutes(
        torch.rand(1, 4, 2),
        demand=torch.tensor([[0.3, 0.3, 0.3]]),
        used=torch.tensor([0.2]),
        limit=torch.tensor([0.5]),
        ends=torch.tensor([[0, 1, 0]]),
    )
    candidates = torch.tensor(
        [
            [
                [[0, 0], [1, 1], [2, 0]],  # as it is
                [[0, 1], [1, 1], [2, 0]],
                [[0, 0], [1, 0], [2, 0]],  # 1.1 on board
                [[0, 1], [1, 0], [2, 0]],  # 0.6 on board in the end
            ]
        ]
    )
    cost = pieces.cost(candidates)[0]
    assert cost.isfinite().tolist() == [True, True, False, False]
    assert torch.equal(pieces.current[:, None], candidates[:, :1])


def test_knapsack_groups_share_what_is_free() -> None:
    weights, values = 0.1 + torch.rand(2, 3, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = Knapsack(weights, values, torch.full((3,), 4.0, dtype=torch.float64))
    solution = torch.zeros(3, 2, 13, dtype=torch.bool)
    solution[..., :4] = True
    order = torch.randperm(13)
    pieces, _ = problem.split(solution, 5, shift=0, permutation=order)
    assert len(pieces.capacity) == 3 * 2 * 2
    weight = (solution * problem.weights[:, None]).sum(-1)
    left_over = (solution[..., order[10:]] * problem.weights[:, None, order[10:]]).sum(-1)
    torch.testing.assert_close(pieces.capacity.view(3, 2, 2).sum(-1), problem.capacity[:, None] - left_over)
    free = pieces.capacity - (pieces.weights * pieces.current).sum(-1)
    torch.testing.assert_close(free, ((4 - weight) / 2).repeat_interleave(2, 1).flatten())
    inside = torch.stack([problem.weights[:, order[:5]], problem.weights[:, order[5:10]]], 1)
    torch.testing.assert_close(pieces.weights.view(3, 2, 2, 5)[:, 0], inside)


def test_what_does_not_fit_into_whole_pieces_stays() -> None:
    problem, tour = TSP.random(1, 11), torch.randperm(11)[None, None]
    pieces, merge = problem.split(tour, 4, shift=2)
    assert pieces.coords.shape == (2, 4, 2)
    assert torch.equal(merge(pieces.current), tour)  # rolled there and back
    turned = torch.tensor([[0, 2, 1, 3]] * 2)
    merged = merge(turned)
    assert merged.roll(2, -1)[0, 0, 8:].tolist() == tour.roll(2, -1)[0, 0, 8:].tolist()
    assert merged.roll(2, -1)[0, 0, :4].tolist() == tour.roll(2, -1)[0, 0, [0, 2, 1, 3]].tolist()


@pytest.mark.parametrize("problem", [TSP.random(3, 9), CVRP.random(3, 9), Knapsack.random(3, 9)])
def test_graphs_leave_out_the_node_itself(problem: Any) -> None:
    graph = problem.graph(4)
    batch, nodes, k = graph.neighbours.shape
    assert (batch, k) == (3, 4)
    assert graph.nodes.shape[:2] == (3, nodes)
    assert graph.edges.shape[:3] == (3, nodes, 4)
    assert (graph.neighbours != torch.arange(nodes)[:, None]).all()
    assert (graph.neighbours.sort(-1).values.diff(dim=-1) > 0).all()
    assert problem.graph(100).neighbours.shape[2] == nodes - 1


def test_neighbours_are_the_nearest_and_the_depot_is_everyones() -> None:
    cities = TSP.random(2, 12)
    graph = cities.graph(3)
    distances = torch.cdist(cities.coords, cities.coords)
    near = distances.sort(-1).values[..., 1:4]
    torch.testing.assert_close(-graph.edges[..., 0] * cities.scale[:, None, None], near)
    assert (CVRP.random(2, 12).graph(3).neighbours[:, 1:] == 0).any(-1).all()


def test_the_best_ratio_is_every_items_neighbour() -> None:
    problem = Knapsack(torch.tensor([[1.0, 1.0, 2.0]]), torch.tensor([[1.0, 3.0, 1.0]]), torch.tensor([2.0]))
    graph = problem.graph(1)
    assert graph.neighbours[0, :, 0].tolist()[1] == 2  # item 1 is node 2
    assert graph.neighbours[0, 3, 0] == 2
    affinity = problem.affinity[0]
    # Item 0 beside item 1: joint ratio 2, where the best is 3 (item 1 itself with "stop" is 3).
    assert float(affinity[2, 1]) == pytest.approx(2 / 3 - 1)
    assert (affinity <= 0).all()
    assert (affinity >= -1).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TSP(torch.rand(5, 2)), "coords must be a tensor of 3 dimensions"),
        (lambda: TSP(torch.zeros(1, 5, 3)), r"coords must be of shape \(batch, n, 2\), got shape \(1, 5, 3\)"),
        (lambda: TSP(torch.full((1, 5, 2), torch.nan)), "coords must be finite"),
        (lambda: OpenPaths(torch.rand(0, 5, 2)), "coords"),
        (lambda: CVRP(torch.rand(1, 3), torch.rand(1, 5, 2), torch.rand(1, 5)), r"depot .*\(1, 3\)"),
        (lambda: CVRP(torch.rand(1, 2), torch.rand(1, 5, 2), torch.zeros(1, 5)), r"demand must be in \(0, 1\]"),
        (lambda: CVRP(torch.rand(1, 2), torch.rand(1, 5, 2), torch.full((1, 5), 1.5)), r"demand .* \(0, 1\]"),
        (lambda: Knapsack(torch.zeros(1, 3), torch.ones(1, 3), torch.ones(1)), "weights must be positive"),
        (lambda: Knapsack(torch.ones(1, 3), -torch.ones(1, 3), torch.ones(1)), "values must be at least 0, got -1"),
        (lambda: Knapsack(torch.ones(1, 3), torch.ones(1, 3), torch.ones(2)), r"capacity .* shape \(1,\)"),
        (
            lambda: OpenPaths(torch.rand(1, 4, 2)).cost(torch.tensor([[[1, 0, 2, 3]]])),
            "candidates must be permutations",
        ),
        (
            lambda: OpenPaths(torch.rand(1, 4, 2)).cost(torch.tensor([[[0, 1, 1, 3]]])),
            "candidates must be permutations",
        ),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_no_solution_has_no_price() -> None:
    problem = routes([0.9, 0.9, 0.1])
    with pytest.raises(ValueError, match="solution must be permutations of 3"):
        problem.cost(torch.tensor([[[[0, 0], [0, 0], [2, 1]]]]))
    with pytest.raises(ValueError, match="return to the depot"):
        problem.cost(torch.tensor([[[[0, 0], [1, 0], [2, 0]]]]))
    solution = torch.tensor([[[[0, 0], [2, 1], [1, 1]], [[0, 0], [1, 1], [2, 1]]]])
    assert problem.cost(solution).isfinite().tolist() == [[True, False]]
    # The route that goes on over the end of the circle is loaded by its customers at the beginning, too.
    assert problem.cost(solution.roll(1, 2)).isfinite().tolist() == [[True, False]]
    cities = TSP(torch.rand(1, 4, 2))
    with pytest.raises(ValueError, match="solution must be permutations of 4"):
        cities.cost(torch.zeros(1, 1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="solution must be permutations of 4"):
        cities.cost(torch.tensor([[[0, 1, 2]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_capacity_may_be_full_to_the_last_bit_and_not_fuller(dtype: torch.dtype) -> None:
    fifty = routes([1 / 50] * 50)
    problem = CVRP(fifty.depot.to(dtype), fifty.coords.to(dtype), fifty.demand.to(dtype))
    one_route = solution_of([list(range(50))])
    assert problem.cost(one_route).isfinite().all()
    too_much = CVRP(problem.depot, problem.coords, problem.demand * (1 + 1e-5))
    assert too_much.cost(one_route).isinf().all()
    weights = torch.full((1, 70), 0.1, dtype=dtype)
    everything = torch.ones(1, 1, 70, dtype=torch.bool)
    for share, fits in {1.0: True, 1 - 1e-5: False}.items():
        capacity = torch.tensor([7 * share], dtype=dtype)
        assert bool(Knapsack(weights, weights, capacity).cost(everything).isfinite()) is fits


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_networks_read_neither_unit_nor_origin(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    coords = torch.rand(2, 30, 2, generator=generator, dtype=torch.float64)
    moved = scale * (coords + 1e4)
    stops = routes([0.1] * 29)
    items = torch.rand(2, 2, 12, generator=generator, dtype=torch.float64) + 0.1
    capacity = torch.tensor([2.0, 3.0], dtype=torch.float64)
    pairs = [
        (TSP(coords), TSP(moved), scale),
        (
            CVRP(stops.depot, stops.coords, stops.demand),
            CVRP(scale * (stops.depot + 1e4), scale * (stops.coords + 1e4), stops.demand),
            scale,
        ),
        (Knapsack(*items, capacity), Knapsack(scale * items[0], 7 * items[1], scale * capacity), 7),
    ]
    for here, there, unit in pairs:
        for one, other in zip(here.graph(5), there.graph(5), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(there.scale, unit * here.scale, rtol=1e-9, atol=0)
        rows = [problem.walk(2, generator=torch.Generator().manual_seed(0)) for problem in (here, there)]
        torch.testing.assert_close(rows[1].context(), rows[0].context())


def test_a_run_of_customers_keeps_its_ends() -> None:
    pieces = OpenRoutes(
        torch.rand(1, 4, 2),
        demand=torch.tensor([[0.1, 0.1, 0.1]]),
        used=torch.zeros(1),
        limit=torch.ones(1),
        ends=torch.tensor([[0, 0, 0]]),
    )
    for wrong in (
        [[1, 0], [0, 0], [2, 0]],
        [[0, 0], [2, 0], [1, 0]],
        [[0, 0], [1, 0], [2, 1]],
        [[0, 0], [0, 0], [2, 0]],
    ):
        with pytest.raises(ValueError, match="candidates must be permutations of a run's customers"):
            pieces.cost(torch.tensor([[wrong]]))


@pytest.mark.parametrize("held", [torch.tensor([[[2, 0]]]), torch.tensor([[[1.0, 0.5]]])])
def test_a_share_or_a_number_of_items_has_no_price(held: Tensor) -> None:
    """Twice an item was paid twice."""
    problem = Knapsack(torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 1.0]]), torch.tensor([2.0]))
    with pytest.raises(ValueError, match="solution must be booleans"):
        problem.cost(held)
    with pytest.raises(TypeError, match="solution must be a tensor"):
        problem.cost(held.numpy())  # type: ignore[arg-type]
