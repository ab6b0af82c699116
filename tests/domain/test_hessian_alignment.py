from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.func import hessian as exact_hessian

from trimtab.domain import (
    HGPPenalty,
    HutchinsonPenalty,
    head_hessian,
    hessian_distance,
    hessian_gradient_product,
    hutchinson_diagonal,
)

PENALTIES = [HGPPenalty(1.0, 1.0), HutchinsonPenalty(1.0, 1.0, probes=8)]


class Small(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def domains(count: int = 3, batch: int = 7) -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(3)
    return [
        (
            (1 + d) * torch.randn(batch, 5, generator=draws, dtype=torch.float64),
            torch.randint(3, (batch,), generator=draws),
        )
        for d in range(count)
    ]


def losses(model: nn.Module, batch: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [F.cross_entropy(model(x), y) for x, y in batch]


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    return Small().double()


def exact(model: Small, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of the head, weight before bias."""
    z = model.features(x).detach()

    def loss(flat: Tensor) -> Tensor:
        held = {"weight": flat[:12].view(3, 4), "bias": flat[12:]}
        return F.cross_entropy(functional_call(model.head, held, (z,)), y)

    flat = torch.cat([model.head.weight.flatten(), model.head.bias]).detach()
    return torch.func.grad(loss)(flat), exact_hessian(loss)(flat)


def test_the_product_is_the_hessian_times_the_gradient(model: Small) -> None:
    (x, y), *_ = domains()
    gradient, hessian = exact(model, x, y)
    found = hessian_gradient_product(losses(model, [(x, y)])[0], list(model.head.parameters()))
    torch.testing.assert_close(torch.cat([f.flatten() for f in found]), hessian @ gradient, rtol=1e-8, atol=1e-10)


def test_hutchinson_is_exact_where_the_hessian_is_diagonal() -> None:
    x = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    found = hutchinson_diagonal((x**4).sum(), [x], probes=1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, 12 * x.detach() ** 2)


def test_hutchinson_is_zero_where_the_loss_is_linear_in_a_parameter() -> None:
    x, scalar, linear = torch.tensor([1.0, 2.0]), torch.tensor(3.0), torch.ones(2, 2)
    params = [p.requires_grad_() for p in (x, scalar, linear)]
    found = hutchinson_diagonal((x**3).sum() + scalar**2 + linear.sum(), params, probes=3)
    torch.testing.assert_close(found, torch.tensor([6.0, 12.0, 2.0, 0.0, 0.0, 0.0, 0.0]))


def test_hutchinson_is_unbiased(model: Small) -> None:
    (x, y), *_ = domains()
    _, hessian = exact(model, x, y)
    loss = losses(model, [(x, y)])[0]
    draws = torch.Generator().manual_seed(0)
    found = hutchinson_diagonal(loss, list(model.head.parameters()), probes=4000, generator=draws)
    assert (found - hessian.diagonal()).norm() < 0.03 * hessian.diagonal().norm()


def test_all_sign_vectors_give_the_diagonal_exactly(model: Small) -> None:
    (x, y), *_ = domains()
    _, hessian = exact(model, x, y)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).double()  # of the bias alone
    found = hutchinson_diagonal(losses(model, [(x, y)])[0], [model.head.bias], signs=signs)
    torch.testing.assert_close(found, hessian.diagonal()[12:])


@pytest.mark.parametrize("detach_mean", [True, False])
def test_the_penalty_is_the_formula(model: Small, detach_mean: bool) -> None:
    batch = domains()
    parts = [exact(model, x, y) for x, y in batch]
    slopes = torch.stack([g for g, _ in parts])
    mean_hessian = torch.stack([h for _, h in parts]).mean(0)
    products = torch.stack([h @ g for g, h in parts])
    wanted = 0.3 * (products - mean_hessian @ slopes.mean(0)).square().sum(1).mean()
    wanted = wanted + 0.7 * (slopes - slopes.mean(0)).square().sum(1).mean()
    found = HGPPenalty(0.3, 0.7, detach_mean=detach_mean)(losses(model, batch), model.head)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-10)


def test_hutchinsons_penalty_is_the_formula(model: Small) -> None:
    batch = domains()
    parts = [exact(model, x, y) for x, y in batch]
    diagonals = torch.stack([h.diagonal() for _, h in parts])
    slopes = torch.stack([g for g, _ in parts])
    wanted = 0.3 * (diagonals - diagonals.mean(0)).square().sum(1).mean()
    wanted = wanted + 0.7 * (slopes - slopes.mean(0)).square().sum(1).mean()
    penalty = HutchinsonPenalty(0.3, 0.7, probes=6000, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(penalty(losses(model, batch), model.head), wanted, rtol=0.05, atol=0)


def test_the_mean_is_a_constant_unless_asked_for(model: Small) -> None:
    """With the mean held, the gradient is that of distances from fixed points."""
    batch = domains(2)
    features = list(model.features.parameters())

    def gradients(penalty: HGPPenalty) -> Tensor:
        found = torch.autograd.grad(penalty(losses(model, batch), model.head), features)
        return torch.cat([f.flatten() for f in found])

    def by_hand(detach: bool) -> Tensor:
        slopes = []
        for loss in losses(model, batch):
            parts = torch.autograd.grad(loss, list(model.head.parameters()), create_graph=True)
            slopes.append(torch.cat([g.flatten() for g in parts]))
        mean = torch.stack(slopes).mean(0)
        mean = mean.detach() if detach else mean
        value = torch.stack([(s - mean).square().sum() for s in slopes]).mean()
        return torch.cat([f.flatten() for f in torch.autograd.grad(value, features)])

    for detach in (True, False):
        torch.testing.assert_close(gradients(HGPPenalty(0.0, 1.0, detach_mean=detach)), by_hand(detach))


def test_the_curvatures_mean_is_a_constant(model: Small) -> None:
    batch = domains(2)
    features = list(model.features.parameters())
    found = torch.autograd.grad(HGPPenalty(1.0, 0.0)(losses(model, batch), model.head), features)
    params = list(model.head.parameters())
    products, slopes = [], []
    for loss in losses(model, batch):
        products.append(torch.cat([h.flatten() for h in hessian_gradient_product(loss, params)]))
        slopes.append(loss)
    mean = hessian_gradient_product(torch.stack(slopes).mean(), params)
    held = torch.cat([m.flatten() for m in mean]).detach()
    value = torch.stack([(p - held).square().sum() for p in products]).mean()
    for one, other in zip(found, torch.autograd.grad(value, features), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda p: type(p).__name__)
def test_one_domain_or_equal_domains_cost_nothing(model: Small, penalty: HGPPenalty) -> None:
    (first, *_) = domains()
    for batch in ([first], [first, first]):
        assert penalty(losses(model, batch), model.head).item() == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda p: type(p).__name__)
def test_the_features_learn_from_it(model: Small, penalty: HGPPenalty) -> None:
    penalty(losses(model, domains()), model.head).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_without_alpha_gradients_alone_are_matched(model: Small) -> None:
    batch = domains()
    one = HGPPenalty(0.0, 0.7)(losses(model, batch), model.head)
    other = HutchinsonPenalty(0.0, 0.7)(losses(model, batch), model.head)
    assert torch.equal(one, other)
    assert HGPPenalty(0.0, 0.0)(losses(model, batch), model.head).item() == 0


def test_flat_losses_give_no_nan(model: Small) -> None:
    nn.init.zeros_(model.head.weight)
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([1e4, 0, 0]))
    batch = [(x, torch.zeros(len(x), dtype=torch.int64)) for x, _ in domains()]  # every slope is exactly 0
    value = HGPPenalty(1.0, 1.0)(losses(model, batch), model.head)
    value.backward()
    assert value.item() == 0
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_binary_heads_of_one_logit_work() -> None:
    torch.manual_seed(0)
    model = Small(1).double()
    found = [F.binary_cross_entropy_with_logits(model(x)[:, 0], (y > 0).double()) for x, y in domains()]
    assert HGPPenalty(1.0, 1.0)(found, model.head) > 0


def test_the_distance_is_the_spectral_norm(model: Small) -> None:
    (x, y), (x2, y2), *_ = domains()
    hessians = [exact(model, *pair)[1] for pair in ((x, y), (x2, y2))]
    wanted = torch.linalg.matrix_norm(hessians[0] - hessians[1], ord=2)
    z, z2 = model.features(x), model.features(x2)
    torch.testing.assert_close(hessian_distance(z, model.head(z), z2, model.head(z2)), wanted)
    torch.testing.assert_close(hessian_distance(z2, model.head(z2), z, model.head(z)), wanted)
    assert head_hessian(z, model.head(z)).shape == (15, 15)


def test_bad_input_is_refused_by_name(model: Small) -> None:
    batch = losses(model, domains())
    penalty = HGPPenalty()
    for wrong in ([], [torch.ones(2, requires_grad=True)], [torch.tensor(1.0)]):
        with pytest.raises(ValueError, match="losses"):
            penalty(wrong, model.head)
    with pytest.raises(ValueError, match="head"):
        penalty(batch, model.head.requires_grad_(False))
    for options in ({"alpha": -1.0}, {"beta": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            HGPPenalty(**options)
    with pytest.raises(ValueError, match="probes"):
        HutchinsonPenalty(probes=0)
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="signs"):
        hutchinson_diagonal(x.sum(), [x], signs=torch.ones(1, 3))
    with pytest.raises(ValueError, match="other_features"):
        hessian_distance(torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(2, 4), torch.zeros(2, 2))
