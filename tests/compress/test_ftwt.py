from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from trimtab.compress import (
    DynamicConv,
    MaskPredictor,
    dynamic_layers,
    estimate_reduction,
    make_dynamic,
    mask_loss,
    mass_mask,
    uniform_mask,
)
from trimtab.compress.cost import model_cost


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_weakest_channels_are_counted_down() -> None:
    assert uniform_mask(drawn(4, 5).abs(), 0.7).sum(1).tolist() == [2] * 4  # 3.5 of five go: three


def test_a_filter_is_active_where_its_logit_is_positive() -> None:
    layer = DynamicConv(nn.Conv2d(1, 3, 1), None, nn.ReLU(), 0.5)
    layer.logits = torch.tensor([[0.1, -0.1, 3.0], [-2.0, -1.0, -3.0]])
    assert layer.active().tolist() == [[True, False, True], [False, True, False]]  # the largest always is


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1, stride=2),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32, 3),
        )
        for layer in (model[1], model[4]):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
        model(torch.randn(32, 2, 8, 8))
    return model.eval()


def dynamic(mass: float = 0.7, **options: bool) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make_dynamic(network(), mass, **options)


X = drawn(5, 2, 8, 8)


def test_worked_examples() -> None:
    activity = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    assert torch.equal(mass_mask(activity, 0.7), torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool())
    assert torch.equal(uniform_mask(activity, 0.5), torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool())
    assert mass_mask(activity, 1.0).all()
    assert mass_mask(torch.tensor([[5.0, 0.0, 1e-9]]), 1.0).tolist() == [[True, False, False]]
    assert mass_mask(activity, 0.1).sum(1).tolist() == [1, 1]  # the largest stays, though it holds more
    assert mass_mask(torch.zeros(1, 3), 0.5).any()


def test_the_kept_mass_is_within_the_share() -> None:
    activity = drawn(50, 12).abs()
    for mass in (0.5, 0.8, 0.95):
        mask = mass_mask(activity, mass)
        held = (activity * mask).sum(1) / activity.sum(1)
        assert (held <= mass + 2e-5).all()
        least = activity.where(mask, torch.inf).amin(1)
        most_left = activity.where(~mask, 0).amax(1)
        assert (least >= most_left).all()
        assert (held + most_left / activity.sum(1) > mass).all()  # one more would be too many
    torch.testing.assert_close(mass_mask(1e4 * activity, 0.8), mass_mask(activity, 0.8))


def test_the_mask_loss_is_binary_cross_entropy() -> None:
    logits, targets = [drawn(4, 3), drawn(4, 5, seed=1)], [drawn(4, 3, seed=2) > 0, drawn(4, 5, seed=3) > 0]
    p = [logit.sigmoid() for logit in logits]
    expected = sum(-torch.where(t, q.log(), (1 - q).log()).mean() for q, t in zip(p, targets, strict=True))
    torch.testing.assert_close(mask_loss(logits, targets), expected)
    with pytest.raises(ValueError, match="targets"):
        mask_loss([drawn(2, 3)], [drawn(2, 4) > 0])
    with pytest.raises(ValueError, match="logits"):
        mask_loss([], [])


def keep_all(model: nn.Module) -> None:
    for layer in dynamic_layers(model):
        nn.init.zeros_(layer.predictor.linear.weight)
        nn.init.ones_(layer.predictor.linear.bias)


def test_keeping_all_is_the_network_itself() -> None:
    model, plain = dynamic(), network()
    keep_all(model)
    torch.testing.assert_close(model(X), plain(X))
    cost, dense = model_cost(model, X), model_cost(plain, X)
    predictors = 2 * 6 + 6 * 8
    assert cost.multiply_adds == dense.multiply_adds + predictors
    for layer in dynamic_layers(model):
        layer.masked = False
    assert model_cost(model, X).multiply_adds == dense.multiply_adds


def test_unmasked_it_is_the_network_itself_and_has_its_targets() -> None:
    model, plain = dynamic(), network()
    for layer in dynamic_layers(model):
        layer.masked = False
    torch.testing.assert_close(model(X), plain(X))
    responses = plain[:3](X), plain[:6](X)
    for layer, response in zip(dynamic_layers(model), responses, strict=True):
        assert torch.equal(layer.targets, mass_mask(response.amax((2, 3)), 0.7))


def test_masked_channels_are_zero() -> None:
    model = dynamic()
    first = model[0](X)
    active = dynamic_layers(model)[0].active()
    assert not first[~active].any()
    assert 0 < int(active.sum()) < active.numel()
    torch.testing.assert_close(first[active], network()[:3](X)[active])


def test_what_was_masked_multiplies_nothing() -> None:
    model = dynamic()
    model(X)
    one, two = (layer.active().sum(1).double() for layer in dynamic_layers(model))
    expected = (2 * one * 9 * 16).mean() + (one * two * 9 * 4).mean() + 2 * 6 + 6 * 8 + 96
    assert model_cost(model, X).multiply_adds == pytest.approx(expected.item())


def test_skipping_gives_the_same() -> None:
    model = dynamic()
    whole = torch.cat([model(x[None]) for x in X])
    torch.testing.assert_close(whole, model(X))
    for layer in dynamic_layers(model):
        layer.skipping = True
    torch.testing.assert_close(torch.cat([model(x[None]) for x in X]), whole, atol=1e-6, rtol=1e-5)


def test_the_mask_loss_trains_predictors_alone() -> None:
    model = dynamic().train()
    model(X)
    layers = dynamic_layers(model)
    mask_loss([layer.logits for layer in layers], [layer.targets for layer in layers]).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {name for name, _ in model.named_parameters() if "predictor" in name}


def test_coupled_predictors_reach_the_layers_before() -> None:
    model = dynamic(decoupled=False).train()
    model(X)
    mask_loss([model[3].logits], [model[3].targets]).backward()
    assert model[0].conv.weight.grad.any()


def test_the_task_reaches_predictors_only_straight_through() -> None:
    plain = dynamic()
    plain(X).sum().backward()
    assert plain[0].predictor.linear.weight.grad is None
    layer = dynamic(straight_through=True)[0]
    out = layer(X)
    upstream = drawn(*out.shape, seed=3)
    response = network()[:3](X)
    grad = torch.autograd.grad((out * upstream).sum(), layer.logits)[0]
    p = layer.logits.sigmoid()
    torch.testing.assert_close(grad, (upstream * response).sum((2, 3)) * p * (1 - p))


def test_predictors_learn_their_targets() -> None:
    model = dynamic()
    layer = model[3]
    optimizer = torch.optim.Adam(layer.predictor.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        model(X)
        loss = mask_loss([layer.logits], [layer.targets])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_the_estimate_counts_targets() -> None:
    plain = network()
    one, two = (mass_mask(plain[:n](X).amax((2, 3)), 0.7).sum(1).double() for n in (3, 6))
    left = (2 * one * 9 * 16).sum() + (one * two * 9 * 4).sum()
    whole = 5 * (2 * 6 * 9 * 16 + 6 * 8 * 9 * 4)
    assert estimate_reduction(plain, [X[:2], X[2:]], 0.7) == pytest.approx(1 - left.item() / whole)
    assert estimate_reduction(dynamic(0.3), [X], 0.7) == pytest.approx(1 - left.item() / whole)
    assert estimate_reduction(plain, [X], 0.5) > estimate_reduction(plain, [X], 0.9)
    with pytest.raises(ValueError, match="batches"):
        estimate_reduction(plain, [], 0.7)


def test_it_is_copied_and_saved_in_the_middle_of_training() -> None:
    model = dynamic().train()
    model(X)
    other = copy.deepcopy(model)
    assert other[3].before[0] is other[0]
    torch.testing.assert_close(other.eval()(X), model.eval()(X))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = dynamic()
    again.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(again.eval()(X), model.eval()(X))


def test_the_model_is_left_as_it_is_and_names_are_checked() -> None:
    plain = network()
    before = copy.deepcopy(plain.state_dict())
    kept = make_dynamic(plain, 0.5, skip=["0"])
    assert len(dynamic_layers(kept)) == 1
    assert not dynamic_layers(kept)[0].before
    kept.train()(X).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    with pytest.raises(ValueError, match="skip"):
        make_dynamic(plain, 0.5, skip=["1"])
    with pytest.raises(ValueError, match="model"):
        make_dynamic(nn.Sequential(nn.Linear(2, 2)), 0.5)
    with pytest.raises(ValueError, match="mass"):
        make_dynamic(plain, 0.0)
    with pytest.raises(ValueError, match="conv"):
        DynamicConv(nn.Conv2d(2, 2, 1, groups=2), None, nn.ReLU(), 0.5)


@pytest.mark.parametrize("mass", [0.0, 1.5, float("nan")])
def test_bad_shares_are_refused_by_name(mass: float) -> None:
    with pytest.raises(ValueError, match="mass"):
        mass_mask(torch.ones(2, 3), mass)
    with pytest.raises(ValueError, match="activity"):
        mass_mask(torch.ones(3), 0.5)
    with pytest.raises(ValueError, match="ratio"):
        uniform_mask(torch.ones(2, 3), 1.0)


def test_other_precisions() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dynamic()(X).shape == (5, 3)
    double = dynamic().double()
    assert double(X.double()).dtype == torch.float64
    assert MaskPredictor(3, 2, softmax=False)(torch.ones(1, 3, 2, 2)).shape == (1, 2)
