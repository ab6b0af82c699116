"""What every rule that trains from labelled samples and views of others keeps to, whatever it makes of them.

A new rule joins by one entry in MEMBERS. A rule is a module with `forward(x)`, the logits, a loss of a batch, and
perhaps `update()` for after the optimizer's step.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab import semisup

CLASSES = 3


class Batch(NamedTuple):
    x: Tensor
    targets: Tensor
    index: Tensor
    weak: Tensor
    strong: Tensor


def batch(step: int, unlabelled: int = 24) -> Batch:
    """Points of three classes, told by their largest of the first three numbers; views are points with noise."""
    generator = torch.Generator().manual_seed(step)
    points = torch.randn(24, 4, generator=torch.Generator().manual_seed(99))  # the labelled set
    index = torch.randperm(24, generator=generator)[:8]
    x = points[index]
    plain = 2 * torch.randn(unlabelled, 4, generator=generator)
    views = (plain + 0.1 * torch.randn(2, unlabelled, 4, generator=generator)).unbind()
    return Batch(x, x[:, :3].argmax(1), index, *views)


LABELS = torch.randn(24, 4, generator=torch.Generator().manual_seed(99))[:, :3].argmax(1)


def trunk() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU())


def shrinkmatch(off: bool) -> nn.Module:
    align = None if off else semisup.QueueDistributionAlignment(CLASSES)
    threshold = 1 - 1e-7 if off else 0.7
    return semisup.ShrinkMatch(
        trunk(), nn.Linear(16, CLASSES), threshold=threshold, align=align, shrink=0.0 if off else 1.0
    )


def simmatchv2(off: bool) -> nn.Module:
    options: dict[str, Any] = {"weights": (0.0, 0.0, 0.0)} if off else {"weights": (1.0, 0.5, 0.5), "momentum": 0.9}
    return semisup.SimMatchV2(trunk(), nn.Linear(16, CLASSES), LABELS, top_n=8, queue_size=64, dim=8, **options)


class Member(NamedTuple):
    build: Callable[[bool], Any]
    """Makes the rule, on or switched off, from the global random state."""
    loss: Callable[[Any, Batch], dict[str, Tensor]]
    """The loss of a batch."""
    sees: Callable[[Batch], Tensor] = lambda b: torch.cat([b.x, b.weak, b.strong])
    """What goes through the network at once, labelled samples first."""
    weak_is_constant: bool = True
    """Whether weak views are for targets alone."""


MEMBERS = {
    "ShrinkMatch": Member(shrinkmatch, lambda rule, b: rule.loss(b.x, b.targets, b.weak, b.strong)),
    "SimMatchV2": Member(
        simmatchv2,
        lambda rule, b: rule.loss(b.x, b.targets, b.index, b.weak, b.strong),
        lambda b: torch.cat([b.x, b.strong]),
    ),
}


@pytest.fixture(params=MEMBERS.values(), ids=MEMBERS)
def member(request: pytest.FixtureRequest) -> Member:
    return request.param


def built(member: Member, seed: int = 0, off: bool = False) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return member.build(off)


class Loop:
    """The user's loop around a rule."""

    def __init__(self, member: Member, rule: Any, lr: float = 0.1) -> None:
        self.member, self.rule = member, rule
        self.optimizer = torch.optim.SGD([p for p in rule.parameters() if p.requires_grad], lr=lr)

    def step(self, b: Batch) -> dict[str, Tensor]:
        self.rule.train()
        found = self.member.loss(self.rule, b)
        self.optimizer.zero_grad()
        found["total"].backward()
        self.optimizer.step()
        if hasattr(self.rule, "update"):
            self.rule.update()
        return {name: value.detach() for name, value in found.items()}

    def run(self, steps: int, first: int = 0) -> list[dict[str, Tensor]]:
        return [self.step(batch(step)) for step in range(first, first + steps)]


def state(rule: nn.Module) -> list[Tensor]:
    return [value.clone() for value in rule.state_dict().values() if isinstance(value, Tensor)]


def test_resumes_bit_exactly(member: Member) -> None:
    loop = Loop(member, built(member))
    loop.run(3)
    file = io.BytesIO()
    torch.save(loop.rule.state_dict(), file)
    file.seek(0)
    again = Loop(member, built(member, seed=1))
    again.rule.load_state_dict(torch.load(file, weights_only=True))
    for one, other in zip(loop.run(3, first=3), again.run(3, first=3), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_nothing_is_drawn_from_the_global_state(member: Member) -> None:
    loop = Loop(member, built(member))
    before = torch.random.get_rng_state()
    loop.run(2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_switched_off_it_is_cross_entropy_on_the_labelled(member: Member) -> None:
    rule = built(member, off=True)
    plain = copy.deepcopy(rule)
    loop = Loop(member, rule)
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    for step in range(4):
        b = batch(step)
        loop.step(b)
        # Batch statistics are of all that goes through the network.
        logits = plain.train()(member.sees(b))[: len(b.x)]
        optimizer.zero_grad()
        F.cross_entropy(logits, b.targets).backward()
        optimizer.step()
    torch.testing.assert_close(rule.eval()(batch(9).x), plain.eval()(batch(9).x), rtol=1e-4, atol=1e-5)


def test_learns(member: Member) -> None:
    loop = Loop(member, built(member))
    found = loop.run(200)
    assert all(value.isfinite().all() for losses in found for value in losses.values())
    b = batch(1000, unlabelled=200)
    right = loop.rule.eval()(b.weak).argmax(1) == b.weak[:, :3].argmax(1)
    assert right.float().mean() >= 0.8


def test_the_parts_are_detached_and_the_total_is_not(member: Member) -> None:
    found = member.loss(built(member), batch(0))
    assert found.pop("total").requires_grad
    assert all(not value.requires_grad for value in found.values())
    assert 0 <= found["used"] <= 1


def test_weak_views_are_constants(member: Member) -> None:
    rule = built(member)
    Loop(member, rule).run(2)
    b = batch(3)
    weak = b.weak.clone().requires_grad_()
    rule.eval()  # batch statistics would carry a gradient
    member.loss(rule, b._replace(weak=weak))["total"].backward()
    assert weak.grad is None or (weak.grad == 0).all()


def test_the_order_of_the_unlabelled_does_not_matter(member: Member) -> None:
    rule = built(member)
    Loop(member, rule).run(2)
    rule.eval()
    b, order = batch(3), torch.randperm(24, generator=torch.Generator().manual_seed(0))
    one = member.loss(rule, b)
    other = member.loss(rule, b._replace(weak=b.weak[order], strong=b.strong[order]))
    for name in one:
        torch.testing.assert_close(one[name], other[name])


def test_one_unlabelled_sample_will_do(member: Member) -> None:
    rule = built(member)
    Loop(member, rule).run(2)
    rule.eval()
    assert member.loss(rule, batch(3, unlabelled=1))["total"].isfinite()


def test_half_precision(member: Member) -> None:
    rule = built(member)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for step in range(2):
            found = member.loss(rule, batch(step))
    assert found["total"].dtype == torch.float32
    assert found["total"].isfinite()


REFUSED: list[tuple[Callable[[Batch], Batch], type[Exception], str]] = [
    (lambda b: b._replace(targets=b.targets.float()), TypeError, "targets"),
    (lambda b: b._replace(targets=b.targets[1:]), ValueError, "targets"),
    (lambda b: b._replace(weak=b.weak[:0], strong=b.strong[:0]), ValueError, "x_weak"),
    (lambda b: b._replace(x=b.x[:0], targets=b.targets[:0], index=b.index[:0]), ValueError, "x must"),
    (lambda b: b._replace(strong=b.strong[1:]), ValueError, "x_strong"),
    (lambda b: b._replace(strong=b.strong.long()), TypeError, "x_strong"),
    (lambda b: b._replace(weak=b.weak[:, 1:]), ValueError, "x_weak"),
]


def test_a_refused_batch_changes_nothing(member: Member) -> None:
    rule = built(member)
    Loop(member, rule).run(2)
    before = state(rule)
    for spoil, error, name in REFUSED:
        with pytest.raises(error, match=name):
            member.loss(rule, spoil(batch(3)))
        assert all(torch.equal(one, other) for one, other in zip(state(rule), before, strict=True))


@pytest.mark.parametrize("kind", [semisup.DistributionAlignment, semisup.QueueDistributionAlignment])
def test_an_alignment_that_refuses_changes_nothing(kind: Any) -> None:
    align = kind(CLASSES)
    align(torch.tensor([[0.5, 0.3, 0.2]]))
    before = state(align)
    for wrong in (torch.ones(2, 4), torch.ones(0, CLASSES), torch.ones(CLASSES), torch.ones(2, CLASSES).long()):
        with pytest.raises((ValueError, TypeError), match="probs"):
            align(wrong)
    assert all(torch.equal(one, other) for one, other in zip(state(align), before, strict=True))


def lego_batch(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    plain = 2 * torch.randn(24, 4, generator=generator)
    first, second = (plain + 0.1 * torch.randn(2, 24, 4, generator=generator)).unbind()
    targets = plain[:, :3].argmax(1)
    return first, second, targets, (targets < 2) & (torch.arange(24) % 2 == 0)


def lego(seed: int = 0) -> semisup.LegoGCD:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return semisup.LegoGCD(trunk(), 16, 2, CLASSES, hidden=16, projection=8, threshold=0.4, momentum=0.9)


def test_lego_gcd_resumes_bit_exactly_and_a_refused_batch_changes_nothing() -> None:
    held, other = lego(), lego(seed=1)
    for step in range(2):
        held.set_epoch(step)
        held.loss(*lego_batch(step))
    other.load_state_dict(held.state_dict())
    for step in (2, 3):
        one, same = held.loss(*lego_batch(step)), other.loss(*lego_batch(step))
        assert all(torch.equal(one[name], same[name]) for name in one)
    before = state(held)
    first, second, targets, labelled = lego_batch(5)
    for wrong in (
        (first, second[1:], targets, labelled),
        (first, second, targets.float(), labelled),
        (first, second, targets[1:], labelled),
        (first, second, targets, labelled.long()),
        (first, second, targets, labelled[1:]),
        (first[:0], second[:0], targets[:0], labelled[:0]),
    ):
        with pytest.raises((ValueError, TypeError)):
            held.loss(*wrong)
        assert all(torch.equal(one, other) for one, other in zip(state(held), before, strict=True))
    with pytest.raises(ValueError, match="epoch"):
        held.set_epoch(-1)
    # LocalEntropyRegularization, by itself.
    for wrong in ((torch.ones(2, 4), labelled[:2]), (torch.ones(2, CLASSES), labelled)):
        with pytest.raises(ValueError):
            held.local_entropy(*wrong)
    assert all(torch.equal(one, other) for one, other in zip(state(held), before, strict=True))
