from __future__ import annotations

import math

import pytest
import torch

from trimtab.semisup import nearest_others, neighbor_graph, neighbors


def points(n: int = 15) -> torch.Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_they_are_the_nearest_and_none_is_its_own() -> None:
    x = points()
    distances, which = nearest_others(x, 4)
    whole = torch.cdist(x, x) + torch.diag(torch.full((15,), math.inf, dtype=torch.float64))
    expected, order = whole.sort(1)
    torch.testing.assert_close(distances, expected[:, :4])
    assert torch.equal(which, order[:, :4])


def test_twins_are_neighbours_and_not_themselves() -> None:
    x = torch.zeros(3, 2)
    distances, which = nearest_others(x, 2)
    assert (distances == 0).all()
    assert all(i not in row for i, row in enumerate(which.tolist()))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = nearest_others(points(), 3)
    monkeypatch.setattr(neighbors, "_BLOCK", 40)
    for one, other in zip(whole, nearest_others(points(), 3), strict=True):
        torch.testing.assert_close(one, other)


def test_a_graph_holds_the_values_in_the_rows() -> None:
    values, which = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([[2, 1], [0, 2], [0, 1]])
    expected = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 4.0], [5.0, 6.0, 0.0]])
    assert torch.equal(neighbor_graph(values, which).to_dense(), expected)


def test_neighbours_do_not_depend_on_where_samples_lie() -> None:
    """In single precision; the product of matrices would find others once samples are many and far from the origin."""
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    shifted = x + 2.0**13  # exact in most digits
    distances, which = nearest_others(shifted - 2.0**13, 3)
    far_distances, far_which = nearest_others(shifted, 3)
    assert torch.equal(far_which, which)
    torch.testing.assert_close(far_distances, distances)


def test_bad_input_is_refused_by_name() -> None:
    for k in (0, 15):
        with pytest.raises(ValueError, match="k must be"):
            nearest_others(points(), k)
    with pytest.raises(ValueError, match="x must be finite"):
        nearest_others(points() * math.nan, 1)
    with pytest.raises(ValueError, match="at least 2"):
        nearest_others(points(1), 1)
    with pytest.raises(TypeError, match="x must be floating point"):
        nearest_others(torch.ones(3, 2, dtype=torch.int64), 1)
