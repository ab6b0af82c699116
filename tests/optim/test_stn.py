"""Self-tuning networks: layers against plain ones, gradients against differences, bilevel problems with known ends."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.optim import (
    HyperParameter,
    HyperParameters,
    SelfTuner,
    STNConv2d,
    STNDropout,
    STNDropout2d,
    STNLinear,
    collapse_stn,
    constrain,
    convert_to_stn,
    per_example_dropout,
    per_example_weight_decay,
    responding,
    unconstrain,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def network(seed=0):
    """A convolution, normalisation, both kinds of dropout, linear layers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1, padding_mode="circular", bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout2d(),
            nn.Flatten(),
            nn.Linear(64, 8),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(8, 3),
        )


def two():
    return HyperParameters(
        {"conv": HyperParameter(0.05, 0.0, 0.9), "rate": HyperParameter(0.3, 0.0, 0.9), "l2": HyperParameter(1e-3, 0.0)}
    )


DROPOUT = {"3": "conv", "7": "rate"}


def tuner(**options):
    hparams = two()
    model = convert_to_stn(network(), hparams, dropout=DROPOUT, generator=seeded(7))
    options = {"warmup": 0, "generator": seeded(3), **options}
    return SelfTuner(model, hparams, penalty=lambda m, h, v: per_example_weight_decay(m, h, v["l2"]), **options)


def batches(count=4, size=16):
    x = randn(count, size, 1, 8, 8)
    y = torch.randint(0, 3, (count, size), generator=seeded(1))
    return list(zip(x, y, strict=True))


# --- hyper-parameters -------------------------------------------------------------------------------------------------


def test_stretched_logit_of_a_known_rate():
    assert unconstrain(0.05, 0.0, 0.9) == pytest.approx(math.log(0.05 / 0.85), rel=1e-12)
    assert unconstrain(0.05, 0.0, 0.9) == pytest.approx(-2.8332133, abs=1e-7)


BOUNDS = [(0.0, 0.9), (-2.0, 3.0), (0.0, math.inf), (-math.inf, 1.5), (-math.inf, math.inf)]


@pytest.mark.parametrize(("low", "high"), BOUNDS)
@given(x=st.floats(-8, 8))
@settings(max_examples=20, deadline=None)
def test_bounds_are_kept_and_undone(low, high, x):
    value = constrain(torch.tensor(x, dtype=torch.float64), low, high).item()
    assert low < value < high
    assert unconstrain(value, low, high) == pytest.approx(x, abs=1e-8)


@pytest.mark.parametrize(("low", "high", "slope"), [(-2.0, 3.0, 1.25), (1.0, math.inf, 0.5), (-math.inf, 1.0, -0.5)])
def test_slopes_in_the_middle(low, high, slope):
    """A stretched sigmoid has a quarter of the width; the softplus one half, and it falls from an upper bound."""
    x = torch.zeros((), requires_grad=True)
    assert torch.autograd.grad(constrain(x, low, high), x)[0].item() == pytest.approx(slope)


@pytest.mark.parametrize(
    ("value", "low", "high"), [(0.0, 0.0, 0.9), (0.9, 0.0, 0.9), (1.0, 2.0, 3.0), (math.nan, 0, 1)]
)
def test_values_outside_of_their_bounds_are_refused(value, low, high):
    with pytest.raises(ValueError, match="value must be strictly between"):
        unconstrain(value, low, high)
    with pytest.raises(ValueError, match="init"):
        HyperParameter(value, low, high)


def test_entropy_of_unit_scales():
    hparams = HyperParameters({name: HyperParameter(0.5, scale=1.0) for name in "ab"})
    assert hparams.entropy().item() == pytest.approx(2 * 1.4189385, abs=1e-6)
    scales = torch.distributions.Normal(0, two().scales()).entropy().sum()
    torch.testing.assert_close(two().entropy(), scales)


def test_samples_are_perturbed_by_the_scale_in_the_unbounded_space():
    hparams = HyperParameters({"a": HyperParameter(0.3, 0, 1, scale=0.5), "b": HyperParameter(2.0, scale=0.1)})
    noise = torch.tensor([[1.0, -1.0], [0.0, 2.0]])
    start = torch.tensor([math.log(0.3 / 0.7), 2.0])
    expected = start + noise * torch.tensor([0.5, 0.1])
    torch.testing.assert_close(hparams.sample(2, noise=noise), expected)
    drawn = hparams.sample(20_000, generator=seeded())
    torch.testing.assert_close(drawn.std(0), torch.tensor([0.5, 0.1]), rtol=0.03, atol=0)
    assert torch.equal(hparams.sample(5, generator=seeded()), hparams.sample(5, generator=seeded()))
    values = hparams.values(expected)
    torch.testing.assert_close(values["a"], expected[:, 0].sigmoid())
    torch.testing.assert_close(values["b"], expected[:, 1])


def test_a_perturbation_may_be_shared_by_the_batch():
    hparams = HyperParameters({"own": HyperParameter(0.0), "shared": HyperParameter(0.0, per_example=False)})
    drawn = hparams.sample(64, generator=seeded())
    assert drawn[:, 1].unique().numel() == 1
    assert drawn[:, 0].unique().numel() == 64


def test_discrete_ones_are_used_as_integers_and_answered_to_as_numbers():
    hparams = HyperParameters({"holes": HyperParameter(2, 0, 5, discrete=True)})
    assert hparams.values()["holes"].item() == 2
    drawn = hparams.sample(2000, generator=seeded())
    values = hparams.values(drawn)["holes"]
    assert set(values.tolist()) == {0, 1, 2, 3, 4} & set(values.tolist()) > {1, 2, 3}
    assert drawn.unique().numel() == 2000


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: HyperParameter(0.5, scale=0.0), "scale"),
        (lambda: HyperParameter(0.5, 0, 4, discrete=True), "init"),
        (lambda: HyperParameter(5, 0, 5, discrete=True), "init"),
        (lambda: HyperParameters({}), "items"),
        (lambda: two().sample(3, noise=torch.zeros(3, 2)), "noise"),
        (lambda: two().values(torch.zeros(5, 2)), "h must"),
        (lambda: STNLinear(2, 2, num_hparams=0), "num_hparams"),
        (lambda: STNLinear(2, 2, num_hparams=3)(torch.zeros(4, 2), torch.zeros(4, 2)), r"\(4, 3\) or \(3,\).*\(4, 2\)"),
        (lambda: STNLinear(2, 2, num_hparams=3)(torch.zeros(4, 2), torch.zeros(5, 3)), "h must"),
        (lambda: per_example_dropout(torch.zeros(4, 2), torch.zeros(3)), "p must"),
        (lambda: per_example_dropout(torch.zeros(4, 2), torch.zeros(4), uniform=torch.zeros(4)), "uniform"),
        (lambda: convert_to_stn(nn.ReLU(), two()), "module"),
        (lambda: convert_to_stn(network(), two(), skip=["2"]), "skip"),
        (lambda: convert_to_stn(network(), two(), dropout={"2": "rate"}), "dropout.*'2'"),
        (lambda: convert_to_stn(network(), two(), dropout={"7": "speed"}), "dropout.*'speed'"),
        (lambda: per_example_weight_decay(nn.Linear(2, 2), torch.zeros(4, 2), torch.zeros(2)), "rates"),
        (lambda: tuner(train_steps=0), "train_steps"),
        (lambda: tuner(valid_steps=0), "valid_steps"),
        (lambda: tuner(warmup=-1), "warmup"),
        (lambda: tuner(entropy_weight=-1.0), "entropy_weight"),
        (lambda: tuner().epoch(batches(), []), "valid"),
    ],
)
def test_bad_input_is_named(make, argument):
    with pytest.raises(ValueError, match=argument):
        make()


def test_a_refused_conversion_changes_nothing():
    model = network()
    kinds = [type(part) for part in model.modules()]
    for options in ({"skip": ["nothing"]}, {"dropout": {"7": "speed"}}, {"dropout": {"0": "rate"}}):
        with pytest.raises(ValueError):
            convert_to_stn(model, two(), **options)
    assert [type(part) for part in model.modules()] == kinds
    assert model.state_dict().keys() == network().state_dict().keys()
    with pytest.raises(TypeError, match="items"):
        HyperParameters({"a": 0.5})


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h", [None, torch.zeros(6, 3), torch.zeros(3)])
def test_without_hyper_parameters_layers_are_the_plain_ones_exactly(h):
    linear, conv = STNLinear(5, 4, num_hparams=3), STNConv2d(2, 4, 3, num_hparams=3)
    x, image = randn(6, 5), randn(6, 2, 5, 5)
    assert torch.equal(linear(x, h), F.linear(x, linear.weight, linear.bias))
    assert torch.equal(conv(image, h), F.conv2d(image, conv.weight, conv.bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (7,), (7, 3)])
def test_linear_layer_follows_the_formula(leading, bias):
    """y = s (W x + b) + c_w (V x) + c_b v, with c = C h, written out for each example."""
    layer = STNLinear(5, 4, num_hparams=3, bias=bias).double()
    with torch.no_grad():
        layer.scale.fill_(1.7)
    x, h = randn(6, *leading, 5).double(), randn(6, 3, seed=1).double()
    c_w, c_b = h @ layer.gate[:4].T, h @ layer.gate[4:].T
    for i, out in enumerate(layer(x, h)):
        plain, response = x[i] @ layer.weight.T, x[i] @ layer.response_weight.T
        expected = 1.7 * plain + c_w[i] * response
        if bias:
            expected = expected + 1.7 * layer.bias + c_b[i] * layer.response_bias
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("kind", ["Linear", "Conv1d", "Conv2d", "Conv3d"])
def test_every_example_sees_the_plain_layer_that_answers_to_its_hyper_parameters(kind):
    spatial = {"Linear": 0, "Conv1d": 1, "Conv2d": 2, "Conv3d": 3}[kind]
    plain = nn.Linear(4, 6) if not spatial else getattr(nn, kind)(4, 6, 3, stride=2, padding=1, groups=2)
    hparams = two()
    layer = convert_to_stn(plain.double(), hparams, generator=seeded())
    assert layer is plain
    with torch.no_grad():
        layer.scale.fill_(0.8)
        layer.gate.mul_(100)
    x, h = randn(5, 4, *[6] * spatial).double(), randn(5, 3, seed=1).double()
    out = layer(x, h)
    for i in range(5):
        one = layer(x[i : i + 1], h[i])
        torch.testing.assert_close(out[i : i + 1], one)
        weight, bias = layer.response(h[i])
        torch.testing.assert_close(one, layer.product(x[i : i + 1], weight, bias))
        torch.testing.assert_close(layer.squared_norm(h)[i], weight.square().sum())
        torch.testing.assert_close(layer.squared_norm(h[i]), weight.square().sum())


@pytest.mark.parametrize("layer", [STNLinear(5, 4, num_hparams=3), STNConv2d(5, 4, 1, num_hparams=3)])
def test_output_is_affine_in_the_hyper_parameters(layer):
    x = randn(6, 5) if isinstance(layer, STNLinear) else randn(6, 5, 2, 2)
    one, other, share = randn(6, 3, seed=1), randn(6, 3, seed=2), 0.3
    mixed = layer(x, share * one + (1 - share) * other)
    torch.testing.assert_close(mixed, share * layer(x, one) + (1 - share) * layer(x, other), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(layer(x, one), layer(x, other), atol=1e-4)


def test_the_response_starts_small():
    """Weights are uniform within 1/sqrt(fan in), gates normal with deviation 0.01."""
    layer = STNConv2d(8, 200, 3, num_hparams=5)
    assert layer.response_weight.abs().max().item() == pytest.approx(72**-0.5, rel=1e-2)
    assert layer.response_bias.abs().max().item() == pytest.approx(72**-0.5, rel=5e-2)
    assert layer.gate.std().item() == pytest.approx(0.01, rel=0.05)
    assert layer.gate.shape == (400, 5)


def test_gradients_of_the_layer():
    layer = STNLinear(3, 2, num_hparams=2).double()
    parameters = {name: p.detach().requires_grad_() for name, p in layer.named_parameters()}

    def output(x, h, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x, h))

    x, h = randn(4, 3).double().requires_grad_(), randn(4, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(output, (x, h, *parameters.values()))
    assert torch.autograd.gradcheck(output, (x, h[0].detach().requires_grad_(), *parameters.values()))


# --- conversion -------------------------------------------------------------------------------------------------------


def test_a_converted_network_is_the_old_one_at_zero():
    model = network()
    parameters, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    assert convert_to_stn(model, two(), dropout=DROPOUT, skip=["8"]) is model
    assert isinstance(model[5], STNLinear)
    assert type(model[8]) is nn.Linear
    assert isinstance(model[3], STNDropout2d)
    assert isinstance(model[7], STNDropout)
    for name, value in parameters.items():
        assert model.get_parameter(name) is value
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    x, old = randn(6, 1, 8, 8), network().eval()
    model.eval()
    with responding(model, torch.zeros(6, 3)):
        assert torch.equal(model(x), old(x))
    with responding(model, randn(6, 3)):
        assert not torch.allclose(model(x), old(x), atol=1e-4)
    assert torch.equal(model(x), old(x))


def test_attention_keeps_its_own_layers_and_what_is_in_the_block_converts():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    convert_to_stn(model, two(), dropout={"dropout": "rate"}, generator=seeded())
    assert isinstance(model.linear1, STNLinear)
    assert not isinstance(model.self_attn.out_proj, STNLinear)
    h = two().sample(5, generator=seeded())
    model.train()
    with responding(model, h, two().values(h)):
        assert model(randn(5, 3, 8)).isfinite().all()
    with pytest.raises(RuntimeError, match="'rate' has no rate"):
        model(randn(5, 3, 8))


def test_a_collapsed_network_is_plain_and_gives_the_same():
    ours = tuner()
    for _ in range(3):
        ours.epoch(batches(), batches(2))
    x = randn(6, 1, 8, 8, seed=5)
    expected, values = ours.predict(x), ours.hparams.values()
    plain = collapse_stn(ours.model, ours.hparams).eval()
    torch.testing.assert_close(plain(x), expected)
    assert [type(part) for part in plain.modules()] == [type(part) for part in network().modules()]
    assert plain[7].p == pytest.approx(values["rate"].item())
    assert plain[3].p == pytest.approx(values["conv"].item())
    fresh = network()
    fresh.load_state_dict(plain.state_dict())


# --- regularisers -----------------------------------------------------------------------------------------------------


def test_dropout_at_rates_of_its_own_for_each_example():
    x, p = torch.ones(4, 5000), torch.tensor([0.0, 0.25, 0.5, 0.9])
    dropped = per_example_dropout(x, p, generator=seeded())
    assert torch.equal(dropped[0], x[0])
    for row, rate in zip(dropped[1:], p[1:], strict=True):
        torch.testing.assert_close(row[row > 0], torch.full_like(row[row > 0], 1 / (1 - rate)))
        assert (row == 0).float().mean().item() == pytest.approx(rate.item(), abs=0.02)
    torch.testing.assert_close(dropped.mean(1), torch.ones(4), atol=0.1, rtol=0)


def test_dropout_of_channels_and_with_given_numbers():
    x = torch.ones(2, 3, 4, 4)
    uniform = torch.tensor([[0.1, 0.5, 0.9], [0.1, 0.5, 0.9]]).view(2, 3, 1, 1)
    dropped = per_example_dropout(x, torch.tensor([0.2, 0.6]), channels=True, uniform=uniform)
    expected = torch.tensor([[0.0, 1.25, 1.25], [0.0, 0.0, 2.5]])
    torch.testing.assert_close(dropped, expected.view(2, 3, 1, 1).expand(2, 3, 4, 4))


def test_dropout_passes_no_gradient_to_its_rates():
    p = torch.full((3,), 0.5, requires_grad=True)
    x = torch.ones(3, 4, requires_grad=True)
    per_example_dropout(x, p, uniform=torch.linspace(0, 0.99, 12).view(3, 4)).sum().backward()
    assert p.grad is None
    torch.testing.assert_close(x.grad, (torch.linspace(0, 0.99, 12).view(3, 4) >= 0.5) * 2.0)


def test_weight_decay_is_each_examples_own():
    """Against weights formed for every example; a plain layer's weight counts with the same rate."""
    model = convert_to_stn(network(), two(), skip=["8"], generator=seeded())
    h, rates = randn(4, 3), torch.tensor([0.0, 0.1, 1.0, 2.0])
    own = [sum(model[i].response(row)[0].square().sum() for i in (0, 5)) + model[8].weight.square().sum() for row in h]
    torch.testing.assert_close(per_example_weight_decay(model, h, rates), 0.5 * (rates * torch.stack(own)).mean())


def test_weight_decay_without_response_is_sgds():
    model, plain = convert_to_stn(nn.Linear(4, 3, bias=False), two()), nn.Linear(4, 3, bias=False)
    plain.load_state_dict({"weight": model.weight.detach().clone()})
    per_example_weight_decay(model, torch.zeros(8, 3), torch.full((8,), 0.3)).backward()
    plain(torch.zeros(1, 4)).sum().backward()
    torch.optim.SGD(plain.parameters(), lr=0.1, weight_decay=0.3).step()
    torch.testing.assert_close(model.weight - 0.1 * model.weight.grad, plain.weight)


# --- the loop ---------------------------------------------------------------------------------------------------------


def snapshot(module):
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def moved(before, module):
    return {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("tune_scales", [True, False])
def test_each_step_moves_its_own(tune_scales):
    ours = tuner(tune_scales=tune_scales)
    weights, hparams = snapshot(ours.model), snapshot(ours.hparams)
    ours.train_step(*batches()[0])
    assert moved(weights, ours.model) == set(weights)
    assert not moved(hparams, ours.hparams)
    assert all(p.grad is None for p in ours.hparams.parameters())
    ours.optimizer.zero_grad()
    weights, buffers = snapshot(ours.model), copy.deepcopy(dict(ours.model.named_buffers()))
    ours.valid_step(*batches()[1])
    assert not moved(weights, ours.model)
    assert all(p.grad is None for p in ours.model.parameters())
    assert all(torch.equal(value, buffers[name]) for name, value in ours.model.named_buffers())
    assert moved(hparams, ours.hparams) == ({"h", "rho"} if tune_scales else {"h"})


def test_parts_keep_the_mode_they_were_in():
    ours = tuner()
    ours.model.train()
    ours.model[1].eval()
    ours.valid_step(*batches()[0])
    ours.predict(batches()[0][0])
    assert ours.model.training
    assert ours.model[7].training
    assert not ours.model[1].training


def test_the_hypergradient_is_that_of_the_collapsed_network():
    """Central differences of the validation loss of plain networks at nearby hyper-parameters."""
    ours = tuner(tune_scales=False, hyper_optimizer=None)
    ours.model.double()
    ours.hparams.double()
    x, y = randn(12, 1, 8, 8).double(), torch.arange(12) % 3
    for _ in range(3):
        ours.train_step(x, y)

    def loss(shift):
        model, hparams = copy.deepcopy((ours.model, ours.hparams))
        with torch.no_grad():
            hparams.h += shift
        return F.cross_entropy(collapse_stn(model, hparams).eval()(x), y).item()

    expected = [(loss(1e-5 * e) - loss(-1e-5 * e)) / 2e-5 for e in torch.eye(3).double()]
    ours.valid_step(x, y)
    torch.testing.assert_close(ours.hparams.h.grad, torch.tensor(expected).double(), rtol=1e-5, atol=1e-9)


def test_the_entropy_keeps_the_scales_up():
    gradients = []
    for weight in (0.0, 0.5):
        ours = tuner(entropy_weight=weight)
        ours.valid_step(*batches()[0])
        gradients.append(ours.hparams.rho.grad)
    rho = two().rho.detach()
    torch.testing.assert_close(gradients[1] - gradients[0], -0.5 * rho.sigmoid() / F.softplus(rho))


def test_training_without_a_response_is_plain_training():
    """At zero, without perturbations and rates, and with the scale held, plain parameters move as SGD moves them."""
    hparams = HyperParameters({"a": HyperParameter(0.0, scale=1e-30)})
    model, plain = network().eval(), network()
    for i in (3, 7):
        model[i].p = plain[i].p = 0.0
    convert_to_stn(model, hparams)
    held = [p for name, p in model.named_parameters() if name in dict(plain.named_parameters())]
    ours = SelfTuner(model, hparams, optimizer=torch.optim.SGD(held, lr=0.1, momentum=0.9))
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches():
        ours.train_step(x, y)
        sgd.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        sgd.step()
    for name, value in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), value)


def test_turns_and_warm_up():
    calls = []

    class Logged(SelfTuner):
        def train_step(self, x, *targets):
            calls.append("t")
            return torch.zeros(())

        def valid_step(self, x, *targets):
            calls.append(f"v{targets[0]}")
            return torch.zeros(())

    hparams = two()
    ours = Logged(convert_to_stn(network(), hparams), hparams, train_steps=2, valid_steps=1, warmup=1)
    train, valid = [(torch.zeros(1),)] * 3, [(torch.zeros(1), 0), (torch.zeros(1), 1)]
    assert set(ours.epoch(train, valid)) == {"train"}
    assert calls == ["t"] * 3
    calls.clear()
    assert set(ours.epoch(train * 2, valid)) == {"train", "valid"}
    assert "".join(calls) == "tv0ttv1ttv0t"  # the count of steps goes on from the warm-up


def test_any_loss_and_augmentation():
    """A loss with three arguments; inputs changed by the examples' own hyper-parameters, in training alone."""
    hparams = HyperParameters({"noise": HyperParameter(0.2, 0.0, 1.0)})
    seen = []

    def augment(x, values):
        seen.append(values["noise"])
        return x + values["noise"].view(-1, 1)

    def loss(output, target, weight):
        return (weight * (output - target).square().sum(1)).mean()

    ours = SelfTuner(convert_to_stn(nn.Linear(4, 2), hparams), hparams, loss, augment=augment, warmup=0)
    batch = randn(8, 4), randn(8, 2), torch.ones(8)
    ours.train_step(*batch)
    (values,) = seen
    assert values.shape == (8,)
    assert values.unique().numel() == 8
    assert not values.requires_grad
    ours.valid_step(*batch)
    assert len(seen) == 1


def test_saved_in_the_middle_it_goes_on_the_same():
    ours = tuner(warmup=1)
    ours.epoch(batches(3), batches(2))
    held = io.BytesIO()
    torch.save(ours.state_dict(), held)
    held.seek(0)
    again = tuner(warmup=1)
    again.load_state_dict(torch.load(held, weights_only=True))
    for each in (ours, again):
        each.generator = seeded(11)
        each.epoch(batches(), batches(2))
    for one, other in ((ours.model, again.model), (ours.hparams, again.hparams)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_the_generator_decides_everything():
    ends = []
    for seed in (1, 1, 2):
        ours = tuner(generator=seeded(seed))
        ours.epoch(batches(), batches(2))
        ends.append(ours.hparams.h.detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_copies_go_their_own_way():
    ours = tuner(generator=None)
    model, hparams = copy.deepcopy((ours.model, ours.hparams))
    expected = copy.deepcopy(ours).predict(batches()[0][0])
    ours.epoch(batches(), batches(2))
    torch.testing.assert_close(SelfTuner(model, hparams).predict(batches()[0][0]), expected)


def ridge(a=2.0, log_strength=0.3, **options):
    """Training: (w - a)^2 / 2 + e^h w^2 / 2, whose best response is a / (1 + e^h)."""
    hparams = HyperParameters({"strength": HyperParameter(log_strength, scale=0.2)})
    model = convert_to_stn(nn.Linear(1, 1, bias=False), hparams, generator=seeded(2))
    ours = SelfTuner(
        model,
        hparams,
        lambda output, target: 0.5 * (output - target).square().mean(),
        torch.optim.Adam(model.parameters(), lr=0.1),
        penalty=lambda m, h, v: per_example_weight_decay(m, h, v["strength"].exp()),
        generator=seeded(4),
        warmup=0,
        **options,
    )
    return ours, (torch.ones(256, 1), torch.full((256, 1), a))


def test_ridge_response_has_the_slope_of_the_best_response():
    ours, batch = ridge()
    for _ in range(250):
        ours.train_step(*batch)
    h = ours.hparams.h.detach().requires_grad_()
    weight = ours.model.response(h)[0].sum()
    strength = math.exp(0.3)
    assert weight.item() == pytest.approx(2 / (1 + strength), rel=0.01)
    slope = torch.autograd.grad(weight, h)[0].item()
    assert slope == pytest.approx(-2 * strength / (1 + strength) ** 2, rel=0.05)


def test_ridge_strength_is_found_by_validation():
    """The validation loss (w - 1/2)^2 / 2 is least where a / (1 + e^h) is 1/2: at h = ln 3."""
    ours, batch = ridge(tune_scales=False)
    ours.hyper_optimizer = torch.optim.Adam(ours.hparams.parameters(), lr=0.03)
    ours.warmup = 1
    valid = batch[0], torch.full((256, 1), 0.5)
    for _ in range(3):
        ours.epoch([batch] * 200, [valid])
    assert ours.hparams.h.item() == pytest.approx(math.log(3), abs=0.05)


class TestWhatCannotBeConverted:
    def hparams(self, name: str = "rate") -> HyperParameters:
        return HyperParameters({name: HyperParameter(0.05, 0.0, 0.9)})

    def test_shared_weights_are_refused_for_each_layer_has_a_response_of_its_own(self):
        tied = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 2))
        tied[2].weight = tied[0].weight
        with pytest.raises(ValueError, match="module must not share weights, got those of layer '0'"):
            convert_to_stn(tied, self.hparams())
        assert [type(layer) for layer in tied] == [nn.Linear, nn.ReLU, nn.Linear, nn.Linear]
        convert_to_stn(tied, self.hparams(), skip=["0", "2"])
        assert type(tied[3]) is STNLinear

    def test_one_layer_in_two_places_is_no_sharing(self):
        layer = nn.Linear(3, 3)
        net, hparams = nn.Sequential(layer, nn.Tanh(), layer), self.hparams()
        convert_to_stn(net, hparams)
        with torch.no_grad():
            net[0].gate.normal_(generator=torch.Generator().manual_seed(0))
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
        with responding(net, hparams.h):
            expected = net(x)
        torch.testing.assert_close(collapse_stn(net, hparams)(x), expected)

    def test_other_hyper_parameters_collapse_nothing(self):
        net = convert_to_stn(nn.Sequential(nn.Linear(3, 3), nn.Dropout()), self.hparams(), dropout={"1": "rate"})
        before = copy.deepcopy(net.state_dict())
        two = HyperParameters({"rate": HyperParameter(0.05, 0.0, 0.9), "more": HyperParameter(1.0)})
        for other, message in ((self.hparams("other"), "hparams must hold 'rate'"), (two, "hparams must be the 1")):
            with pytest.raises(ValueError, match=message):
                collapse_stn(net, other)
            assert net.state_dict().keys() == before.keys()
            assert all(torch.equal(net.state_dict()[name], held) for name, held in before.items())


@pytest.mark.parametrize("high", [5.0, 4.5, math.inf])
def test_a_discrete_hyper_parameter_stays_below_its_bound_where_rounding_reaches_it(high) -> None:
    held = HyperParameters({"holes": HyperParameter(2, 0, high, discrete=True)})
    far = held.values(torch.tensor([[30.0], [-200.0]]))["holes"].tolist()
    assert far == ([30.0, 0.0] if high == math.inf else [4.0, 0.0])
