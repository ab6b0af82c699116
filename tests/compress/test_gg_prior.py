from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy.stats import gennorm
from torch import Tensor, nn

from trimtab.compress import (
    RF8,
    BackSlash,
    GeneralizedGaussian,
    code_length,
    deep_shape,
    estimate_shape,
    exp_golomb_bits,
    gg_init_,
    moment_ratio,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def law(shape: float, scale: float = 1.0) -> GeneralizedGaussian:
    return GeneralizedGaussian(torch.tensor(shape, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64))


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0, 8.0])
def test_the_law_is_scipys(shape: float) -> None:
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    ours, theirs = law(shape, 0.7), gennorm(shape, scale=0.7)
    np.testing.assert_allclose(ours.log_prob(x), theirs.logpdf(x))
    np.testing.assert_allclose(ours.cdf(x), theirs.cdf(x), atol=1e-12)
    np.testing.assert_allclose(ours.icdf(torch.tensor([0.05, 0.5, 0.8])), theirs.ppf([0.05, 0.5, 0.8]), rtol=1e-5)
    np.testing.assert_allclose(ours.entropy(), theirs.entropy())
    np.testing.assert_allclose(ours.variance, theirs.var())


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0, 60.0])
def test_draws_have_the_law(shape: float) -> None:
    drawn = law(shape, 0.7).sample((20_000,), seeded())
    places = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    shares = (drawn <= law(shape, 0.7).icdf(places)[:, None]).double().mean(1)
    torch.testing.assert_close(shares, places, atol=0.015, rtol=0)
    assert torch.equal(drawn, law(shape, 0.7).sample((20_000,), seeded()))


def test_draws_have_gradients() -> None:
    shape, scale = torch.tensor(1.5, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    GeneralizedGaussian(shape, scale).rsample((4000,), seeded()).square().mean().backward()
    h = 1e-3  # the variance's slopes
    variance = lambda nu, a: GeneralizedGaussian(torch.tensor(nu), torch.tensor(a)).variance.item()
    assert scale.grad.item() == pytest.approx(2 * variance(1.5, 2.0) / 2.0, rel=0.1)
    assert shape.grad.item() == pytest.approx((variance(1.5 + h, 2.0) - variance(1.5 - h, 2.0)) / (2 * h), rel=0.15)


def test_ratio_of_moments() -> None:
    torch.testing.assert_close(moment_ratio(torch.tensor([1.0, 2.0])), torch.tensor([2.0, math.pi / 2]))
    assert moment_ratio(torch.tensor(0.1)).isfinite()
    for shape in (0.4, 1.0, 1.7):
        assert estimate_shape(law(shape).sample((60_000,), seeded())) == pytest.approx(shape, rel=0.05)


def test_the_estimate_has_no_unit_and_pools() -> None:
    drawn = torch.randn(3000, generator=seeded())
    assert estimate_shape(drawn) == estimate_shape(1e-4 * drawn) == estimate_shape(drawn.view(3, 1000).unbind())
    for wrong in ([], torch.zeros(3), torch.tensor([1.0, math.nan])):
        with pytest.raises(ValueError, match="tensors"):
            estimate_shape(wrong)


@pytest.mark.parametrize(("mode", "fan"), [("fan_out", 200), ("fan_in", 400)])
def test_a_start_has_its_variance(mode: str, fan: int) -> None:
    layer = gg_init_(nn.Linear(400, 200), 0.8, 2.0, mode, generator=seeded())
    assert layer.weight.var().item() == pytest.approx(2.0 / fan, rel=0.02)
    assert estimate_shape(layer.weight) == pytest.approx(0.8, abs=0.03)
    assert not layer.bias.any()
    norm = gg_init_(nn.BatchNorm1d(3))
    assert torch.equal(norm.weight, torch.ones(3))
    conv = gg_init_(nn.Conv2d(20, 30, 3), generator=seeded())
    assert conv.weight.var().item() == pytest.approx(2 / (30 * 9), rel=0.08)


def test_shrinking_by_a_laplace_law_is_soft_thresholding() -> None:
    weight = torch.randn(50, generator=seeded())
    expected = weight.sign() * (weight.abs() - 0.3).relu()
    BackSlash([weight], rdo=15.0, shape=1.0).post_step()
    torch.testing.assert_close(weight, expected)


def test_the_shrinking_step_is_the_formula() -> None:
    weight = torch.tensor([2.0, -3.0], dtype=torch.float64)
    BackSlash([weight], rdo=0.2, shape=0.5).post_step()
    by = [0.1 * 0.5 * (1 + 2.0) ** -0.5, 0.1 * 0.5 * (1 + 3.0) ** -0.5]
    torch.testing.assert_close(weight, torch.tensor([2 - by[0], -3 + by[1]], dtype=torch.float64))


def test_shrinking_estimates_when_it_should_and_off_is_off() -> None:
    weight = torch.randn(4000, generator=seeded())
    before = weight.clone()
    rule = BackSlash([weight[:2000], weight[2000:]], rdo=0.0, every=3)
    for _ in range(4):
        rule.post_step()
    assert torch.equal(weight, before)
    assert rule.shape == estimate_shape(weight)
    weight.copy_(law(0.5).sample((4000,), seeded()))
    rule.post_step()
    assert rule.shape == estimate_shape(before)  # the next estimate is at the seventh step
    rule.post_step()
    rule.post_step()
    assert rule.shape == estimate_shape(weight)
    other = BackSlash([weight], rdo=0.0)
    other.load_state_dict(rule.state_dict())
    assert other.state_dict() == {"shape": rule.shape, "steps": 7}
    for wrong in ({}, {"shape": 1.0}, {"shape": -1.0, "steps": 3}, {"shape": 1.0, "steps": -1}):
        with pytest.raises(ValueError, match=r"shape|steps"):
            other.load_state_dict(wrong)
        assert other.steps == 7


def test_levels_get_what_the_law_wants_in_order() -> None:
    weights = 0.05 * torch.randn(20_000, generator=seeded(), dtype=torch.float64)
    (new,) = deep_shape([weights], tail_count=0, step=2.0**-9)
    shape = estimate_shape(weights)
    scale = 0.6 * weights.square().mean().sqrt() * math.exp((math.lgamma(1 / shape) - math.lgamma(3 / shape)) / 2)
    levels = (weights * 2**9).round()
    places = torch.arange(levels.min(), levels.max() + 1, dtype=torch.float64) / 2**9
    share = (-(((places - weights.mean()).abs() / scale) ** (0.8 * shape))).exp()
    wanted = (20_000 * share / share.sum()).floor()
    dealt = (new[:, None] == places).sum(0)
    assert ((dealt - wanted)[: len(places) * 3 // 4] == 0).all()  # the few left over lie at the top
    assert (new[weights.argsort()].diff() >= -1e-12)[: int(wanted.sum()) - 1].all()
    assert code_length(new, 2.0**-9) < code_length(weights, 2.0**-9)


def test_unscaled_reshaping_of_the_law_changes_little() -> None:
    weights = law(1.2, 0.05).sample((20_000,), seeded())
    (new,) = deep_shape([weights], 1.0, 1.0, tail_count=0, step=2.0**-9)
    assert ((new - weights).abs() * 2**9).quantile(0.95) <= 3


def test_tails_stay() -> None:
    weights = 0.05 * torch.randn(5000, generator=seeded(), dtype=torch.float64)
    one, other = deep_shape([weights[:2000].view(40, 50), weights[2000:]], step=2.0**-9, tail_count=8)
    new = torch.cat([one.flatten(), other])
    assert one.shape == (40, 50)
    levels = (weights * 2**9).round()
    values, counts = levels[levels > 0].unique(return_counts=True)
    tail = levels.abs() > values[counts <= 8].min()
    assert 0 < tail.sum() < 2500
    torch.testing.assert_close(new[tail], levels[tail] / 2**9)
    assert new[~tail].std() < 0.9 * weights[~tail].std()


def test_ties_may_stay_together() -> None:
    weights = torch.randn(2000, generator=seeded()).round(decimals=1)
    (apart,), (together,) = (
        deep_shape([weights], step=2.0**-6, tail_count=0, ties=ties) for ties in ("split", "together")
    )
    held = weights == 0.3
    assert len(apart[held].unique()) > 1
    assert len(together[held].unique()) == 1


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"shape_scale": 0.0}, "shape_scale"),
        ({"step": -1.0}, "step"),
        ({"tail_count": -1}, "tail_count"),
        ({"ties": "no"}, "ties"),
    ],
)
def test_bad_reshaping_is_refused_by_name(options: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        deep_shape([torch.ones(3)], **options)


def test_code_lengths() -> None:
    levels = torch.arange(-40, 41)
    mapped = [2 * v - 1 if v > 0 else -2 * v for v in levels.tolist()]
    assert exp_golomb_bits(levels).tolist() == [2 * int(math.log2(v + 1)) + 1 for v in mapped]
    assert exp_golomb_bits(torch.tensor([2**30])).item() == 2 * 31 + 1
    with pytest.raises(TypeError, match="levels"):
        exp_golomb_bits(torch.ones(2))


def test_residual_floats() -> None:
    octave = torch.tensor([0.75, 0.875, 0.9375, 1.0, 1.0625, 1.125, 1.25])
    form = RF8()
    assert torch.equal(form.quantize(octave), octave)
    given = torch.tensor([1.3, 1.4, -0.8, 0.1, 3.0])
    assert torch.equal(form.quantize(given), torch.tensor([1.25, 1.5, -0.75, 0.09375, 3.0]))
    x = torch.randn(5000, generator=seeded(), dtype=torch.float64)
    rounded = form.quantize(x)
    assert torch.equal(form.quantize(rounded), rounded)
    assert torch.equal(form.quantize(-x), -rounded)
    assert torch.equal(form.quantize(x * 2.0**-7), rounded * 2.0**-7)
    assert ((rounded - x) / x).abs().max() <= 0.1083
    torch.testing.assert_close(form.quantize(torch.tensor([1.3536])), torch.tensor([1.5]))
    noise = 10 * (x.square().mean() / (x - rounded).square().mean()).log10()
    assert noise.item() == pytest.approx(28.0, abs=0.5)


def test_packed_residual_floats() -> None:
    form = RF8(exponent_max=2)
    codes = torch.arange(256, dtype=torch.uint8)
    values = form.decode(codes)
    assert torch.equal(form.decode(form.encode(values)), values)
    x = torch.cat([torch.randn(3000, generator=seeded()), torch.tensor([0.0, 1.4, 5.9, 6.0, -0.75 * 2.0**-13])])
    assert form.encode(x).dtype == torch.uint8
    assert torch.equal(form.decode(form.encode(x)), form.quantize(x))
    outside = torch.tensor([100.0, -7.9, 1e-9, -(2.0**-14)])
    assert form.decode(form.encode(outside)).tolist() == [6.0, -6.0, 0.0, 0.0]
    with pytest.raises(TypeError, match="code"):
        form.decode(codes.long())
    for wrong in (torch.tensor([math.nan]), torch.tensor([math.inf])):
        with pytest.raises(ValueError, match="value"):
            form.encode(wrong)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"rdo": -1.0}, "rdo"), ({"shape": 0.0}, "shape"), ({"offset": 0.0}, "offset"), ({"every": 0}, "every")],
)
def test_bad_shrinking_is_refused_by_name(options: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        BackSlash([torch.ones(3)], **options)
    with pytest.raises(ValueError, match="params"):
        BackSlash([])


def test_a_refused_start_changes_nothing() -> None:
    layer = nn.Linear(3, 2)
    before = copy.deepcopy(layer.state_dict())
    for options in ({"shape": 0.0}, {"xi": -1.0}, {"mode": "fan"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            gg_init_(layer, **options)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_half_precision() -> None:
    weight: Tensor = torch.randn(100, generator=seeded()).bfloat16()
    BackSlash([weight], rdo=1.0).post_step()
    assert weight.dtype == torch.bfloat16
    assert deep_shape([weight])[0].dtype == RF8().quantize(weight).dtype == torch.bfloat16


@pytest.mark.parametrize("weight", [math.nan, math.inf, 1e30])
def test_what_the_code_cannot_hold_has_no_length(weight: float) -> None:
    with pytest.raises(ValueError, match="tensors must be finite"):
        code_length([torch.zeros(2), torch.tensor([weight])], 0.1)


def test_a_law_too_wide_for_single_precision_is_named() -> None:
    layer = nn.Linear(4, 3)
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="shape must be"):
        gg_init_(layer, shape=0.05)
    assert torch.equal(layer.weight, before)
    assert gg_init_(layer, shape=0.08).weight.isfinite().all()
