from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from trimtab.solvers import CVRP, TSP, Knapsack, OpenPaths, PathConstructor
from trimtab.solvers.udc.construction import TourWalk, Trace, Walk, rollout
from trimtab.solvers.udc.path_constructor import _attention_free, _shared
from trimtab.solvers.udc.routing import is_permutation


def net(features: int = 3, context: int = 0) -> PathConstructor:
    return PathConstructor(features, context, width=8, depth=2, hidden=16).double()


def paths(pieces: int = 5, n: int = 7) -> OpenPaths:
    return OpenPaths(torch.rand(pieces, n, 2, dtype=torch.float64))


def log_prob_of(constructor: PathConstructor, pieces: OpenPaths, orders: Tensor) -> Tensor:
    """Of building these orders (pieces, candidates, n), from whichever end they begin at."""
    n = orders.shape[-1]
    walk = TourWalk(orders[..., 0], n, goal=orders[..., -1])
    steps = []
    for step in range(1, n):
        steps.append((orders[..., step], walk.current, walk.allowed(), walk.context()))
        walk.visit(orders[..., step])
    parts = (torch.stack(part, 2) for part in zip(*steps, strict=True))
    return constructor.policy(pieces).log_prob(Trace(walk.first, walk.goal, *parts))


def test_attention_follows_its_equation() -> None:
    bias, key, value = torch.randn(2, 3, 5), torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    weights = (bias[..., None] + key[:, None]).softmax(2)
    torch.testing.assert_close(_attention_free(bias, *_shared(key, value)), (weights * value[:, None]).sum(2))
    huge = _attention_free(bias, *_shared(key + 1e4, value))
    torch.testing.assert_close(huge, (weights * value[:, None]).sum(2), rtol=1e-2, atol=1e-2)


def test_logits_are_clipped_and_lean_to_what_is_near() -> None:
    constructor, pieces = net(), paths(1)
    embedding = constructor.embed(pieces)._replace(nodes=torch.zeros(1, 7, 8, dtype=torch.float64))
    everywhere = torch.ones(1, 1, 7, dtype=torch.bool)
    none = torch.empty(1, 1, 0, dtype=torch.float64)
    row = constructor.log_probs(embedding, torch.tensor([[6]]), torch.tensor([[0]]), none, everywhere)[0, 0]
    # With nodes that say nothing only the distance is left, times log2 of the number of nodes.
    expected = (50 * (math.log2(7) * pieces.affinity[0, 0]).tanh()).log_softmax(-1)
    torch.testing.assert_close(row, expected)


@pytest.mark.parametrize("backwards", [False, True])
def test_all_orders_of_a_path_together_have_probability_one(backwards: bool) -> None:
    orders = torch.tensor([[[0, *inner, 4] for inner in itertools.permutations(range(1, 4))]])
    orders = orders.flip(-1) if backwards else orders
    total = log_prob_of(net(), paths(1, 5), orders).detach().exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-12)


def test_probabilities_ignore_place_size_and_numbering() -> None:
    constructor, pieces = net(), paths(3)
    orders = torch.stack([torch.cat([torch.tensor([0]), torch.randperm(5) + 1, torch.tensor([6])]) for _ in range(4)])
    orders = orders.expand(3, -1, -1)
    expected = log_prob_of(constructor, pieces, orders)
    for moved in (7 * pieces.coords - 3, pieces.coords.flip(-1)):
        torch.testing.assert_close(log_prob_of(constructor, OpenPaths(moved), orders), expected)
    renumber = torch.tensor([0, 4, 2, 5, 1, 3, 6])
    place = renumber.argsort()
    torch.testing.assert_close(log_prob_of(constructor, OpenPaths(pieces.coords[:, renumber]), place[orders]), expected)


def test_the_ends_of_a_path_are_told_from_the_rest() -> None:
    constructor, pieces = net(), paths(3)
    exchange = [1, 0, *range(2, 7)]  # an end with an inner point
    nodes = constructor.embed(OpenPaths(pieces.coords[:, exchange])).nodes
    assert not torch.allclose(nodes[:, exchange], constructor.embed(pieces).nodes)


def test_walking_a_path_backwards_is_walking_the_path_turned_round() -> None:
    constructor, pieces = net(), paths(3)
    orders = torch.tensor([[[0, 3, 1, 2, 5, 4, 6]]]).expand(3, 1, 7)
    backwards = log_prob_of(constructor, pieces, orders.flip(-1))
    torch.testing.assert_close(
        log_prob_of(constructor, OpenPaths(pieces.coords.flip(1)), 6 - orders.flip(-1)), backwards
    )
    assert not torch.allclose(log_prob_of(constructor, pieces, orders), backwards)


def test_candidates_begin_at_either_end_and_read_forwards() -> None:
    constructor, pieces = net(), paths(6, 9)
    walk = pieces.walk(5)
    assert (walk.first == torch.tensor([0, 0, 0, 8, 8])).all()
    assert (walk.goal == torch.tensor([8, 8, 8, 0, 0])).all()
    found = constructor(pieces, 5, greedy=False)
    assert found.shape == (6, 5, 9)
    assert is_permutation(found).all()
    assert (found[..., 0] == 0).all()
    assert (found[..., -1] == 8).all()
    greedy = constructor(pieces)
    assert torch.equal(greedy, constructor(pieces))
    turned = constructor(OpenPaths(pieces.coords.flip(1)))
    assert torch.equal(8 - turned.flip(-1), greedy.flip(1))


def pieces_of(problem: TSP | CVRP | Knapsack) -> object:
    generator = torch.Generator().manual_seed(0)

    def evenly(walk: Walk, allowed: Tensor) -> Tensor:
        return torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)

    solution = problem.read(rollout(problem.walk(3, generator=generator), evenly, generator=generator))
    return problem.split(solution, 6, shift=3, generator=generator)[0]


@pytest.mark.parametrize(
    ("problem", "context"), [(TSP.random(2, 12), 0), (CVRP.random(2, 12, capacity=20), 2), (Knapsack.random(2, 12), 1)]
)
def test_the_log_probability_of_a_trace_is_that_of_its_steps(problem: TSP | CVRP | Knapsack, context: int) -> None:
    pieces = pieces_of(problem)
    constructor = PathConstructor(pieces.features.shape[-1], context, width=8, depth=1, hidden=8)  # type: ignore[attr-defined]
    policy = constructor.policy(pieces)  # type: ignore[arg-type]
    steps: list[Tensor] = []

    def recorded(walk: Walk, allowed: Tensor) -> Tensor:
        steps.append(policy(walk, allowed))
        return steps[-1]

    trace = rollout(pieces.walk(4), recorded)  # type: ignore[attr-defined]
    stepwise = torch.stack(steps, 2).gather(-1, trace.actions[..., None]).sum((-2, -1))
    found = policy.log_prob(trace)
    torch.testing.assert_close(found, stepwise, rtol=1e-4, atol=1e-4)
    found.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in constructor.parameters())
