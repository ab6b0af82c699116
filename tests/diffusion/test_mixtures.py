"""Gaussian mixtures against brute force, autograd and Monte Carlo."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal

from trimtab.diffusion import AnalyticGMM, VPLinear, degrade

D, K = 4, 5


@pytest.fixture
def mixture() -> AnalyticGMM:
    """Components of full rank, of rank two plus a floor, and isotropic."""
    g = torch.Generator().manual_seed(0)
    factor = torch.randn(K, D, D, generator=g, dtype=torch.float64)
    factor[1, :, 2:] = 0
    covs = 0.2 * factor @ factor.mT + 0.05 * torch.eye(D, dtype=torch.float64)
    covs[2] = 0.3 * torch.eye(D, dtype=torch.float64)
    weights, means = (
        torch.rand(K, generator=g, dtype=torch.float64) + 0.1,
        torch.randn(K, D, generator=g, dtype=torch.float64),
    )
    return AnalyticGMM(weights, means, covs, labels=torch.tensor([0, 0, 1, 2, 2]))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(6, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def brute_log_joint(m: AnalyticGMM, x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    eye = torch.eye(D, dtype=x.dtype)
    parts = [
        MultivariateNormal(alpha * mu, alpha**2 * cov + sigma**2 * eye) for mu, cov in zip(m.means, m.covs, strict=True)
    ]
    return torch.stack([part.log_prob(x) for part in parts], 1) + m.log_weights


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.0), (0.8, 0.6), (0.05, 1.0), (1.0, 20.0)])
def test_density_score_and_classes_against_brute_force(mixture, x, alpha: float, sigma: float) -> None:
    joint = brute_log_joint(mixture, x, alpha, sigma)
    torch.testing.assert_close(mixture.log_prob(x, alpha, sigma), joint.logsumexp(1))
    at = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_prob(at, alpha, sigma).sum(), at)
    torch.testing.assert_close(mixture.score(x, alpha, sigma), gradient)
    by_class = torch.stack([joint[:, mixture.labels == c].logsumexp(1) for c in range(3)], 1)
    torch.testing.assert_close(mixture.class_log_posterior(x, alpha, sigma), by_class.log_softmax(1))


@pytest.mark.parametrize("cond", [None, 2, torch.tensor([0, 1, 2, 0, 1, 2])])
def test_posterior_mean_is_tweedies_formula(mixture, x, cond) -> None:
    alpha, sigma = 0.7, 0.4
    tweedie = (x + sigma**2 * mixture.score(x, alpha, sigma, cond)) / alpha
    torch.testing.assert_close(mixture.posterior_mean(x, alpha, sigma, cond), tweedie)


def test_posterior_mean_by_importance_sampling(mixture, x) -> None:
    alpha, sigma = 0.6, 0.8
    draws = mixture.sample(400_000, generator=torch.Generator().manual_seed(2))
    weights = (-((x[:, None] - alpha * draws) ** 2).sum(-1) / (2 * sigma**2)).softmax(1)
    torch.testing.assert_close(mixture.posterior_mean(x, alpha, sigma), weights @ draws, atol=0.02, rtol=0)


def test_classifier_free_decomposition(mixture, x) -> None:
    """grad log p(x | c) - grad log p(x) = grad log p(c | x)."""
    at = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.class_log_posterior(at, 0.8, 0.6)[:, 1].sum(), at)
    torch.testing.assert_close(mixture.score(x, 0.8, 0.6, 1) - mixture.score(x, 0.8, 0.6), gradient)


def test_levels_per_sample(mixture, x) -> None:
    alpha, sigma = torch.linspace(0.1, 1, 6, dtype=torch.float64), torch.linspace(1, 0.2, 6, dtype=torch.float64)
    for method in (mixture.posterior_mean, mixture.score, mixture.log_prob, mixture.class_log_posterior):
        rows = [method(x[i : i + 1], alpha[i].item(), sigma[i].item()) for i in range(6)]
        torch.testing.assert_close(method(x, alpha, sigma), torch.cat(rows))


def test_samples_have_the_moments(mixture) -> None:
    draws = mixture.sample(200_000, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(draws.mean(0), mixture.mean, atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(draws.T), mixture.cov, atol=0.05, rtol=0)
    own = mixture.sample(50_000, cond=1, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(own.mean(0), mixture.means[2], atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(own.T), mixture.covs[2], atol=0.02, rtol=0)


def test_low_rank_is_recognised() -> None:
    vectors = torch.linalg.qr(torch.randn(20, 3, dtype=torch.float64)).Q
    cov = vectors @ vectors.T + 0.01 * torch.eye(20, dtype=torch.float64)
    mixture = AnalyticGMM(torch.ones(1), torch.zeros(1, 20, dtype=torch.float64), cov[None])
    assert mixture.basis.shape == (1, 20, 3)


def test_zero_noise_limit_is_a_projection() -> None:
    """A covariance without full rank, at a positive noise level."""
    vectors = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64)).Q
    plane = AnalyticGMM(torch.ones(1), torch.zeros(1, 6, dtype=torch.float64), (vectors @ vectors.T)[None])
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = 0.8 / (0.8**2 + 0.6**2) * x @ vectors @ vectors.T
    torch.testing.assert_close(plane.posterior_mean(x, 0.8, 0.6), expected)


def test_degrade(mixture, x) -> None:
    schedule, t = VPLinear(), torch.full((6,), 0.5, dtype=torch.float64)
    exact, labels = mixture.denoiser(schedule), torch.tensor([0, 1, 2, 0, 1, 2])
    assert torch.equal(degrade(exact)(x, t, labels), exact(x, t, labels))
    # Fully blurred and with classes of equal weight, the condition says nothing.
    flat = AnalyticGMM(torch.ones(K, dtype=torch.float64), mixture.means, mixture.covs, mixture.labels)
    blurred = degrade(flat.denoiser(schedule), class_blur=1.0)
    torch.testing.assert_close(blurred(x, t, labels), flat.denoiser(schedule)(x, t))
    # The pull to the mean is linear and grows with the noise.
    pulls = []
    for time in (0.1, 0.9):
        t = torch.full((6,), time, dtype=torch.float64)
        weak, full = degrade(exact, shrink=0.3)(x, t), exact(x, t)
        pull = 0.3 * schedule.sigma(t[:1]) ** 2
        torch.testing.assert_close(weak, (1 - pull) * full + pull * mixture.mean)
        pulls.append(pull)
    assert pulls[0] < pulls[1]


def test_precision_follows() -> None:
    ring = AnalyticGMM.ring()
    assert ring.posterior_mean(torch.zeros(1, 2), 0.5, 0.5).dtype == torch.float32
    assert ring.to(torch.float64).sample(3).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2), torch.zeros(2), torch.eye(2)[None]), "means"),
        ((torch.ones(3), torch.zeros(2, 2), torch.eye(2).expand(2, 2, 2)), "weights"),
        ((torch.tensor([1.0, -1.0]), torch.zeros(2, 2), torch.eye(2).expand(2, 2, 2)), "weights"),
        ((torch.ones(2), torch.zeros(2, 2), torch.eye(3).expand(2, 3, 3)), "covs must have shape"),
        ((torch.ones(1), torch.zeros(1, 2), torch.tensor([[[1.0, 0.5], [0.0, 1.0]]])), "covs must be symmetric"),
        ((torch.ones(1), torch.zeros(1, 2), -torch.eye(2)[None]), "covs must be positive"),
        ((torch.ones(1), torch.full((1, 2), torch.nan), torch.eye(2)[None]), "finite"),
        ((torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None], torch.zeros(2, dtype=torch.long)), "labels"),
    ],
)
def test_bad_mixture(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnalyticGMM(*arguments)


def test_bad_calls(mixture, x) -> None:
    with pytest.raises(ValueError, match="x must have shape"):
        mixture.score(x[:, :2])
    with pytest.raises(ValueError, match="cond must be one class or one per sample"):
        mixture.score(x, 1.0, 0.0, torch.tensor([0, 1]))
    unlabelled = AnalyticGMM(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    with pytest.raises(ValueError, match="labels"):
        unlabelled.class_log_posterior(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="cond must be None for a mixture without labels"):
        unlabelled.score(torch.zeros(1, 2), cond=0)
    with pytest.raises(ValueError, match="shrink"):
        degrade(mixture.denoiser(VPLinear()), shrink=2.0)
    with pytest.raises(ValueError, match="prediction"):
        mixture.denoiser(VPLinear(), "noise")


def test_hyper_parameters_out_of_range_are_refused() -> None:
    mixture, x = AnalyticGMM.ring(), torch.zeros(2, 2)
    for blur in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="blur must be"):
            mixture.posterior_mean(x, 1.0, 0.5, 0, blur=blur)
    for std in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="std must be at least 0"):
            AnalyticGMM.isotropic(torch.zeros(1, 2), std)
    with pytest.raises(ValueError, match="modes must be at least 1, got 0"):
        AnalyticGMM.ring(0)


@pytest.mark.parametrize("cond", [2, -1, torch.tensor([0, 7, 1])])
def test_a_class_that_does_not_exist_is_refused(cond) -> None:
    """It has no component, and log-weights of nothing are NaN."""
    pair = AnalyticGMM.isotropic(torch.tensor([[-1.0], [1.0]]), std=0.1, labels=torch.arange(2))
    for method in (pair.posterior_mean, pair.score, pair.log_prob):
        with pytest.raises(ValueError, match="cond must be classes of the mixture, of which the largest is 1"):
            method(torch.zeros(3, 1), 0.5, 0.5, cond)
    if isinstance(cond, int):
        with pytest.raises(ValueError, match="cond must be classes"):
            pair.sample(3, cond=cond)


def test_what_is_no_mixture_is_refused_by_name() -> None:
    means, covs = torch.zeros(2, 1), torch.ones(2, 1, 1)
    with pytest.raises(TypeError, match="labels must be integers"):
        AnalyticGMM(torch.ones(2), means, covs, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="labels must be at least 0, got -1"):
        AnalyticGMM(torch.ones(2), means, covs, torch.tensor([0, -1]))
    with pytest.raises(TypeError, match="means and covs must be float32 or both float64"):
        AnalyticGMM(torch.ones(2), means, covs.double())
    with pytest.raises(TypeError, match="means must be a tensor, got ndarray"):
        AnalyticGMM.isotropic(means.numpy(), std=0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="denoiser must be a mixture's"):
        degrade(torch.nn.Identity(), shrink=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("shift", [1e2, 1e4])
def test_far_from_the_origin_single_precision_does_as_well_as_near_it(shift: float) -> None:
    """What is asked of float32 is answered for the very same numbers in float64."""
    g = torch.Generator().manual_seed(0)
    near = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    factor = torch.randn(3, 2, 2, generator=g)
    far = AnalyticGMM(torch.ones(3), near + shift, 0.1 * factor @ factor.mT, torch.arange(3))
    exact, x = far.to(torch.float64), torch.randn(200, 2, generator=g) + shift
    for alpha, sigma in ((1.0, 0.5), (1.0, 2.0)):
        for ask in (AnalyticGMM.log_prob, AnalyticGMM.score, AnalyticGMM.class_log_posterior):
            torch.testing.assert_close(
                ask(far, x, alpha, sigma).double(), ask(exact, x.double(), alpha, sigma), rtol=1e-5, atol=1e-5
            )
        # A number far from the origin is itself known to a ten-millionth of it.
        torch.testing.assert_close(
            far.posterior_mean(x, alpha, sigma).double(),
            exact.posterior_mean(x.double(), alpha, sigma),
            rtol=4e-7,
            atol=1e-5,
        )
    # At another alpha, per sample, and for one class.
    alpha, cond = torch.linspace(0.2, 1.0, 200, dtype=torch.float64), torch.arange(200) % 3
    at = alpha[:, None] * x.double()
    plain = AnalyticGMM(torch.ones(3).double(), near.double(), exact.covs, torch.arange(3))
    torch.testing.assert_close(
        exact.posterior_mean(at, alpha, 0.5, cond) - shift,
        plain.posterior_mean(at - alpha[:, None] * shift, alpha, 0.5, cond),
    )


def test_levels_that_mean_nothing_are_refused(mixture, x) -> None:
    for ask in (mixture.log_prob, mixture.score, mixture.class_log_posterior, mixture.posterior_mean):
        with pytest.raises(ValueError, match="sigma must be at least 0 and finite, got -0.5"):
            ask(x, 1.0, -0.5)
        with pytest.raises(ValueError, match="alpha must be finite, got nan"):
            ask(x, float("nan"), 0.5)
    point = AnalyticGMM.isotropic(torch.zeros(1, 2), std=0.0)
    with pytest.raises(ValueError, match="sigma must be positive where a covariance is singular"):
        point.log_prob(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="sigma must be positive where a covariance is singular"):
        point.posterior_mean(torch.zeros(1, 2), 1.0, 0.0)


def test_conditions_and_counts_that_mean_nothing_are_refused(mixture, x) -> None:
    with pytest.raises(TypeError, match="cond must be integers, got torch.bool"):
        mixture.posterior_mean(x, 1.0, 0.5, torch.ones(6, dtype=torch.bool))
    with pytest.raises(TypeError, match="cond must be integers, got torch.float32"):
        mixture.log_prob(x, 1.0, 0.5, torch.ones(6))
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        mixture.sample(-1)


def test_small_covariances_must_be_symmetric_too() -> None:
    covs = 1e-8 * torch.tensor([[[1.0, 0.5], [0.0, 1.0]]])
    with pytest.raises(ValueError, match="covs must be symmetric"):
        AnalyticGMM(torch.ones(1), torch.zeros(1, 2), covs)
