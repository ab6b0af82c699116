from __future__ import annotations

import pytest
import torch

from trimtab.domain import instance_statistics, restyle, standardize

X = torch.rand(3, 2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_statistics_are_those_of_each_map() -> None:
    mean, std = instance_statistics(X, eps=1e-6)
    assert mean.shape == std.shape == (3, 2, 1, 1)
    torch.testing.assert_close(mean[1, 0].squeeze(), X[1, 0].mean())
    torch.testing.assert_close(std[1, 0].squeeze(), (X[1, 0].var(correction=1) + 1e-6).sqrt())


def test_content_has_no_style_and_comes_back_with_it() -> None:
    content, mean, std = standardize(X)
    torch.testing.assert_close(content.mean((2, 3)), torch.zeros(3, 2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(restyle(content, mean, std), X)


def test_content_does_not_depend_on_the_style() -> None:
    content = standardize(X, eps=0.0)[0]
    torch.testing.assert_close(standardize(30 * X - 7, eps=0.0)[0], content)


def test_half_precision_is_raised_and_flat_maps_are_finite() -> None:
    flat = torch.ones(2, 3, 4, 4, dtype=torch.bfloat16)
    content, mean, std = standardize(flat)
    assert mean.dtype == std.dtype == torch.float32
    assert content.abs().max() == 0


def test_other_shapes_are_refused() -> None:
    for wrong in (X[0], X[:, :, :1, :1]):
        with pytest.raises(ValueError, match="x must have shape"):
            instance_statistics(wrong)
    with pytest.raises(TypeError, match="floating point"):
        instance_statistics(torch.zeros(1, 1, 2, 2, dtype=torch.int64))
