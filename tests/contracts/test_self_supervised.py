"""What every objective without labels keeps to, whatever it asks of samples and their views.

A new one joins by one entry in MEMBERS: an adapter to `loss(x, index, generator)` on its network, as below.
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
from trimtab.ops.averaging import Teacher
from trimtab.ops.info_nce import nt_xent

SAMPLES, DIM = 48, 16


def points() -> Tensor:
    """The training set: small images of one channel, in a few directions of different strength."""
    generator = torch.Generator().manual_seed(77)
    directions = torch.randn(6, 16, generator=generator) * torch.linspace(2, 0.2, 6)[:, None]
    return (torch.randn(SAMPLES, 6, generator=generator) @ directions).view(-1, 1, 4, 4)


class Objective(nn.Module):
    """A network on images of 4 by 4 and a rule, with views that are images in noise."""

    def __init__(self, rule: nn.Module) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, DIM))
        self.rule = rule

    def views(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        first, second = (x + 0.3 * torch.randn(x.shape, generator=generator) for _ in range(2))
        return self.network(first), self.network(second)

    def update(self) -> None:
        pass


class Particles(Objective):
    def __init__(self, off: bool) -> None:
        super().__init__(semisup.MSBReg(0.0, 0.0) if off else semisup.MSBReg())
        self.teacher = Teacher(self.network, 0.9)

    def loss(self, x: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        z = torch.stack(self.views(x, generator), 1)
        return self.rule(z, self.teacher(x)[:, None], generator=generator)

    def plain(self, x: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        cosines = [F.cosine_similarity(view, self.teacher(x)) for view in self.views(x, generator)]
        return 2 - 2 * torch.stack(cosines).mean()

    def update(self) -> None:
        self.teacher.update(self.network)


class Masked(Objective):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU())
            self.pixels, self.losses = nn.Linear(32, 16), nn.Linear(32, 4)

        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            seen = x.masked_fill(mask.view(-1, 1, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3), 0.0)
            features = self.body(seen)
            return self.pixels(features).view(-1, 4, 4), self.losses(features)

    def __init__(self, off: bool) -> None:
        switches = {"max_hard": 0.0, "prediction_weight": 0.0} if off else {"max_hard": 1.0}
        super().__init__(semisup.HPM(self.Model(), 2, 5, mask_ratio=0.5, decay=(0.9, 0.99), **switches))
        self.rule.set_epoch(2)

    def loss(self, x: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        return self.rule.loss(x, generator=generator)["total"]

    def plain(self, x: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.rand(len(x), 4, generator=generator)
        mask = torch.zeros(len(x), 4, dtype=torch.bool).scatter_(1, noise.topk(2, 1).indices, True)
        made = self.rule.model(x, mask)[0]
        return F.mse_loss(made[mask], F.unfold(x, 2, stride=2).mT[mask])

    def update(self) -> None:
        self.rule.update()


class InterImage(Objective):
    def __init__(self, off: bool) -> None:
        memory = semisup.ClusterMemory(SAMPLES, DIM, 4, momentum=0.7)
        weight = 0.0 if off else 0.5
        super().__init__(semisup.InterCLR(memory, 8, 16, inter_weight=weight, renew_every=2))
        with torch.no_grad():
            memory.start(self.network(points()), generator=torch.Generator().manual_seed(0))
        self.seen: Any = None

    def loss(self, x: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        first, second = self.views(x, generator)
        found = self.rule.loss(first, index, nt_xent(torch.cat([first, second])), generator=generator)
        self.seen = (index, second.detach())
        return found["total"]

    def plain(self, x: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        return nt_xent(torch.cat(self.views(x, generator)))

    def update(self) -> None:
        self.rule.update(*self.seen)


class Matched(Objective):
    def __init__(self, off: bool) -> None:
        weight = 0.0 if off else 1.0
        super().__init__(semisup.GraphMatchingLoss(DIM, k=2, group_size=4, edge_weight=weight, margin=0.2, dropout=0.2))

    def loss(self, x: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        return self.rule(*self.views(x, generator), generator=generator)

    def plain(self, x: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        """Its first-order part: an assignment, whose gradient is told by another one."""
        u, q, edges_s, edges_t = self.rule.costs(*self.views(x, generator), generator=generator)
        true = torch.eye(4)
        v, other = (
            F.one_hot(semisup.match_graphs(cost, 0 * q, edges_s, edges_t), 4).float()
            for cost in (u, u + self.rule.lam_grad * (1 - 2 * true) / len(u))
        )
        value = (v * (1 - true) + (1 - v) * true).sum() / len(u)
        slope = -(v - other) / self.rule.lam_grad
        return value + (u * slope).sum() - (u * slope).sum().detach()


class Told(Objective):
    """Sixteen columns that tell each other's codes; switched off it is only written out."""

    def __init__(self, off: bool) -> None:
        # Dropout would draw from the global state.
        sizes = {"dim": 8, "num_layers": 1, "num_heads": 2, "predictor_dim": 4, "predictor_layers": 1}
        super().__init__(semisup.TJEPA(16, **sizes, dropout=0.0))

    def loss(self, x: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        return self.rule.loss(x.flatten(1), generator=generator)["total"]

    def plain(self, x: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        x, rule = x.flatten(1), self.rule
        masks = semisup.sample_column_masks(len(x), 16, generator=generator)
        told = rule.predictor(rule.encoder(x, columns=masks.context), masks.context, masks.targets)
        rows = torch.arange(len(x))[:, None, None]
        return (told - rule.teacher.model(x)[rows, masks.targets].detach()).square().mean()

    def update(self) -> None:
        self.rule.update(0.5)


class Member(NamedTuple):
    build: Callable[[bool], Any]
    """Makes the objective, on or switched off, from the global random state."""


MEMBERS = {
    "MSBReg": Member(Particles),
    "HPM": Member(Masked),
    "InterCLR, ClusterMemory": Member(InterImage),
    "GraphMatchingLoss": Member(Matched),
    "TJEPA": Member(Told),
}


@pytest.fixture(params=MEMBERS.values(), ids=MEMBERS)
def member(request: pytest.FixtureRequest) -> Member:
    return request.param


def built(member: Member, seed: int = 0, off: bool = False) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return member.build(off)


def batch(step: int, size: int = 12) -> tuple[Tensor, Tensor]:
    index = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(step))[:size]
    return points()[index], index


def run(objective: Any, steps: int, first: int = 0, seed: int = 1, plain: bool = False) -> list[float]:
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.05)
    found = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(seed * 1000 + step)
        value = (objective.plain if plain else objective.loss)(*batch(step), generator)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if not plain or not isinstance(objective, InterImage):
            objective.update()
        found.append(value.item())
    return found


def same(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k] for k in a)


def test_the_generator_decides_all_that_is_drawn(member: Member) -> None:
    state = torch.random.get_rng_state()
    one, other, third = built(member), built(member), built(member)
    assert run(one, 3) == run(other, 3)
    assert same(one, other)
    run(third, 3, seed=2)
    assert not same(third, one)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_learns(member: Member) -> None:
    objective = built(member)
    values = run(objective, 60)
    assert all(torch.tensor(values).isfinite())
    if not isinstance(objective, InterImage):  # whose negatives become harder while it learns
        assert sum(values[-10:]) < sum(values[:10])


def test_gradients_are_finite_and_reach_the_network_alone(member: Member) -> None:
    objective = built(member)
    objective.loss(*batch(0), torch.Generator().manual_seed(0)).backward()
    grads = [p.grad for p in objective.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)
    assert any(grad.abs().sum() > 0 for grad in grads)
    assert not any(buffer.requires_grad for buffer in objective.buffers())
    held = [part for part in objective.modules() if isinstance(part, Teacher)]
    assert all(p.grad is None for teacher in held for p in teacher.parameters())


def test_resumes_bit_exactly(member: Member) -> None:
    objective = built(member)
    run(objective, 3)
    file = io.BytesIO()
    torch.save(objective.state_dict(), file)
    file.seek(0)
    again = built(member, seed=5)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert run(objective, 4, first=3) == run(again, 4, first=3)
    assert same(objective, again)


def test_a_state_that_does_not_fit_changes_nothing(member: Member) -> None:
    rule = built(member).rule
    own = rule.state_dict()
    if not own:
        pytest.skip("it holds nothing")
    before = copy.deepcopy(own)
    last = list(own)[-1]
    spoilt = {name: value for name, value in own.items() if name != last}
    with pytest.raises((ValueError, RuntimeError)):
        rule.load_state_dict(spoilt)
    tensors = [name for name, value in own.items() if isinstance(value, Tensor) and value.ndim]
    with pytest.raises((ValueError, RuntimeError)):
        rule.load_state_dict({**own, tensors[-1]: own[tensors[-1]][:-1]})
    after = rule.state_dict()
    assert all(torch.equal(after[k], v) if isinstance(v, Tensor) else after[k] == v for k, v in before.items())


def test_switched_off_it_is_its_baseline(member: Member) -> None:
    rule, twin = built(member, off=True), built(member, off=True)
    for found, expected in zip(run(rule, 4), run(twin, 4, plain=True), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    for p, other in zip(rule.network.parameters(), twin.network.parameters(), strict=True):
        torch.testing.assert_close(p, other, rtol=1e-3, atol=1e-5)


def test_an_empty_batch_is_refused_and_changes_nothing(member: Member) -> None:
    objective = built(member)
    run(objective, 2)
    before = copy.deepcopy(objective.state_dict())
    x, index = batch(0)
    with pytest.raises(ValueError, match="at least|empty"):
        objective.loss(x[:0], index[:0], torch.Generator())
    after = objective.state_dict()
    assert all(torch.equal(after[k], v) if isinstance(v, Tensor) else after[k] == v for k, v in before.items())


def test_autocast_is_close_to_float32(member: Member) -> None:
    if member is MEMBERS["GraphMatchingLoss"]:
        pytest.skip("matchings jump; test_lvm_med looks at its costs")
    value = built(member).loss(*batch(0), torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = built(member).loss(*batch(0), torch.Generator().manual_seed(0))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, value, rtol=0.05, atol=0.05)
