"""What everything keeps that moves weights after the optimizer's step: it shrinks, and never turns a weight around.

A new rule joins by one entry in MEMBERS.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from trimtab import compress


class Member(NamedTuple):
    make: Callable[[nn.Module, bool], Any]
    """Puts it on a network, on or switched off."""


def envelope(net: nn.Module, off: bool) -> compress.GroupEnvelope:
    groups, half_space = compress.filter_groups(net)["0"], None if off else 0.0
    return compress.GroupEnvelope(groups, 2, lam=0.0 if off else 0.1, half_space=half_space)


MEMBERS: dict[str, Member] = {
    "BackSlash": Member(lambda net, off: compress.BackSlash(net.parameters(), rdo=0.0 if off else 2.0, every=2)),
    "GroupEnvelope": Member(envelope),
    "SoftShrinkage": Member(lambda net, off: compress.SoftShrinkage(net, 0.6, shrink=1.0 if off else 0.8)),
    "SoftShrinkage, over": Member(lambda net, off: compress.SoftShrinkage(net, 0.0 if off else 0.6, 0.8, phase=1)),
}


@pytest.fixture(params=MEMBERS.values(), ids=MEMBERS)
def member(request: pytest.FixtureRequest) -> Member:
    return request.param


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))


def trained(net: nn.Module, rule: Any, first: int, last: int) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for step in range(first, last):
        x = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        rule.post_step()


def values(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def test_switched_off_it_moves_nothing(member: Member) -> None:
    net, plain = network(), network()
    trained(net, member.make(net, True), 0, 4)

    class Nothing:
        def post_step(self) -> None: ...

    trained(plain, Nothing(), 0, 4)
    assert all(torch.equal(one, other) for one, other in zip(values(net), values(plain), strict=True))


def test_it_shrinks_and_turns_nothing_around(member: Member) -> None:
    net = network()
    rule, before = member.make(net, False), values(net)
    for _ in range(3):
        rule.post_step()
    moved = False
    for now, then in zip(values(net), before, strict=True):
        assert (now.abs() <= then.abs()).all()
        assert (now * then >= 0).all()
        moved = moved or not torch.equal(now, then)
    assert moved


def test_zero_stays_zero_and_finite(member: Member) -> None:
    net = network()
    rule = member.make(net, False)
    with torch.no_grad():
        net[0].weight[2:].zero_()
        net[0].bias[2:].zero_()
    for _ in range(3):
        rule.post_step()
    assert not net[0].weight[2:].any()
    assert all(value.isfinite().all() for value in values(net))


def test_weights_stay_leaves_without_a_graph(member: Member) -> None:
    net = network()
    parameters = list(net.parameters())
    trained(net, member.make(net, False), 0, 2)
    assert all(one is other for one, other in zip(net.parameters(), parameters, strict=True))
    assert all(p.requires_grad and p.is_leaf and p.grad is not None for p in parameters)


def test_resumes_bit_exactly(member: Member) -> None:
    net = network()
    rule = member.make(net, False)
    trained(net, rule, 0, 3)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "rule": rule.state_dict()}, file)
    file.seek(0)
    state, other = torch.load(file, weights_only=True), network()
    again = member.make(other, False)
    other.load_state_dict(state["net"])
    again.load_state_dict(state["rule"])
    trained(net, rule, 3, 6)
    trained(other, again, 3, 6)
    assert all(torch.equal(one, two) for one, two in zip(values(net), values(other), strict=True))


def parts(held: Any) -> Any:
    """A state in plain numbers."""
    if isinstance(held, Tensor):
        return held.tolist()
    if isinstance(held, dict):
        return {name: parts(value) for name, value in held.items()}
    return [parts(value) for value in held] if isinstance(held, list) else held


def test_a_refused_state_changes_nothing(member: Member) -> None:
    net = network()
    rule = member.make(net, False)
    trained(net, rule, 0, 2)
    before = copy.deepcopy(rule.state_dict())
    for wrong in ({}, {**before, "stray": 1}, dict.fromkeys(before, -1)):
        with pytest.raises((ValueError, TypeError)):
            rule.load_state_dict(wrong)
        assert parts(rule.state_dict()) == parts(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(member: Member, dtype: torch.dtype) -> None:
    net = network().to(dtype)
    member.make(net, False).post_step()
    assert {value.dtype for value in values(net)} == {dtype}
    assert all(value.isfinite().all() for value in values(net))
