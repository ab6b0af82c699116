"""EluCD: the guided score, the temperatures, the sine and smooth activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trimtab.diffusion import (
    EDM,
    AnalyticGMM,
    ClassifierGuidance,
    CountNFE,
    Denoiser,
    Flow,
    OffTheShelfGuidance,
    VPLinear,
    convert,
    ddim,
    degrade,
    grids,
    sine_weight,
    smooth_activations,
)
from trimtab.diffusion.prediction import PREDICTIONS

SCHEDULE = VPLinear()
RING = AnalyticGMM.ring(dtype=torch.float64)
MODEL = degrade(RING.denoiser(SCHEDULE, "eps"), class_blur=0.5)
LABELS = torch.arange(6)
X = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
T = torch.linspace(0.2, 0.8, 6, dtype=torch.float64)


def classifier(x0: Tensor) -> Tensor:
    return 3 * x0 @ RING.means.T


def score_added(guided: OffTheShelfGuidance, x: Tensor = X, t: Tensor = T) -> Tensor:
    alpha, sigma, kind = SCHEDULE.alpha(t), SCHEDULE.sigma(t), guided.prediction
    inner = guided.denoiser(x, t, guided.cond)
    return convert(guided(x, t), x, alpha, sigma, kind, "score") - convert(inner, x, alpha, sigma, kind, "score")


def clean() -> Tensor:
    return convert(MODEL(X, T, LABELS), X, SCHEDULE.alpha(T), SCHEDULE.sigma(T), "eps", "x0")


def test_with_plain_temperatures_it_is_the_gradient_of_the_log_probability_at_the_prediction() -> None:
    at = clean().requires_grad_()
    (expected,) = torch.autograd.grad(classifier(at).log_softmax(1)[torch.arange(6), LABELS].sum(), at)
    guided = OffTheShelfGuidance(MODEL, LABELS, classifier=classifier, scale=2.0, marginal_temperature=1.0, gamma=0.0)
    with torch.no_grad():
        torch.testing.assert_close(score_added(guided), 2.0 * expected)


def test_temperatures() -> None:
    """Without the marginal part it is the gradient of the logit; in general that of a f_y - log sum exp(b f)."""
    only = OffTheShelfGuidance(MODEL, LABELS, classifier=classifier, marginal_temperature=0.0, gamma=0.0)
    torch.testing.assert_close(score_added(only), 3 * RING.means[LABELS])
    both = OffTheShelfGuidance(
        MODEL, LABELS, classifier=classifier, joint_temperature=1.5, marginal_temperature=0.4, gamma=0.0
    )
    shares = (0.4 * classifier(clean())).softmax(1)
    expected = 1.5 * 3 * RING.means[LABELS] - 0.4 * 3 * shares @ RING.means
    torch.testing.assert_close(score_added(both), expected)


def test_a_shift_of_all_logits_changes_nothing() -> None:
    plain = OffTheShelfGuidance(MODEL, LABELS, classifier=classifier)
    shifted = OffTheShelfGuidance(MODEL, LABELS, classifier=lambda x0: classifier(x0) + 7.0)
    torch.testing.assert_close(plain(X, T), shifted(X, T))


def test_logits_however_large_are_finite() -> None:
    guided = OffTheShelfGuidance(MODEL, LABELS, classifier=lambda x0: 1e5 * classifier(x0))
    assert bool(torch.isfinite(guided(X, T)).all())


def test_the_model_is_not_differentiated_and_is_evaluated_once() -> None:
    seen: list[bool] = []

    def model(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        seen.append(x.requires_grad)
        return MODEL(x, t, cond)

    counted = CountNFE(Denoiser(model, SCHEDULE))
    with torch.no_grad():
        out = OffTheShelfGuidance(counted, LABELS, classifier=classifier)(X, T)
    assert seen == [False]
    assert not out.requires_grad


def test_at_no_noise_it_is_guidance_by_a_classifier_of_noisy_samples() -> None:
    """There the prediction is the sample itself."""
    t = torch.full((6,), 1e-4, dtype=torch.float64)
    on = {"scale": 2.0, "marginal_temperature": 1.0, "gamma": 0.0}
    shelf = OffTheShelfGuidance(MODEL, LABELS, classifier=classifier, **on)
    noisy = ClassifierGuidance(MODEL, LABELS, classifier=lambda x, t: classifier(x), scale=2.0)
    x = RING.sample(6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(score_added(shelf, x, t), score_added(noisy, x, t), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_any_kind_of_prediction(kind) -> None:
    model = degrade(RING.denoiser(SCHEDULE, kind), class_blur=0.5)
    value = OffTheShelfGuidance(model, LABELS, classifier=classifier)(X, T)
    alpha, sigma = SCHEDULE.alpha(T), SCHEDULE.sigma(T)
    expected = convert(OffTheShelfGuidance(MODEL, LABELS, classifier=classifier)(X, T), X, alpha, sigma, "eps", "x0")
    torch.testing.assert_close(convert(value, X, alpha, sigma, kind, "x0"), expected)


def test_the_sine_is_that_of_an_ancestral_step() -> None:
    """Per step of length h the variance is g^2 h: the weight is (var_t + gamma var_T sin) / var_t."""
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    variance, largest = SCHEDULE.g2(t) / 100, SCHEDULE.g2(torch.tensor(1.0, dtype=torch.float64)) / 100
    expected = (variance + 0.3 * largest * torch.sin(torch.pi * t)) / variance
    torch.testing.assert_close(sine_weight(SCHEDULE, t), expected)
    assert torch.equal(sine_weight(SCHEDULE, t, gamma=0.0), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("schedule", [VPLinear(), EDM(), Flow(t_max=0.99)], ids=lambda s: type(s).__name__)
def test_the_sine_vanishes_at_the_end_and_never_lowers(schedule) -> None:
    t = torch.linspace(schedule.t_min, schedule.t_max, 50, dtype=torch.float64)
    weight = sine_weight(schedule, t)
    assert weight[-1].item() == pytest.approx(1.0)
    assert bool(torch.isfinite(weight).all())
    assert bool((weight >= 1).all())


def test_smooth_activations_everywhere_and_the_original_untouched() -> None:
    network = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True))).double()
    smooth = smooth_activations(network, beta=5.0)
    assert not any(isinstance(part, nn.ReLU) for part in smooth.modules())
    assert sum(isinstance(part, nn.ReLU) for part in network.modules()) == 2
    assert list(smooth.state_dict()) == list(network.state_dict())
    assert isinstance(smooth_activations(nn.ReLU()), nn.Softplus)
    # Where ReLU's gradient jumps, that of softplus does not.
    torch.testing.assert_close(smooth_activations(network, beta=1e6)(X), network(X), atol=1e-5, rtol=0)
    at = torch.zeros(1, requires_grad=True)
    assert torch.autograd.grad(smooth_activations(nn.ReLU(), beta=5.0)(at).sum(), at)[0].item() == 0.5


def test_more_scale_more_of_the_class() -> None:
    labels = torch.arange(8).repeat(25)
    noise = SCHEDULE.prior(200, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def accuracy(scale: float) -> float:
        guided = OffTheShelfGuidance(MODEL, labels, classifier=classifier, scale=scale)
        x = ddim(guided, noise, grids.power(SCHEDULE, 25))
        return float((RING.class_log_posterior(x).argmax(1) == labels).double().mean())

    assert accuracy(0.0) < accuracy(0.5) - 0.05 < accuracy(3.0)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_a_prediction_keeps_its_precision(kind) -> None:
    """Times are float32 for half-precision samples, and with them alpha and sigma."""
    model = Denoiser(lambda x, t, cond: 0.5 * x, SCHEDULE, kind)
    guided = OffTheShelfGuidance(model, LABELS, classifier=lambda x0: x0.repeat(1, 4))
    assert guided(X.half(), T.float()).dtype == torch.float16
    assert ddim(guided, X.half(), grids.power(SCHEDULE, 4)).dtype == torch.float16


@pytest.mark.parametrize("schedule", [VPLinear(), EDM()])
def test_beyond_the_schedules_end_guidance_is_not_raised(schedule) -> None:
    beyond = schedule.t_max * torch.tensor([1.0, 1.05, 1.5], dtype=torch.float64)
    torch.testing.assert_close(sine_weight(schedule, beyond, 0.3), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("name", ["scale", "gamma", "joint_temperature", "marginal_temperature"])
def test_bad_numbers(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        OffTheShelfGuidance(MODEL, LABELS, classifier=classifier, **{name: float("inf")})


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="classifier must be callable"):
        OffTheShelfGuidance(MODEL, LABELS, classifier=3)
    with pytest.raises(ValueError, match="classifier must return logits"):
        OffTheShelfGuidance(MODEL, LABELS, classifier=lambda x0: x0[0])(X, T)
    with pytest.raises(ValueError, match=r"module must hold at least one nn\.ReLU"):
        smooth_activations(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"module must be an nn\.Module"):
        smooth_activations(torch.relu)
    with pytest.raises(ValueError, match="beta must be positive"):
        smooth_activations(nn.ReLU(), beta=0.0)


def test_a_schedule_that_ends_without_any_data_has_no_sine() -> None:
    """Its squared diffusion is infinite at the end, and every weight would be."""
    labels = torch.tensor([0, 1])

    def guided(schedule, gamma: float) -> OffTheShelfGuidance:
        model = Denoiser(lambda x, t, cond: x, schedule, "flow")
        return OffTheShelfGuidance(model, labels, classifier=lambda x0: x0, gamma=gamma)

    with pytest.raises(
        ValueError, match="gamma must be 0 where the squared diffusion is infinite at t_max, as on Flow"
    ):
        guided(Flow(), 0.3)
    x, t = torch.ones(2, 2), torch.full((2,), 0.5)
    assert guided(Flow(), 0.0)(x, t).isfinite().all()
    assert guided(Flow(t_max=0.99), 0.3)(x, t).isfinite().all()


def test_a_relu_that_stands_in_several_places_is_smoothed_in_each() -> None:
    shared = nn.ReLU()
    net = nn.Sequential(nn.Linear(2, 3), shared, nn.Linear(3, 3), shared)
    net.missing = None  # type: ignore[assignment]
    net.register_module("absent", None)
    smooth = smooth_activations(net)
    assert not any(isinstance(part, nn.ReLU) for part in smooth.modules())
    assert isinstance(net[3], nn.ReLU)


def test_where_the_sine_goes_at_the_beginning() -> None:
    """1 on the schedule it was made for; 1 + pi gamma on EDM, whose g^2 is proportional to time."""
    early = torch.tensor([1e-6], dtype=torch.float64)
    assert sine_weight(VPLinear(), early, 0.3).item() == pytest.approx(1.0, abs=1e-3)
    assert sine_weight(EDM(), early, 0.3).item() == pytest.approx(1 + 0.3 * torch.pi, rel=1e-6)
