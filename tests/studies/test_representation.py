"""The representation task: its images, its reference models, and that a run is fixed by its seed."""

from __future__ import annotations

import pytest
import torch

from trimtab.studies.engine.study import Trial
from trimtab.studies.tasks.representation import RepresentationLearning, shape_images
from trimtab.studies.tools.autoencoders import BetaTCVAE, BetaVAE
from trimtab.studies.tools.factor_images import shapes


def test_images_are_one_for_each_combination_and_all_different() -> None:
    made = shapes(places=4, sizes=3, brightnesses=3)
    assert made.x.shape == (4 * 4 * 3 * 3 * 3, 1, 16, 16)
    assert float(made.x.min()) == 0.0
    assert float(made.x.max()) == 1.0
    assert len(made.factors.unique(dim=0)) == len(made.x)
    assert len(made.x.flatten(1).unique(dim=0)) == len(made.x)


def test_factors_do_what_they_are_called() -> None:
    made = shapes(places=8, sizes=4, brightnesses=4)
    x = made.x[:, 0].double().reshape(8, 8, 4, 3, 4, 16, 16)
    mass = x.sum((-1, -2))
    axis = torch.arange(16, dtype=torch.float64)
    columns = (x.sum(-2) * axis).sum(-1) / mass
    rows = (x.sum(-1) * axis).sum(-1) / mass
    centres = 4 + torch.arange(8, dtype=torch.float64)
    # Large shapes at the margin are cut off, which moves their middle; the smaller ones are whole.
    torch.testing.assert_close(columns[:, :, :2], centres[:, None, None, None, None].expand(8, 8, 2, 3, 4))
    torch.testing.assert_close(rows[:, :, :2], centres[:, None, None, None].expand(8, 8, 2, 3, 4))
    assert bool((mass.diff(dim=2) > 0).all())  # size
    peak = x.amax((-1, -2))[4, 4, -1, 0]
    torch.testing.assert_close(peak, torch.tensor([0.4, 0.6, 0.8, 1.0], dtype=torch.float64))


def test_total_correlation_at_weight_one_is_the_plain_divergence() -> None:
    """The three parts sum to log q(z|x) - log p(z), whatever the estimates of q(z) are."""
    generator = torch.Generator().manual_seed(0)
    mean, log_var, noise = torch.randn(3, 6, 4, dtype=torch.float64, generator=generator)
    z = mean + (0.5 * log_var).exp() * noise
    found = BetaTCVAE(torch.nn.Identity(), torch.nn.Identity(), 1.0, 100).divergence(z, mean, log_var)
    posterior = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    prior = torch.distributions.Normal(torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(found, (posterior.log_prob(z) - prior.log_prob(z)).sum(1))
    # And a latent that is a copy of another adds to it with its weight.
    twice = [torch.cat([part, part], 1) for part in (z, mean, log_var)]
    one, two = (
        BetaTCVAE(torch.nn.Identity(), torch.nn.Identity(), b, 100).divergence(*twice).mean() for b in (1.0, 2.0)
    )
    assert two > one


def test_the_divergence_of_a_vae_is_closed_form() -> None:
    generator = torch.Generator().manual_seed(1)
    mean, log_var = torch.randn(2, 6, 4, dtype=torch.float64, generator=generator)
    model = BetaVAE(torch.nn.Identity(), torch.nn.Identity(), 3.0)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * log_var).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(model.divergence(mean, mean, log_var), 3.0 * expected.sum(1))


@pytest.mark.parametrize("name", ["auto-encoder", "VQ-VAE"])
def test_a_run_is_fixed_by_its_seed(name: str) -> None:
    entrant = RepresentationLearning.references()[name]
    one, two, other = (shape_images.run(Trial(seed=seed), entrant).metrics for seed in (0, 0, 1))
    assert one == two
    assert one["error"] != other["error"]


def test_while_searching_only_the_score_comes_back() -> None:
    found = shape_images.run(Trial(searching=True), RepresentationLearning.references()["VAE"])
    assert not found.metrics
    assert found.score is not None
