"""What everything that adapts a trained classifier to another domain keeps to, whatever it learns from.

A new member joins by one entry in MEMBERS. `act` is one use of it on a batch: a prediction that adapts, or a loss, the
user's step and what follows; it gives numbers that depend on all that came before.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from trimtab import domain

LR = 0.05
COUNT, CLASSES, WIDTH = 48, 3, 5


def batch(number: int, size: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(COUNT, 6, generator=torch.Generator().manual_seed(0)) + 0.5
    index = torch.randperm(COUNT, generator=generator)[:size]
    return x[index], x[index, :CLASSES].argmax(1), index


def encoder() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, WIDTH), nn.BatchNorm1d(WIDTH))


class Trained:
    """A module with losses, and the user's optimizer."""

    def __init__(
        self, module: nn.Module, parameters: nn.Module, loss: Callable[..., Tensor], after: Callable[..., Any]
    ):
        self.module, self.given, self.after = module, loss, after
        self.optimizer = torch.optim.SGD(parameters.parameters(), lr=LR)

    def act(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        self.module.train()
        value = self.given(x, y, index)
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()
        self.after(x, y, index)
        return value.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])


def sfda2(off: bool) -> Trained:
    weights = {"alpha": 0.0, "ifa_weight": 0.0, "fd_weight": 0.0} if off else {}
    rule = domain.SFDA2(encoder(), nn.Linear(WIDTH, CLASSES), COUNT, 10, k=3, **weights)
    rule.fill(batch(0, COUNT)[0][batch(0, COUNT)[2].argsort()].split(20))
    return Trained(rule, rule, lambda x, y, index: rule.loss(x, index)["total"], lambda x, y, index: rule.update())


def adanpc_training(off: bool) -> Trained:
    # The encoder is the user's: batch statistics would move in it before the loss is asked.
    whole = nn.ModuleDict(
        {"encoder": nn.Linear(6, WIDTH), "loss": domain.NeighbourLoss(WIDTH, CLASSES, capacity=30, k=4)}
    )
    return Trained(
        whole,
        whole["encoder"],
        lambda x, y, index: whole["loss"](whole["encoder"](x), y),
        lambda x, y, index: whole["loss"].update(whole["encoder"](x), y),
    )


def drm_training(off: bool) -> Trained:
    model = domain.DomainHeads(encoder(), WIDTH, CLASSES, 2, gap="discriminator")

    def halves(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        return list(zip(x.tensor_split(2), y.tensor_split(2), strict=True))

    return Trained(model, model, lambda x, y, index: model.loss(halves(x, y))["total"], lambda x, y, index: None)


def edge_pairs(off: bool) -> Trained:
    model = nn.Sequential(nn.Flatten(), encoder(), nn.Linear(WIDTH, CLASSES))
    loss = domain.EdgePairLoss(model, canny=domain.EnhancedCanny())

    def value(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return loss(x.view(-1, 1, 2, 3), y, generator=torch.Generator().manual_seed(0))["total"]

    return Trained(loss, model, value, lambda x, y, index: None)


class Streaming:
    """What adapts as it predicts."""

    def __init__(self, held: Any) -> None:
        self.held = held
        self.state_dict, self.load_state_dict = held.state_dict, held.load_state_dict

    def act(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return self.held.predict(x)


def adanpc(off: bool) -> Streaming:
    model = domain.AdaNPC(encoder(), WIDTH, CLASSES, k=3, threshold=1.1 if off else 0.0)
    x, y, _ = batch(100)
    model.remember(x, y)
    return Streaming(model)


def adanpc_normalised(off: bool) -> Streaming:
    model = domain.AdaNPC(encoder(), WIDTH, CLASSES, k=3, threshold=1.1 if off else 0.0)
    x, y, _ = batch(100)
    model.remember(x, y)
    return Streaming(domain.AdaNPCBN(model, lr=LR))


def drm_steering(off: bool) -> Streaming:
    model = domain.DomainHeads(encoder(), WIDTH, CLASSES, 2, gamma=1.0)
    return Streaming(domain.DRMSteering(model, threshold=1.1 if off else 0.0, lr=LR, params="all"))


class Statistics:
    """Running covariances."""

    def __init__(self) -> None:
        self.held = domain.ClassCovariance(CLASSES, 6)
        self.state_dict, self.load_state_dict = self.held.state_dict, self.held.load_state_dict

    def act(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return self.held(x, y)


class Member(NamedTuple):
    build: Callable[[bool], Any]
    """Makes it, on or switched off, from the global random state."""
    still: bool = False
    """Whether, switched off, it answers as it did before however much it has seen."""
    per_sample: bool = False
    """Whether it gives one row a sample."""
    wrong: tuple[Callable[[Tensor, Tensor, Tensor], tuple[Any, Any, Any]], ...] = ()
    """Changes of a batch that must be refused."""


def no_label(x: Tensor, y: Tensor, index: Tensor) -> tuple[Any, Any, Any]:
    return x, y.float(), index


def too_few_labels(x: Tensor, y: Tensor, index: Tensor) -> tuple[Any, Any, Any]:
    return x, y[:-1], index


def unknown_label(x: Tensor, y: Tensor, index: Tensor) -> tuple[Any, Any, Any]:
    return x, y + CLASSES, index


def unknown_index(x: Tensor, y: Tensor, index: Tensor) -> tuple[Any, Any, Any]:
    return x, y, index + COUNT


def repeated_index(x: Tensor, y: Tensor, index: Tensor) -> tuple[Any, Any, Any]:
    return x, y, torch.zeros_like(index)


def nothing(x: Tensor, y: Tensor, index: Tensor) -> tuple[Any, Any, Any]:
    return x[:0], y[:0], index[:0]


def too_wide(x: Tensor, y: Tensor, index: Tensor) -> tuple[Any, Any, Any]:
    return torch.cat([x, x], 1), y, index


MEMBERS = {
    "SFDA2": Member(sfda2, wrong=(unknown_index, repeated_index, nothing, too_wide)),
    "AdaNPC": Member(adanpc, still=True, per_sample=True, wrong=(too_wide,)),
    "AdaNPCBN": Member(adanpc_normalised, per_sample=True, wrong=(nothing, too_wide)),
    "NeighbourLoss": Member(adanpc_training, wrong=(no_label, too_few_labels, unknown_label)),
    "DomainHeads": Member(drm_training, wrong=(no_label, unknown_label, nothing)),
    "EdgePairLoss": Member(edge_pairs, wrong=(no_label, too_few_labels, nothing)),
    "DRMSteering": Member(drm_steering, still=True, per_sample=True, wrong=(too_wide,)),
    "ClassCovariance": Member(lambda off: Statistics(), wrong=(no_label, too_few_labels, too_wide)),
}


@pytest.fixture(params=MEMBERS, ids=MEMBERS)
def member(request: pytest.FixtureRequest) -> Member:
    return MEMBERS[request.param]


def built(member: Member, off: bool = False, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return member.build(off)


def run(held: Any, steps: int, first: int = 0) -> list[Tensor]:
    return [held.act(*batch(step)) for step in range(first, first + steps)]


def tensors(held: Any) -> list[Tensor]:
    """All tensors in a state, in order."""
    if isinstance(held, Tensor):
        return [held.clone()]
    parts = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else []
    return [tensor for part in parts for tensor in tensors(part)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_resumes_bit_exactly(member: Member) -> None:
    held = built(member)
    run(held, 3)
    file = io.BytesIO()
    torch.save(held.state_dict(), file)
    file.seek(0)
    again = built(member, seed=1)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert same(run(held, 3, first=3), run(again, 3, first=3))
    assert same(tensors(held.state_dict()), tensors(again.state_dict()))


def test_draws_nothing(member: Member) -> None:
    state = torch.random.get_rng_state()
    first, second = run(built(member), 4), run(built(member), 4)
    assert same(first, second)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_it_adapts(member: Member) -> None:
    held = built(member)
    before = tensors(held.state_dict())
    found = run(held, 3)
    assert all(value.isfinite().all() for value in found)
    assert not same(before, tensors(held.state_dict()))


def test_switched_off_it_answers_as_before(member: Member) -> None:
    if not member.still:
        pytest.skip("has no such switch")
    held = built(member, off=True)
    x = batch(9)
    first, state = held.act(*x), tensors(held.state_dict())
    run(held, 3)
    assert torch.equal(held.act(*x), first)
    assert same(state, tensors(held.state_dict()))


def test_order_within_a_batch_does_not_matter(member: Member) -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    held, shuffled = built(member), built(member)
    for step in range(3):
        x, y, index = batch(step)
        if member is MEMBERS["DomainHeads"]:  # whose batch comes in parts
            order = torch.cat(
                [
                    part[torch.randperm(6, generator=torch.Generator().manual_seed(step))]
                    for part in torch.arange(12).tensor_split(2)
                ]
            )
        found, other = held.act(x, y, index), shuffled.act(x[order], y[order], index[order])
        torch.testing.assert_close(other, found[order] if member.per_sample else found, rtol=1e-4, atol=1e-5)


def test_a_refused_call_leaves_the_state_bit_equal(member: Member) -> None:
    held = built(member)
    run(held, 2)
    before = tensors(held.state_dict())
    for change in member.wrong:
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            held.act(*change(*batch(5)))
        assert same(before, tensors(held.state_dict())), change.__name__


def test_a_state_of_another_is_refused_and_changes_nothing(member: Member) -> None:
    held = built(member)
    run(held, 2)
    before, state = tensors(held.state_dict()), copy.deepcopy(held.state_dict())
    inner = state.get("module", state.get("model", state))
    del inner[next(iter(inner))]
    with pytest.raises((ValueError, RuntimeError, KeyError)):
        held.load_state_dict(state)
    assert same(before, tensors(held.state_dict()))
