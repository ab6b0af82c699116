"""The time of a pass, beside what is counted; counts are tested with the quantisers that change them."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trimtab.compress import compress_linear, measured_latency, model_cost
from trimtab.nets import mlp


class Sleepy(nn.Module):
    """Takes as long as it is told to, and notes how it was called."""

    def __init__(self, milliseconds: float, calls: list[tuple[float, bool, bool]]) -> None:
        super().__init__()
        self.milliseconds, self.calls = milliseconds, calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self.milliseconds, self.training, torch.is_grad_enabled()))
        time.sleep(self.milliseconds / 1000)
        return x


def test_models_take_turns_in_eval_mode_and_are_put_back() -> None:
    calls: list[tuple[float, bool, bool]] = []
    slow, fast = Sleepy(20, calls), Sleepy(2, calls).eval()
    found = measured_latency(slow, fast, x=torch.zeros(1, 2), repeats=3, warmup=1)
    assert [call[0] for call in calls] == [20, 2] * 4
    assert not any(training or grad for _, training, grad in calls)
    assert slow.training
    assert not fast.training
    assert found[0] >= 20
    assert found[1] >= 2
    assert found[1] < found[0]


def test_modes_are_put_back_after_a_failure() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(RuntimeError):
        measured_latency(model, x=torch.zeros(1, 2))
    assert model.training


def test_a_factorised_model_is_counted_and_measured_to_be_less() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = mlp(1024, (1024, 1024))
        x = torch.randn(256, 1024)
    small, _ = compress_linear(whole, ratio=0.05)
    assert model_cost(small, x).multiply_adds < 0.1 * model_cost(whole, x).multiply_adds
    slow, fast = measured_latency(whole, small, x=x, repeats=5)
    assert fast < slow


def test_what_cannot_be_measured_is_refused_by_name() -> None:
    model, x = nn.Linear(2, 1), torch.zeros(1, 2)
    with pytest.raises(TypeError, match="x must be a tensor"):
        measured_latency(model, x=np.zeros((1, 2)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x must be at least one sample"):
        measured_latency(model, x=x[:0])
    with pytest.raises(ValueError, match="repeats must be"):
        measured_latency(model, x=x, repeats=0)
    with pytest.raises(ValueError, match="warmup must be"):
        measured_latency(model, x=x, warmup=-1)
    with pytest.raises(TypeError, match="repeats must be"):
        measured_latency(model, x=x, repeats=2.5)  # type: ignore[arg-type]
