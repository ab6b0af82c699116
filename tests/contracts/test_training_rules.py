"""What every rule that trains networks from batches keeps to, whatever it does in a step.

A new rule joins by one line in MEMBERS. A rule that steps its own optimizers is used as it is; a module that gives
losses for the user's optimizer goes through `Stepped`.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab import domain, generative, losses, optim
from trimtab.ops.arguments import class_indices

LR = 0.1


class Stepped:
    """A module with `loss(x, targets, generator=...) -> {"total": ...}` and the loop around it."""

    def __init__(self, module: nn.Module, generator: torch.Generator) -> None:
        self.module, self.generator = module, generator
        self.optimizer = torch.optim.SGD(module.parameters(), lr=LR)

    def step(self, x: Tensor, targets: Tensor, index: Tensor) -> dict[str, Tensor]:
        self.module.train()
        found = self.module.loss(x, targets, generator=self.generator)
        self.optimizer.zero_grad()
        found["total"].backward()
        self.optimizer.step()
        return {name: value.detach() for name, value in found.items()}

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        return self.module.eval()(x)

    def state_dict(self) -> dict[str, Any]:
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])


def trunk(inputs: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 16), nn.BatchNorm1d(16), nn.ReLU())


class Unmixed(nn.Module):
    """A policy by which AdaMixUp mixes nothing."""

    folds = 2

    def forward(self, parts: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return torch.tensor([50.0, -50.0, -50.0]).expand(parts.shape[1], 3)


def adamixup(generator: torch.Generator, off: bool) -> Stepped:
    policy = Unmixed() if off else optim.MixPolicy(trunk(), 16)
    # Batch normalisation sees the unseen half too, so that the plain network, which does not, goes without.
    module = optim.AdaMixUp(nn.Sequential(nn.Linear(4, 16), nn.ReLU()) if off else trunk(), 16, 3, policy)
    if off:
        for p in module.discriminator.parameters():
            nn.init.zeros_(p)  # it then sends the trunk no gradient
    return Stepped(module, generator)


def elr_plus(generator: torch.Generator, off: bool) -> losses.ELRPlus:
    networks = [nn.Sequential(trunk(), nn.Linear(16, 3)) for _ in range(2)]
    optimizers = [torch.optim.SGD(network.parameters(), lr=LR) for network in networks]
    switches = {"lam": 0.0, "mixup_alpha": 0.0} if off else {"lam": 1.0}
    return losses.ELRPlus(networks, optimizers, 64, 3, **switches, generator=generator)


class Unindexed(losses.NestedCoTeaching):
    """Takes the positions of samples in the training set, and needs none."""

    @property
    def generator(self) -> torch.Generator:
        return self.layers[0].generator

    def step(self, x: Tensor, targets: Tensor, index: Tensor) -> dict[str, Tensor]:
        return super().step(x, targets)


def nested_co_teaching(generator: torch.Generator, off: bool) -> losses.NestedCoTeaching:
    options = {"sigma": 1e-3, "mu": 16.0} if off else {"sigma": 10.0}  # switched off, all 16 features are kept
    layers = [losses.NestedDropout(16, **options, generator=generator) for _ in range(2)]
    networks = [nn.Sequential(trunk(), layer, nn.Linear(16, 3)) for layer in layers]
    optimizers = [torch.optim.SGD(network.parameters(), lr=LR) for network in networks]
    return Unindexed(networks, optimizers, forget_rate=0.0 if off else 0.2, freeze_batch_norm=False)


class Whole(nn.Module):
    """Series of one feature in which nothing is missing, classified by supnotMIWAE."""

    def __init__(self, off: bool) -> None:
        super().__init__()
        encoder, decoder, classifier = OfEveryStep(2, 4), OfEveryStep(2, 2), OfWhole()
        self.model = generative.SupNotMIWAE(
            encoder,
            decoder,
            classifier,
            1,
            missingness=None if off else nn.Linear(1, 1),
            rate=0.0 if off else 0.2,
            num_latents=3,
        )
        # At the rate of this suite a likelihood runs away: the classifier learns, and the fillings are what they are.
        for part in (encoder, decoder):
            part.requires_grad_(False)

    def loss(self, x: Tensor, targets: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        series = x[:, :, None]
        return self.model.loss(series, torch.ones_like(series, dtype=torch.bool), targets, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        series = x[:, :, None]
        mask = torch.ones_like(series, dtype=torch.bool)
        return self.model.predict(series, mask, generator=torch.Generator().manual_seed(0)).probs.log()


class OfEveryStep(nn.Linear):
    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        return super().forward(x)


class OfWhole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3), nn.LogSoftmax(1))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        return self.net(x.flatten(1))


def supnotmiwae(generator: torch.Generator, off: bool) -> Stepped:
    return Stepped(Whole(off), generator)


class Masking(nn.Module):
    """Images of four pixels, classified beside masked consistency."""

    def __init__(self, off: bool) -> None:
        super().__init__()
        # Batch normalisation sees masked images too, so that the plain network, which sees none, goes without.
        body = nn.Sequential(nn.Linear(4, 16), nn.ReLU()) if off else trunk()
        self.student = nn.Sequential(nn.Flatten(), body, nn.Linear(16, 3))
        self.mic = domain.MaskedImageConsistency(
            self.student, patch=1, ratio=0.3, decay=0.9, weight=0.0 if off else 0.5
        )

    def loss(self, x: Tensor, targets: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        class_indices("targets", targets)
        if len(targets) != len(x):
            raise ValueError(f"targets must be {len(x)} labels, got {len(targets)}")
        found = self.mic.loss(self.student, x.view(-1, 1, 2, 2), generator=generator)
        return {**found, "total": found["total"] + F.cross_entropy(self.student(x), targets)}

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)


class Followed(Stepped):
    """With a teacher that follows after every step."""

    def step(self, x: Tensor, targets: Tensor, index: Tensor) -> dict[str, Tensor]:
        found = super().step(x, targets, index)
        self.module.mic.update(self.module.student)
        return found


def masked_image_consistency(generator: torch.Generator, off: bool) -> Followed:
    return Followed(Masking(off), generator)


class Member(NamedTuple):
    build: Callable[[torch.Generator, bool], Any]
    """Makes the rule, on or switched off, from the global random state."""
    plain: Callable[[Any], list[nn.Module]]
    """The networks of a switched-off rule, to be trained by cross-entropy alone beside it; their mean predicts."""
    sees: slice = slice(None)
    """The part of a batch whose labels the rule uses."""


MEMBERS = {
    "AdaMixUp": Member(adamixup, lambda rule: [nn.Sequential(rule.module.trunk, rule.module.head)], slice(0, 8)),
    "ELRPlus": Member(elr_plus, lambda rule: rule.networks),
    "MaskedImageConsistency": Member(masked_image_consistency, lambda rule: [rule.module.student]),
    "NestedCoTeaching": Member(nested_co_teaching, lambda rule: rule.networks),
    "SupNotMIWAE": Member(supnotmiwae, lambda rule: [rule.module.model.classifier.net]),
}


@pytest.fixture(params=MEMBERS.values(), ids=MEMBERS)
def member(request: pytest.FixtureRequest) -> Member:
    return request.param


def built(member: Member, seed: int = 0, off: bool = False) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return member.build(torch.Generator().manual_seed(seed), off)


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 4, generator=generator)
    return x, x[:, :3].argmax(1), torch.arange(16) + 16 * (step % 4)


def run(rule: Any, steps: int, first: int = 0) -> list[dict[str, Tensor]]:
    return [rule.step(*batch(step)) for step in range(first, first + steps)]


def same(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


def test_resumes_bit_exactly(member: Member) -> None:
    rule = built(member)
    run(rule, 3)
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    again = built(member, seed=1)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert same(run(rule, 3, first=3), run(again, 3, first=3))
    assert torch.equal(rule.predict(batch(0)[0]), again.predict(batch(0)[0]))


def test_the_generator_decides_all_that_is_drawn(member: Member) -> None:
    state = torch.random.get_rng_state()
    first, second = run(built(member), 3), run(built(member), 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same(first, second)
    other = built(member)
    other.generator.manual_seed(5)
    assert not same(first, run(other, 3))


def test_switched_off_it_is_cross_entropy(member: Member) -> None:
    rule, twin = built(member, off=True), built(member, off=True)
    plain = member.plain(twin)
    optimizers = [torch.optim.SGD(network.parameters(), lr=LR) for network in plain]
    for step in range(5):
        x, targets, index = batch(step)
        rule.step(x, targets, index)
        for network, optimizer in zip(plain, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(network.train()(x[member.sees]), targets[member.sees]).backward()
            optimizer.step()
    x = batch(9)[0]
    with torch.no_grad():
        expected = torch.stack([network.eval()(x) for network in plain]).mean(0)
    torch.testing.assert_close(rule.predict(x), expected, rtol=1e-4, atol=1e-6)


def test_learns(member: Member) -> None:
    rule = built(member)
    found = run(rule, 150)
    assert all(value.isfinite().all() and not value.requires_grad for held in found for value in held.values())
    x, targets, _ = batch(1000)
    assert (rule.predict(x).argmax(1) == targets).float().mean() >= 0.75


def test_a_prediction_does_not_depend_on_its_batch(member: Member) -> None:
    rule = built(member)
    run(rule, 1)
    x = batch(7)[0]
    torch.testing.assert_close(rule.predict(x)[:3], rule.predict(x[:3]))


def tensors(held: Any) -> list[Tensor]:
    """All tensors in a state, in order."""
    if isinstance(held, Tensor):
        return [held.clone()]
    parts = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else []
    return [tensor for part in parts for tensor in tensors(part)]


def test_a_refused_step_leaves_the_state_bit_equal(member: Member) -> None:
    rule = built(member)
    run(rule, 2)
    x, targets, index = batch(0)
    before = tensors(rule.state_dict())
    for wrong, error in ((targets.float(), TypeError), (targets[:-1], ValueError)):
        with pytest.raises(error, match="targets"):
            rule.step(x, wrong, index)
        after = tensors(rule.state_dict())
        assert len(after) == len(before)
        assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))
