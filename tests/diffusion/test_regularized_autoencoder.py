"""Auto-encoders and the score: optima in closed form, exact energies of mixtures, chains that keep a distribution."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from trimtab.diffusion import AnalyticGMM
from trimtab.diffusion.regularized_autoencoder import (
    DenoisingAutoencoderLoss,
    ReconstructionContractiveLoss,
    dae_metropolis,
    energy_difference,
    metropolis,
    score_from_reconstruction,
)

SIGMA = 0.4
MEAN = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
COV = torch.tensor([[1.0, 0.3, 0.0], [0.3, 0.5, -0.1], [0.0, -0.1, 0.2]], dtype=torch.float64)
RING = AnalyticGMM.ring(5, std=0.2, dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian_samples(count: int = 20) -> Tensor:
    """Samples with exactly this mean and covariance."""
    z = torch.randn(count, 3, dtype=torch.float64, generator=generator())
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / count)).T
    return MEAN + z @ torch.linalg.cholesky(COV).T


def with_all_noise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every sample with noise of ±sqrt(3) on each axis in turn: exact for the expectation of a quadratic."""
    axes = math.sqrt(3) * torch.cat([torch.eye(3), -torch.eye(3)]).double()
    return x.repeat_interleave(6, 0), axes.repeat(len(x), 1)


class Affine(torch.nn.Module):
    def __init__(self, A: Tensor, b: Tensor) -> None:
        super().__init__()
        self.A, self.b = torch.nn.Parameter(A.clone()), torch.nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.A.T + self.b


def optimum() -> Affine:
    shrink = COV @ torch.linalg.inv(COV + SIGMA**2 * torch.eye(3).double())
    return Affine(shrink, MEAN - shrink @ MEAN)


@pytest.mark.parametrize("kind", ["denoising", "contractive"])
def test_the_best_affine_reconstruction_is_the_posterior_mean_of_a_gaussian(kind: str) -> None:
    """For both losses: the gradient is zero there, and not beside it."""
    x = gaussian_samples()

    def value(r: Affine) -> Tensor:
        if kind == "contractive":
            return ReconstructionContractiveLoss(SIGMA)(r, x)
        repeated, noise = with_all_noise(x)
        return DenoisingAutoencoderLoss(SIGMA)(r, repeated, noise=noise)

    r = optimum()
    value(r).backward()
    torch.testing.assert_close(r.A.grad, torch.zeros(3, 3).double(), atol=1e-10, rtol=0)
    torch.testing.assert_close(r.b.grad, torch.zeros(3).double(), atol=1e-10, rtol=0)
    beside = Affine(r.A.detach() + 0.1 * torch.eye(3), r.b.detach())
    assert value(beside) > value(r)


def test_the_losses_agree_for_affine_reconstructions() -> None:
    r = Affine(torch.randn(3, 3, generator=generator()).double(), torch.randn(3, generator=generator(1)).double())
    x, noise = with_all_noise(gaussian_samples())
    denoising = DenoisingAutoencoderLoss(0.7)(r, x, noise=noise)
    torch.testing.assert_close(ReconstructionContractiveLoss(0.7)(r, gaussian_samples()), denoising)


def test_elsewhere_they_differ_by_the_laplacian() -> None:
    """In one dimension, r(x) = x^2: the denoising loss has 2 sigma^2 E (x^2 - x) more, and 3 sigma^4."""
    x = torch.linspace(-1, 2, 7, dtype=torch.float64)[:, None]
    sigma = 0.3
    nodes = torch.tensor([-math.sqrt(3), 0.0, math.sqrt(3)], dtype=torch.float64)  # exact up to degree five
    weights = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
    loss = DenoisingAutoencoderLoss(sigma)
    parts = [loss(torch.square, x, noise=node.expand_as(x)) for node in nodes]
    denoising = (torch.stack(parts) * weights).sum()
    contractive = ReconstructionContractiveLoss(sigma)(torch.square, x).detach()
    expected = 2 * sigma**2 * (x**2 - x).mean() + 3 * sigma**4
    torch.testing.assert_close(denoising - contractive, expected)


def network(inputs: int = 3) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(inputs, 5), torch.nn.Tanh(), torch.nn.Linear(5, inputs)).double()


def test_the_estimate_of_the_penalty_has_the_exact_one_as_its_mean() -> None:
    r, x = network(), gaussian_samples(4)
    estimate = ReconstructionContractiveLoss(0.5, estimator="hutchinson")
    values = [
        estimate(r, x, signs=torch.tensor(signs, dtype=torch.float64).expand(4, 3))
        for signs in itertools.product((-1, 1), repeat=3)
    ]
    torch.testing.assert_close(torch.stack(values).mean(), ReconstructionContractiveLoss(0.5)(r, x))


@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
def test_the_penalty_trains_the_network(estimator) -> None:
    """Its gradient agrees with finite differences: it goes through the derivative."""
    r, x = network(), gaussian_samples(4)
    loss = ReconstructionContractiveLoss(2.0, estimator=estimator)
    signs = torch.ones_like(x)
    value = lambda: loss(r, x, signs=signs if estimator == "hutchinson" else None)
    weight = r[0].weight
    (gradient,) = torch.autograd.grad(value(), weight)
    with torch.no_grad():
        weight[1, 2] += 1e-6
        above = float(value())
        weight[1, 2] -= 2e-6
        below = float(value())
    assert (above - below) / 2e-6 == pytest.approx(float(gradient[1, 2]), rel=1e-5)


def test_losses_take_images_and_draw_by_the_generator() -> None:
    x = torch.randn(2, 1, 3, 3, generator=generator())
    for loss in (DenoisingAutoencoderLoss(0.1), ReconstructionContractiveLoss(0.1, estimator="hutchinson")):
        values = [float(loss(lambda x: x.cumsum(-1).tanh(), x, generator=generator(s)).detach()) for s in (1, 1, 2)]
        assert values[0] == values[1] != values[2]


def test_the_residual_of_the_exact_denoiser_is_the_score() -> None:
    x = 1.5 * torch.randn(50, 2, dtype=torch.float64, generator=generator())
    found = score_from_reconstruction(lambda x: RING.posterior_mean(x, 1.0, 0.3), x, 0.3)
    torch.testing.assert_close(found, RING.score(x, 1.0, 0.3))


def test_the_reconstruction_error_is_no_energy() -> None:
    """Between two modes it is small where the density is least: its gradient points the wrong way."""
    pair = AnalyticGMM.isotropic(torch.tensor([[-1.0], [1.0]], dtype=torch.float64), std=0.3)
    x = torch.tensor([[0.02]], dtype=torch.float64, requires_grad=True)
    residual = pair.posterior_mean(x, 1.0, 0.2) - x
    (slope,) = torch.autograd.grad(residual.square().sum(), x)
    assert residual.item() > 0  # uphill, to the mode on the right
    assert -slope.item() < 0  # the error falls to the left, towards the density's minimum


@pytest.mark.parametrize("n_points", [1, 7])
def test_energy_differences_of_a_gaussian_are_exact(n_points: int) -> None:
    smoothed = torch.distributions.MultivariateNormal(MEAN, COV + SIGMA**2 * torch.eye(3).double())
    a, b = torch.randn(2, 6, 3, dtype=torch.float64, generator=generator())
    found = energy_difference(optimum(), a, b, SIGMA, n_points=n_points)
    torch.testing.assert_close(found.detach(), smoothed.log_prob(a) - smoothed.log_prob(b))


def test_energy_differences_of_a_mixture() -> None:
    a, b = torch.randn(2, 30, 2, dtype=torch.float64, generator=generator())
    r = lambda x: RING.posterior_mean(x, 1.0, 0.3)
    found = energy_difference(r, a, b, 0.3, n_points=256)
    torch.testing.assert_close(found, RING.log_prob(a, 1.0, 0.3) - RING.log_prob(b, 1.0, 0.3), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(energy_difference(r, b, a, 0.3, n_points=256), -found)
    errors = [
        (energy_difference(r, a, b, 0.3, n_points=n) - energy_difference(r, a, b, 0.3, n_points=4096)).abs().mean()
        for n in (64, 128)
    ]
    assert errors[0] / errors[1] > 3  # of second order


def test_chains_reach_the_smoothed_density() -> None:
    start = torch.zeros(3000, 3, dtype=torch.float64)
    with torch.no_grad():
        chain = dae_metropolis(
            optimum(), start, SIGMA, proposal_std=0.6, n_steps=150, n_points=1, generator=generator()
        )
    assert chain.states.shape == (150, 3000, 3)
    assert 0.1 < chain.acceptance < 0.9
    torch.testing.assert_close(chain.states[-1].mean(0), MEAN, atol=0.07, rtol=0)
    torch.testing.assert_close(torch.cov(chain.states[-1].T), COV + SIGMA**2 * torch.eye(3).double(), atol=0.1, rtol=0)
    assert torch.equal(start, torch.zeros_like(start))


def test_chains_accept_as_they_should() -> None:
    x = torch.zeros(4, 2)
    flat = metropolis(lambda a, b: torch.zeros(len(a)), x, proposal_std=1.0, n_steps=5, generator=generator())
    assert flat.acceptance == 1.0
    never = metropolis(lambda a, b: torch.full((len(a),), -torch.inf), x, proposal_std=1.0, n_steps=5)
    assert never.acceptance == 0.0
    assert torch.equal(never.states, torch.zeros(5, 4, 2))
    runs = [
        dae_metropolis(torch.tanh, x, 1.0, proposal_std=0.5, n_steps=4, generator=generator(2)).states for _ in range(2)
    ]
    assert torch.equal(*runs)


def test_a_flat_density_lets_every_proposal_through_and_proposals_are_as_wide_as_asked_for() -> None:
    start = torch.zeros(5000, 2, dtype=torch.float64)
    chain = metropolis(lambda a, b: torch.zeros(len(a)), start, proposal_std=0.3, n_steps=4, generator=generator())
    assert chain.acceptance == 1.0
    steps = torch.cat([start[None], chain.states]).diff(dim=0)
    assert steps.std().item() == pytest.approx(0.3, rel=0.02)


def test_bad_arguments() -> None:
    x = torch.zeros(2, 3)
    for build in (DenoisingAutoencoderLoss, ReconstructionContractiveLoss):
        with pytest.raises(ValueError, match="sigma must be positive"):
            build(0.0)
        with pytest.raises(TypeError, match="x must be floating point"):
            build(1.0)(torch.tanh, x.long())
        with pytest.raises(ValueError, match="x must have shape"):
            build(1.0)(torch.tanh, x[:0])
        with pytest.raises(ValueError, match="reconstruct must return the shape of x"):
            build(1.0)(lambda x: x[:, :2], x)
    with pytest.raises(ValueError, match="noise must be of shape"):
        DenoisingAutoencoderLoss(1.0)(torch.tanh, x, noise=x[:1])
    with pytest.raises(ValueError, match="signs must be of shape"):
        ReconstructionContractiveLoss(1.0, estimator="hutchinson")(torch.tanh, x, signs=x[:1])
    with pytest.raises(ValueError, match="estimator must be one of"):
        ReconstructionContractiveLoss(1.0, estimator="none")
    with pytest.raises(ValueError, match="b must be of shape"):
        energy_difference(torch.tanh, x, x[:1], 1.0)
    with pytest.raises(ValueError, match="n_points must be at least 1"):
        energy_difference(torch.tanh, x, x, 1.0, n_points=0)
    with pytest.raises(ValueError, match="x must be finite"):
        dae_metropolis(torch.tanh, x / 0, 1.0, proposal_std=1.0, n_steps=1)
    with pytest.raises(ValueError, match="proposal_std must be positive"):
        dae_metropolis(torch.tanh, x, 1.0, proposal_std=0.0, n_steps=1)


def test_the_contractive_loss_is_there_in_inference_mode() -> None:
    x, loss = gaussian_samples(), ReconstructionContractiveLoss(SIGMA)
    with torch.inference_mode():
        found = loss(torch.tanh, x.clone())
    assert torch.equal(found.clone(), loss(torch.tanh, x).detach())
