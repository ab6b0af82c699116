from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from trimtab.compress import (
    LSQActivation,
    LSQWeight,
    MinMaxActivation,
    MinMaxWeight,
    affine_qparams,
    fake_quantize,
    lsq_quantize,
    model_cost,
    prepare_quantized,
    recalibrate_bn,
)
from trimtab.compress.evolution import evolve


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Conv2d(3, 2, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8, 2),
        )


@pytest.mark.parametrize("signed", [True, False])
def test_agrees_with_torch(signed: bool) -> None:
    x = (3 * torch.randn(200, generator=seeded()) + 1).requires_grad_()
    low, high = x.detach().quantile(0.1), x.detach().quantile(0.9)
    step, zero = affine_qparams(low, high, 4, signed=signed)
    smallest, largest = (-8, 7) if signed else (0, 15)
    other = x.detach().clone().requires_grad_()
    ours = fake_quantize(x, step, zero, 4, signed=signed)
    theirs = torch.fake_quantize_per_tensor_affine(other, step.item(), int(zero), smallest, largest)
    torch.testing.assert_close(ours, theirs)
    ours.sum().backward()
    theirs.sum().backward()
    # torch takes what rounds into the range as inside, we what lies in it: they may differ next to its ends
    near = ((x.detach() / step + zero - smallest).abs() < 0.51) | ((x.detach() / step + zero - largest).abs() < 0.51)
    assert torch.equal(x.grad[~near], other.grad[~near])


@pytest.mark.parametrize(("low", "high"), [(0.5, 3.0), (-4.0, -1.0), (-3.0, 1.0), (-0.2, 5.0)])
def test_parameters_are_those_of_torchs_observer_also_where_zero_lies_outside(low: float, high: float) -> None:
    observing = pytest.importorskip("torch.ao.quantization.observer")
    for symmetric, scheme in ((False, torch.per_tensor_affine), (True, torch.per_tensor_symmetric)):
        observer = observing.MinMaxObserver(dtype=torch.qint8, qscheme=scheme)
        observer(torch.tensor([low, high]))
        step, zero_point = observer.calculate_qparams()
        found = affine_qparams(torch.tensor(low), torch.tensor(high), 8, symmetric=symmetric)
        # torch spreads a symmetric range over -127.5 to 127.5; here its end is the largest number there is.
        torch.testing.assert_close(found[0], step[0] * (127.5 / 127 if symmetric else 1))
        assert found[1] == zero_point[0]
        assert fake_quantize(torch.zeros(1), *found, 8).item() == 0


def test_learned_steps_start_and_learn_as_their_paper_says() -> None:
    """s = 2 <|v|> / sqrt(Q), and its gradient is divided by sqrt(N Q), N numbers that share the step."""
    weight, sample = torch.randn(3, 2, 5, generator=seeded()), torch.randn(7, 4, generator=seeded(1))
    whole, rows = LSQWeight(weight, 4), LSQWeight(weight, 4, per_channel=True)
    signed, unsigned = LSQActivation(sample, 4), LSQActivation(sample.abs(), 4)
    torch.testing.assert_close(whole.step.detach(), 2 * weight.abs().mean() / 7**0.5)
    torch.testing.assert_close(rows.step.detach()[:, 0, 0], 2 * weight.abs().mean((1, 2)) / 7**0.5)
    torch.testing.assert_close(signed.step.detach(), 2 * sample.abs().mean() / 7**0.5)
    torch.testing.assert_close(unsigned.step.detach(), 2 * sample.abs().mean() / 15**0.5)
    assert whole.scale == pytest.approx((30 * 7) ** -0.5)
    assert rows.scale == pytest.approx((10 * 7) ** -0.5)
    assert signed.scale == pytest.approx((4 * 7) ** -0.5)  # whatever the batch
    assert unsigned.scale == pytest.approx((4 * 15) ** -0.5)


def test_ends_of_a_range_come_back_and_values_on_the_grid_stay() -> None:
    low, high = torch.tensor(-1.3), torch.tensor(2.9)
    step, zero = affine_qparams(low, high, 5)
    ends = torch.stack([low, high])
    found = fake_quantize(ends, step, zero, 5)
    assert ((found - ends).abs() <= step / 2 + 1e-6).all()
    torch.testing.assert_close(fake_quantize(found, step, zero, 5), found)
    assert fake_quantize(torch.zeros(1), step, zero, 5).item() == 0


def test_a_learned_step_has_the_gradient_of_lsq() -> None:
    x = torch.tensor([0.3, -0.9, 5.0, -7.0])
    step = torch.tensor(0.5, requires_grad=True)
    lsq_quantize(x, step, 3, scale=0.1).sum().backward()
    assert step.grad.item() == pytest.approx(0.1 * ((1 - 0.6) + (-2 + 1.8) + 3 - 4), rel=1e-4)


def test_gradients_pass_clipped_values_where_they_should() -> None:
    x = torch.tensor([0.1, 50.0], requires_grad=True)
    one = torch.tensor(1.0)
    for pass_clipped, expected in ((False, [1.0, 0.0]), (True, [1.0, 1.0])):
        (slope,) = torch.autograd.grad(fake_quantize(x, one, 0 * one, 3, pass_clipped=pass_clipped).sum(), x)
        assert slope.tolist() == expected


def test_weights_by_channel_err_less() -> None:
    w = torch.randn(4, 30, generator=seeded()) * torch.logspace(-2, 1, 4)[:, None]
    for kind in (MinMaxWeight, LSQWeight):
        errors = [(kind(w, 4, per_channel=fine)(w) - w).square().mean(1)[0].item() for fine in (False, True)]
        assert errors[1] < errors[0]


def test_a_prepared_copy_quantises_and_leaves_the_model_alone() -> None:
    model, x = network(), torch.rand(6, 1, 6, 6, generator=seeded())
    before = copy.deepcopy(model.state_dict())
    small = prepare_quantized(model, x, 3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not hasattr(model[0], "input_quantizer")
    assert [small[i].input_quantizer.bits for i in (0, 3, 6)] == [8, 3, 8]
    assert len(small[3].weight.unique()) <= 8
    assert small[3].input_quantizer.signed is False
    wide = prepare_quantized(model, x, 16, weight=MinMaxWeight, inputs=MinMaxActivation).eval()
    torch.testing.assert_close(wide(x), model.eval()(x), atol=1e-3, rtol=1e-3)
    small.train()(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    parametrize.remove_parametrizations(small[3], "weight")
    assert len(small[3].weight.unique()) <= 8
    some = prepare_quantized(model, x, {"3": 2}, inputs=None)
    assert not parametrize.is_parametrized(some[0])


def test_state_round_trip_and_copies() -> None:
    model, x = network(), torch.rand(6, 1, 6, 6, generator=seeded())
    small = prepare_quantized(model, x, 3)
    other = prepare_quantized(model, 2 * x, 3)
    other.load_state_dict(small.state_dict())
    assert torch.equal(other.eval()(x), small.eval()(x))
    assert torch.equal(copy.deepcopy(small)(x), small(x))


def test_extremes_move_only_while_it_observes() -> None:
    quantizer = MinMaxActivation(torch.tensor([0.0, 1.0]), 4, momentum=0.5)
    quantizer(torch.tensor([-2.0, 3.0]))
    assert (quantizer.low.item(), quantizer.high.item()) == (0, 1)
    quantizer.observing = True
    quantizer(torch.tensor([-2.0, 3.0]))
    assert (quantizer.low.item(), quantizer.high.item()) == (-1, 2)
    quantizer.enabled = False
    x = torch.tensor([0.123])
    assert torch.equal(quantizer(x), x)


def test_extremes_move_as_torchs_moving_average() -> None:
    observing = pytest.importorskip("torch.ao.quantization.observer")
    batches = torch.randn(5, 20, generator=seeded()) * torch.arange(1, 6)[:, None]
    ours = MinMaxActivation(batches[0], 8, momentum=0.2)
    theirs = observing.MovingAverageMinMaxObserver(averaging_constant=0.2)
    theirs(batches[0])
    ours.observing = True
    for batch in batches[1:]:
        ours(batch)
        theirs(batch)
    torch.testing.assert_close((ours.low, ours.high), (theirs.min_val, theirs.max_val))


def test_works_in_other_precisions() -> None:
    model, x = network(), torch.rand(6, 1, 6, 6, generator=seeded())
    small = prepare_quantized(model, x, 4).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert small(x).isfinite().all()
    assert prepare_quantized(model.double(), x.double(), 4)(x.double()).dtype == torch.float64


def test_statistics_anew_are_those_of_the_data() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)).train()
    x = torch.randn(64, 3, generator=seeded())
    model[1].momentum = 0.3
    recalibrate_bn(model, x.split(32))
    z = model[0](x).detach()
    torch.testing.assert_close(model[1].running_mean, z.mean(0), atol=1e-6, rtol=1e-5)
    expected = torch.stack([part.var(0) for part in z.split(32)]).mean(0)
    torch.testing.assert_close(model[1].running_var, expected)
    assert model.training
    assert model[2].training
    assert model[1].momentum == 0.3
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate_bn(model, [])


def test_cost() -> None:
    model, x = network(), torch.rand(2, 1, 6, 6, generator=seeded())
    cost = model_cost(model, x)
    assert [layer.weights for layer in cost.layers] == [27, 54, 16]
    assert [layer.multiply_adds for layer in cost.layers] == [27 * 16, 54 * 4, 16]
    assert cost.size == 97 * 32
    assert cost.operations == cost.multiply_adds * 1024
    small = model_cost(prepare_quantized(model, x, 3), x)
    assert [(layer.weight_bits, layer.input_bits) for layer in small.layers] == [(8, 8), (3, 3), (8, 8)]
    assert model.training
    with torch.no_grad():
        model[3].weight[0] = 0
    half = model_cost(model, x).layers[1]
    assert (half.nonzero, half.multiply_adds, half.size) == (27, 108, 27 * 32 + 54)
    meta = model_cost(copy.deepcopy(model).to("meta"), x.to("meta"))
    assert meta.dense_multiply_adds == cost.multiply_adds
    attention = nn.MultiheadAttention(8, 2, batch_first=True)

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x)[0]

    found = model_cost(Attends(), torch.zeros(3, 5, 8))
    assert found.multiply_adds == 4 * 64 * 5 + 2 * 25 * 8
    with pytest.raises(ValueError, match="empty"):
        model_cost(model, x[:0])


def test_evolution_finds_the_best_within_the_constraint() -> None:
    calls: list[tuple[int, ...]] = []

    def score(held: list[tuple[int, ...]]) -> list[float]:
        calls.extend(held)
        return [float(sum(v * (n + 1) for n, v in enumerate(c))) for c in held]

    found = evolve(score, [range(4)] * 5, feasible=lambda c: sum(c) <= 6, population=24, rounds=30, generator=seeded())
    assert found.best == (0, 0, 0, 3, 3)
    assert len(calls) == len(set(calls)) == found.scored
    assert all(sum(c) <= 6 for c in calls)
    again = evolve(score, [range(4)] * 5, feasible=lambda c: sum(c) <= 6, population=24, rounds=30, generator=seeded())
    assert again == found
    with pytest.raises(ValueError, match="feasible"):
        evolve(score, [range(4)] * 5, feasible=lambda c: False)
    with pytest.raises(ValueError, match="finite"):
        evolve(lambda held: [float("nan")] * len(held), [range(2)], population=2)
    with pytest.raises(ValueError, match="start"):
        evolve(score, [range(2)] * 2, start=[(1,)])


def test_bad_input_is_refused_by_name() -> None:
    model, x = network(), torch.rand(6, 1, 6, 6, generator=seeded())
    with pytest.raises(ValueError, match="bits"):
        prepare_quantized(model, x, 0)
    with pytest.raises(ValueError, match="bits must name layers among 0, 3, 6, got 4"):
        prepare_quantized(model, x, {"4": 3})
    with pytest.raises(ValueError, match="parametrized"):
        prepare_quantized(prepare_quantized(model, x, 4), x, 4)
    with pytest.raises(ValueError, match="layers"):
        prepare_quantized(nn.ReLU(), x, 4)
    with pytest.raises(ValueError, match="high"):
        affine_qparams(torch.zeros(2), torch.zeros(3), 4)
    with pytest.raises(ValueError, match="sample"):
        LSQActivation(torch.zeros(0), 4)
    with pytest.raises(TypeError, match="weight"):
        LSQWeight(torch.zeros(2, 2, dtype=torch.int64), 4)


def plain_lsq(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """The formula with its rounding passed straight through, at 4 bits."""
    ratio = (x / (step.abs() + 1e-8)).clamp(-8, 7)
    return (ratio + (ratio.round() - ratio).detach()) * (step.abs() + 1e-8)


def test_second_derivatives_and_gradients_of_single_samples_are_those_of_the_formula() -> None:
    x, step = 3 * torch.randn(6, 5, generator=seeded(), dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    hessians, singles = [], []
    for quantize in (lambda x, s: lsq_quantize(x, s, 4), plain_lsq):
        leaves = [x.clone().requires_grad_(), step.clone().requires_grad_()]
        slopes = torch.autograd.grad(quantize(*leaves).sin().sum(), leaves, create_graph=True)
        hessians.append(torch.autograd.grad(sum(slope.square().sum() for slope in slopes), leaves))
        of_one = torch.func.grad(lambda x, s, q=quantize: q(x, s).square().sum(), argnums=(0, 1))
        singles.append(torch.func.vmap(of_one, (0, None))(x, step))
    torch.testing.assert_close(hessians[0], hessians[1])
    torch.testing.assert_close(singles[0], singles[1])
