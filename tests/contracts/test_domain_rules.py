"""What everything that trains on several domains keeps to.

A new method joins by one line in MEMBERS. A penalty on the domains' losses goes through `Penalised`, a rule that steps
its own optimizer is used as it is, with `step(batch) -> dict` on a list of `(x, y)`.
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

from trimtab import domain
from trimtab.domain.environments import DomainBatch, checked_domains

LR = 0.1


def networks() -> tuple[nn.Module, nn.Linear]:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten()), nn.Linear(3 * 9, 3)


class Penalised:
    """Two networks, the mean of the domains' losses, a penalty on them, and the loop around it."""

    def __init__(self, penalty: Callable[[list[Tensor], nn.Module], Tensor] | None, features: nn.Module | None = None):
        made, self.head = networks()
        self.features, self.penalty = features or made, penalty
        parameters = [*self.features.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=LR)

    def step(self, batch: DomainBatch) -> dict[str, Tensor]:
        checked_domains(batch)
        self.features.train()
        x = torch.cat([x for x, _ in batch])
        logits = self.head(self.features(x)).split([len(y) for _, y in batch])
        losses = [F.cross_entropy(said, y) for said, (_, y) in zip(logits, batch, strict=True)]
        loss = torch.stack(losses).mean()
        penalty = self.penalty(losses, self.head) if self.penalty else torch.zeros(())
        self.optimizer.zero_grad()
        (loss + penalty).backward()
        self.optimizer.step()
        return {"loss": loss.detach(), "penalty": penalty.detach()}

    def state_dict(self) -> dict[str, Any]:
        parts = {"features": self.features, "head": self.head, "optimizer": self.optimizer}
        return {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("features", "head", "optimizer"):
            getattr(self, name).load_state_dict(state[name])


class InDomains(domain.UDIM):
    """UDIM on a list of domains."""

    def step(self, batch: DomainBatch) -> dict[str, Tensor]:  # type: ignore[override]
        checked_domains(batch)
        x, y = (torch.cat(parts) for parts in zip(*batch, strict=True))
        return super().step(x, y, sizes=[len(y) for _, y in batch])


def penalised(make: Callable[[bool], Any]) -> Callable[[bool], Penalised]:
    return lambda off: Penalised(make(off))


def udim(off: bool) -> InDomains:
    features, head = networks()
    base = torch.optim.SGD([*features.parameters(), *head.parameters()], lr=LR)
    switches = {"rho": 0.0, "lam": 0.0} if off else {"warmup": 0.0, "zeta": 0.1}
    return InDomains(features, head, base, 10, **switches)


def restyled(off: bool) -> Penalised:
    features, _ = networks()
    shares = {"p_clean": 1.0, "p_adv": 0.0} if off else {"p_clean": 0.0, "p_adv": 1.0}
    layer = domain.AdvStyle(3, adv_weight=0.1, **shares, generator=torch.Generator().manual_seed(1))
    features[1] = nn.Sequential(features[1], layer)
    return Penalised(None, features)


class Member(NamedTuple):
    build: Callable[[bool], Any]
    """Makes the rule, on or switched off, from the global random state; it holds `features` and `head`."""
    aligns: bool = False
    """Whether equal domains have a `penalty` of zero."""
    draws: bool = False
    """Whether a step draws at random, so that another order of domains gives another step."""


MEMBERS = {
    "HGPPenalty": Member(penalised(lambda off: domain.HGPPenalty(*((0, 0) if off else (0.5, 0.5)))), aligns=True),
    "HutchinsonPenalty": Member(
        penalised(
            lambda off: domain.HutchinsonPenalty(
                *((0, 0) if off else (0.5, 0.5)), probes=4, generator=torch.Generator().manual_seed(1)
            )
        ),
        aligns=True,
    ),
    "UDIM": Member(udim),
    "AdvStyle": Member(restyled, draws=True),
}


@pytest.fixture(params=MEMBERS.values(), ids=MEMBERS)
def member(request: pytest.FixtureRequest) -> Member:
    return request.param


def built(member: Member, seed: int = 0, off: bool = False) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return member.build(off)


def batch(step: int, count: int = 3) -> DomainBatch:
    draws = torch.Generator().manual_seed(step)
    return [
        ((1 + d) * torch.rand(6, 2, 5, 5, generator=draws), torch.randint(3, (6,), generator=draws))
        for d in range(count)
    ]


def weights(rule: Any) -> list[Tensor]:
    parameters = [*rule.features.named_parameters(), *rule.head.named_parameters()]
    return [p.detach().clone() for name, p in parameters if "strength" not in name]


def test_equal_domains_cost_nothing(member: Member) -> None:
    if not member.aligns:
        pytest.skip("it does not align domains")
    first = batch(0)[0]
    assert built(member).step([first, first])["penalty"].item() == pytest.approx(0, abs=1e-12)
    assert built(member).step(batch(0))["penalty"] > 0


def test_the_order_of_domains_does_not_matter(member: Member) -> None:
    if member.draws:
        pytest.skip("it draws noise, sample by sample")
    one, other = built(member), built(member)
    first, *rest = batch(0)
    one.step([first, *rest])
    other.step([*rest, first])
    for a, b in zip(weights(one), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_switched_off_it_is_risk_minimisation(member: Member) -> None:
    rule, twin = built(member, off=True), built(member, off=True)
    parameters = [*twin.features.parameters(), *twin.head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=LR)
    for step in range(4):
        rule.step(batch(step))
        optimizer.zero_grad()
        losses = [F.cross_entropy(twin.head(twin.features.eval()(x)), y) for x, y in batch(step)]
        torch.stack(losses).mean().backward()
        optimizer.step()
    for a, b in zip(weights(rule), weights(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_resumes_bit_exactly(member: Member) -> None:
    rule = built(member)
    for step in range(3):
        rule.step(batch(step))
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    again = built(member, seed=1)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(weights(rule), weights(again), strict=True))
    if not member.draws and not hasattr(getattr(rule, "penalty", None), "generator"):
        assert str(rule.step(batch(7))) == str(again.step(batch(7)))
        assert all(torch.equal(a, b) for a, b in zip(weights(rule), weights(again), strict=True))


def test_the_same_seed_gives_the_same_numbers(member: Member) -> None:
    state = torch.random.get_rng_state()
    one, other = built(member), built(member)
    for step in range(3):
        one.step(batch(step))
        other.step(batch(step))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def test_a_refused_batch_changes_nothing(member: Member) -> None:
    rule = built(member)
    rule.step(batch(0))
    before = weights(rule)
    first, second, _ = batch(1)
    for wrong in ([], [first, (second[0][:0], second[1][:0])], [first, (second[0], second[1][:-1])]):
        with pytest.raises(ValueError):
            rule.step(wrong)
    with pytest.raises(TypeError):
        rule.step([first, (second[0], second[1].float())])
    assert all(torch.equal(a, b) for a, b in zip(weights(rule), before, strict=True))


def test_everything_learns_and_stays_finite(member: Member) -> None:
    rule = built(member)
    found = [rule.step(batch(step % 2)) for step in range(60)]
    assert all(value.isfinite().all() and not value.requires_grad for held in found for value in held.values())
    assert sum(float(held["loss"]) for held in found[-6:]) < sum(float(held["loss"]) for held in found[:6])
