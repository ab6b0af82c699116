"""TRAM, its divergences and its anchors, against closed forms and SAM."""

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
    SAM,
    TRAM,
    InputNoiseAnchor,
    ParameterAnchor,
    ascent_direction,
    trust_region_divergence,
)

KINDS = ["kl", "reverse_kl", "symmetric", "l2", "mmd"]


def network(seed=0, norm=False, dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        middle = [nn.BatchNorm1d(3)] if norm else []
        return nn.Sequential(nn.Linear(4, 3), *middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(3, 2))


def batch(step):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


def sgd(params, lr=0.05):
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def closure_of(model, optimizer, x, divergence=None):
    def closure():
        optimizer.zero_grad()
        logits = model(x)
        loss = logits.square().sum()
        loss.backward()
        return loss if divergence is None else (loss, divergence)

    return closure


def scores(seed, rows=5, classes=3):
    return torch.randn(2, rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).unbind()


# --- the step ---


def test_second_gradient_on_a_quadratic():
    weight, curvature = nn.Parameter(torch.ones(2, dtype=torch.float64)), torch.tensor([1.0, 4.0], dtype=torch.float64)
    optimizer = TRAM(torch.optim.SGD([weight], lr=1.0))

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (curvature * weight**2).sum()
        loss.backward()
        return loss, 0.1

    assert optimizer.step(closure).item() == 2.5
    torch.testing.assert_close(weight.grad, torch.tensor([1.0242536, 4.3880570], dtype=torch.float64))


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_constant_divergence_is_sams_radius(adaptive):
    one, other = network(), network()
    tram, sam = TRAM(sgd(one.parameters()), adaptive=adaptive), SAM(sgd(other.parameters()), 0.1, adaptive=adaptive)
    for step in range(10):
        tram.step(closure_of(one, tram, batch(step), torch.tensor(0.1)))
        sam.step(closure_of(other, sam, batch(step)))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_constant_divergence_follows_pytorch_optimizers_sam(adaptive):
    peer = pytest.importorskip("pytorch_optimizer")
    one, other = network(), network()
    ours = TRAM(sgd(one.parameters()), adaptive=adaptive)
    theirs = peer.SAM(other.parameters(), torch.optim.SGD, rho=0.1, adaptive=adaptive, lr=0.05, momentum=0.9)
    for step in range(10):
        ours.step(closure_of(one, ours, batch(step), 0.1))
        closure_of(other, theirs, batch(step))()
        theirs.step(closure_of(other, theirs, batch(step)))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_no_divergence_is_the_base_optimizer():
    one, other = network(), network()
    tram, base = TRAM(sgd(one.parameters())), sgd(other.parameters())
    for step in range(3):
        tram.step(closure_of(one, tram, batch(step), 0.0))
        closure_of(other, base, batch(step))()
        base.step()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "radius"), [({}, 0.3), ({"scale": 2.0}, 0.6), ({"scale": 2.0, "max_radius": 0.5}, 0.5)]
)
def test_length_and_direction_of_the_move(arguments, radius):
    model = network()
    optimizer = TRAM(sgd(model.parameters()), **arguments)
    closure_of(model, optimizer, batch(0))()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.perturb(0.3)
    for p, q, d in zip(model.parameters(), before, ascent_direction([p.grad for p in model.parameters()]), strict=True):
        torch.testing.assert_close(p.detach() - q, radius * d, atol=1e-6, rtol=0)


def test_groups_have_their_own_scale():
    model = network()
    first, *others = model.parameters()
    optimizer = TRAM(sgd([{"params": [first], "scale": 0.0}, {"params": others}]))
    closure_of(model, optimizer, batch(0))()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.perturb(0.3)
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [False, True, True, True]


def test_a_divergence_given_as_a_function_is_computed_once_at_the_weights_themselves():
    model, calls = network(), []
    optimizer = TRAM(sgd(model.parameters()))
    start = copy.deepcopy(model)

    def divergence():
        calls.append(torch.equal(model[0].weight, start[0].weight))
        return model[0].weight.square().sum()

    optimizer.step(closure_of(model, optimizer, batch(0), divergence))
    assert calls == [True]


def test_no_gradient_goes_through_the_divergence():
    model = network()
    optimizer = TRAM(sgd(model.parameters()))
    closure_of(model, optimizer, batch(0))()
    before = [p.grad.clone() for p in model.parameters()]
    divergence = model(batch(1)).square().mean()
    optimizer.perturb(divergence)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    assert not any(p.grad.requires_grad or p.grad_fn for p in model.parameters())


def test_bad_arguments_are_named_before_anything_changes():
    model = network()
    for name in ("scale", "max_radius"):
        for value in (-0.1, math.nan, math.inf):
            with pytest.raises(ValueError, match=name):
                TRAM(sgd(model.parameters()), **{name: value})
    optimizer = TRAM(sgd(model.parameters()))
    closure_of(model, optimizer, batch(0))()
    before = copy.deepcopy(model.state_dict())
    for bad in (None, -0.1, math.nan, math.inf, torch.tensor(-1e-3), torch.tensor(math.nan), torch.ones(2)):
        with pytest.raises(ValueError, match="divergence"):
            optimizer.perturb(bad)
    with pytest.raises(TypeError, match="divergence"):
        optimizer.perturb("far")
    for closure in (lambda: torch.ones(()), lambda: (torch.ones(()),)):
        with pytest.raises(ValueError, match=r"\(loss, divergence\)"):
            optimizer.step(closure)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    optimizer.perturb(0.1)  # none of them has left the weights perturbed


# --- divergences ---


@pytest.mark.parametrize("kind", KINDS)
def test_equal_predictions_have_no_divergence_and_others_have(kind):
    a, z = scores(0)
    assert trust_region_divergence(a, a, kind).item() == pytest.approx(0.0, abs=1e-12)
    value = trust_region_divergence(a.requires_grad_(), z.requires_grad_(), kind)
    assert value.item() > 0.1
    assert not value.requires_grad


def test_kullback_leibler_kinds_and_their_direction():
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.1, 0.3, 0.6]).double()
    forward, backward = (p * (p / q).log()).sum().item(), (q * (q / p).log()).sum().item()
    anchor, logits = (p.log() + 2.0)[None], (q.log() - 1.0)[None]
    assert trust_region_divergence(anchor, logits).item() == pytest.approx(forward)
    assert trust_region_divergence(anchor, logits, "reverse_kl").item() == pytest.approx(backward)
    assert trust_region_divergence(anchor, logits, "symmetric").item() == pytest.approx(forward + backward)


def test_l2_is_the_mean_distance_of_the_scores():
    a, z = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert trust_region_divergence(a, z, "l2").item() == pytest.approx(3.0)


def test_mmd_of_two_points():
    a, z = torch.zeros(1, 2).double(), torch.tensor([[3.0, 4.0]]).double()
    widths = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    expected = sum(2 / c - 2 / math.sqrt(c**2 + 25) for c in widths)
    assert trust_region_divergence(a, z, "mmd").item() == pytest.approx(expected)


def test_mmd_is_between_batches_not_rows():
    a, z = scores(1)
    one = trust_region_divergence(a, z, "mmd")
    torch.testing.assert_close(one, trust_region_divergence(a.flip(0), z, "mmd"))
    assert trust_region_divergence(a, a.flip(0), "mmd").item() == pytest.approx(0.0, abs=1e-12)


def test_official_reduction_is_the_releases():
    a, z = scores(2)
    release = F.kl_div(z.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none").mean() / 5
    torch.testing.assert_close(trust_region_divergence(a, z, reduction="official"), release)
    release = (z - a).pow(2).sum(-1).sqrt().mean() / 5
    torch.testing.assert_close(trust_region_divergence(a, z, "l2", "official"), release)
    expected = trust_region_divergence(a, z, "mmd") / 5
    torch.testing.assert_close(trust_region_divergence(a, z, "mmd", "official"), expected)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 1000), st.floats(1e-6, 1e4), st.sampled_from([torch.float32, torch.half]))
def test_never_negative_and_always_finite(kind, seed, size, dtype):
    a, z = (size * x for x in scores(seed))
    a, z = (x.clamp(-6e4, 6e4).to(dtype) for x in (a, z))
    for other in (z, a + 1e-7):
        value = trust_region_divergence(a, other.to(dtype), kind)
        assert value.isfinite()
        assert value >= 0
        assert value.dtype == torch.float32


def test_bad_scores_are_named():
    a, z = scores(0)
    with pytest.raises(ValueError, match="kind.*'kl'"):
        trust_region_divergence(a, z, "js")
    with pytest.raises(ValueError, match="reduction.*'batchmean'"):
        trust_region_divergence(a, z, reduction="mean")
    with pytest.raises(ValueError, match="anchor_logits"):
        trust_region_divergence(a[:2], z)
    with pytest.raises(ValueError, match="logits"):
        trust_region_divergence(a[:0], z[:0])
    with pytest.raises(ValueError, match="logits"):
        trust_region_divergence(a[0], z[0])
    with pytest.raises(TypeError, match="anchor_logits"):
        trust_region_divergence(a.long(), z)


# --- anchors ---


def test_the_previous_weights_are_the_anchor():
    """Over three steps the divergence is from the weights of the step before; in the first step it is zero."""
    model, seen, weights = network(), [], []
    optimizer = TRAM(sgd(model.parameters()), scale=0.1)
    anchor = ParameterAnchor(model, decay=0.0, optimizer=optimizer)
    x = batch(0)

    def closure():
        optimizer.zero_grad()
        logits = model(x)
        loss = logits.square().sum()
        loss.backward()

        def divergence():
            seen.append(trust_region_divergence(anchor(x), logits).item())
            return seen[-1]

        return loss, divergence

    for _ in range(3):
        weights.append(copy.deepcopy(model))
        optimizer.step(closure)
    assert seen[0] == 0.0
    for step in (1, 2):
        expected = trust_region_divergence(weights[step - 1](x), weights[step](x)).item()
        assert seen[step] == pytest.approx(expected, rel=1e-5)
        assert expected > 1e-4


@pytest.mark.parametrize("decay", [0.0, 0.75, 1.0])
def test_the_average_of_past_weights(decay):
    model = nn.Linear(2, 2)
    start = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    anchor = ParameterAnchor(model, decay, optimizer)
    expected, past = start, start
    for step in range(1, 4):
        model.weight.grad = torch.full((2, 2), -float(step))
        past = model.weight.detach().clone()
        optimizer.step()
        expected = decay * expected + (1 - decay) * past
    torch.testing.assert_close(anchor.average.weight, expected)


def test_no_update_where_a_gradient_scaler_takes_no_step():
    model = network()
    optimizer = TRAM(sgd(model.parameters()))
    anchor = ParameterAnchor(model, 0.0, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    before = anchor.average[0].weight.clone()
    for factor in (math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * model(batch(0)).square().sum()).backward()
        scaler.step(optimizer.base)
        scaler.update()
        assert torch.equal(anchor.average[0].weight, before) is (factor == math.inf)


def test_only_the_weights_make_the_difference():
    """Not dropout, nor batch statistics beside running ones; and the statistics of both stay as they are."""
    model = network(norm=True)
    model(batch(3))
    anchor = ParameterAnchor(model, decay=1.0)
    logits = model(batch(0))
    before = copy.deepcopy((model.state_dict(), anchor.state_dict()))
    torch.testing.assert_close(anchor(batch(0)), logits.detach())
    for module, state in zip((model, anchor), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    model.eval()
    torch.testing.assert_close(ParameterAnchor(model)(batch(0)), model(batch(0)).detach())
    dropping = network(dropout=0.5)
    anchor = ParameterAnchor(dropping, decay=1.0)
    torch.testing.assert_close(anchor(batch(0)), network()(batch(0)).detach())
    assert dropping[2].training


def test_the_anchor_follows_no_gradient_and_saves_its_average_alone():
    model = network(norm=True)
    anchor = ParameterAnchor(model, decay=0.5)
    assert not anchor(batch(0)).requires_grad
    assert all(name.startswith("average.") for name in anchor.state_dict())
    with torch.no_grad():
        model[0].weight.add_(1.0)
    anchor.update()
    file = io.BytesIO()
    torch.save(anchor.state_dict(), file)
    file.seek(0)
    other = ParameterAnchor(network(seed=3, norm=True), decay=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    other._model[0].train()
    torch.testing.assert_close(other(batch(1)), anchor(batch(1)))


def test_noise_of_the_asked_kind_and_size_on_the_input():
    identity, x = nn.Flatten(), torch.zeros(400, 50)
    generator = torch.Generator().manual_seed(0)
    normal = InputNoiseAnchor(identity, 0.3, generator=generator)(x)
    assert normal.std().item() == pytest.approx(0.3, rel=0.03)
    assert normal.abs().max() > 0.9
    uniform = InputNoiseAnchor(identity, 0.3, "uniform", generator=generator)(x)
    assert uniform.abs().max() <= 0.3
    assert uniform.std().item() == pytest.approx(0.3 / math.sqrt(3), rel=0.03)
    assert uniform.mean().item() == pytest.approx(0.0, abs=0.01)
    assert torch.equal(InputNoiseAnchor(identity, 0.0)(x), x)


def test_noise_may_be_given_and_draws_repeat():
    model, x = network(), batch(0)
    noise = batch(1)
    torch.testing.assert_close(InputNoiseAnchor(model, 0.1)(x, noise=noise), model(x + noise).detach())
    one, two = (InputNoiseAnchor(model, 0.1, generator=torch.Generator().manual_seed(4))(x) for _ in "ab")
    assert torch.equal(one, two)
    assert not one.requires_grad


def test_noise_on_the_output_of_a_layer():
    embedding = nn.Embedding(6, 4)
    model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(8, 2))
    tokens = torch.tensor([[0, 5], [2, 2]])
    anchor = InputNoiseAnchor(model, 0.1, layer=embedding)
    noise = torch.ones(2, 2, 4)
    torch.testing.assert_close(
        anchor(input=tokens, noise=noise), model[2]((embedding(tokens) + noise).flatten(1)).detach()
    )
    assert not embedding._forward_hooks
    with pytest.raises(TypeError, match="layer"):
        InputNoiseAnchor(model, 0.1)(tokens)
    with pytest.raises(TypeError, match="layer"):
        InputNoiseAnchor(model, 0.1)(input=tokens)


def test_the_noisy_pass_leaves_the_model_as_it_was():
    model = network(norm=True, dropout=0.5)
    model[3].eval()
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    anchor = InputNoiseAnchor(model, 0.0)
    assert torch.equal(anchor(batch(0)), anchor(batch(0)))  # no dropout
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError):
        anchor(torch.ones(2, 7))
    assert [m.training for m in model.modules()] == modes


def test_bad_anchor_arguments_are_named():
    for decay in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="decay"):
            ParameterAnchor(network(), decay)
    for std in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="std"):
            InputNoiseAnchor(network(), std)
    with pytest.raises(ValueError, match="kind"):
        InputNoiseAnchor(network(), 0.1, "laplace")
