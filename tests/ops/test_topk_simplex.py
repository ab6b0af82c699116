"""Projection onto the sparse points of a simplex."""

import itertools

import numpy as np
import pytest
import torch

from trimtab.ops.simplex import project_simplex
from trimtab.ops.topk_simplex import project_descending, project_topk_simplex, top_entries_on_simplex


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_is_the_nearest_sparse_point(k):
    x = torch.randn(20, 6, dtype=torch.float64)
    found = project_topk_simplex(x, k)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(20, dtype=torch.float64))
    assert (found > 0).sum(1).max() <= k
    best = torch.full((20,), torch.inf, dtype=torch.float64)
    for support in itertools.combinations(range(6), k):
        point = torch.zeros_like(x)
        point[:, list(support)] = project_simplex(x[:, list(support)])
        best = best.minimum((point - x).norm(dim=1))
    torch.testing.assert_close((found - x).norm(dim=1), best)


def test_all_entries_is_the_plain_projection_and_ties_keep_one():
    x = torch.randn(4, 5)
    torch.testing.assert_close(project_topk_simplex(x, 5), project_simplex(x))
    assert project_topk_simplex(torch.ones(5), 1).sort().values.tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_entries_that_descend_are_projected_as_others(scale):
    x = (scale * torch.randn(50, 7, dtype=torch.float64)).sort(dim=1, descending=True).values
    torch.testing.assert_close(project_descending(x), project_simplex(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(project_descending(x + 1e4), project_simplex(x), rtol=0, atol=1e-10)
    assert torch.autograd.gradcheck(project_descending, (x[:5].clone().requires_grad_(),))


def test_gradients_reach_the_entries_kept_alone():
    x = torch.tensor([0.5, 0.9, 0.4], dtype=torch.float64, requires_grad=True)
    project_topk_simplex(x, 2)[1].backward()
    assert x.grad.tolist() == [-0.5, 0.5, 0]


@pytest.mark.parametrize("k", [0, 4])
def test_an_impossible_number_is_refused(k):
    with pytest.raises(ValueError, match=r"k must be in \[1, 3\]"):
        top_entries_on_simplex(torch.zeros(3), k)


def test_k_may_be_numpys():
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(project_topk_simplex(x, np.int64(2)), project_topk_simplex(x, 2))
    with pytest.raises(TypeError, match="k must be an integer, got float"):
        project_topk_simplex(x, 2.0)


def test_integers_and_single_numbers_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="^x must be floating point"):
        project_topk_simplex(torch.tensor([3, 1]), 2)
    with pytest.raises(ValueError, match="^x must have entries"):
        project_topk_simplex(torch.tensor(3.0), 1)
