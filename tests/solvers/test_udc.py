from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.solvers import (
    CVRP,
    TSP,
    UDC,
    Knapsack,
    OpenPaths,
    dcr_round,
    nearest_neighbour,
    path_length,
    shortest_paths,
    two_opt,
)
from trimtab.solvers.udc import constructor_loss, keep_better, policy_gradient_loss

SMALL: dict[str, Any] = {"divider": {"width": 8, "depth": 2}, "conqueror": {"width": 16, "depth": 1, "hidden": 16}}


def small(kind: Any = TSP, sub_len: int = 5, neighbours: int = 8) -> UDC:
    torch.manual_seed(0)
    return UDC.for_problem(kind, sub_len, neighbours, **SMALL)


def test_the_gradient_is_reinforces_with_every_sample_in_its_baseline() -> None:
    # All tours of five cities from the first, and all pairs of them: the exact expectation of the loss's gradient.
    coords = torch.rand(1, 5, 2, dtype=torch.float64)
    tours = torch.tensor([[0, *inner] for inner in itertools.permutations(range(1, 5))])
    cost = TSP(coords).cost(tours[None])[0]
    scores = torch.randn(24, dtype=torch.float64, requires_grad=True)
    log_prob = scores.log_softmax(0)
    pairs = torch.cartesian_prod(torch.arange(24), torch.arange(24))
    chance = log_prob.detach()[pairs].sum(1).exp()
    losses = torch.stack([policy_gradient_loss(cost[pair][None], log_prob[pair][None]) for pair in pairs])
    (estimated,) = torch.autograd.grad((chance * losses).sum(), scores, retain_graph=True)
    (exact,) = torch.autograd.grad((log_prob.exp() * cost).sum(), scores)
    torch.testing.assert_close(estimated, exact / 2)  # 1 - 1/2 of it, for two samples


def test_no_gradient_goes_through_costs_and_shared_costs_do_not_matter() -> None:
    cost = torch.rand(3, 4, requires_grad=True)
    log_prob = torch.randn(3, 4, requires_grad=True)
    policy_gradient_loss(cost, log_prob).backward()
    assert cost.grad is None
    first = log_prob.grad.clone()
    torch.testing.assert_close(first.sum(1), torch.zeros(3), atol=1e-6, rtol=0)
    log_prob.grad = None
    policy_gradient_loss(cost.detach() + torch.tensor([[1.0], [20.0], [-3.0]]), log_prob).backward()
    torch.testing.assert_close(log_prob.grad, first, atol=1e-5, rtol=1e-4)


def test_a_round_never_lengthens_a_tour_whatever_is_proposed_for_its_pieces() -> None:
    problem, tour = TSP(torch.rand(2, 20, 2, dtype=torch.float64)), torch.randperm(20).expand(2, 3, 20)

    def anything(paths: OpenPaths) -> Tensor:
        inner = 1 + torch.rand(len(paths.coords), 6).argsort(1)
        return torch.cat([torch.zeros_like(inner[:, :1]), inner, torch.full_like(inner[:, :1], 7)], 1)

    changed = False
    for shift in range(10):
        before, last = problem.cost(tour), tour
        tour = dcr_round(problem, tour, anything, 8, shift=shift)
        assert (problem.cost(tour) <= before + 1e-12).all()
        changed = changed or not torch.equal(tour, last)
    assert changed


def test_an_exact_sub_solver_leaves_no_window_to_improve() -> None:
    problem = TSP(torch.rand(2, 20, 2, dtype=torch.float64))
    tour = torch.stack([torch.randperm(20) for _ in range(6)]).view(2, 3, 20)
    before = problem.cost(tour)
    for _ in range(100):
        last = problem.cost(tour)
        for shift in range(20):
            tour = dcr_round(problem, tour, lambda paths: shortest_paths(paths.coords), 8, shift=shift)
        if torch.equal(problem.cost(tour), last):
            break
    assert (problem.cost(tour) < 0.7 * before).all()
    for begin in range(20):
        window = tour.roll(-begin, -1)[..., :8].flatten(0, 1)
        coords = problem.coords.repeat_interleave(3, 0).gather(1, window[..., None].expand(-1, -1, 2))
        as_it_is = path_length(coords, torch.arange(8).expand(6, 8))
        torch.testing.assert_close(path_length(coords, shortest_paths(coords)), as_it_is)


def test_two_rounds_repair_where_one_cannot() -> None:
    # A tour whose only flaw lies across the cut: points on a circle, two of them swapped.
    angle = torch.arange(12) * torch.pi / 6
    problem = TSP(torch.stack([angle.cos(), angle.sin()], -1)[None])
    tour = torch.arange(12)[[0, 1, 2, 3, 4, 6, 5, 7, 8, 9, 10, 11]][None, None]

    def solve(shift: int) -> float:
        return float(problem.cost(dcr_round(problem, tour, lambda paths: shortest_paths(paths.coords), 6, shift=shift)))

    best = float(problem.cost(torch.arange(12)[None, None]))
    assert solve(0) == pytest.approx(float(problem.cost(tour)))  # 5 and 6 are ends of pieces
    assert solve(3) == pytest.approx(best)


def test_the_rounds_of_solving_cut_half_a_piece_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    udc, problem, seen = small(sub_len=6), TSP.random(1, 18), []
    split = TSP.split

    def recorded(self: TSP, solution: Tensor, sub_len: int, *, shift: int, generator: object = None) -> object:
        seen.append((sub_len, shift))
        return split(self, solution, sub_len, shift=shift)

    monkeypatch.setattr(TSP, "split", recorded)
    udc.solve(problem, samples=2, rounds=2)
    udc.loss(problem, samples=2, candidates=2)
    assert seen == [(6, 3), (6, 6)] * 2
    seen.clear()
    udc.solve(problem, samples=2, rounds=30)
    assert {shift for _, shift in seen[2:]} <= set(range(1, 7))
    assert len({shift for _, shift in seen[2:]}) > 2
    seen.clear()
    udc.solve(problem, samples=2, shifts=[5, 1])
    assert seen == [(6, 5), (6, 1)]


def test_the_divider_is_judged_by_what_is_left_after_repair() -> None:
    # Any tour of four cities is repaired in a few rounds, so that all proposals end up equally good.
    udc, problem = small(sub_len=4), TSP(torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]]))
    generator = torch.Generator().manual_seed(0)
    bare = udc.loss(problem, samples=16, candidates=40, rounds=0, generator=generator)
    assert bare.divider.abs() > 1e-3
    assert bare.conqueror == 0
    repaired = udc.loss(problem, samples=16, candidates=40, rounds=15, generator=generator)
    assert float(repaired.history[0]) > 4.1
    assert float(repaired.history[-1]) == pytest.approx(4, abs=1e-6)
    assert repaired.divider.abs() < 1e-5


def test_the_conquerors_costs_are_those_of_normalised_pieces() -> None:
    paths = OpenPaths(torch.rand(4, 6, 2, generator=torch.Generator().manual_seed(0)))
    conqueror = small().conqueror
    losses = [
        constructor_loss(conqueror, pieces, 5, generator=torch.Generator().manual_seed(1))[0]
        for pieces in (paths, OpenPaths(100 * paths.coords))
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [TSP, CVRP, Knapsack])
def test_training_lowers_the_cost_of_proposals_and_of_repaired_ones(kind: Any) -> None:
    udc, generator = small(kind, sub_len=5, neighbours=6), torch.Generator().manual_seed(0)
    options = {"capacity": 15} if kind is CVRP else {}
    test = kind.random(40, 10, generator=torch.Generator().manual_seed(9), **options)

    def costs() -> Tensor:
        with torch.no_grad():
            return udc.loss(test, samples=4, candidates=4, generator=torch.Generator().manual_seed(3)).history

    before = costs()
    optimizer = torch.optim.Adam(udc.parameters(), lr=1e-2)
    for _ in range(10):
        loss = udc.loss(
            kind.random(6, 10, generator=generator, **options), samples=8, candidates=6, generator=generator
        )
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    after = costs()
    assert after[0] < before[0]
    assert after[-1] < before[-1]


def test_any_callable_solves_the_pieces() -> None:
    udc, problem = small(sub_len=8), TSP.random(3, 24, generator=torch.Generator().manual_seed(0))
    seeds = {"generator": torch.Generator().manual_seed(1)}
    found = udc.solve(problem, samples=4, rounds=6, sub_solver=lambda paths: two_opt(paths.coords), **seeds)
    assert found.solution.shape == (3, 24)
    assert (found.history[-1] < found.history[0]).all()
    # Greedy proposals of tours differ by where they start, and the best of them are kept.
    one = udc.solve(problem, samples=1, rounds=0, generator=torch.Generator().manual_seed(1))
    many = udc.solve(problem, samples=30, rounds=0, generator=torch.Generator().manual_seed(1))
    assert (many.cost <= one.cost + 1e-6).all()
    assert (many.cost < one.cost).any()


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_neither_unit_nor_origin_of_the_places_matters(scale: float) -> None:
    coords = torch.rand(2, 20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results, losses, gradients = [], [], []
    for places in (coords, scale * (coords + 1e4)):
        udc, problem, generator = small(), TSP(places), torch.Generator().manual_seed(1)
        loss = udc.loss(problem, samples=3, candidates=4, generator=generator)
        loss.total.backward()
        losses.append(torch.stack([loss.divider.detach(), loss.conqueror.detach()]))
        gradients.append(torch.cat([p.grad.flatten() for p in udc.parameters() if p.grad is not None]))
        results.append(udc.solve(problem, samples=3, generator=generator))
    assert torch.equal(results[1].solution, results[0].solution)
    torch.testing.assert_close(results[1].cost, scale * results[0].cost, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [{"samples": 1}, {"candidates": 1}, {"rounds": -1}, {"samples": 2.5}, {}])
def test_a_refused_loss_changes_nothing(options: dict[str, Any]) -> None:
    udc, generator = small(sub_len=5).train(), torch.Generator().manual_seed(0)
    before, drawn = {k: v.clone() for k, v in udc.state_dict().items()}, generator.get_state()
    with pytest.raises((ValueError, TypeError)):
        udc.loss(TSP.random(2, 12 if options else 4), generator=generator, **options)
    assert all(torch.equal(value, before[name]) for name, value in udc.state_dict().items())
    assert torch.equal(generator.get_state(), drawn)


def test_numpy_integers_are_sizes() -> None:
    udc = small(sub_len=np.int64(5), neighbours=np.int32(4))
    problem = TSP(np.random.default_rng(0).random((2, 12, 2)))
    assert udc.solve(problem, samples=np.int64(2), rounds=np.int64(1)).solution.shape == (2, 12)


def test_a_piece_as_long_as_the_tour() -> None:
    udc, problem = small(sub_len=9), TSP.random(2, 9)
    assert udc.solve(problem, samples=2).solution.shape == (2, 9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda udc, problem: udc.loss(problem, samples=1), "samples must be at least 2, got 1"),
        (lambda udc, problem: udc.loss(problem, candidates=1), "candidates must be at least 2, got 1"),
        (lambda udc, problem: udc.loss(problem, rounds=-1), "rounds must be at least 0, got -1"),
        (lambda udc, problem: udc.solve(problem, samples=0), "samples must be at least 1, got 0"),
        (lambda udc, problem: udc.solve(problem, rounds=-1), "rounds must be at least 0, got -1"),
        (lambda udc, problem: udc.solve(TSP.random(1, 4)), "problem must be of at least sub_len = 5 nodes, got 4"),
        (lambda udc, problem: UDC(udc.divider, udc.conqueror, sub_len=2), "sub_len must be at least 3, got 2"),
        (lambda udc, problem: UDC(udc.divider, udc.conqueror, neighbours=0), "neighbours must be at least 1, got 0"),
        (lambda udc, problem: UDC.for_problem(dict), "problem must be one of .*TSP.*CVRP.*Knapsack"),
        (lambda udc, problem: dcr_round(problem, TOUR, udc.conqueror, 11), r"sub_len must be in \[3, 10\], got 11"),
        (
            lambda udc, problem: dcr_round(problem, TOUR[0], udc.conqueror, 5),
            r"solution must be of shape \(batch, samples, n, ...\), got shape \(1, 10\)",
        ),
        (lambda udc, problem: dcr_round(problem, TOUR * 0, udc.conqueror, 5), "solution must be permutations of 10"),
        (lambda udc, problem: dcr_round(ROUTES, STOPS * 0, udc.conqueror, 5), "solution must be permutations of 10"),
        (lambda udc, problem: dcr_round(ROUTES, STOPS, udc.conqueror, 5), "return to the depot somewhere"),
        (lambda udc, problem: dcr_round(Knapsack.random(1, 10), TOUR, udc.conqueror, 5), "must be booleans"),
        (lambda udc, problem: dcr_round(problem, TOUR, lambda paths: paths.coords, 5), "candidates must be of shape"),
        (lambda udc, problem: dcr_round(problem, TOUR, lambda paths: paths.current[:, None, :4], 5), "candidates"),
        (lambda udc, problem: dcr_round(problem, TOUR, lambda paths: paths.current.flip(-1), 5), "in place"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(small(), TSP.random(1, 10))


TOUR = torch.arange(10)[None, None]
ROUTES = CVRP.random(1, 10, generator=torch.Generator().manual_seed(0))
STOPS = torch.stack([TOUR, torch.zeros_like(TOUR)], -1)


def test_one_candidate_each_or_several() -> None:
    paths = OpenPaths(torch.rand(4, 7, 2))
    orders = torch.stack([shortest_paths(paths.coords), paths.current], 1)
    torch.testing.assert_close(paths.cost(keep_better(paths, orders)[:, None])[:, 0], paths.cost(orders).min(1).values)
    assert torch.equal(keep_better(paths, orders), keep_better(paths, orders[:, 0]))


def test_state_goes_to_another_and_solves_alike() -> None:
    udc, problem = small(sub_len=6), TSP.random(2, 12)
    udc.loss(problem, samples=4, candidates=4).total.backward()
    torch.optim.SGD(udc.parameters(), lr=0.1).step()
    torch.manual_seed(5)
    other = UDC.for_problem(TSP, 6, 8, **SMALL)
    other.load_state_dict(udc.state_dict())
    results = [net.solve(problem, samples=3, generator=torch.Generator().manual_seed(0)) for net in (udc, other)]
    assert torch.equal(results[0].solution, results[1].solution)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [TSP, CVRP, Knapsack])
def test_cuda(kind: Any) -> None:
    problem = kind(**{key: value.cuda() for key, value in vars(kind.random(2, 12)).items()})
    udc, generator = small(kind).cuda(), torch.Generator().manual_seed(0)
    udc.loss(problem, samples=4, candidates=4, generator=generator).total.backward()
    assert udc.solve(problem, samples=4, rounds=4, generator=generator).solution.is_cuda


@pytest.mark.parametrize("end", [2, -1])
def test_ends_of_routes_are_zero_or_one(end: int) -> None:
    problem = CVRP(torch.zeros(1, 2), torch.tensor([[[1.0, 0], [2, 0], [0, 3]]]), torch.full((1, 3), 0.6))
    solution = torch.tensor([[[[0, 1], [1, end], [2, 1]]]])
    for call in (problem.cost, lambda found: problem.split(found, 3, shift=0)):
        with pytest.raises(ValueError, match="^solution must say with 0 or 1"):
            call(solution)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_places_in_half_precision_are_refused_by_name(dtype: torch.dtype) -> None:
    coords = torch.rand(1, 6, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    for call in (TSP, nearest_neighbour, two_opt, shortest_paths):
        with pytest.raises(TypeError, match="^coords must be float32 or float64"):
            call(coords)


def test_solving_leaves_each_part_in_the_mode_it_was_in() -> None:
    udc = small().train()
    udc.divider.eval()
    udc.conqueror.layers[0].eval()
    before = [module.training for module in udc.modules()]
    problem = TSP.random(1, 10, generator=torch.Generator().manual_seed(0))
    udc.solve(problem, samples=2)
    assert [module.training for module in udc.modules()] == before
    with pytest.raises(KeyError):
        udc.solve(problem, samples=2, sub_solver=lambda pieces: {}["nothing"])
    assert [module.training for module in udc.modules()] == before
