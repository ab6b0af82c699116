"""Bias-free networks, shrinkage bases, Stein's estimate, the sampler and C-alpha images, against what is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trimtab.diffusion import AnalyticGMM
from trimtab.diffusion.harmonic_bases import (
    BiasFreeNorm,
    BiasFreeUNet,
    best_shrinkage,
    c_alpha_images,
    denoiser_eigenbasis,
    memory_or_knowledge,
    sure,
    universal_sampler,
)
from trimtab.diffusion.jacobian import denoiser_jacobian


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(depth: int = 2) -> BiasFreeUNet:
    """A network whose layers and running deviations are not those of the start."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = BiasFreeUNet(base=4, depth=depth)
        torch.nn.init.normal_(net.last.weight, std=0.1)
        for _ in range(5):
            net(torch.rand(8, 1, 8, 8))
    return net.double().eval()


COV = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, -0.2], [0.0, -0.2, 0.3]], dtype=torch.float64)
GAUSSIAN = AnalyticGMM(torch.ones(1).double(), torch.zeros(1, 3).double(), COV[None])


def wiener(sigma: float) -> Tensor:
    return COV @ torch.linalg.inv(COV + sigma**2 * torch.eye(3).double())


# The network


def test_defaults_are_the_authors_network() -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in BiasFreeUNet().parameters())
    assert count == pytest.approx(7.6e6, rel=0.01)


def test_nothing_is_added_anywhere() -> None:
    assert not [name for name, _ in trained().named_parameters() if "bias" in name]
    assert torch.equal(trained()(torch.zeros(1, 1, 8, 8).double()), torch.zeros(1, 1, 8, 8).double())


@pytest.mark.parametrize("factor", [0.01, 3.0])
def test_it_scales_with_the_image_and_is_its_own_jacobian(factor: float) -> None:
    net, y = trained(), torch.rand(1, 1, 8, 8, dtype=torch.float64, generator=generator())
    torch.testing.assert_close(net(factor * y), factor * net(y))
    applied = denoiser_jacobian(net, y) @ y.flatten()
    torch.testing.assert_close(applied, net(y).detach().flatten())


def test_images_do_not_mix_in_evaluation_and_it_starts_as_the_identity() -> None:
    net, y = trained(), torch.rand(3, 1, 8, 16, dtype=torch.float64, generator=generator())
    torch.testing.assert_close(net(y)[1:2], net(y[1:2]))
    fresh = BiasFreeUNet(channels=3, base=4, depth=1)
    images = torch.rand(2, 3, 6, 4)
    assert torch.equal(fresh(images), images)


def test_the_norm_divides_by_the_deviation_and_keeps_the_mean() -> None:
    norm = BiasFreeNorm(2)
    x = 3 + 2 * torch.randn(500, 2, 4, 4, generator=generator())
    out = norm(x)
    torch.testing.assert_close(out.std((0, 2, 3), correction=0), torch.ones(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.mean((0, 2, 3)), x.mean((0, 2, 3)) / x.std((0, 2, 3)), atol=1e-3, rtol=0)
    torch.testing.assert_close(norm.running_std, 0.9 + 0.1 * x.std((0, 2, 3), correction=0), atol=1e-4, rtol=0)
    copied = BiasFreeNorm(2).eval()
    copied.load_state_dict(norm.state_dict())
    assert torch.equal(copied(x), norm.eval()(x))


def test_a_refused_image_changes_nothing() -> None:
    net = BiasFreeUNet(base=4, depth=2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match="sides divisible by 4"):
        net(torch.zeros(1, 1, 8, 10))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# The basis


def test_for_gaussian_images_the_basis_is_that_of_the_covariance() -> None:
    sigma = 0.5
    values, axes = torch.linalg.eigh(COV)
    found = denoiser_eigenbasis(lambda y: GAUSSIAN.posterior_mean(y, 1.0, sigma), torch.randn(1, 3).double())
    torch.testing.assert_close(found.values, (values / (values + sigma**2)).flip(0))
    torch.testing.assert_close((found.vectors * axes.T.flip(0)).sum(1).abs(), torch.ones(3).double())
    assert found.asymmetry < 1e-6


def test_white_images_are_shrunk_by_one_factor() -> None:
    found = denoiser_eigenbasis(lambda y: 2 / (2 + 0.25) * y, torch.randn(1, 1, 4, 4).double())
    torch.testing.assert_close(found.values, torch.full((16,), 2 / 2.25).double())
    assert found.vectors.shape == (16, 1, 4, 4)


def test_asymmetry_is_that_of_the_matrix() -> None:
    A = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    found = denoiser_eigenbasis(lambda y: y @ A.T, torch.zeros(1, 2), k=1)
    assert found.asymmetry == pytest.approx(math.sqrt(8 / 6))
    torch.testing.assert_close(found.values, torch.tensor([2.0]))  # of [[1, 1], [1, 1]]


def test_the_best_factors_have_the_least_error() -> None:
    x, sigma = torch.randn(5, dtype=torch.float64, generator=generator()), 0.7
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=generator(1))).Q
    coords = basis @ x

    def error(factors: Tensor) -> float:
        """Bias and variance of shrinking noisy coordinates."""
        return float(((1 - factors) ** 2 * coords**2 + factors**2 * sigma**2).sum())

    best = best_shrinkage(x, basis, sigma)
    assert error(best) == pytest.approx(sigma**2 * float(best.sum()))
    for k in range(5):
        for change in (-1e-3, 1e-3):
            other = best.clone()
            other[k] += change
            assert error(other) > error(best)


# Stein's estimate


def test_the_estimate_averages_to_the_error() -> None:
    """Of a linear denoiser, over noise in closed form: twice the same expression."""
    sigma, W = 0.6, wiener(0.9)  # not the best one for this noise
    x = torch.randn(3, dtype=torch.float64, generator=generator())
    axes = math.sqrt(3) * torch.cat([torch.eye(3), -torch.eye(3)]).double()  # exact for quadratics
    y = x + sigma * axes
    # The trace of the Jacobian with signs that average to it exactly.
    signs = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)], dtype=torch.float64)
    estimates = [sure(lambda y: y @ W.T, y, sigma, signs=s.expand_as(y)).mean() for s in signs]
    error = (y @ W.T - x).square().sum(1).mean()
    torch.testing.assert_close(torch.stack(estimates).mean(), error)


def test_the_estimate_of_the_exact_denoiser_of_a_mixture() -> None:
    ring = AnalyticGMM.ring(dtype=torch.float64)
    x = ring.sample(20_000, generator=generator())
    y = x + 0.4 * torch.randn(x.shape, dtype=torch.float64, generator=generator(1))
    denoise = lambda y: ring.posterior_mean(y, 1.0, 0.4)
    estimate = sure(denoise, y, 0.4, generator=generator(2)).mean()
    torch.testing.assert_close(estimate, (denoise(y) - x).square().sum(1).mean(), rtol=0.05, atol=0)


# The sampler


def test_the_sampler_draws_from_a_gaussian() -> None:
    """With a denoiser that knows the noise from the residual, as blind networks do, for one dimension of signal."""
    count = 100

    def denoise(y: Tensor) -> Tensor:
        # Data are constant images of standard normal value; the rest of y is noise.
        return y.mean(1, keepdim=True).expand_as(y)

    start = torch.randn(400, count, dtype=torch.float64, generator=generator())
    made = universal_sampler(denoise, start, step=0.05, beta=0.5, sigma_end=0.02, generator=generator(1))
    torch.testing.assert_close(made.images, made.images.mean(1, keepdim=True).expand_as(made.images))
    assert (made.sigmas[-1] <= 0.02).all()
    assert (made.sigmas[0] > 0.8).all()


def test_without_noise_it_goes_straight() -> None:
    start = torch.randn(3, 4, generator=generator())
    made = universal_sampler(torch.zeros_like, start, step=0.1, beta=1.0, sigma_end=1e-3)
    # y_{t+1} = (1 - h_t) y_t, h_t = 0.1 t / (1 + 0.1 (t - 1)), so that the product is 0.9 * 0.9 / 1.1 * ...
    expected = start.norm(dim=1) / 2
    for t in range(1, 4):
        torch.testing.assert_close(made.sigmas[t - 1], expected)
        expected = expected * (1 - 0.1 * t / (1 + 0.1 * (t - 1)))


def test_samples_are_independent_and_reproducible() -> None:
    start = torch.randn(3, 6, generator=generator())
    runs = [universal_sampler(torch.tanh, start, step=0.2, generator=generator(1), max_steps=20) for _ in range(2)]
    assert torch.equal(runs[0].images, runs[1].images)
    still = [
        universal_sampler(torch.tanh, part, step=0.2, beta=1.0, max_steps=20).images for part in (start, start[:1])
    ]
    torch.testing.assert_close(still[0][:1], still[1])
    with pytest.raises(ValueError, match="beta must be in"):
        universal_sampler(torch.tanh, start, beta=0.0)


# Memory


def test_memory_and_knowledge() -> None:
    train = torch.randn(2, 20, 5, 5, generator=generator())
    remembered = memory_or_knowledge((train[0, :8], train[1, :8]), (train[0], train[1]))
    assert remembered.memory == pytest.approx(1.0)
    assert not remembered.generalises
    new = torch.randn(8, 5, 5, generator=generator(1))
    known = memory_or_knowledge((new, new), (train[0], train[1]))
    assert known.agreement == pytest.approx(1.0)
    assert known.memory < 0.9
    assert known.generalises
    with pytest.raises(ValueError, match=r"samples\[1\] must be of shape"):
        memory_or_knowledge((new, new[:3]), (train[0], train[1]))


# Images


def test_images_are_the_more_regular_the_larger_alpha() -> None:
    found = []
    for alpha in (1.0, 2.0, 4.0):
        images = c_alpha_images(50, 32, alpha, generator=generator())
        assert images.shape == (50, 1, 32, 32)
        assert 0 <= images.min() <= images.max() <= 1
        # Second differences within regions; the contour is what is left out with the largest ones.
        bends = images.diff(dim=-1).diff(dim=-1).abs().flatten(1)
        found.append(float(bends.quantile(0.5)))
    assert found[0] > 2 * found[1] > 4 * found[2]


def test_images_have_two_regions_and_come_from_the_generator() -> None:
    images = [c_alpha_images(20, 16, 3.0, generator=generator(s)) for s in (0, 0, 1)]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    # Going down the columns of an image there is one jump, far larger than the usual change.
    steps = images[0][:, 0].diff(dim=1).abs().flatten(1)
    assert (steps.amax(1) / steps.median(1).values).median() > 5
    # The columns are alike, as the contour is regular: it moves by a pixel or two from one to the next.
    places = images[0][:, 0].diff(dim=1).abs().argmax(1)
    assert places.diff(dim=1).abs().double().median() <= 2


def test_the_contour_is_noise_whose_waves_are_divided_by_that_power_of_their_frequency() -> None:
    size, count = 32, 200
    images = c_alpha_images(count, size, 2.0, generator=generator(3))[:, 0].double()
    jumps = images.diff(dim=1).abs().argmax(1) + 1
    white = 2 * torch.rand(count, size, generator=generator(3), dtype=torch.float64) - 1
    place = torch.arange(size, dtype=torch.float64)
    found = {}
    for alpha in (1.0, 1.5, 2.0, 2.5):
        contour = white.mean(1, keepdim=True)
        for wave in range(1, size // 2 + 1):  # term by term, every frequency twice but for the mean and the highest
            angle = 2 * torch.pi * wave * (place[:, None] - place) / size
            contour = contour + (2 if wave < size // 2 else 1) * wave**-alpha * white @ angle.cos() / size
        found[alpha] = float((jumps == (size * contour + size / 2).round()).double().mean())
    assert max(found, key=found.__getitem__) == 2.0
    assert found[2.0] > 0.35


def test_either_region_may_be_the_dark_one_and_their_values_reach_the_ends() -> None:
    images = c_alpha_images(200, 16, 3.0, generator=generator(1))
    darker_above = images[:, :, :4].mean((1, 2, 3)) < images[:, :, -4:].mean((1, 2, 3))
    assert 0.3 < darker_above.double().mean() < 0.7
    # A region's lightest or darkest place is shown in about half of the images.
    assert (images.amax((1, 2, 3)) > 0.99).double().mean() > 0.25
    assert (images.amin((1, 2, 3)) < 0.01).double().mean() > 0.25


@pytest.mark.parametrize(
    ("arguments", "message"), [((0, 16, 1.0), "count"), ((1, 3, 1.0), "size"), ((1, 16, 0.0), "alpha")]
)
def test_bad_arguments_of_images(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} must be"):
        c_alpha_images(*arguments)


def test_an_empty_batch_leaves_the_running_deviation() -> None:
    norm = BiasFreeNorm(2)
    with pytest.raises(ValueError, match="x must have shape"):
        norm(torch.zeros(0, 2, 4, 4))
    assert torch.equal(norm.running_std, torch.ones(2))


def test_the_estimate_is_there_in_inference_mode() -> None:
    y = torch.randn(2, 3, generator=generator()).double()
    with torch.inference_mode():
        found = sure(lambda y: y.tanh(), y.clone(), 0.5, generator=generator())
    assert torch.equal(found.clone(), sure(lambda y: y.tanh(), y, 0.5, generator=generator()))
