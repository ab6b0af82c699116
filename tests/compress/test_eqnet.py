from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.compress import (
    AccuracyPredictor,
    ElasticConfig,
    ElasticQuantizer,
    EQNet,
    elastic_layers,
    elastic_quantize,
    elastic_weights,
    fit_predictor,
    guided_loss,
    prepare_elastic,
    sample_config,
    search_config,
    searched_range,
    set_config,
    uniform_config,
    weight_distribution_loss,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(rows: int = 4, columns: int = 60) -> torch.Tensor:
    scales = torch.logspace(-1, 1, rows)[:, None]
    return torch.randn(rows, columns, generator=seeded()) * scales


def elastic(bits: tuple[int, ...] = (2, 4, 8)) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)
        )
    return prepare_elastic(model, torch.randn(32, 4, generator=seeded()), bits)


def test_more_bits_and_finer_steps_err_less() -> None:
    w = weight()
    quantizer = ElasticQuantizer(w)
    errors = []
    for bits, per_channel in ((2, False), (2, True), (4, False), (4, True), (8, False), (8, True)):
        quantizer.configure(bits, per_channel=per_channel)
        errors.append((quantizer(w) - w).abs().pow(2.4).mean().item())
    assert errors[0] > errors[2] > errors[4]
    assert errors[1] > errors[3] > errors[5]
    assert all(fine < coarse for coarse, fine in zip(errors[::2], errors[1::2], strict=True))


@pytest.mark.parametrize("symmetric", [True, False])
def test_there_are_no_more_values_than_the_bits_tell_apart(symmetric: bool) -> None:
    w = weight()
    quantizer = ElasticQuantizer(w, (2, 3))
    for bits in (2, 3):
        quantizer.configure(bits, per_channel=True, symmetric=symmetric)
        assert all(len(row.unique()) <= 2**bits for row in quantizer(w).detach())
        quantizer.configure(bits, symmetric=symmetric)
        assert len(quantizer(w).detach().unique()) <= 2**bits


def test_the_symmetric_form_is_odd_inside_the_range() -> None:
    x = torch.linspace(-2.9, 2.9, 41)
    step = torch.tensor(1.0)
    torch.testing.assert_close(elastic_quantize(-x, step, None, 3), -elastic_quantize(x, step, None, 3))


def test_an_offset_keeps_its_sign() -> None:
    x = torch.linspace(-5, -4, 9)
    step, offset = searched_range(x[None], 4, symmetric=False)
    assert offset < 0
    torch.testing.assert_close(elastic_quantize(x, step, offset, 4), x, atol=0.04, rtol=0)


def test_the_search_starts_at_the_whole_range_and_is_never_worse() -> None:
    rows = torch.randn(3, 500, generator=seeded()) ** 3  # heavy tails, which a smaller range serves better
    step, offset = searched_range(rows, 3, symmetric=True)
    whole = rows.abs().amax(1) / 3

    def error(s: torch.Tensor) -> torch.Tensor:
        return (elastic_quantize(rows, s[:, None], None, 3) - rows).abs().pow(2.4).mean(1)

    assert (error(step) < error(whole)).all()
    assert (step >= 0.2 * whole).all()
    assert torch.equal(offset, torch.zeros(3))


def test_gradients_of_step_and_offset_agree_with_finite_differences_but_for_rounding() -> None:
    # Away from ties the rounded part stays; the gradient inside the range takes rounding for the identity.
    x = torch.tensor([0.3, 1.2, 9.0, -9.0], dtype=torch.float64)
    step = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    offset = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    elastic_quantize(x, step, offset, 3).sum().backward()
    s = 0.7 + 1e-6
    inside = sum(round((v - 0.1) / s) - (v - 0.1) / s for v in (0.3, 1.2))
    assert step.grad is not None
    assert offset.grad is not None
    assert step.grad.item() == pytest.approx(inside + 3 - 4)
    assert offset.grad.item() == pytest.approx(2.0)  # the clipped ones move with it, the others do not

    def clipped(s: float, b: float) -> float:
        values = torch.tensor([9.0, -9.0], dtype=torch.float64)
        return elastic_quantize(values, torch.tensor(s).double(), torch.tensor(b).double(), 3).sum().item()

    assert (clipped(0.71, 0.1) - clipped(0.69, 0.1)) / 0.02 == pytest.approx(-1.0, abs=1e-5)
    assert (clipped(0.7, 0.11) - clipped(0.7, 0.09)) / 0.02 == pytest.approx(2.0, abs=1e-5)


def test_gradients_of_steps_are_scaled_by_size() -> None:
    w = weight()
    quantizer = ElasticQuantizer(w, (3,))
    for per_channel, scale in ((False, (3 * 240) ** -0.5), (True, 2 / (3 * 240 / 60) ** 0.5)):
        quantizer.configure(3, per_channel=per_channel)
        held = quantizer.channel_step if per_channel else quantizer.step
        found = torch.autograd.grad(quantizer(w).sum(), held)[0][0, 0]
        step = held.detach()[0, 0].requires_grad_()
        plain = elastic_quantize(w, step[:, None] if per_channel else step, None, 3)
        torch.testing.assert_close(found, scale * torch.autograd.grad(plain.sum(), step)[0])


def test_changing_bits_touches_no_parameter() -> None:
    model = elastic()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(5):
        set_config(model, sample_config(model, generator=seeded(1)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x = torch.randn(8, 4, generator=seeded())
    set_config(model, uniform_config(model, 8))
    first = model.eval()(x)
    set_config(model, uniform_config(model, 2))
    assert not torch.equal(model(x), first)
    set_config(model, uniform_config(model, 8))
    assert torch.equal(model(x), first)


def test_elastic_layers_are_the_inner_ones_and_inputs_after_relu_have_no_sign() -> None:
    model = elastic()
    pairs = elastic_layers(model)
    assert list(pairs) == ["3", "5"]
    assert not pairs["3"][1].signed
    assert pairs["3"][0].signed
    assert [w.shape for w in elastic_weights(model)] == [(8, 8), (8, 8)]
    with pytest.raises(ValueError, match="at least three"):
        prepare_elastic(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.randn(3, 2))


def test_shape_of_weights() -> None:
    uniform, normal = torch.linspace(-3, 1, 20_001), torch.randn(400_000, generator=seeded())
    assert weight_distribution_loss([uniform]).item() == pytest.approx(0, abs=1e-4)
    assert weight_distribution_loss([normal]).item() == pytest.approx(0.015 * 1.44, rel=0.05)
    skewed = normal.exp()[:1000]
    z = (skewed - skewed.mean()) / skewed.std()
    expected = 0.5 * (z.pow(4).mean() - 3) ** 2 + 2 * z.pow(3).mean() ** 2
    found = weight_distribution_loss([skewed], kurtosis=3, kurtosis_weight=0.5, skewness_weight=2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(weight_distribution_loss([7 * skewed - 2]), weight_distribution_loss([skewed]))


def test_guidance() -> None:
    logits = torch.randn(5, 4, generator=seeded(), requires_grad=True)
    guide = torch.randn(5, 4, generator=seeded(1), requires_grad=True)
    targets = torch.arange(5) % 4
    plain = F.cross_entropy(logits, targets)
    torch.testing.assert_close(guided_loss(logits, targets), plain)
    torch.testing.assert_close(guided_loss(logits, targets, logits), 0.5 * plain)
    p, q = guide.softmax(1), logits.softmax(1)
    kl = (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(guided_loss(logits, targets, guide, 0.3), 0.3 * kl + 0.7 * plain)
    guided_loss(logits, targets, guide).backward()
    assert guide.grad is None


def test_a_step_adds_up_the_gradients_of_three_sub_networks() -> None:
    x, y = torch.randn(16, 4, generator=seeded()), torch.arange(16) % 3
    model, twin = elastic(), elastic()
    rule = EQNet(model, torch.optim.SGD(model.parameters(), lr=0.1), distribution=2.0, clip=None, generator=seeded(3))
    twin_rule = EQNet(twin, torch.optim.SGD(twin.parameters(), lr=0.1), generator=seeded(3))
    found = rule.step(x, y)
    named = twin_rule.configs()
    assert [name for name, _ in named] == ["largest", "random", "smallest"]
    assert set(named[0][1].weight_bits + named[0][1].input_bits) == {8}
    assert set(named[2][1].weight_bits + named[2][1].input_bits) == {2}
    twin.train()
    guide, total = None, 2 * weight_distribution_loss(elastic_weights(twin))
    for _, config in named:
        set_config(twin, config)
        logits = twin(x)
        total = total + guided_loss(logits, y, guide)
        guide = logits.detach()
    total.backward()
    twin_rule.optimizer.step()
    torch.testing.assert_close(found["total"], total.detach())
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_predictor_learns_and_the_search_keeps_to_the_budget() -> None:
    draws = seeded(2)
    model = elastic()
    configs = [sample_config(model, generator=draws) for _ in range(64)]
    accuracies = torch.tensor([0.5 + 0.05 * math.log2(min(c.weight_bits)) for c in configs])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        predictor = AccuracyPredictor(2, bits=(2, 4, 8), hidden=32)
    assert predictor.encode(configs).shape == (64, 15)
    assert predictor.encode(configs).sum(1).min() >= 4
    assert fit_predictor(predictor, configs, accuracies, steps=200, lr=3e-3) < 2e-4
    config, found = search_config(predictor, 5.0, population=12, rounds=8, generator=draws)
    assert 4.5 <= config.mean_bits <= 5.0
    assert min(config.weight_bits) > 2  # bits go where the accuracy hangs on them
    assert list(found.history) == sorted(found.history)


def test_bad_input_is_refused_by_name() -> None:
    model = elastic()
    with pytest.raises(ValueError, match="bits must be one of 2, 4, 8, got 3"):
        ElasticQuantizer(weight(), (2, 4, 8)).configure(3)
    with pytest.raises(ValueError, match="per_channel"):
        ElasticQuantizer(weight(), inputs=True).configure(4, per_channel=True)
    with pytest.raises(ValueError, match="different"):
        ElasticQuantizer(weight(), (2, 2))
    before = elastic_layers(model)["3"][0].bits
    with pytest.raises(ValueError, match="bits"):
        set_config(model, ElasticConfig((4, 3), (4, 4)))
    with pytest.raises(ValueError, match="layers"):
        set_config(model, ElasticConfig((4,), (4,)))
    assert elastic_layers(model)["3"][0].bits == before
    with pytest.raises(ValueError, match="elastic layers"):
        EQNet(nn.Linear(2, 2), torch.optim.SGD([torch.zeros(1)], lr=0.1))
    with pytest.raises(ValueError, match="at least two numbers"):
        weight_distribution_loss([])
    with pytest.raises(ValueError, match="accuracies"):
        fit_predictor(AccuracyPredictor(2, hidden=4), [], torch.zeros(1))


def test_weights_that_are_all_alike_do_not_spoil_the_others() -> None:
    alike, other = torch.zeros(6, requires_grad=True), torch.randn(50, requires_grad=True)
    weight_distribution_loss([alike, other]).backward()
    assert alike.grad.tolist() == [0.0] * 6
    alone = torch.autograd.grad(weight_distribution_loss([other]), other)[0]
    torch.testing.assert_close(other.grad, alone / 2)
