"""Moving averages of weights: the closed form, buffers, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.ops.averaging import frozen_copy, move_average


def layer(value: float) -> nn.BatchNorm1d:
    made = nn.BatchNorm1d(2)
    nn.init.constant_(made.weight, value)
    made.running_mean.fill_(value)
    return made


def test_closed_form() -> None:
    """After k moves towards a constant, the distance to it has shrunk by decay^k."""
    average, module = frozen_copy(layer(0.0)), layer(1.0)
    for _ in range(5):
        move_average(average, module, 0.8)
    torch.testing.assert_close(average.weight, torch.full((2,), 1 - 0.8**5))
    assert torch.equal(average.running_mean, module.running_mean)
    assert not average.weight.requires_grad
    assert not average.training


def test_ends() -> None:
    average, module = frozen_copy(layer(0.0)), layer(1.0)
    move_average(average, module, 1.0)
    assert torch.equal(average.weight, torch.zeros(2))
    move_average(average, module, 0.0)
    assert torch.equal(average.weight, module.weight)
    with torch.no_grad():
        module.weight.add_(1)
    assert torch.equal(average.weight, torch.ones(2))


def test_refused() -> None:
    average = frozen_copy(layer(0.0))
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\]"):
        move_average(average, layer(1.0), 1.5)
    with pytest.raises(ValueError, match="average must have the weights of module"):
        move_average(average, nn.Linear(2, 2), 0.5)
    assert torch.equal(average.weight, torch.zeros(2))
