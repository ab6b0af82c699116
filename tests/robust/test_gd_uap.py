from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from trimtab.robust import GDUAP, feature_log_norm_loss, fooling_rate


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(bias: bool = True) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=bias),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, stride=2, padding=1, bias=bias),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 5, bias=bias),
        )


IMAGES = torch.rand(30, 1, 8, 8, generator=seeded(1))


def test_the_gradient_of_one_linear_layer_has_its_closed_form() -> None:
    layer = nn.Linear(6, 4, bias=False, dtype=torch.float64)
    x = torch.randn(3, 6, generator=seeded(), dtype=torch.float64, requires_grad=True)
    value = feature_log_norm_loss(layer, x, nn.Linear)
    out = layer(x).detach()
    assert value.item() == pytest.approx(-math.log(0.5 * out.square().sum().item()))
    (gradient,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(gradient, -2 * (out @ layer.weight.detach()) / out.square().sum())


def test_each_layer_has_a_logarithm_of_its_own_after_its_relu() -> None:
    net, x = network(), IMAGES[:3]
    expected = sum(-math.log(0.5 * a.square().sum().item()) for a in (net[:2](x), net[:4](x)))
    assert feature_log_norm_loss(net, x).item() == pytest.approx(expected, rel=1e-5)
    raw = nn.Sequential(net[0], nn.Tanh(), net[2], nn.Flatten())
    outputs = (raw[0](x), raw[:3](x))
    assert feature_log_norm_loss(raw, x).item() == pytest.approx(
        sum(-math.log(0.5 * a.square().sum().item()) for a in outputs), rel=1e-5
    )
    last = feature_log_norm_loss(net, x, (nn.Conv2d, nn.Linear))
    assert last.item() == pytest.approx(expected - math.log(0.5 * net(x).square().sum().item()), rel=1e-5)


def test_scaling_the_input_of_a_network_without_biases_adds_its_logarithm() -> None:
    net = network(bias=False).double()
    x = torch.randn(1, 1, 8, 8, generator=seeded(), dtype=torch.float64)
    small, large = feature_log_norm_loss(net, x), feature_log_norm_loss(net, 7.0 * x)
    assert large.item() == pytest.approx(small.item() - 2 * 2 * math.log(7.0))


def test_a_silent_layer_is_finite_and_hooks_are_gone_afterwards() -> None:
    net = network(bias=False)
    x = torch.zeros(1, 1, 8, 8, requires_grad=True)
    value = feature_log_norm_loss(net, x)
    (gradient,) = torch.autograd.grad(value, x)
    assert value.isfinite()
    assert gradient.isfinite().all()
    with pytest.raises(RuntimeError):
        feature_log_norm_loss(net, torch.zeros(1, 2, 8, 8))
    assert not any(module._forward_hooks for module in net.modules())


def test_fooling_rate_counts_changed_predictions() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    net[1].weight.data = torch.randn(5, 64, generator=seeded(2))
    assert fooling_rate(net, torch.zeros(1, 1, 8, 8), IMAGES) == 0.0
    delta = 0.2 * torch.randn(1, 1, 8, 8, generator=seeded())
    expected = (net(IMAGES).argmax(1) != net((IMAGES + delta).clamp(0, 1)).argmax(1)).float().mean().item()
    assert 0 < expected < 1
    for size in (7, 1024):
        assert fooling_rate(net, delta, IMAGES, batch_size=size) == pytest.approx(expected)
    net[-1].weight.data.zero_()
    assert fooling_rate(net, delta, IMAGES) == 0.0


def test_crafting_raises_the_activations_and_the_fooling_rate_over_noise() -> None:
    net = network()
    start = 0.3 * (2 * torch.rand(1, 1, 8, 8, generator=seeded()) - 1)
    found = GDUAP(net, 0.3, steps=150, lr=0.01).craft((1, 8, 8), start=start)
    before, after = (feature_log_norm_loss(net, delta) for delta in (start, found.delta))
    assert after < before - 1
    assert found.steps == 150
    assert math.isnan(found.fooling)
    assert found.delta.abs().mean() > 1.2 * start.abs().mean()


@pytest.mark.parametrize("prior", [None, "range", IMAGES])
def test_it_stays_in_the_ball_whatever_the_prior(prior: str | Tensor | None) -> None:
    found = GDUAP(network(), 0.1, prior=prior, lr=0.05, steps=12, batch_size=4).craft((1, 8, 8), generator=seeded())
    assert found.delta.shape == (1, 1, 8, 8)
    assert found.delta.abs().max() <= 0.1
    assert not found.delta.requires_grad


def test_a_saturated_perturbation_is_halved_when_no_more_saturates() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    net[0].weight.data.fill_(1.0)
    start = torch.full((1, 1, 8, 8), 0.1)
    found = [GDUAP(net, 0.1, steps=steps, lr=1e-3).craft((1, 8, 8), start=start) for steps in (1, 2)]
    assert found[0].saturation == 1.0
    torch.testing.assert_close(found[0].delta, start)  # it has just come to the edge
    torch.testing.assert_close(found[1].delta, start / 2)


def _rising(weight: float = 1.0) -> nn.Module:
    """A network whose activations grow with every pixel."""
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    net[0].weight.data.fill_(weight)
    return net


def test_a_step_of_the_default_length_is_a_hundredth_of_the_ball() -> None:
    start = torch.full((1, 1, 4, 4), 0.01)
    moved = GDUAP(_rising(), 0.2, steps=1).craft((1, 4, 4), start=start).delta
    torch.testing.assert_close(moved, start + 0.002)  # Adam's first step is as long as its learning rate


class _Part(nn.Module):
    """Looks at the first `count` pixels alone."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layer, self.count = nn.Conv1d(1, 1, 1, bias=False), count
        self.layer.weight.data.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[..., : self.count])


@pytest.mark.parametrize(("count", "halved"), [(6, True), (5, False)])
def test_more_than_half_must_be_saturated(count: int, halved: bool) -> None:
    start = torch.zeros(1, 1, 10)
    start[..., :count] = 0.1
    found = GDUAP(_Part(count), 0.1, lr=1e-3, steps=2, layers=nn.Conv1d).craft((1, 10), start=start)
    torch.testing.assert_close(found.delta, start / 2 if halved else start)


def test_it_is_not_halved_while_a_pixel_of_thousands_still_comes_to_the_edge() -> None:
    start = torch.full((1, 1, 5000), 0.1)
    start[..., :5] -= 1e-3 * torch.arange(1, 6) - 5e-4  # one more gets there in every step
    stopped = GDUAP(_Part(5000), 0.1, lr=1e-3, steps=5, layers=nn.Conv1d).craft((1, 5000), start=start)
    torch.testing.assert_close(stopped.delta, torch.full_like(start, 0.1))
    halved = GDUAP(_Part(5000), 0.1, lr=1e-3, steps=6, layers=nn.Conv1d).craft((1, 5000), start=start)
    torch.testing.assert_close(halved.delta, torch.full_like(start, 0.05))


def test_after_it_was_halved_it_is_checked_twice_as_soon() -> None:
    net = nn.Sequential(_rising(), nn.Flatten(), nn.Linear(16, 2))
    options = {"lr": 1e-3, "steps": 40, "check_every": 40}
    images, edge = torch.rand(4, 1, 4, 4, generator=seeded()), torch.full((1, 1, 4, 4), 0.1)
    far = GDUAP(net, 0.1, **options).craft((1, 4, 4), validation=images, start=edge / 100)
    assert [step for step, _ in far.history] == [40]
    near = GDUAP(net, 0.1, **options).craft((1, 4, 4), validation=images, start=edge)
    assert [step for step, _ in near.history] == [20, 40]


def test_images_of_the_range_prior_are_gaussian_within_the_bounds() -> None:
    seen: list[Tensor] = []

    def look(images: Tensor, generator: torch.Generator | None) -> Tensor:
        seen.append(images)
        return images

    options = {"prior": "range", "augment": look, "steps": 1, "batch_size": 400, "mean": 0.3}
    GDUAP(network(), 0.1, std=0.1, bounds=None, **options).craft((1, 8, 8), generator=seeded())
    GDUAP(network(), 0.1, std=0.5, **options).craft((1, 8, 8), generator=seeded())
    assert seen[0].mean().item() == pytest.approx(0.3, abs=0.005)
    assert seen[0].std().item() == pytest.approx(0.1, abs=0.003)
    assert (seen[1].min().item(), seen[1].max().item()) == (0.0, 1.0)


def test_the_best_of_all_checks_is_kept_and_patience_ends_it() -> None:
    net = network()
    attack = GDUAP(net, 0.3, steps=200, lr=0.03, check_every=10, patience=3)
    found = attack.craft((1, 8, 8), validation=IMAGES, generator=seeded())
    rates = [rate for _, rate in found.history]
    assert found.fooling == max(rates) == pytest.approx(fooling_rate(net, found.delta, IMAGES))
    best = rates.index(max(rates))
    assert found.steps == 200 or len(rates) == best + 4
    constant = network()
    constant[-1].weight.data.zero_()
    stopped = GDUAP(constant, 0.3, steps=200, lr=1e-4, check_every=10, patience=3).craft(
        (1, 8, 8), validation=IMAGES, generator=seeded()
    )
    assert (stopped.steps, stopped.fooling) == (40, 0.0)


def test_without_images_the_background_is_what_it_is_added_to() -> None:
    net = network()
    start = 0.1 * torch.ones(1, 1, 8, 8)
    moved = GDUAP(net, 0.1, background=0.5, steps=1, lr=0.01).craft((1, 8, 8), start=start * 0.5).delta
    x = (0.5 + 0.5 * start).requires_grad_()
    (gradient,) = torch.autograd.grad(feature_log_norm_loss(net, x), x)
    torch.testing.assert_close(moved, 0.5 * start - 0.01 * gradient.sign(), atol=1e-5, rtol=0)


def test_prior_images_are_changed_by_what_is_asked_to() -> None:
    seen = []

    def flip(x: Tensor, generator: torch.Generator | None) -> Tensor:
        seen.append(x.shape)
        return x.flip(3)

    options = {"steps": 3, "batch_size": 6}
    plain = GDUAP(network(), 0.1, prior=IMAGES, **options).craft((1, 8, 8), generator=seeded())
    flipped = GDUAP(network(), 0.1, prior=IMAGES.flip(3), augment=flip, **options).craft((1, 8, 8), generator=seeded())
    torch.testing.assert_close(flipped.delta, plain.delta)
    assert seen == [(6, 1, 8, 8)] * 3


def test_the_model_is_left_as_it_was() -> None:
    net = nn.Sequential(network(), nn.BatchNorm1d(5), nn.Dropout()).train()
    before = copy.deepcopy(net.state_dict())
    GDUAP(net, 0.1, steps=3, check_every=1).craft((1, 8, 8), validation=IMAGES, generator=seeded())
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert all(module.training for module in net.modules())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


def test_bad_arguments_are_refused_by_name() -> None:
    net = network()
    for options, name in (
        ({"xi": 0.0}, "xi"),
        ({"lr": -1.0}, "lr"),
        ({"steps": 0}, "steps"),
        ({"prior": "data"}, "prior"),
        ({"prior": IMAGES[:0]}, "prior"),
        ({"layers": nn.Conv1d}, "layers"),
        ({"patience": 0}, "patience"),
    ):
        with pytest.raises(ValueError, match=name):
            GDUAP(net, **{"xi": 0.1, **options})
    with pytest.raises(TypeError, match="prior"):
        GDUAP(net, 0.1, prior=7)  # type: ignore[arg-type]
    for shapes, name in (({"validation": IMAGES[:, :, 1:]}, "validation"), ({"start": IMAGES[:1, :, 1:]}, "start")):
        with pytest.raises(ValueError, match=name):
            GDUAP(net, 0.1).craft((1, 8, 8), **shapes)
    for options, name in (
        ({"validation": IMAGES[:0]}, "validation"),
        ({"start": torch.full((1, 1, 8, 8), torch.nan)}, "start"),
        ({"start": torch.zeros(2, 1, 8, 8)}, "start"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must"):
            GDUAP(net, 0.1).craft((1, 8, 8), **options)
    with pytest.raises(ValueError, match="^model must"):
        GDUAP(nn.ReLU(), 0.1, layers=nn.ReLU).craft((1, 8, 8))
    with pytest.raises(ValueError, match="^model must give logits, got NaN"):
        fooling_rate(lambda x: x.flatten(1) * torch.nan, torch.zeros_like(IMAGES[:1]), IMAGES)
    with pytest.raises(ValueError, match="delta must be"):
        fooling_rate(net, IMAGES[:1], IMAGES[:0])
    with pytest.raises(TypeError, match="x must be floating point"):
        feature_log_norm_loss(net, IMAGES.long())
