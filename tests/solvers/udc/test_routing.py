from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.solvers import nearest_neighbour, path_length, shortest_paths, tour_length, two_opt
from trimtab.solvers.udc.routing import is_permutation, normalise_paths


def cities(batch: int, n: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_lengths_by_hand() -> None:
    triangle = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]]])
    order = torch.tensor([[[0, 1, 2], [1, 0, 2]]])
    assert path_length(triangle, order).tolist() == [[7.0, 8.0]]
    assert tour_length(triangle, order).tolist() == [[12.0, 12.0]]
    assert tour_length(triangle, order[:, 0]).tolist() == [12.0]


@given(st.integers(2, 30), st.integers(0, 99), st.integers(0, 29))
@settings(max_examples=20, deadline=None)
def test_a_tours_length_ignores_where_it_begins_and_which_way_it_goes(n: int, seed: int, shift: int) -> None:
    coords = cities(2, n, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).expand(2, n)
    length = tour_length(coords, order)
    torch.testing.assert_close(tour_length(coords, order.roll(shift, -1)), length)
    torch.testing.assert_close(tour_length(coords, order.flip(-1)), length)


def test_normalised_points_keep_their_shape_in_the_unit_square() -> None:
    coords = 5 * cities(6, 9) - 2
    coords[:3, :, 1] *= 3  # taller than wide
    coords[3:, :, 0] *= 3
    unit, scale = normalise_paths(coords)
    torch.testing.assert_close(torch.cdist(unit, unit) * scale[:, None, None], torch.cdist(coords, coords))
    torch.testing.assert_close(unit.amin(1), torch.zeros_like(unit[:, 0]))
    torch.testing.assert_close(unit[..., 0].amax(1), torch.ones_like(scale))
    assert (unit[..., 1].amax(1) <= 1).all()
    again, one = normalise_paths(unit)
    torch.testing.assert_close(again, unit)
    torch.testing.assert_close(one, torch.ones_like(one))
    alone, _ = normalise_paths(torch.full((1, 4, 2), 0.3))
    assert torch.equal(alone, torch.zeros(1, 4, 2))


def test_nearest_neighbour_goes_to_the_nearest() -> None:
    coords = cities(3, 12)
    starts = torch.tensor([[0, 5], [3, 3], [11, 1]])
    tours = nearest_neighbour(coords, starts)
    for points, row, begins in zip(coords, tours, starts, strict=True):
        for tour, start in zip(row.tolist(), begins.tolist(), strict=True):
            assert tour[0] == start
            for step in range(1, 12):
                left = set(range(12)) - set(tour[:step])
                assert tour[step] == min(left, key=lambda j: float((points[j] - points[tour[step - 1]]).norm()))
    assert nearest_neighbour(coords).shape == (3, 12, 12)


def reversals(order: list[int], closed: bool) -> list[list[int]]:
    """All orders one reversal away that keep the first point, and of open paths the last."""
    end = len(order) if closed else len(order) - 1
    return [order[:i] + order[i:j][::-1] + order[j:] for i in range(1, end) for j in range(i + 2, end + 1)]


@pytest.mark.parametrize("closed", [False, True])
def test_two_opt_ends_where_no_reversal_helps(closed: bool) -> None:
    coords = cities(5, 11)
    length = tour_length if closed else path_length
    start = torch.arange(11).expand(5, 11)
    found = two_opt(coords, closed=closed)
    assert is_permutation(found).all()
    assert (length(coords, found) < length(coords, start)).all()
    assert (found[:, 0] == 0).all()
    if not closed:
        assert (found[:, -1] == 10).all()
    for points, order in zip(coords, found.tolist(), strict=True):
        nearby = torch.tensor([reversals(order, closed)])
        assert (length(points[None], nearby) >= length(points[None], torch.tensor([[order]])) - 1e-5).all()


def test_two_opt_makes_the_best_move_first() -> None:
    coords = cities(4, 9, seed=3)
    moved = two_opt(coords, max_moves=1)
    for points, order in zip(coords, moved, strict=True):
        nearby = torch.tensor([reversals(list(range(9)), closed=False)])
        assert float(path_length(points[None], order[None])) == pytest.approx(
            float(path_length(points[None], nearby).min()), rel=1e-12
        )
    assert torch.equal(two_opt(coords, max_moves=0), torch.arange(9).expand(4, 9))


def test_two_opt_of_paths_alone_and_together_agree() -> None:
    coords = cities(6, 15)
    together = two_opt(coords, closed=True)
    for row, points in enumerate(coords):
        assert torch.equal(two_opt(points[None], closed=True)[0], together[row])


def test_two_opt_leaves_the_input_alone_and_takes_tiny_problems() -> None:
    order = torch.randperm(8).expand(2, 8).clone()
    before = order.clone()
    two_opt(cities(2, 8), order)
    assert torch.equal(order, before)
    for n in (1, 2, 3):
        assert two_opt(cities(2, n)).tolist() == [list(range(n))] * 2
        assert is_permutation(two_opt(cities(2, n), closed=True)).all()


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_shortest_paths_are_the_shortest_of_all(n: int) -> None:
    coords = cities(4, n)
    found = shortest_paths(coords)
    every = torch.tensor([[0, *inner, n - 1] for inner in itertools.permutations(range(1, n - 1))])
    best = path_length(coords, every.expand(4, -1, -1)).min(1).values
    torch.testing.assert_close(path_length(coords, found), best)
    assert is_permutation(found).all()
    assert (found[:, 0] == 0).all()
    assert (found[:, -1] == n - 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_unit_and_origin_do_not_matter(dtype: torch.dtype, scale: float) -> None:
    # Coordinates on a grid, so that moving them is exact in float32, too.
    coords = torch.randint(1024, (3, 30, 2), generator=torch.Generator().manual_seed(0)).to(dtype) / 1024
    moved = scale * (coords + 1e4 * torch.tensor([1.0, 3.0], dtype=dtype))
    if dtype == torch.float32:
        moved, scale = coords + torch.tensor([1024.0, -4096.0]), 1.0
    tours = nearest_neighbour(coords)
    assert torch.equal(nearest_neighbour(moved), tours)
    for closed in (False, True):
        found = two_opt(coords, closed=closed)
        torch.testing.assert_close(
            path_length(moved, two_opt(moved, closed=closed)) / scale, path_length(coords, found), rtol=1e-5, atol=0
        )


def test_a_crossing_of_a_metre_is_found_among_projected_coordinates() -> None:
    square = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    moved = square + torch.tensor([5e5, 4.5e6], dtype=torch.float64)
    assert float(tour_length(moved, two_opt(moved, closed=True))) == pytest.approx(4.0)


def test_numpy_arrays_are_taken() -> None:
    points = np.random.default_rng(0).random((2, 9, 2))
    order = two_opt(points, np.tile(np.arange(9), (2, 1)))
    assert torch.equal(order, two_opt(torch.tensor(points)))
    torch.testing.assert_close(path_length(points, order.numpy()), path_length(torch.tensor(points), order))


@pytest.mark.parametrize("function", [path_length, tour_length, nearest_neighbour, two_opt])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"coords": torch.full((1, 4, 2), torch.nan)}, ValueError, "coords must be finite"),
        ({"coords": torch.zeros(4, 2)}, ValueError, "coords must be a tensor of 3 dimensions"),
        ({"coords": torch.zeros(1, 4, 2, dtype=torch.long)}, TypeError, "coords must be floating point"),
        ({"coords": [[0.0, 1.0]]}, TypeError, "coords must be a tensor or a NumPy array"),
        ({"order": torch.tensor([[0, 1, 2, 4]])}, ValueError, r"(order|starts) must be in \[0, 4\), got 4"),
        ({"order": torch.tensor([[0, 1, -1, 2]])}, ValueError, r"(order|starts) must be in \[0, 4\), got -1"),
        ({"order": torch.ones(1, 4)}, TypeError, "(order|starts) must be integers"),
        ({"order": torch.zeros(2, 4, dtype=torch.long)}, ValueError, "(order|starts) must be of shape"),
    ],
)
def test_values_are_looked_at(function: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"coords": cities(1, 4), "order": torch.arange(4)[None]} | change
    with pytest.raises(error, match=message):
        function(*arguments.values())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="2 to 14 points a path, got 15"):
        shortest_paths(cities(1, 15))
    with pytest.raises(ValueError, match="order must be permutations"):
        two_opt(cities(1, 4), torch.tensor([[0, 1, 2, 2]]))
    with pytest.raises(ValueError, match=r"order .* shape \(1, 4\), got shape \(1, 3\)"):
        two_opt(cities(1, 4), torch.tensor([[0, 1, 2]]))
