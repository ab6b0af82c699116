"""The training loss has the exact denoiser as its minimum, for every kind of prediction; levels and labels."""

import pytest
import torch

from trimtab.diffusion import (
    AnalyticGMM,
    Denoiser,
    EDMPreconditioned,
    VPLinear,
    denoising_loss,
    drop_labels,
    lognormal_levels,
)
from trimtab.diffusion.prediction import PREDICTIONS, convert, target
from trimtab.nets import DenoisingMLP

SCHEDULE = VPLinear()
RING = AnalyticGMM.ring(dtype=torch.float64)


def draws(count: int = 4000):
    generator = torch.Generator().manual_seed(0)
    x0 = RING.sample(count, generator=generator)
    noise = torch.randn(count, 2, dtype=torch.float64, generator=generator)
    return x0, 0.05 + 0.9 * torch.rand(count, dtype=torch.float64, generator=generator), noise


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_exact_denoiser_is_the_minimum(kind):
    x0, t, noise = draws()
    exact = RING.denoiser(SCHEDULE, kind)
    best = denoising_loss(exact, x0, t, noise)
    for factor in (0.9, 1.1):
        scaled = Denoiser(lambda x, t, factor=factor: factor * exact(x, t), SCHEDULE, kind)
        assert denoising_loss(scaled, x0, t, noise) > best


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_targets_are_what_conversion_says(kind):
    x0, t, noise = draws(16)
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    x = SCHEDULE.add_noise(x0, noise, t)
    torch.testing.assert_close(target(x0, noise, alpha, sigma, kind), convert(x0, x, alpha, sigma, "x0", kind))
    # A denoiser that knows the answer has no loss.
    knows = Denoiser(lambda x, t: convert(x0, x, SCHEDULE.alpha(t), SCHEDULE.sigma(t), "x0", kind), SCHEDULE, kind)
    assert denoising_loss(knows, x0, t, noise) < 1e-20


def test_weights_are_per_sample_and_means_are_means():
    x0, t, noise = draws(6)
    zero = Denoiser(lambda x, t: torch.zeros_like(x), SCHEDULE, "eps")
    each = noise.square().mean(1)
    torch.testing.assert_close(denoising_loss(zero, x0, t, noise), each.mean())
    weight = torch.arange(6).double()
    torch.testing.assert_close(denoising_loss(zero, x0, t, noise, weight=weight), (weight * each).mean())


def test_a_condition_reaches_the_model_and_the_network_learns():
    torch.manual_seed(0)
    denoiser = EDMPreconditioned(DenoisingMLP(2, num_classes=8, hidden=32, blocks=1), 0.7)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    ring, generator = RING.to(torch.float32), torch.Generator().manual_seed(0)
    found = []
    for _ in range(300):
        labels = torch.randint(8, (128,), generator=generator)
        x0, noise = ring.sample(128, cond=labels, generator=generator), torch.randn(128, 2, generator=generator)
        t = lognormal_levels(128, generator=generator)
        labels = drop_labels(labels, 8, 0.1, generator=generator)
        loss = denoising_loss(denoiser, x0, t, noise, labels, weight=denoiser.weight(t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert sum(found[-20:]) < 0.6 * sum(found[:20])


def test_levels_are_lognormal():
    found = lognormal_levels(50_000, -0.5, 2.0, generator=torch.Generator().manual_seed(0)).log()
    assert found.mean().item() == pytest.approx(-0.5, abs=0.03)
    assert found.std().item() == pytest.approx(2.0, abs=0.03)


def test_labels_are_dropped_in_their_share():
    labels = torch.arange(10).repeat(1000)
    found = drop_labels(labels, 10, 0.1, generator=torch.Generator().manual_seed(0))
    assert (found == 10).double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(found[found < 10], labels[found < 10])
    assert torch.equal(drop_labels(labels, 10, 0.0), labels)


def test_bad_input():
    x0, t, noise = draws(4)
    denoiser = RING.denoiser(SCHEDULE)
    with pytest.raises(ValueError, match="noise must be of shape"):
        denoising_loss(denoiser, x0, t, noise[:2])
    with pytest.raises(ValueError, match="t must have shape"):
        denoising_loss(denoiser, x0, t[:2], noise)
    with pytest.raises(ValueError, match="weight must have shape"):
        denoising_loss(denoiser, x0, t, noise, weight=torch.ones(4, 1))
    with pytest.raises(ValueError, match="kind must be one of"):
        target(x0, noise, 1.0, 1.0, "velocity")
    with pytest.raises(ValueError, match="std must be positive"):
        lognormal_levels(3, std=0.0)
    with pytest.raises(ValueError, match="share must be in"):
        drop_labels(torch.zeros(3, dtype=torch.int64), 10, 1.5)


def test_a_null_class_that_is_none_is_refused() -> None:
    """A class of 8.5 would be cut to 8."""
    with pytest.raises(TypeError, match=r"null must be an integer, got 8\.5"):
        drop_labels(torch.arange(3), null=8.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="labels must be integers"):
        drop_labels(torch.rand(3), null=8)


def test_truth_values_are_no_labels():
    with pytest.raises(TypeError, match="labels must be integers, got torch.bool"):
        drop_labels(torch.tensor([True, False]), null=10)
