from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

from trimtab.domain import UDIM, inconsistency, perturb_domain, standardize
from trimtab.optim import SAM

DRAWS = torch.Generator().manual_seed(0)
X = torch.rand(6, 2, 5, 5, generator=DRAWS, dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def networks(batch_norm: bool = False) -> tuple[nn.Sequential, nn.Linear]:
    torch.manual_seed(1)
    norm = [nn.BatchNorm2d(3)] if batch_norm else []
    features = nn.Sequential(nn.Conv2d(2, 3, 3), *norm, nn.Tanh(), nn.Flatten())
    return features.double(), nn.Linear(27, 3).double()


def rule(lr: float = 0.1, *, batch_norm: bool = False, **options: object) -> UDIM:
    features, head = networks(batch_norm)
    base = torch.optim.SGD([*features.parameters(), *head.parameters()], lr=lr)
    return UDIM(features, head, base, **{"total_steps": 10, "warmup": 0.0, "zeta": 0.5, **options})  # type: ignore[arg-type]


def weights(held: UDIM) -> list[Tensor]:
    return [p.detach().clone() for part in (held.features, held.head) for p in part.parameters()]


def test_the_inconsistency_is_the_formula_from_autograd() -> None:
    features, head = networks()
    z, z2 = features(X).detach(), features(X.flip(3)).detach()

    def gradients(z: Tensor) -> list[Tensor]:
        def loss(weight: Tensor, bias: Tensor, z: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(z, weight, bias), y)

        return list(vmap(grad(loss, (0, 1)), (None, None, 0, 0))(head.weight, head.bias, z[:, None], Y[:, None]))

    spreads, others, size = [], [], 0.0
    for one, other in zip(gradients(z), gradients(z2), strict=True):
        spreads.append((one - one.mean(0)).square().mean(0).flatten())
        others.append((other - one.mean(0)).square().mean(0).flatten())
        size += float(other.detach().flatten(1).square().sum(1).mean()) / other[0].numel()
    v, v2 = torch.cat(spreads), torch.cat(others)
    middle = (v + v2) / 2
    wanted = 0.5 * ((v - middle).square().mean() + (v2 - middle).square().mean()) + size
    torch.testing.assert_close(inconsistency(z, z2, Y, head), wanted.detach(), check_dtype=False)


def test_of_a_batch_with_itself_only_the_size_is_left() -> None:
    features, head = networks()
    z = features(X)
    residual = head(z).softmax(1) - F.one_hot(Y, 3)
    size = (residual[:, :, None] * z[:, None]).square().mean() + residual.square().mean()
    torch.testing.assert_close(inconsistency(z, z, Y, head), size)


def test_style_mode_moves_the_style_alone_and_uphill() -> None:
    features, head = networks()
    params = [*features.parameters(), *head.parameters()]

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(head(features(x)), Y)

    def worst(x: Tensor, rho: float) -> float:
        value = loss(x)
        slope = torch.autograd.grad(value, params)
        return float(value + rho * torch.stack([g.square().sum() for g in slope]).sum().sqrt())

    for rho in (0.0, 0.5):
        moved = perturb_domain(loss, params, X, rho, 0.05)
        assert not moved.requires_grad
        assert not torch.allclose(moved, X, atol=1e-4)
        torch.testing.assert_close(standardize(moved, 0.0)[0], standardize(X, 0.0)[0], rtol=1e-5, atol=1e-7)
        assert worst(moved, rho) > worst(X, rho)
    assert all(p.grad is None for p in params)


def test_style_mode_is_the_formula() -> None:
    features, head = networks()

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(head(features(x)), Y)

    content, mean, std = standardize(X, 1e-5)
    style = [part.detach().requires_grad_() for part in (mean, std)]
    steps = torch.autograd.grad(loss(content * style[1] + style[0]), style)
    wanted = content * (std + 2.0 * steps[1]) + mean + 2.0 * steps[0]
    found = perturb_domain(loss, [*features.parameters(), *head.parameters()], X, 0.0, 2.0)
    torch.testing.assert_close(found, wanted.detach())


def test_pixel_mode_moves_each_sample_by_the_length_of_the_step() -> None:
    features, head = networks()
    params = [*features.parameters(), *head.parameters()]
    moved = perturb_domain(lambda x: F.cross_entropy(head(features(x)), Y), params, X, 0.05, 0.3, "pixel")
    torch.testing.assert_close((moved - X).flatten(1).norm(dim=1), torch.full((6,), 0.3, dtype=torch.float64))
    still = perturb_domain(lambda x: F.cross_entropy(head(features(x)), Y), params, X, 0.05, 0.0, "pixel")
    torch.testing.assert_close(still, X)


@pytest.mark.parametrize("options", [{"lam": 0.0}, {"warmup": 1.0}], ids=["no weight", "warm-up"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_switched_off_it_is_sam_bit_by_bit(options: dict[str, float], batch_norm: bool) -> None:
    held = rule(batch_norm=batch_norm, rho=0.1, **options)
    features, head = networks(batch_norm)
    plain = SAM(
        torch.optim.SGD([*features.parameters(), *head.parameters()], lr=0.1),
        rho=0.1,
        model=nn.ModuleList([features, head]),
    )

    def closure() -> Tensor:
        plain.zero_grad()
        loss = F.cross_entropy(head(features(X)), Y)
        loss.backward()
        return loss

    for _ in range(3):
        held.step(X, Y)
        plain.step(closure)
    for one, other in zip(
        [*held.features.state_dict().values(), *held.head.state_dict().values()],
        [*features.state_dict().values(), *head.state_dict().values()],
        strict=True,
    ):
        assert torch.equal(one, other)


def test_without_radius_and_weight_it_is_the_base_optimizer() -> None:
    held = rule(rho=0.0, lam=0.0)
    features, head = networks()
    plain = torch.optim.SGD([*features.parameters(), *head.parameters()], lr=0.1)
    for _ in range(3):
        held.step(X, Y)
        plain.zero_grad()
        F.cross_entropy(head(features(X)), Y).backward()
        plain.step()
    for one, other in zip(weights(held), [*features.parameters(), *head.parameters()], strict=True):
        assert torch.equal(one, other)


def test_a_step_is_sams_gradient_plus_that_of_the_penalty() -> None:
    held, probe = rule(rho=0.1, lam=3.0), rule(rho=0.1)
    params = [*probe.features.parameters(), *probe.head.parameters()]

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(probe.head(probe.features(x)), Y)

    first = torch.autograd.grad(loss(X), params)
    length = torch.stack([g.square().sum() for g in first]).sum().sqrt()
    moved = perturb_domain(loss, params, X, 0.1, 0.5)
    apart = inconsistency(probe.features(X), probe.features(moved), Y, probe.head)
    slopes = torch.autograd.grad(apart, params)
    home = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, g in zip(params, first, strict=True):
            p.add_(0.1 * g / length)
    sharp = torch.autograd.grad(loss(X), params)
    wanted = [p - 0.1 * (g + 3.0 * s) for p, g, s in zip(home, sharp, slopes, strict=True)]
    found = held.step(X, Y)
    torch.testing.assert_close(found["inconsistency"], apart.detach())
    torch.testing.assert_close(found["total"], found["loss"] + 3.0 * found["inconsistency"])
    for one, other in zip(weights(held), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_domains_are_summed_and_their_order_does_not_matter() -> None:
    one, other = rule(), rule()
    found = one.step(X, Y, sizes=[2, 4])
    again = other.step(torch.cat([X[2:], X[:2]]), torch.cat([Y[2:], Y[:2]]), sizes=[4, 2])
    torch.testing.assert_close(found["inconsistency"], again["inconsistency"])
    assert not torch.isclose(found["inconsistency"], rule().step(X, Y)["inconsistency"])


def test_running_statistics_see_the_batch_once() -> None:
    held = rule(batch_norm=True)
    alone = copy.deepcopy(held.features)
    held.step(X, Y)
    alone.train()(X)
    assert torch.equal(held.features[1].running_mean, alone[1].running_mean)
    assert int(held.features[1].num_batches_tracked) == 1


def test_predicting_leaves_the_modes_of_the_networks() -> None:
    held = rule(batch_norm=True)
    held.features.train()
    held.features[1].eval()
    held.head.eval()
    before = [part.training for part in (*held.features.modules(), held.head)]
    expected = held.head(copy.deepcopy(held.features).eval()(X))
    torch.testing.assert_close(held.predict(X), expected)
    assert [part.training for part in (*held.features.modules(), held.head)] == before


def test_bad_input_is_refused_and_changes_nothing() -> None:
    held = rule()
    before = weights(held)
    for call, error, words in (
        (lambda: held.step(X, Y.float()), TypeError, "targets"),
        (lambda: held.step(X, Y[:3]), ValueError, "targets"),
        (lambda: held.step(X[:, 0], Y), ValueError, "x must have shape"),
        (lambda: held.step(X, Y, sizes=[3, 2]), ValueError, "sizes"),
        (lambda: held.load_state_dict({}), ValueError, "state"),
        (lambda: rule(rho=-1.0), ValueError, "rho"),
        (lambda: rule(mode="noise"), ValueError, "mode"),
        (lambda: rule(warmup=1.5), ValueError, "warmup"),
    ):
        with pytest.raises(error, match=words):
            call()
    with pytest.raises(TypeError, match="head"):
        UDIM(nn.Flatten(), nn.Conv2d(1, 1, 1), torch.optim.SGD(held.features.parameters(), lr=0.1), 1)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(weights(held), before, strict=True))
    assert held.steps_done == 0
