"""Preconditioning: unit sizes where the theory says so, and boundaries exactly."""

import pytest
import torch
from torch import nn

from trimtab.diffusion import EDM, ConsistencyPreconditioned, Denoiser, EDMPreconditioned, VPLinear, deis, grids
from trimtab.nets import DenoisingMLP


class Recorded(nn.Module):
    """Returns what it was built with, and remembers what came."""

    def __init__(self, out: torch.Tensor) -> None:
        super().__init__()
        self.out, self.seen = out, None

    def forward(self, x, c_noise, *further):
        self.seen = (x, c_noise, *further)
        return self.out


def noisy(count: int = 200_000, std: float = 0.5):
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, count, 1, dtype=torch.float64, generator=generator)
    return std * x0, noise


@pytest.mark.parametrize("sigma", [0.01, 0.5, 20.0])
def test_edm_gives_the_network_inputs_and_targets_of_variance_one(sigma):
    x0, noise = noisy()
    t = torch.full((len(x0),), sigma, dtype=torch.float64)
    net = Recorded(torch.zeros_like(x0))
    denoiser = EDMPreconditioned(net, 0.5)
    x = x0 + sigma * noise
    plain = denoiser(x, t)
    assert net.seen[0].std().item() == pytest.approx(1, rel=0.01)
    torch.testing.assert_close(net.seen[1], t.log() / 4)
    # What the network has to add for the true clean sample, and that at the least amplification of its errors: the
    # target is uncorrelated with the input.
    target = (x0 - plain) / denoiser.scalings(t)[1][:, None]
    assert target.std().item() == pytest.approx(1, rel=0.01)
    assert abs((target * net.seen[0]).mean().item()) < 0.01
    torch.testing.assert_close(denoiser.weight(t), denoiser.scalings(t)[1] ** -2)


def test_the_zero_network_is_the_exact_denoiser_of_a_gaussian():
    """So that the solver moves samples at their number of standard deviations."""
    denoiser = EDMPreconditioned(Recorded(torch.zeros(64, 2, dtype=torch.float64)), 0.5)
    x = denoiser.schedule.prior(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = deis(denoiser, x, grids.karras(denoiser.schedule, 200))
    ends = torch.tensor([80.0, 0.002], dtype=torch.float64)
    spread = (ends**2 + 0.25).sqrt()
    torch.testing.assert_close(found, x * spread[1] / spread[0], rtol=1e-3, atol=1e-4)


def test_a_consistency_function_keeps_what_has_the_least_noise():
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    for schedule in (EDM(), EDM(t_min=0.1, t_max=3.0)):
        function = ConsistencyPreconditioned(Recorded(torch.randn(3, 2, 4, dtype=torch.float64)), 0.7, schedule)
        t = torch.full((3,), schedule.t_min, dtype=torch.float64)
        assert torch.equal(function(x, t), x)
        far = torch.full((3,), schedule.t_max, dtype=torch.float64)
        assert not torch.allclose(function(x, far), x)


@pytest.mark.parametrize("sigma", [1.5, 4.0])
def test_a_consistency_function_is_that_of_its_papers_appendix(sigma):
    """c_skip = s^2 / ((t - e)^2 + s^2), c_out = s (t - e) / sqrt(s^2 + t^2): the root is of the whole noise."""
    least, spread = 1.0, 0.8
    function = ConsistencyPreconditioned(Recorded(torch.ones(1, 1)), spread, EDM(t_min=least, t_max=9.0))
    found = function(torch.full((1, 1), 3.0), torch.full((1,), sigma))
    skip = spread**2 / ((sigma - least) ** 2 + spread**2)
    out = spread * (sigma - least) / (spread**2 + sigma**2) ** 0.5
    assert found.item() == pytest.approx(3.0 * skip + out)


def test_a_consistency_function_at_much_noise_is_the_network_s_alone():
    function = ConsistencyPreconditioned(Recorded(torch.ones(1, 2, dtype=torch.float64)), 0.5)
    skip, out = function.scalings(torch.tensor([1e6], dtype=torch.float64))
    torch.testing.assert_close(skip, torch.zeros(1, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(out, torch.tensor([0.5], dtype=torch.float64))


def test_further_arguments_reach_the_network():
    net = DenoisingMLP(2, num_classes=3, hidden=8, conditions=1)
    denoiser = EDMPreconditioned(net)
    x, t = torch.randn(4, 2), torch.ones(4)
    denoiser(x, t, torch.tensor([0, 1, 2, 3]), torch.zeros(4, 1))
    denoiser(x, t, torch.tensor([0, 1, 2, 3]), extra=torch.zeros(4, 1))
    with pytest.raises(ValueError, match="extra must have shape"):
        denoiser(x, t, None)


def test_it_is_a_module_with_the_network_s_parameters():
    denoiser = EDMPreconditioned(DenoisingMLP(2, hidden=8))
    assert {name.split(".")[0] for name in denoiser.state_dict()} == {"net"}


def test_bad_arguments():
    with pytest.raises(TypeError, match="net must be"):
        EDMPreconditioned(lambda x, t: x)
    with pytest.raises(TypeError, match="schedule must be EDM"):
        EDMPreconditioned(nn.Identity(), schedule=VPLinear())
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        ConsistencyPreconditioned(nn.Identity(), 0.0)
    assert isinstance(Denoiser(lambda x, t: x, EDM()), Denoiser)
