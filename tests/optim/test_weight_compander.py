"""The weight compander's curve against closed forms, its gradients, and what happens to networks under it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from trimtab.optim import (
    WeightCompander,
    apply_weight_compander,
    compand,
    compander_param_groups,
    inverse_compand,
    remove_weight_compander,
)

positive = st.floats(0.05, 20.0)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def test_known_values():
    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    value = compand(one, a=1.0, b=1.0)
    assert value.item() == pytest.approx(0.78539816, abs=1e-8)
    assert torch.autograd.grad(value, one)[0].item() == pytest.approx(0.5)


@given(a=positive, b=positive, seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_odd_monotone_and_bounded(a, b, seed):
    v = (10 * b * randn(50, seed=seed).double()).sort().values
    w = compand(v, a, b)
    torch.testing.assert_close(compand(-v, a, b), -w)
    assert (w.diff() > 0).all()
    assert w.abs().max() < a * math.pi / 2
    assert compand(torch.tensor(1e12), a, b).item() == pytest.approx(a * math.pi / 2, rel=1e-5)


@given(a=positive, b=positive, seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_inverse_within_the_bound(a, b, seed):
    share = 0.999 * torch.rand(100, generator=torch.Generator().manual_seed(seed)) * 2 - 0.999
    w = share * a * math.pi / 2
    torch.testing.assert_close(compand(inverse_compand(w, a, b), a, b), w, atol=1e-6 * a, rtol=0)
    compander = WeightCompander(a, b)
    torch.testing.assert_close(compander(compander.right_inverse(w)), w, atol=1e-6 * a, rtol=1e-6)


def test_small_weights_are_expanded_and_large_ones_compressed():
    """With a = 1.5 and b = 1 the two meet where 1.5 arctan(v) = v, near 1.45."""
    v = torch.tensor([0.01, 0.5, 1.4, 1.5, 3.0])
    assert (compand(v, 1.5, 1.0) > v).tolist() == [True, True, True, False, False]
    small = torch.tensor(1e-3, dtype=torch.float64)
    assert (compand(small, 1.5, 1.0) / small).item() == pytest.approx(1.5, rel=1e-5)


def test_gradients_of_latents_and_of_the_curve():
    compander = WeightCompander(0.8, 0.3, learnable=True).double()
    v, upstream = randn(4, 5).double().requires_grad_(), randn(4, 5, seed=1).double()
    a, b = compander.a.item(), compander.b.item()
    compander(v).backward(upstream)
    torch.testing.assert_close(v.grad, upstream * (a / b) / (1 + (v / b) ** 2))
    # The curve's parameters are logarithms: da = a dlog(a).
    torch.testing.assert_close(compander.log_a.grad / a, (upstream * (v / b).atan()).sum())
    torch.testing.assert_close(compander.log_b.grad / b, -(upstream * a * v / (b**2 + v**2)).sum())


def test_a_nearly_straight_curve_trains_as_the_plain_network():
    plain, bent = network(), network()
    bent.load_state_dict(plain.state_dict())
    apply_weight_compander(bent, a=1e4, b=1e4)
    x, y = randn(6, 1, 4, 4), torch.arange(6) % 3
    for model in (plain, bent):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    for index in (0, 3, 5):
        torch.testing.assert_close(bent[index].weight, plain[index].weight, rtol=1e-5, atol=1e-6)


def test_defaults_of_each_layer():
    """The bound is four deviations of the layer's weights, the slope at zero 1.5."""
    model = network()
    deviations = {i: model[i].weight.std().item() for i in (0, 3, 5)}
    apply_weight_compander(model)
    for i, deviation in deviations.items():
        (compander,) = model[i].parametrizations.weight
        assert compander.a.item() * math.pi / 2 == pytest.approx(4 * deviation, rel=1e-5)
        assert (compander.a / compander.b).item() == pytest.approx(1.5, rel=1e-5)
    assert [name for name, _ in model.named_parameters() if "log" in name] == []


def test_an_outlier_widens_the_bound_of_its_layer():
    layer = nn.Linear(50, 40)
    with torch.no_grad():
        layer.weight[0, 0] = 5.0
    before = layer.weight.detach().clone()
    apply_weight_compander(layer)
    torch.testing.assert_close(layer.weight, before, atol=1e-6, rtol=1e-5)
    assert layer.parametrizations.weight[0].a.item() * math.pi / 2 == pytest.approx(5 / 0.99, rel=1e-5)


def test_identity_start_takes_the_weights_as_latents():
    model, before = network(), network()
    before.load_state_dict(model.state_dict())
    apply_weight_compander(model, a=0.3, b=0.2, init="identity")
    for index in (0, 3, 5):
        latent = model[index].parametrizations.weight.original
        assert torch.equal(latent, before[index].weight)
        torch.testing.assert_close(model[index].weight, 0.3 * (before[index].weight / 0.2).atan())


def test_weights_stay_within_the_bound_whatever_the_step():
    layer = apply_weight_compander(nn.Linear(6, 4), a=0.5, b=0.3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e4)
    layer(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    assert layer.weight.abs().max() <= 0.5 * math.pi / 2
    assert layer.weight.abs().min() > 0.7  # the step was large indeed


def test_optimizers_made_before_still_train_the_latents():
    layer = nn.Linear(6, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    held = layer.weight
    apply_weight_compander(layer)
    assert layer.parametrizations.weight.original is held
    layer(torch.ones(2, 6)).sum().backward()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert not torch.allclose(layer.weight, before)
    remove_weight_compander(layer)
    assert layer.weight is held


def test_only_layers_of_the_types_given():
    model = apply_weight_compander(network(), types=(nn.Conv2d,))
    assert parametrize.is_parametrized(model[0], "weight")
    assert not parametrize.is_parametrized(model[3])
    assert not parametrize.is_parametrized(model[0], "bias")


def test_curves_may_have_a_learning_rate_of_their_own():
    groups = compander_param_groups(apply_weight_compander(network(), learnable=True), weight_decay=0.1, lr=1e-4)
    assert [group.get("lr") for group in groups] == [None, 1e-4]
    assert len(compander_param_groups(apply_weight_compander(network()))) == 1


def tied():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: WeightCompander(0.0, 1.0), "a must be"),
        (lambda: WeightCompander(1.0, -1.0), "b must be"),
        (lambda: WeightCompander(math.inf, 1.0), "a must be"),
        (lambda: WeightCompander(1.0, 1.0).right_inverse(torch.tensor([2.0])), r"bound 1\.5708, got 2"),
        (lambda: WeightCompander(1.0, 1.0).right_inverse(torch.tensor([math.nan])), "got nan"),
        (lambda: apply_weight_compander(network(), a=-1.0), "a must be"),
        (lambda: apply_weight_compander(network(), b=0.0), "b must be"),
        (lambda: apply_weight_compander(network(), slope=0.0), "slope"),
        (lambda: apply_weight_compander(network(), bound=math.nan), "bound"),
        (lambda: apply_weight_compander(network(), init="copy"), "init"),
        (lambda: apply_weight_compander(nn.ReLU()), "layer of the types Linear"),
        (lambda: apply_weight_compander(network(), a=0.01), "layer '0'.*bound"),
        (lambda: apply_weight_compander(tied()), "must not share weights, got that of layer '1'"),
        (lambda: compander_param_groups(network(), weight_decay=-0.1), "weight_decay"),
        (lambda: remove_weight_compander(network()), "module must have a companded"),
    ],
)
def test_bad_input_is_named(make, argument):
    with pytest.raises(ValueError, match=argument):
        make()


def test_a_refusal_changes_nothing():
    """The last layer is at fault, after others that could have been changed."""
    model = network()
    nn.init.zeros_(model[5].weight)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="a must be given .* layer '5'"):
        apply_weight_compander(model)
    assert list(model.state_dict()) == keys
    assert not any(parametrize.is_parametrized(part) for part in model.modules())


def test_other_parametrizations_are_left_alone():
    model = network()
    parametrizations.weight_norm(model[0])
    apply_weight_compander(model[5])
    remove_weight_compander(model)
    assert parametrize.is_parametrized(model[0], "weight")
    assert not parametrize.is_parametrized(model[5])
    apply_weight_compander(model[3])
    parametrizations.orthogonal(model[3])
    with pytest.raises(ValueError, match="layer '3' with more of them"):
        remove_weight_compander(model)
    assert len(model[3].parametrizations.weight) == 2


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_curve_without_bound_or_slope_is_refused(value: float) -> None:
    for function in (compand, inverse_compand):
        with pytest.raises(ValueError, match="b must be positive and finite"):
            function(torch.zeros(1), a=1.0, b=value)
        with pytest.raises(ValueError, match="a must be positive and finite"):
            function(torch.zeros(1), a=value, b=1.0)
