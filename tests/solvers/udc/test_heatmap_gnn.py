from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from trimtab.solvers import CVRP, TSP, HeatmapGNN, Knapsack
from trimtab.solvers.udc.construction import TourWalk, Trace, Walk, rollout
from trimtab.solvers.udc.heatmap_gnn import FLOOR


def net(nodes: int = 2, edges: int = 1, depth: int = 2) -> HeatmapGNN:
    return HeatmapGNN(nodes, edges, width=8, depth=depth).double()


def cities(batch: int, n: int) -> TSP:
    return TSP(torch.rand(batch, n, 2, dtype=torch.float64))


def trace_of(tours: Tensor) -> Trace:
    """The trace of going along tours (batch, samples, n)."""
    walk = TourWalk(tours[..., 0], tours.shape[-1])
    steps = []
    for step in range(1, tours.shape[-1]):
        steps.append((tours[..., step], walk.current, walk.allowed(), walk.context()))
        walk.visit(tours[..., step])
    return Trace(walk.first, walk.goal, *(torch.stack(parts, 2) for parts in zip(*steps, strict=True)))


def test_layers_follow_their_equation() -> None:
    torch.manual_seed(0)
    gnn, graph = net(depth=1).eval(), cities(1, 6).graph(3)
    layer = gnn.layers[0]
    for norm in (layer.node_norm, layer.edge_norm):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    v, e = silu(gnn.node_in(graph.nodes)), silu(gnn.edge_in(graph.edges))
    new_v, new_e = layer(v, e, graph.neighbours)
    for i in range(6):
        message = torch.zeros(8, dtype=torch.float64)
        for slot, j in enumerate(graph.neighbours[0, i].tolist()):
            message += e[0, i, slot].sigmoid() * layer.message(v[0, j]) / 3
            inner = layer.edge(e[0, i, slot]) + layer.source(v[0, i]) + layer.target(v[0, j])
            torch.testing.assert_close(new_e[0, i, slot], e[0, i, slot] + silu(layer.edge_norm(inner[None])[0]))
        inner = layer.node_norm((layer.node(v[0, i]) + message)[None])[0]
        torch.testing.assert_close(new_v[0, i], v[0, i] + silu(inner))


def test_each_row_of_heat_is_a_distribution_over_neighbours() -> None:
    gnn, graph = net(), cities(3, 10).graph(4)
    first, last = torch.randint(10, (2, 3, 5))
    visited = torch.rand(3, 5, 10) < 0.4
    heat = gnn.heat(gnn.embed(graph), first, last, visited)
    assert heat.shape == (3, 5, 10, 4)
    torch.testing.assert_close(heat.exp().sum(-1), torch.ones(3, 5, 10, dtype=torch.float64))


def test_heat_depends_on_how_the_solution_began() -> None:
    gnn, graph = net(), cities(1, 10).graph(4)
    embedding = gnn.embed(graph)
    none = torch.zeros(1, 1, 10, dtype=torch.bool)
    zero, one = torch.tensor([[0]]), torch.tensor([[1]])
    some = none.clone()
    some[..., 3:6] = True
    base = gnn.heat(embedding, zero, zero, some)
    assert base.isfinite().all()
    for other in ((one, zero, some), (zero, one, some), (zero, zero, none)):
        assert not torch.allclose(gnn.heat(embedding, *other), base)
    # The visited nodes count by their mean, so that twice as many of the same weigh no more.
    share = embedding._replace(visited=torch.ones_like(embedding.visited))
    all_of_them = torch.ones_like(none)
    torch.testing.assert_close(gnn.heat(share, zero, zero, some), gnn.heat(share, zero, zero, all_of_them))


def test_nodes_may_be_renumbered() -> None:
    gnn, problem = net().eval(), cities(1, 8)
    order = torch.randperm(8)
    tours = torch.stack([torch.randperm(8) for _ in range(4)])[None]
    plain = gnn.policy(problem.graph(4), 3)
    renumbered = gnn.policy(TSP(problem.coords[:, order]).graph(4), 3)
    place = order.argsort()  # where a city went
    for policy, route in ((plain, tours), (renumbered, place[tours])):
        rollout(TourWalk(route[..., 0], 8), forced(route, policy), draws=0)
    torch.testing.assert_close(plain.log_prob(trace_of(tours)), renumbered.log_prob(trace_of(place[tours])))


def forced(tours: Tensor, policy: object) -> object:
    """Asks the policy, and goes along the tours all the same."""
    count = itertools.count(1)

    def choose(walk: Walk, allowed: Tensor) -> Tensor:
        policy(walk, allowed)  # type: ignore[operator]
        return torch.nn.functional.one_hot(tours[..., next(count)], allowed.shape[-1]).double().log()

    return choose


@pytest.mark.parametrize("neighbours", [4, 2])
@pytest.mark.parametrize("refresh", [1, 2, 10])
def test_all_tours_together_have_probability_one(neighbours: int, refresh: int) -> None:
    tours = torch.tensor([[[0, *inner] for inner in itertools.permutations(range(1, 5))]])
    policy = net().policy(cities(1, 5).graph(neighbours), refresh)
    rollout(TourWalk(tours[..., 0], 5), forced(tours, policy), draws=0)  # type: ignore[arg-type]
    total = policy.log_prob(trace_of(tours)).detach().exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("refresh", [1, 3, 4, 100])
def test_the_log_probability_of_a_trace_is_that_of_its_steps(refresh: int) -> None:
    problem = cities(2, 9)
    policy = net().policy(problem.graph(4), refresh)
    walk = problem.walk(6)
    steps: list[Tensor] = []

    def recorded(walk: Walk, allowed: Tensor) -> Tensor:
        steps.append(policy(walk, allowed))
        return steps[-1]

    trace = rollout(walk, recorded)
    stepwise = torch.stack(steps, 2).gather(-1, trace.actions[..., None]).sum((-2, -1))
    torch.testing.assert_close(policy.log_prob(trace), stepwise)
    assert policy.log_prob(trace).requires_grad


def test_a_new_heat_map_is_made_every_so_many_steps() -> None:
    gnn, problem = net(), cities(1, 9)
    made: list[int] = []
    plain = gnn.heat
    gnn.heat = lambda *args: made.append(int(args[3].sum())) or plain(*args)  # type: ignore[method-assign]
    rollout(problem.walk(1), gnn.policy(problem.graph(4), 3))
    assert made == [1, 4, 7]  # how many were visited when it was made


def test_nodes_that_are_no_neighbours_are_left_to_the_floor() -> None:
    graph = cities(1, 6).graph(2)
    policy = net().policy(graph, 5)
    walk = TourWalk(torch.tensor([[0]]), 6)
    row = policy(walk, walk.allowed())[0, 0].exp()
    others = [j for j in range(1, 6) if j not in graph.neighbours[0, 0].tolist()]
    assert row[0] == 0
    torch.testing.assert_close(row[others], row.new_full((3,), FLOOR / (1 + 5 * FLOOR)))


@pytest.mark.parametrize("problem", [TSP.random(2, 12), CVRP.random(2, 12), Knapsack.random(2, 12)])
def test_gradients_are_finite(problem: TSP | CVRP | Knapsack) -> None:
    graph = problem.graph(5)
    gnn = HeatmapGNN(graph.nodes.shape[-1], graph.edges.shape[-1], width=8, depth=2)
    policy = gnn.policy(graph, 4)
    policy.log_prob(rollout(problem.walk(5), policy)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in gnn.parameters())
