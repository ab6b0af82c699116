from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.unlearning import (
    AdaptThenUnlearn,
    ElasticPenalty,
    RepulsionLoss,
    generator_fisher,
    gradient_penalty,
    parameter_distance,
    repulsion,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def critic(seed: int = 9) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))


X = drawn(6, 2)


def rule(rate: float = 0.1, **options: Any) -> AdaptThenUnlearn:
    networks = net(), critic()
    optimizers = [torch.optim.SGD(part.parameters(), lr=rate) for part in networks]
    return AdaptThenUnlearn(*networks, optimizers, 3, generator=torch.Generator().manual_seed(4), **options)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_the_distance_is_a_mean_over_tensors_of_means() -> None:
    model, others = net(), [net(1), net(2)]
    by_hand = [
        sum((p - q).square().mean() for p, q in zip(model.parameters(), other.parameters(), strict=True)) / 4
        for other in others
    ]
    torch.testing.assert_close(parameter_distance(model, others), (by_hand[0] + by_hand[1]) / 2)
    torch.testing.assert_close(parameter_distance(model, others, normalise=False), by_hand[0] + by_hand[1])
    assert parameter_distance(model, [copy.deepcopy(model)]) == 0
    one, twice = ([net(1)] * n for n in (1, 2))
    torch.testing.assert_close(
        parameter_distance(model, twice, normalise=False), 2 * parameter_distance(model, one, normalise=False)
    )
    torch.testing.assert_close(RepulsionLoss(others).distance(model), parameter_distance(model, others))


def test_its_gradient_goes_to_the_model_alone() -> None:
    model, other = net(), net(1)
    parameter_distance(model, [other]).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, 2 * (p - q).detach() / (4 * p.numel()))
        assert q.grad is None


def test_repulsions_at_and_off_the_adapted_weights() -> None:
    nought = torch.zeros((), requires_grad=True)
    assert repulsion(nought, "el2", alpha=70.0) == 70
    assert repulsion(nought, "nl2") == 0
    assert repulsion(nought, "il2").isfinite()
    at_reference = RepulsionLoss([net()], "el2")
    model = net()
    at_reference(model).backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.parameters())
    v = torch.linspace(0.1, 5, 20, requires_grad=True)
    for kind in ("il2", "nl2", "el2"):
        found = repulsion(v, kind, gamma=0.7)  # type: ignore[arg-type]
        assert (found.diff() < 0).all()
        (slope,) = torch.autograd.grad(found.sum(), v)
        expected = {"il2": -0.7 / v**2, "nl2": torch.full_like(v, -0.7), "el2": -70 * (-0.7 * v).exp()}[kind]
        torch.testing.assert_close(slope, expected)


def test_the_loss_holds_copies() -> None:
    adapted, model = net(1), net()
    loss = RepulsionLoss([adapted, net(2)], "il2")
    before = loss(model).item()
    for p in adapted.parameters():
        nn.init.zeros_(p)
    assert loss(model).item() == before
    assert not list(loss.parameters())
    again = RepulsionLoss([net(3), net(4)], "il2")
    again.load_state_dict(loss.state_dict())
    assert again(model).item() == before


def test_importance_is_the_mean_square_of_each_samples_gradient() -> None:
    synthesis, discriminator, z = net(), critic(), drawn(5, 3)
    found = generator_fisher(synthesis, discriminator, z)
    rows = []
    for sample in z:
        loss = F.softplus(-discriminator(synthesis(sample[None]))).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(synthesis.parameters()))]))
    torch.testing.assert_close(found, torch.stack(rows).square().mean(0))
    assert not found.requires_grad
    assert all(p.grad is None for p in (*synthesis.parameters(), *discriminator.parameters()))


def test_the_elastic_penalty_by_hand() -> None:
    start = net()
    importance = torch.arange(float(len(weights(start))))
    penalty = ElasticPenalty(start, importance, weight=3.0)
    assert penalty(start) == 0
    moved = net(1)
    torch.testing.assert_close(penalty(moved), 3 * (importance * (weights(moved) - weights(start)).square()).sum())
    penalty(moved).backward()
    assert moved[0].weight.grad is not None


def test_the_gradient_penalty_is_of_the_scores() -> None:
    x = drawn(4, 2)
    discriminator = critic()
    by_hand = torch.stack([torch.autograd.functional.jacobian(lambda s: discriminator(s).sum(), s) for s in x])
    torch.testing.assert_close(gradient_penalty(discriminator, x).detach(), by_hand.square().sum(1).mean())


@pytest.mark.parametrize("penalised", [False, True])
def test_a_step_by_hand(penalised: bool) -> None:
    penalty = RepulsionLoss([net(1)], "el2", gamma=2.0) if penalised else None
    made = rule(penalty=penalty, r1=5.0, r1_every=2)
    synthesis, discriminator, z = net(), critic(), drawn(2, 6, 3)
    loss_d = F.softplus(discriminator(synthesis(z[0]).detach())).mean() + F.softplus(-discriminator(X)).mean()
    total = loss_d + 2 * 5 / 2 * gradient_penalty(discriminator, X)
    gradients = torch.autograd.grad(total, list(discriminator.parameters()))
    with torch.no_grad():
        for p, g in zip(discriminator.parameters(), gradients, strict=True):
            p.sub_(0.1 * g)
    loss_g = F.softplus(-discriminator(synthesis(z[1]))).mean()
    extra = penalty(synthesis) if penalty is not None else torch.zeros(())
    gradients = torch.autograd.grad(loss_g + extra, list(synthesis.parameters()))
    found = made.step(X, z=z)
    torch.testing.assert_close(weights(made.discriminator), weights(discriminator))
    torch.testing.assert_close(
        weights(made.synthesis), weights(synthesis) - 0.1 * torch.cat([g.flatten() for g in gradients])
    )
    torch.testing.assert_close(found["discriminator"], loss_d.detach())
    torch.testing.assert_close(found["generator"], loss_g.detach())
    torch.testing.assert_close(found["penalty"], extra.detach())


def test_r1_comes_at_its_steps_alone() -> None:
    off, seldom = rule(r1=0.0), rule(r1=5.0, r1_every=3)
    z = drawn(2, 6, 3)
    seldom.steps_done = 1
    for _ in range(2):  # of the steps 1, 2 and 3, counted from 0, the last one has it
        off.step(X, z=z)
        seldom.step(X, z=z)
        assert torch.equal(weights(off.discriminator), weights(seldom.discriminator))
    off.step(X, z=z)
    seldom.step(X, z=z)
    assert not torch.equal(weights(off.discriminator), weights(seldom.discriminator))


@pytest.mark.parametrize("kind", ["il2", "nl2", "el2"])
def test_without_strength_it_is_plain_fine_tuning(kind: str) -> None:
    nothing = {"alpha": 0.0} if kind == "el2" else {"gamma": 0.0}
    plain, silent = rule(), rule(penalty=RepulsionLoss([net(1)], kind, **nothing))  # type: ignore[arg-type]
    for _ in range(3):
        plain.step(X)
        silent.step(X)
    torch.testing.assert_close(weights(plain.synthesis), weights(silent.synthesis), atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["il2", "nl2", "el2"])
def test_it_is_repelled(kind: str) -> None:
    with torch.no_grad():
        near = net()
        for p in near.parameters():
            p.add_(0.05)
    options = {"il2": {"gamma": 1e-3}, "nl2": {"gamma": 1.0}, "el2": {"gamma": 10.0, "alpha": 1.0}}[kind]
    loss = RepulsionLoss([near], kind, **options)  # type: ignore[arg-type]
    plain, repelled = rule(0.02), rule(0.02, penalty=loss)
    for _ in range(15):
        plain.step(X)
        repelled.step(X)
    assert loss.distance(repelled.synthesis) > loss.distance(plain.synthesis)
    assert math.isfinite(loss.distance(repelled.synthesis).item())


def test_it_resumes_bit_exactly() -> None:
    made, again = rule(r1_every=3), rule(r1_every=3)
    for _ in range(2):
        made.step(X)
    again.load_state_dict(copy.deepcopy(made.state_dict()))
    for _ in range(3):
        one, other = made.step(X), again.step(X)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="references"):
        parameter_distance(net(), [])
    with pytest.raises(ValueError, match=r"references.*weight"):
        parameter_distance(net(), [critic()])
    with pytest.raises(ValueError, match="references"):
        RepulsionLoss([net(), critic()])
    with pytest.raises(ValueError, match="model"):
        RepulsionLoss([net()])(critic())
    for name, options in {"kind": {"kind": "l2"}, "gamma": {"gamma": -1.0}, "alpha": {"alpha": -1.0}}.items():
        with pytest.raises(ValueError, match=name):
            RepulsionLoss([net()], **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="importance"):
        ElasticPenalty(net(), torch.ones(3))
    with pytest.raises(ValueError, match="z must"):
        rule().step(X, z=drawn(6, 3))
    with pytest.raises(ValueError, match="x must"):
        rule().step(X[:0])
    with pytest.raises(TypeError, match="x must"):
        rule().step(X.long())
    with pytest.raises(ValueError, match="r1_every"):
        rule(r1_every=0)
    with pytest.raises(ValueError, match="optimizers"):
        AdaptThenUnlearn(net(), critic(), [], 3)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_importance_that_would_repel_is_named(value: float) -> None:
    with pytest.raises(ValueError, match="importance must be finite and at least 0"):
        ElasticPenalty(nn.Linear(2, 1, bias=False), torch.tensor([1.0, value]))
