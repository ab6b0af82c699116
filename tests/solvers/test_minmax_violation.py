from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from trimtab.solvers import (
    discrete_tomography,
    fixed_point_filter,
    minmax_violation,
    parallel_projections,
    quantization_grid,
    quantize_layer,
)
from trimtab.solvers.minmax_violation import (
    Searches,
    best_move,
    best_pair,
    bounds,
    compensated_rounding,
    least,
    relaxation,
)
from trimtab.solvers.minmax_violation.designs import filter_rows


def instance(m: int = 12, n: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(m, n, generator=generator, dtype=torch.float64)
    return A, 2 * torch.randn(m, generator=generator, dtype=torch.float64)


def searches(m: int, n: int, batch: int, levels: int = 5, seed: int = 0) -> tuple[Searches, Tensor, Tensor]:
    A, b = instance(m, n, seed)
    grid = torch.arange(levels).double().expand(1, n, -1) - levels // 2
    index = torch.randint(levels, (batch, n), generator=torch.Generator().manual_seed(seed))
    return Searches(A, b[None], grid, index), A, b


def enumerated(A: Tensor, b: Tensor, sets: list[Tensor]) -> float:
    return min(float((A @ torch.stack(x) - b).abs().max()) for x in itertools.product(*sets))


@pytest.mark.parametrize("seed", range(4))
def test_optimal_where_all_can_be_listed(seed: int) -> None:
    A, b = instance(15, 5, seed)
    levels = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    result = minmax_violation(A, b, levels, max_steps=60)
    best = enumerated(A, b, [levels] * 5)
    assert float(result.value) == pytest.approx(best, rel=1e-12)
    assert float(result.bound) <= best + 1e-9


def test_reaches_the_optimum_that_a_mixed_integer_solver_proves() -> None:
    A, b = instance(30, 10, 3)
    ones, rows = np.ones((30, 1)), A.numpy()
    proven = milp(
        np.append(np.zeros(10), 1.0),
        constraints=[
            LinearConstraint(np.hstack([rows, -ones]), -np.inf, b.numpy()),
            LinearConstraint(np.hstack([rows, ones]), b.numpy(), np.inf),
        ],
        integrality=np.append(np.ones(10), 0.0),
        bounds=Bounds(np.append(np.full(10, -2.0), 0.0), np.append(np.full(10, 2.0), np.inf)),
    )
    result = minmax_violation(A, b, torch.arange(-2, 3).double())
    assert proven.status == 0
    assert proven.fun - 1e-6 <= float(result.value) <= 1.05 * proven.fun


def test_value_is_that_of_the_answer_and_history_ends_there() -> None:
    A, b = instance(40, 20)
    weights = torch.linspace(0.5, 2, 40, dtype=torch.float64)
    levels = torch.linspace(-1, 1, 7, dtype=torch.float64)
    result = minmax_violation(A, b, levels, weights=weights, max_steps=60)
    value = (weights * (A @ result.x - b)).abs().max()
    assert float(result.value) == pytest.approx(float(value), rel=1e-12)
    assert float(result.history[-1]) == pytest.approx(float(value), rel=1e-10)
    assert (result.history.diff() <= 0).all()
    assert len(result.history) == result.n_steps + 1
    assert torch.equal(levels[result.index], result.x)
    assert float(result.bound) <= float(value)


def test_identity_rounds() -> None:
    b = torch.tensor([0.3, -0.8, 1.7, 9.0], dtype=torch.float64)
    result = minmax_violation(torch.eye(4).double(), b, torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    assert float(result.value) == 7.0
    spread = minmax_violation(torch.eye(3).double(), b[:3], torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    assert float(spread.value) == pytest.approx(0.3)
    assert spread.x.tolist() == [0.0, -1.0, 2.0]


@given(seed=st.integers(0, 10_000), rows=st.integers(1, 40), variables=st.integers(1, 8), count=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_best_move_is_the_best_of_all(seed: int, rows: int, variables: int, count: int) -> None:
    search, A, b = searches(rows, variables, 3, levels=count, seed=seed)
    moves = search.moves(search.index, slice(None))
    bound = bounds(search.residual, search.columns, moves)
    value, chosen = best_move(search.residual, search.columns, moves, bound)
    for one in range(3):
        x = search.values(search.index, slice(None))[one]
        after = []
        for k in range(2 * variables):
            moved = x.clone()
            moved[k % variables] += moves[one, k]
            after.append(float((A @ moved - b).abs().max()) if moves[one, k] else float("inf"))
        assert float(value[one]) == pytest.approx(min(after), rel=1e-9)
        assert after[int(chosen[one])] == pytest.approx(min(after), rel=1e-9)
        assert (bound[one] <= torch.tensor(after, dtype=torch.float64) + 1e-9).all()


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_single_steps_decide_about_all_levels(seed: int) -> None:
    # Convex along a variable: where no neighbouring level is better, no level is.
    search, A, b = searches(20, 4, 1, levels=9, seed=seed)
    x = search.values(search.index, slice(None))[0]
    here = float((A @ x - b).abs().max())
    for j in range(4):

        def at(level: int, j: int = j) -> float:
            moved = x.clone()
            moved[j] = float(level) - 4
            return float((A @ moved - b).abs().max())

        place = int(search.index[0, j])
        near = [at(level) for level in (place - 1, place + 1) if 0 <= level < 9]
        assert (min(near) < here) == (min(at(level) for level in range(9)) < here)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_best_pair_is_the_best_of_all_that_improve(seed: int) -> None:
    # With so few variables no more moves lower the worst row than pairs may begin with.
    n = 5
    search, A, b = searches(30, n, 2, seed=seed)
    moves = search.moves(search.index, slice(None))
    value, chosen = best_pair(search.residual, search.columns, moves)
    for one in range(2):
        x = search.values(search.index, slice(None))[one]
        here, found = float(search.residual[one].abs().max()), {}
        for k, other in itertools.combinations(range(2 * n), 2):
            if k % n != other % n and moves[one, k] and moves[one, other]:
                moved = x.clone()
                moved[k % n] += moves[one, k]
                moved[other % n] += moves[one, other]
                found[k, other] = float((A @ moved - b).abs().max())
        best = min(found.values())
        if best < here:
            assert float(value[one]) == pytest.approx(best, rel=1e-9)
        pair = tuple(sorted(chosen[one].tolist()))
        assert found[pair] == pytest.approx(float(value[one]), rel=1e-9)


def test_pairs_reach_what_single_moves_cannot() -> None:
    # From (0, 0) every single step makes the first row worse; both together solve it.
    A = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    search = Searches(
        10 * A[:1].clone().repeat(2, 1) + torch.tensor([[0.0, 0.0], [1.0, 1.0]]),
        torch.tensor([[0.0, 2.0]], dtype=torch.float64),
        torch.tensor([0.0, 1.0], dtype=torch.float64).expand(1, 2, 2),
        torch.zeros(1, 2, dtype=torch.long),
    )
    moves = search.moves(search.index, slice(None))
    single, _ = best_move(search.residual, search.columns, moves, bounds(search.residual, search.columns, moves))
    pair, chosen = best_pair(search.residual, search.columns, moves)
    assert float(single) > float(search.best_value) > float(pair) == 0.0
    assert sorted(chosen[0].tolist()) == [0, 1]


def test_least_looks_further_only_where_it_must() -> None:
    true = torch.rand(3, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    bound = true.clone()
    bound[1] = 0.0  # says nothing, so that all must be looked at
    looked: list[tuple[int, ...]] = []

    def after(who: Tensor, chosen: Tensor) -> Tensor:
        looked.append(tuple(chosen.shape))
        return true[who[:, None], chosen][..., None]

    value, chosen = least(bound, after)
    assert torch.equal(value, true.amin(1))
    assert torch.equal(chosen, true.argmin(1))
    assert looked[0] == (3, 8)
    assert looked[-1] == (1, 200)
    value, _ = least(
        torch.full((1, 4), torch.inf, dtype=torch.float64), lambda who, chosen: true[who][:, chosen[0]][..., None]
    )
    assert value.isinf().all()


def test_residuals_do_not_drift() -> None:
    search, A, b = searches(30, 12, 2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):  # never recomputed, as nothing goes back
        search.step(3, generator)
    exact = search.values(search.index, slice(None)) @ A.T - b
    assert (search.residual - exact).abs().max() < 1e-9


def test_tabu_keeps_a_changed_variable() -> None:
    search, _, _ = searches(30, 12, 16, levels=9)
    generator, changed = torch.Generator().manual_seed(0), []
    for _ in range(12):
        before, best = search.index.clone(), search.best_value.clone()
        search.step(4, generator)
        moved = (search.index != before).int()
        assert (moved.sum(1) == 1).all()
        changed.append(moved.argmax(1).where(search.best_value == best, -1))  # a new best may break the tabu
    for now, then in itertools.combinations(range(11, -1, -1), 2):
        if now - then <= 4:
            assert not ((changed[now] == changed[then]) & (changed[now] >= 0)).any()


def test_a_tabu_move_counts_only_below_the_best() -> None:
    search, _, _ = searches(30, 6, 4)
    moves = search.moves(search.index, slice(None))
    bound = bounds(search.residual, search.columns, moves)
    free, chosen = best_move(search.residual, search.columns, moves, bound)
    limit = torch.full_like(bound, math.inf)
    limit.scatter_(1, chosen[:, None], free[:, None])  # not below it: the second best is made
    second, other = best_move(search.residual, search.columns, moves, bound, limit)
    assert (second >= free).all()
    assert (other != chosen).all()
    limit.scatter_(1, chosen[:, None], 1.0001 * free[:, None])
    again, same = best_move(search.residual, search.columns, moves, bound, limit)
    assert torch.equal(again, free)
    assert torch.equal(same, chosen)


def test_permutations_of_rows_and_variables_change_nothing_else() -> None:
    A, b = instance(15, 5)
    levels = [torch.arange(3).double() + j for j in range(5)]
    rows, variables = torch.randperm(15), torch.randperm(5)
    plain = minmax_violation(A, b, levels, max_steps=60)
    turned = minmax_violation(A[rows][:, variables], b[rows], [levels[j] for j in variables], max_steps=60)
    assert float(turned.value) == pytest.approx(float(plain.value))
    assert torch.allclose(turned.x, plain.x[variables])


def test_sets_of_different_sizes() -> None:
    A, b = instance(10, 3)
    sets = [torch.tensor(values, dtype=torch.float64) for values in ([0.5], [-1.0, 0.0, 3.0], [-2.0, 2.0])]
    result = minmax_violation(A, b, sets)
    assert float(result.value) == pytest.approx(enumerated(A, b, sets))
    assert all(float(value) in one.tolist() for value, one in zip(result.x, sets, strict=True))
    # From far outside, each variable starts at its own outermost level and can come back.
    far = minmax_violation(A, b, sets, start=torch.full((3,), 99.0).double(), restarts=4, max_steps=20)
    assert float(far.value) == pytest.approx(float(result.value))
    still = minmax_violation(A, b, sets, start=torch.full((3,), 99.0).double(), restarts=4, max_steps=0)
    assert all(int(place) < len(one) for place, one in zip(still.index, sets, strict=True))
    assert still.x.tolist() == [0.5, 3.0, 2.0]


def test_several_problems_are_solved_as_each_alone() -> None:
    A, _ = instance(15, 5)
    b = 2 * torch.randn(4, 15, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grids = torch.arange(4).double() * torch.tensor([0.5, 1.0, 1.5, 2.0])[:, None, None] - 1
    together = minmax_violation(A, b, grids.expand(4, 5, 4), max_steps=40)
    assert together.x.shape == (4, 5)
    assert together.history.shape[1:] == together.value.shape == (4,)
    for one in range(4):
        alone = minmax_violation(A, b[one], grids[one, 0], max_steps=40)
        assert float(together.value[one]) == pytest.approx(float(alone.value))
        assert float(alone.value) == pytest.approx(enumerated(A, b[one], [grids[one, 0]] * 5))


def test_bounds_of_the_relaxation_are_its_optimum() -> None:
    A, b = instance(20, 4)
    low, high = torch.full((1, 4), -0.4).double(), torch.full((1, 4), 0.4).double()
    x, value = relaxation(A, b[None], low, high)
    assert float((A @ x[0] - b).abs().max()) == pytest.approx(float(value), rel=1e-9)
    for _ in range(200):
        assert float((A @ (0.8 * torch.rand(4).double() - 0.4) - b).abs().max()) >= float(value)


def test_stops_at_the_bound() -> None:
    # The only values there are meet the relaxation's optimum, so that nothing is left to look for.
    A, b = instance(10, 4)
    result = minmax_violation(A, b, torch.zeros(1).double())
    assert result.n_steps == 0
    assert float(result.value) == pytest.approx(float(b.abs().max()))
    assert float(result.value) == pytest.approx(float(result.bound))


def test_a_start_that_is_a_solution_stays() -> None:
    A, _ = instance(10, 4)
    x = torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    exact = minmax_violation(A, A @ x, torch.arange(3).double(), start=x, max_steps=20)
    assert torch.equal(exact.x, x)
    assert float(exact.value) < 1e-12
    assert float(exact.bound) == -torch.inf


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu() -> None:
    A, b = instance(30, 10)
    levels = torch.arange(-2, 3).double()
    here, there = minmax_violation(A, b, levels), minmax_violation(A.cuda(), b.cuda(), levels)
    assert there.x.is_cuda
    assert float(there.value) == pytest.approx(float(here.value), rel=0.05)


def test_compensated_rounding_by_definition() -> None:
    # After each rounding, the rest is refitted by (damped) least squares, which is what GPTQ's recursion amounts to.
    A, _ = instance(12, 4)
    centre = torch.randn(2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grid = torch.arange(-3, 4).double().expand(2, 4, -1) * 0.5
    order = torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3]])
    index = compensated_rounding(A, centre, grid, order, damping=0.02)
    gram = A.T @ A
    gram += 0.02 * gram.diagonal().mean() * torch.eye(4)
    for problem, (number, turn) in itertools.product(range(2), enumerate(order.tolist())):
        x = centre[problem].clone()
        for place, j in enumerate(turn):
            x[j] = grid[problem, j][(grid[problem, j] - x[j]).abs().argmin()]
            done, rest = turn[: place + 1], turn[place + 1 :]
            off = x[done] - centre[problem, done]
            if rest:
                step = torch.linalg.solve(gram[rest][:, rest], -gram[rest][:, done] @ off)
                x[rest] = centre[problem, rest] + step
        assert torch.allclose(grid[problem].gather(1, index[problem, number][:, None])[:, 0], x)


def test_never_worse_than_its_roundings() -> None:
    A, _ = instance(60, 30)
    weights = torch.randn(30, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    levels = torch.linspace(-3, 3, 8, dtype=torch.float64)
    nearest = levels[(levels - weights[:, None]).abs().argmin(1)]
    order = A.square().sum(0).argsort(descending=True, stable=True)[None]
    index = compensated_rounding(A, weights[None], levels.expand(1, 30, -1), order)[0, 0]
    begun = minmax_violation(A, A @ weights, levels, start=weights, restarts=2, max_steps=0)
    errors = [float((A @ (x - weights)).abs().max()) for x in (nearest, levels[index])]
    assert float(begun.value) == pytest.approx(min(errors))
    found = minmax_violation(A, A @ weights, levels, start=weights, restarts=2)
    assert float(found.value) < 0.95 * min(errors)


def test_time_limit_stops() -> None:
    A, b = instance(60, 30)
    result = minmax_violation(A, b, torch.arange(-2, 3).double(), time_limit=0.05, max_steps=10**6)
    assert 0 < result.n_steps < 10**5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"A": torch.ones(3)}, ValueError, "A must be a non-empty matrix"),
        ({"A": torch.ones(3, 2).long()}, TypeError, "A must be floating point"),
        ({"A": [[1.0]]}, TypeError, "A must be a tensor or a NumPy array"),
        ({"A": torch.full((3, 2), torch.nan)}, ValueError, "A must be finite"),
        ({"b": torch.ones(2)}, ValueError, r"b must be of shape \(3,\)"),
        ({"b": torch.full((3,), torch.inf)}, ValueError, "b must be finite"),
        ({"levels": torch.tensor([1.0, 0.0])}, ValueError, "levels must be increasing"),
        ({"levels": torch.tensor([1.0, 1.0])}, ValueError, "levels must be increasing"),
        ({"levels": torch.ones(3, 2)}, ValueError, "levels must be of shape"),
        ({"levels": torch.ones(0)}, ValueError, "levels must be of 1, 2 or 3"),
        ({"levels": [torch.ones(1)]}, ValueError, "levels must be 2 non-empty"),
        ({"weights": torch.tensor([1.0, 0.0, 1.0])}, ValueError, "weights must be positive, got 0"),
        ({"weights": torch.ones(2)}, ValueError, r"weights must be of shape \(3,\)"),
        ({"start": torch.ones(3)}, ValueError, r"start must be of shape \(2,\)"),
        ({"restarts": 0}, ValueError, "restarts must be"),
        ({"max_steps": -1}, ValueError, "max_steps must be"),
        ({"patience": 0}, ValueError, "patience must be"),
        ({"kick": 0}, ValueError, "kick must be"),
        ({"tenure": -1}, ValueError, "tenure must be"),
        ({"time_limit": 0.0}, ValueError, "time_limit must be"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"A": torch.ones(3, 2), "b": torch.ones(3), "levels": torch.tensor([0.0, 1.0])}
    with pytest.raises(error, match=message):
        minmax_violation(**(good | change))


def test_quantized_layer() -> None:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    inputs = torch.randn(64, 20, generator=torch.Generator().manual_seed(1))
    found = quantize_layer(weight, inputs, bits=3, max_steps=60)
    assert found.weight.dtype == torch.float32
    assert found.codes.min() >= 0
    assert found.codes.max() <= 7
    torch.testing.assert_close(found.weight, found.scale[:, None] * (found.codes - found.zero[:, None]))
    torch.testing.assert_close((inputs @ (found.weight - weight).T).abs().amax(0), found.value, rtol=1e-3, atol=1e-5)
    nearest = (weight / found.scale.where(found.scale > 0, 1)[:, None] + found.zero[:, None]).round().clamp(0, 7)
    rounded = (inputs @ (found.scale[:, None] * (nearest - found.zero[:, None]) - weight).T).abs().amax(0)
    assert (found.value <= rounded + 1e-6).all()
    assert found.value.sum() < 0.85 * rounded.sum()
    assert not found.weight[2].any()
    polished = quantize_layer(weight, inputs, bits=3, start=found.weight, max_steps=10)
    assert (polished.value <= found.value + 1e-5).all()


def test_grid_spans_weights_and_zero() -> None:
    weight = torch.tensor([[0.5, 2.0], [-3.0, -1.0], [-1.0, 1.0]])
    scale, zero = quantization_grid(weight, 4)
    codes = torch.arange(16)
    values = scale[:, None] * (codes - zero[:, None])
    assert (values == 0).any(1).all()
    assert (values.amax(1) >= weight.amax(1).clamp(min=0) - scale / 2 - 1e-6).all()
    assert (values.amin(1) <= weight.amin(1).clamp(max=0) + scale / 2 + 1e-6).all()


@pytest.mark.parametrize("num_taps", [14, 15])
def test_filter_has_the_response_it_claims(num_taps: int) -> None:
    from scipy.signal import freqz

    found = fixed_point_filter(num_taps, [0, 0.3, 0.5, 1], [1, 0], bits=8, weight=[1, 2], max_steps=100)
    assert torch.equal(found.taps.flip(0), found.taps)
    assert torch.equal(found.taps * 128, found.codes.double())
    frequencies = [np.linspace(0, 0.3, 400), np.linspace(0.5, 1, 400)]
    ripple = [
        weight * np.abs(np.abs(freqz(found.taps.numpy(), worN=np.pi * at)[1]) - gain).max()
        for at, gain, weight in zip(frequencies, (1, 0), (1, 2), strict=True)
    ]
    assert max(ripple) == pytest.approx(found.value, rel=0.03)
    assert found.bound <= found.value < 0.12


def test_relaxed_filter_is_the_remez_one() -> None:
    from scipy.signal import remez

    rows, gains, band = filter_rows(15, [0, 0.3, 0.5, 1], [1, 0], density=32)
    x, value = relaxation(rows, gains[None], *(torch.full((1, 8), v).double() for v in (-1.0, 1.0)))
    best = remez(15, [0, 0.3, 0.5, 1], [1, 0], fs=2)
    half = torch.from_numpy(best[7:].copy())
    assert float((rows @ half - gains).abs().max()) == pytest.approx(float(value), rel=1e-2)
    torch.testing.assert_close(x[0], half, atol=2e-3, rtol=0)
    assert len(band) == len(gains) == len(rows)


def test_projections() -> None:
    image = torch.arange(16.0).view(4, 4)
    maps = parallel_projections(4, torch.tensor([0.0, torch.pi / 2, 0.7]))
    sums = maps @ image.flatten()
    torch.testing.assert_close(sums.sum(1), torch.full((3,), 120.0))  # mass is kept at every angle
    # Four columns stand between five bins, and give half of their mass to each side.
    for found, lines in ((sums[0], image.sum(0)), (sums[1], image.sum(1))):
        halves = torch.cat([lines, torch.zeros(1)]) + torch.cat([torch.zeros(1), lines])
        torch.testing.assert_close(found[found > 1e-3], halves / 2)


def test_tomography_recovers_a_picture_from_bounded_errors() -> None:
    image = torch.zeros(8, 8, dtype=torch.float64)
    image[2:6, 3:6] = 1
    image[1, 4] = 1
    angles = torch.arange(6, dtype=torch.float64) * torch.pi / 6
    exact = parallel_projections(8, angles) @ image.flatten()
    error = 0.3 * (2 * torch.rand(exact.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1)
    found = discrete_tomography(exact + error, angles, 8, torch.tensor([0.0, 1.0]).double(), max_steps=100)
    assert torch.equal(found, image)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_layer(torch.ones(2, 3), torch.ones(4, 2), 3), "inputs must be of shape"),
        (lambda: quantize_layer(torch.ones(2, 3), torch.ones(4, 3), 3, start=torch.ones(2)), "start must be of shape"),
        (lambda: quantization_grid(torch.ones(2), 3), "weight must be a matrix"),
        (lambda: quantization_grid(torch.ones(2, 3), 0), "bits must be"),
        (lambda: fixed_point_filter(15, [0, 0.5, 0.3, 1], [1, 0], 8), "bands must be 4 rising"),
        (lambda: fixed_point_filter(15, [0, 1], [1, 0], 8), "bands must be 4 rising"),
        (lambda: fixed_point_filter(0, [0, 1], [1], 8), "num_taps must be"),
        (lambda: fixed_point_filter(5, [0, 1], [1], 1), "bits must be"),
        (lambda: fixed_point_filter(5, [0, 1], [1], 8, weight=[1, 2]), "weight must be one"),
        (lambda: fixed_point_filter(5, [0, 1], [1], 8, density=0), "density must be"),
        (lambda: parallel_projections(0, torch.zeros(1)), "side must be"),
        (lambda: parallel_projections(3, torch.zeros(0)), "angles must be one or more"),
        (lambda: parallel_projections(3, torch.tensor([math.nan])), "angles must be finite"),
        (lambda: quantization_grid(torch.full((1, 2), math.inf), 3), "weight must be finite"),
        (lambda: quantize_layer(torch.ones(2, 3), torch.full((4, 3), math.nan), 3), "inputs must be finite"),
        (lambda: quantize_layer(torch.full((2, 3), math.nan), torch.ones(4, 3), 3), "weight must be finite"),
        (lambda: fixed_point_filter(5, [0, math.nan], [1.0], 8), r"bands\[1\] must be finite"),
        (lambda: fixed_point_filter(5, [0, 1], [math.nan], 8), r"desired\[0\] must be finite"),
        (lambda: fixed_point_filter(5, [0, 1], [1.0], 8, weight=[0.0]), r"weight\[0\] must be positive"),
        (lambda: discrete_tomography(torch.ones(2, 3), torch.zeros(2), 3, torch.zeros(1)), "projections must be"),
    ],
)
def test_designs_refuse_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e-6, 1e6, 1e20, 1e30])
@pytest.mark.parametrize("which", ["rows", "levels"])
def test_the_bound_is_that_of_the_problem_in_any_unit(scale: float, which: str) -> None:
    generator = torch.Generator().manual_seed(0)
    A, b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((12, 5), (12,)))
    levels = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    plain = minmax_violation(A, b, levels, restarts=4, max_steps=30)
    scaled = minmax_violation(
        *((scale * A, scale * b, levels) if which == "rows" else (A, scale * b, scale * levels)),
        restarts=4,
        max_steps=30,
    )
    assert float(scaled.bound) / scale == pytest.approx(float(plain.bound))
    assert float(scaled.value) / scale == pytest.approx(float(plain.value))
    assert torch.equal(scaled.index, plain.index)
