"""sLCT: its scale and its norm, the reduction to iCT bit for bit, and each of its parts alone."""

import math

import pytest
import torch
from torch import nn

from trimtab.diffusion import (
    EDM,
    ConsistencyPreconditioned,
    Denoiser,
    ImprovedConsistencyTraining,
    LatentConsistencyTraining,
    NonScalingLayerNorm,
    adaptive_scale,
    assign_noise,
    cauchy,
    neighbours,
    pseudo_huber,
)
from trimtab.diffusion.slct import transport_pairing
from trimtab.nets import DenoisingMLP


def function_of(dim: int = 3) -> ConsistencyPreconditioned:
    torch.manual_seed(0)
    function = ConsistencyPreconditioned(DenoisingMLP(dim, hidden=16)).double()
    for p in function.parameters():
        nn.init.normal_(p, std=0.2)
    return function


X0, NOISE = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
INDEX = torch.tensor([0, 2, 4, 9, 14, 19])


def only(function, **parts):
    """iCT, with some parts of sLCT."""
    plain = {"distance": pseudo_huber, "scale": lambda levels: 0.01, "diffusion_weight": 0.0, "assign": None}
    return LatentConsistencyTraining(function, 100, s1=40, **(plain | parts))


def test_transport_is_of_squared_distances():
    """A detour over the middle is shorter in sum, and not in the sum of squares."""
    x, noise = torch.tensor([[0.0, 0.0], [1.0, 0.3]]), torch.tensor([[1.0, 0.3], [2.0, 0.0]])
    assert torch.equal(transport_pairing(x, noise), noise)
    assert torch.equal(assign_noise(x, noise), noise.flip(0))


def test_the_scale_at_the_first_levels_and_as_they_grow():
    assert adaptive_scale(11) == pytest.approx(math.exp(-1.18 * math.log(10) - 0.72))
    assert adaptive_scale(11) == pytest.approx(0.03216, abs=1e-5)
    found = [adaptive_scale(n) for n in (11, 21, 41, 81, 161, 321, 641)]
    assert found == sorted(found, reverse=True)
    assert found[1] / found[0] == pytest.approx(2**-1.18)


def test_a_norm_with_a_shift_and_no_scale():
    norm, x = NonScalingLayerNorm(5).double(), torch.randn(2, 7, 5, dtype=torch.float64)
    assert set(norm.state_dict()) == {"bias"}
    nn.init.normal_(norm.bias)
    torch.testing.assert_close(norm(x), nn.functional.layer_norm(x, (5,), bias=norm.bias, eps=1e-6))
    centred = norm(x) - norm.bias
    torch.testing.assert_close(centred.mean(-1), torch.zeros(2, 7).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(centred.square().mean(-1), torch.ones(2, 7).double(), rtol=1e-4, atol=0)
    # An outlier among the features raises the others' size in no way.
    torch.testing.assert_close(norm(1000 * x), norm(x), rtol=1e-4, atol=1e-6)
    norm(x).sum().backward()
    assert norm.bias.grad is not None


def test_without_its_parts_it_is_iCT_bit_for_bit():
    for step in (0, 60, 99):
        c = 0.00054 * math.sqrt(3)
        plain = ImprovedConsistencyTraining(function_of(), 100, s1=40)
        reduced = only(function_of(), scale=lambda levels, c=c: c)
        losses = [rule(X0, step, generator=torch.Generator().manual_seed(step)) for rule in (plain, reduced)]
        assert torch.equal(*losses)


def test_the_denoising_term_is_of_the_lowest_quarter_alone():
    function = function_of()
    rule, off = only(function, diffusion_weight=0.7, sigma_data=0.6), only(function)
    levels = rule.levels(50)
    assert len(levels) == 21
    for index in range(20):
        i = torch.full((6,), index)
        difference = rule(X0, 50, noise=NOISE, index=i) - off(X0, 50, noise=NOISE, index=i)
        if index + 2 <= 6:  # the student's level, counted from 1, among the lowest quarter of 21
            low, high = levels[i], levels[i + 1]
            student, _ = neighbours(function, X0, NOISE, low, high)
            weight = (0.36 + high**2) / (0.6 * high) ** 2
            expected = 0.7 * (weight[:, None] * (student - X0).square()).mean()
            torch.testing.assert_close(difference, expected, rtol=1e-6, atol=1e-9)
            assert difference > 0
        else:
            assert difference == 0
    for share, last in ((0.0, 0), (0.5, 11), (1.0, 21)):
        part = only(function, diffusion_weight=1.0, diffusion_share=share)
        for index in range(20):
            i = torch.full((6,), index)
            changed = part(X0, 50, noise=NOISE, index=i) != off(X0, 50, noise=NOISE, index=i)
            assert bool(changed) == (index + 2 <= last)


def test_the_denoising_term_is_the_mean_of_those_that_it_is_for():
    """Whoever is at more noise in the same batch does not thin it out, and does not enter it."""
    function = function_of()
    rule, off = only(function, diffusion_weight=0.7), only(function)
    index = torch.tensor([0, 3, 19, 12, 15, 8])

    def term(rows):
        draws = {"noise": NOISE[rows], "index": index[rows]}
        return rule(X0[rows], 50, **draws) - off(X0[rows], 50, **draws)

    torch.testing.assert_close(term(slice(None)), term(slice(2)), rtol=1e-6, atol=1e-9)


def test_pairing_is_a_permutation_of_the_noise_that_was_given():
    function = function_of()
    paired = only(function, assign=lambda x, noise: assign_noise(x, noise, metric="sqeuclidean"))
    by_hand = only(function)
    expected = by_hand(X0, 0, noise=assign_noise(X0, NOISE, metric="sqeuclidean"), index=INDEX % 10)
    assert torch.equal(paired(X0, 0, noise=NOISE, index=INDEX % 10), expected)
    whole = LatentConsistencyTraining(function, 100, s1=40, diffusion_weight=0.0, scale=lambda levels: 0.01)
    alike = only(function, distance=cauchy, assign=whole.assign)
    assert torch.equal(whole(X0, 0, noise=NOISE, index=INDEX % 10), alike(X0, 0, noise=NOISE, index=INDEX % 10))


def test_the_scale_follows_levels_and_dimension():
    seen = []

    def distance(a, b, c):
        seen.append(c)
        return cauchy(a, b, c)

    for dim in (4096, 16):
        identity = Denoiser(lambda x, t: x, EDM(), "x0")
        rule = LatentConsistencyTraining(identity, 100, s1=40, distance=distance)
        for step in (0, 99):
            seen.clear()
            rule(torch.randn(2, dim), step)
            assert seen[0] == pytest.approx(adaptive_scale(len(rule.levels(step))) * math.sqrt(dim))


def test_an_outlier_pulls_less_than_with_iCT():
    """The gradient of one latent far off, as a share of the whole batch's."""
    identity = Denoiser(lambda x, t: x, EDM(), "x0")

    def share(distance):
        theta = torch.ones(32, 1, dtype=torch.float64, requires_grad=True)
        scaled = Denoiser(lambda x, t: theta[: len(x)] * x, identity.schedule, "x0")
        x0 = 0.1 * torch.randn(32, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        x0[0] = 50.0
        noise = torch.randn(32, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        noise[0] = 20.0
        rule = only(scaled, distance=distance, scale=lambda levels: 0.05)
        rule(x0, 50, noise=noise, index=torch.full((32,), 12)).backward()
        pull = theta.grad.abs().flatten()
        return float(pull[0] / pull.sum())

    assert share(cauchy) < 0.3 * share(pseudo_huber)


def test_bad_input():
    function = function_of()
    with pytest.raises(ValueError, match="levels must be at least 2"):
        adaptive_scale(1)
    with pytest.raises(ValueError, match="dim must be at least 1"):
        NonScalingLayerNorm(0)
    with pytest.raises(ValueError, match="diffusion_share must be in"):
        LatentConsistencyTraining(function, 10, diffusion_share=1.5)
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        LatentConsistencyTraining(function, 10, sigma_data=0.0)
    with pytest.raises(ValueError, match="diffusion_weight must be at least 0"):
        LatentConsistencyTraining(function, 10, diffusion_weight=-1.0)
    with pytest.raises(ValueError, match="step must be in"):
        LatentConsistencyTraining(function, 10, s1=20)(X0, -1)
    with pytest.raises(ValueError, match="index must have shape"):
        LatentConsistencyTraining(function, 10, s1=20)(X0, 0, index=INDEX[:2])
