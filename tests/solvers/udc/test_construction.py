from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.solvers.udc.construction import PackWalk, RouteWalk, TourWalk, Walk, gumbel, rollout


def evenly(walk: Walk, allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf).log_softmax(-1)


def visits(walk: Walk, nodes: list[int]) -> list[list[int]]:
    """Goes along the nodes with one sample; what was allowed before each step and after the last."""
    seen = []
    for node in nodes:
        seen.append(walk.allowed()[0, 0].nonzero()[:, 0].tolist())
        assert node in seen[-1]
        walk.visit(torch.tensor([[node]]))
    return [*seen, walk.allowed()[0, 0].nonzero()[:, 0].tolist()]


def test_a_tour_goes_anywhere_and_a_path_ends_where_it_must() -> None:
    tour = TourWalk(torch.tensor([[1]]), 4)
    assert visits(tour, [3, 0]) == [[0, 2, 3], [0, 2], [2]]
    assert not tour.finished
    path = TourWalk(torch.tensor([[0]]), 4, goal=torch.tensor([[2]]))
    assert visits(path, [3, 1]) == [[1, 3], [1], [2]]
    path.visit(torch.tensor([[2]]))
    assert path.finished


def test_a_vehicle_returns_when_full_and_in_the_end() -> None:
    walk = RouteWalk(torch.tensor([[0.0, 0.6, 0.5, 0.3]]), 1)
    assert visits(walk, [1, 3, 0, 2, 0]) == [[1, 2, 3], [0, 3], [0], [2], [0], [0]]
    assert walk.finished
    torch.testing.assert_close(walk.context(), torch.tensor([[[1.0, 1.0]]]))


def test_vehicles_do_not_return_early_while_the_rest_would_be_too_much() -> None:
    demand = torch.tensor([[0.0, 0.4, 0.4, 0.4, 0.4]])
    with_one_more = RouteWalk(demand, 1, vehicles=torch.tensor([1.0]))
    # 1.2 is left after the first customer, more than one more vehicle carries; 0.8 is not.
    assert visits(with_one_more, [1, 2]) == [[1, 2, 3, 4], [2, 3, 4], [0]]
    assert visits(RouteWalk(demand, 1), [1]) == [[1, 2, 3, 4], [0, 2, 3, 4]]
    out_of_vehicles = RouteWalk(demand, 1, vehicles=torch.tensor([0.0]))
    assert visits(out_of_vehicles, [1, 2]) == [[1, 2, 3, 4], [2, 3, 4], [0]]  # where it must, it may


def test_a_run_of_customers_starts_loaded_and_ends_within_its_limit() -> None:
    demand = torch.tensor([[0.0, 0.2, 0.3, 0.2]])
    fixed = {"closes": torch.tensor([False])}
    walk = RouteWalk(demand, 1, used=torch.tensor([0.1]), limit=torch.tensor([0.9]), **fixed)
    assert walk.first.item() == 1
    assert walk.goal.item() == 3
    assert visits(walk, [2, 3]) == [[0, 2], [0, 3], [0]]
    assert walk.finished
    tight = RouteWalk(demand, 1, used=torch.tensor([0.1]), limit=torch.tensor([0.7]), **fixed)
    assert visits(tight, [2, 0, 3]) == [[0, 2], [0], [3], [0]]  # 0.1 + 0.2 + 0.3 + 0.2 is above the limit
    full = RouteWalk(demand, 1, used=torch.tensor([0.6]), limit=torch.tensor([0.7]), **fixed)
    assert visits(full, [0, 2, 3]) == [[0], [2], [0, 3], [0]]
    closing = RouteWalk(demand, 1, used=torch.tensor([0.1]), closes=torch.tensor([True]))
    assert visits(closing, [3, 2]) == [[0, 2, 3], [0, 2], [0]]
    assert not closing.finished
    assert closing.goal.item() == 0


def test_a_knapsack_is_filled_until_nothing_fits() -> None:
    walk = PackWalk(torch.tensor([[0.5, 0.4, 0.2]]), torch.tensor([0.7]), 1)
    assert visits(walk, [1, 3]) == [[1, 2, 3], [3], [0]]
    assert walk.finished
    torch.testing.assert_close(walk.context(), torch.zeros(1, 1, 1), atol=1e-6, rtol=0)


def test_a_sample_that_has_finished_waits_where_it_is() -> None:
    walk = PackWalk(torch.tensor([[0.9, 0.3, 0.3]]), torch.tensor([1.0]), 2)
    walk.visit(torch.tensor([[1, 2]]))
    trace = rollout(walk, evenly)
    assert trace.actions.tolist() == [[[0], [3]]]
    assert trace.allowed[0, 0, 0].tolist() == [True, False, False, False]


def test_a_trace_holds_what_the_choices_were_made_on() -> None:
    generator = torch.Generator().manual_seed(0)
    trace = rollout(TourWalk(torch.tensor([[0, 4], [2, 2]]), 5), evenly, generator=generator)
    assert trace.actions.shape == trace.current.shape == (2, 2, 4)
    assert trace.allowed.shape == (2, 2, 4, 5)
    assert torch.equal(trace.current[..., 0], trace.first)
    assert torch.equal(trace.current[..., 1:], trace.actions[..., :-1])
    assert trace.allowed.gather(-1, trace.actions[..., None]).all()
    assert trace.allowed.sum(-1).tolist() == [[[4, 3, 2, 1]] * 2] * 2


def test_nothing_to_decide() -> None:
    trace = rollout(PackWalk(torch.tensor([[2.0, 3.0]]), torch.tensor([1.0]), 3), evenly)
    assert trace.actions.shape == (1, 3, 0)
    assert trace.allowed.shape == (1, 3, 0, 3)


def test_draws_follow_the_policy() -> None:
    wanted = torch.tensor([0.0, 0.1, 0.3, 0.6])

    def policy(walk: Walk, allowed: Tensor) -> Tensor:
        return (wanted * allowed).log().log_softmax(-1)

    first = torch.zeros(1, 20_000, dtype=torch.long)
    trace = rollout(TourWalk(first, 4), policy, generator=torch.Generator().manual_seed(0))
    shares = trace.actions[..., 0].flatten().bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, wanted, atol=0.012, rtol=0)
    greedy = rollout(TourWalk(first, 4), policy, draws=0)
    assert (greedy.actions == torch.tensor([3, 2, 1])).all()
    mixed = rollout(TourWalk(first, 4), policy, draws=1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mixed.actions[..., 0], trace.actions[..., 0])
    later = mixed.actions[..., 1:]
    assert (later[..., 0] > later[..., 1]).all()  # the likelier of those left comes first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gumbel_noise_is_finite_and_standard(dtype: torch.dtype) -> None:
    noise = gumbel(torch.zeros(100_000, dtype=dtype), torch.Generator().manual_seed(0))
    assert noise.dtype == dtype
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(torch.pi**2 / 6, abs=0.05)
