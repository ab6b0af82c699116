"""Networks told the guidance scale: nothing changes at the start, copies are their own, and sampling with it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from trimtab.diffusion import (
    CountNFE,
    DistilledGuidance,
    EDMPreconditioned,
    FourierFeatures,
    ScaleConditioned,
    ScaleEmbedding,
    deis,
    grids,
)
from trimtab.nets import DenoisingMLP


def network() -> DenoisingMLP:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DenoisingMLP(2, num_classes=3, hidden=16, blocks=2)
        nn.init.normal_(net.outward.weight)
        for block in net.blocks:
            nn.init.normal_(block.second.weight)
    return net


def batch(count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 2, generator=generator), torch.rand(count, generator=generator), torch.arange(count) % 3


class Shift(nn.Module):
    """Adds the scale."""

    def forward(self, hidden: Tensor, scale: Tensor, t: Tensor, cond: object = None) -> Tensor:
        return scale[:, None]


def test_zero_residual_leaves_the_network_bit_for_bit() -> None:
    net = network()
    expected = net(*batch())
    student = ScaleConditioned(net, {"noise_level": ScaleEmbedding(16)})
    for scale in (None, 1.0, 4.0, torch.rand(5)):
        assert torch.equal(student(*batch(), scale), expected)
    assert torch.equal(net(*batch()), expected)


def test_what_is_added_is_added_where_it_is_named() -> None:
    """A residual on the output layer adds to the output itself, per sample; without a scale nothing."""
    net = network()
    student, scale = ScaleConditioned(net, {"outward": Shift()}), torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0])
    torch.testing.assert_close(student(*batch(), scale), net(*batch()) + scale[:, None])
    torch.testing.assert_close(student(*batch(), 2.0), net(*batch()) + 2)
    assert torch.equal(student(*batch()), net(*batch()))


def test_tokens_and_tuples() -> None:
    attention = nn.MultiheadAttention(4, 1, batch_first=True)
    x = torch.randn(3, 5, 4)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
            return self.attention(x, x, x)[0]

    scale = torch.tensor([1.0, 2.0, 3.0])

    net = Net()
    plain = net(x, torch.zeros(3))
    student = ScaleConditioned(net, {"attention": Shift()})
    torch.testing.assert_close(student(x, torch.zeros(3), None, scale), plain + scale[:, None, None])


def test_copies_live_on_their_own() -> None:
    student = ScaleConditioned(network(), {"noise_level": ScaleEmbedding(16)})
    twin = copy.deepcopy(student)
    with torch.no_grad():
        twin.residuals[0].last.weight.fill_(0.3)
        twin.network.outward.bias.fill_(1.0)
    assert torch.equal(student(*batch(), 3.0), network()(*batch()))
    assert not torch.equal(twin(*batch(), 3.0), twin(*batch()))
    with torch.no_grad():
        student.residuals[0].last.weight.fill_(-5.0)
    before = twin(*batch(), 3.0)
    assert torch.equal(before, copy.deepcopy(twin)(*batch(), 3.0))


def test_state_dict_round_trip() -> None:
    student = ScaleConditioned(network(), {"noise_level": ScaleEmbedding(16)})
    with torch.no_grad():
        student.residuals[0].last.weight.normal_()
    file = io.BytesIO()
    torch.save(student.state_dict(), file)
    file.seek(0)
    with torch.random.fork_rng():
        torch.manual_seed(9)
        other = ScaleConditioned(DenoisingMLP(2, 3, 16, 2), {"noise_level": ScaleEmbedding(16)})
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(*batch(), 3.0), student(*batch(), 3.0))


def test_a_failed_call_leaves_no_scale_behind() -> None:
    net = network()
    student = ScaleConditioned(net, {"outward": Shift()})
    x, t, cond = batch()
    with pytest.raises(ValueError, match="x must have 2 numbers"):
        student(x[:, :1], t, cond, 3.0)
    assert torch.equal(net(x, t, cond), student(x, t, cond))


def test_distilled_guidance_is_a_denoiser_of_one_evaluation() -> None:
    student = EDMPreconditioned(ScaleConditioned(network(), {"noise_level": ScaleEmbedding(16)}))
    with torch.no_grad():
        student.net.residuals[0].last.weight.normal_(generator=torch.Generator().manual_seed(0))
    x, _, cond = batch()
    t, scale = torch.full((5,), 0.7), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    guided = DistilledGuidance(student, cond, scale)
    assert torch.equal(guided(x, t), student(x, t, cond, scale))
    assert torch.equal(DistilledGuidance(student, cond, 3.0)(x, t)[2], guided(x, t)[2])
    counted = CountNFE(guided)
    deis(counted, student.schedule.prior(5, 2), grids.karras(student.schedule, 6))
    assert counted.count == 6


def test_fourier_features() -> None:
    """Each feature is a cosine of its own frequency: known at zero, and periodic."""
    features = FourierFeatures(8, bandwidth=2.0)
    torch.testing.assert_close(features(torch.zeros(1))[0], torch.cos(2 * torch.pi * features.phases))
    period = 1 / features.frequencies
    for k in range(8):
        value = features(torch.stack([torch.tensor(0.3), 0.3 + period[k]]))[:, k]
        torch.testing.assert_close(value[0], value[1], atol=1e-4, rtol=0)


def test_refused() -> None:
    with pytest.raises(ValueError, match="residuals must name layers"):
        ScaleConditioned(network(), {"nowhere": Shift()})
    with pytest.raises(ValueError, match="residuals must name layers"):
        ScaleConditioned(network(), {})
    with pytest.raises(TypeError, match="residuals must be modules"):
        ScaleConditioned(network(), {"norm": torch.zeros})
    with pytest.raises(TypeError, match="network must be"):
        ScaleConditioned(torch.zeros, {"norm": Shift()})
    student = ScaleConditioned(network(), {"outward": Shift()})
    with pytest.raises(ValueError, match="scale must be one number or one per sample"):
        student(*batch(), torch.ones(3))
    with pytest.raises(ValueError, match="scale must be finite"):
        DistilledGuidance(EDMPreconditioned(student), batch()[2], float("nan"))
