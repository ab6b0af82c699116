"""What every rule that trains a consistency function from data keeps to: its draws, its gradient, what it refuses.

A rule is called `rule(x0, step, cond, generator=...)` and holds no state. A new one joins by one line in MEMBERS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from trimtab.diffusion import (
    ConsistencyPreconditioned,
    Denoiser,
    ImprovedConsistencyTraining,
    LatentConsistencyTraining,
    NonScalingLayerNorm,
    VPLinear,
)
from trimtab.nets import DenoisingMLP

STEPS = 40
MEMBERS: dict[str, Callable[..., Any]] = {"iCT": ImprovedConsistencyTraining, "sLCT": LatentConsistencyTraining}
every_rule = pytest.mark.parametrize("rule", MEMBERS.values(), ids=MEMBERS)

COND = torch.arange(12) % 3
X0 = 0.5 * torch.randn(12, 4, generator=torch.Generator().manual_seed(0))


def function() -> ConsistencyPreconditioned:
    """Awake, since a new network says zero; with dropout, which student and teacher must share."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DenoisingMLP(4, 3, hidden=16, blocks=2, dropout=0.3, norm=NonScalingLayerNorm)
        for layer in (net.outward, *(block.second for block in net.blocks)):
            nn.init.normal_(layer.weight, std=0.3)
        return ConsistencyPreconditioned(net)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@every_rule
def test_the_generator_decides_what_is_drawn(rule: Callable[..., Any]) -> None:
    training = rule(function().eval(), STEPS, s1=20)
    state = torch.get_rng_state()
    one, other, third = (training(X0, 3, COND, generator=seed(number)) for number in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, other)
    assert not torch.equal(one, third)


@every_rule
def test_every_parameter_is_trained_and_the_loss_falls(rule: Callable[..., Any]) -> None:
    """On data that are one point, where the best function is known to all levels."""
    trained = function()
    training, point = rule(trained, 300, s1=20), torch.full((64, 4), 0.4)
    optimizer = torch.optim.RAdam(trained.parameters(), lr=3e-3)
    for step in range(300):
        loss = training(point, step, COND.repeat(6)[:64], generator=seed(step))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained.parameters())
        optimizer.step()
    trained.eval()
    x, t = point + 2 * torch.randn(64, 4, generator=seed(1)), torch.full((64,), 2.0)
    away = [float((f(x, t, COND.repeat(6)[:64]) - point).abs().mean().detach()) for f in (function().eval(), trained)]
    assert away[1] < 0.5 * away[0]


@every_rule
@pytest.mark.parametrize("bad", [{"step": STEPS}, {"index": torch.tensor([0])}, {"noise": X0[:3]}])
def test_a_refused_batch_leaves_everything_as_it_was(rule: Callable[..., Any], bad: dict[str, Any]) -> None:
    held = function()
    before = {name: value.clone() for name, value in held.state_dict().items()}
    state = torch.get_rng_state()
    given = {"step": 0, "noise": torch.zeros_like(X0), "index": torch.zeros(12, dtype=torch.int64)} | bad
    training = rule(held, STEPS, s1=20)
    with pytest.raises(ValueError):
        training(X0, given.pop("step"), COND, **given)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in held.state_dict().items())


@every_rule
def test_images_and_double_precision(rule: Callable[..., Any]) -> None:
    training = rule(function().double().eval(), STEPS, s1=20)
    found = training(X0.double().reshape(12, 1, 2, 2), 0, COND, generator=seed())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, training(X0.double(), 0, COND, generator=seed()))


@every_rule
def test_a_batch_of_one(rule: Callable[..., Any]) -> None:
    assert rule(function(), STEPS, s1=20)(X0[:1], 0, COND[:1]).isfinite()


@every_rule
def test_a_function_on_another_schedule(rule: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="function must be on the EDM schedule"):
        rule(Denoiser(lambda x, t: x, VPLinear(), "x0"), STEPS)
