"""GFCG: the reference class, the weight, and what they come to on exact mixtures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.diffusion import (
    AnalyticGMM,
    CountNFE,
    Denoiser,
    GradientFreeClassifierGuidance,
    Split,
    VPLinear,
    confusion,
    convert,
    ddim,
    degrade,
    grids,
)
from trimtab.diffusion.prediction import PREDICTIONS

SCHEDULE = VPLinear()
RING = AnalyticGMM.ring(dtype=torch.float64)
MODEL = degrade(RING.denoiser(SCHEDULE, "eps"), class_blur=0.5)
LABELS = torch.arange(6)
X = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
T = torch.full((6,), 0.4, dtype=torch.float64)


def rule(model=MODEL, labels: Tensor = LABELS, classifier=RING.class_log_posterior, **setting):
    return GradientFreeClassifierGuidance(model, labels, classifier=classifier, **setting)


def test_reference_is_the_likeliest_other_class() -> None:
    probabilities = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.2, 0.7], [0.1, 0.2, 0.7]])
    reference, share = confusion(probabilities, torch.tensor([0, 0, 2]))
    assert reference.tolist() == [2, 2, 1]
    torch.testing.assert_close(share, torch.tensor([0.3 / 0.8, 0.7 / 0.8, 0.2 / 0.9]))


def test_limits_of_the_confusion() -> None:
    """Of two classes the other one; half at even odds; nothing when sure; half, not NaN, when both have vanished."""
    labels = torch.tensor([0, 1])
    reference, share = confusion(torch.full((2, 2), 0.5), labels)
    assert reference.tolist() == [1, 0]
    assert share.tolist() == [0.5, 0.5]
    assert confusion(torch.eye(4)[:2], labels)[1].tolist() == [0.0, 0.0]
    assert confusion(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([0]))[1].tolist() == [1.0]
    assert confusion(torch.zeros(2, 3), labels)[1].tolist() == [0.5, 0.5]


def test_a_sample_that_is_surely_of_its_class_is_left_alone() -> None:
    sure = torch.nn.functional.one_hot(LABELS, 8).double() * 1e4
    assert torch.equal(rule(classifier=lambda x0: sure)(X, T), MODEL(X, T, LABELS))


def test_the_formula_and_the_kind_of_prediction() -> None:
    cond = MODEL(X, T, LABELS)
    alpha, sigma = SCHEDULE.alpha(T), SCHEDULE.sigma(T)
    clean = convert(cond, X, alpha, sigma, "eps", "x0")
    reference, share = confusion(RING.class_log_posterior(clean).exp(), LABELS)
    away = convert(MODEL(X, T, reference), X, alpha, sigma, "eps", "x0")
    expected = away + (1 + 3.0 * share)[:, None] * (clean - away)
    for kind in PREDICTIONS:
        model = degrade(RING.denoiser(SCHEDULE, kind), class_blur=0.5)
        value = rule(model, scale=3.0)(X, T)
        torch.testing.assert_close(convert(value, X, alpha, sigma, kind, "x0"), expected)


def test_for_two_classes_it_points_where_the_classifiers_gradient_does() -> None:
    """Of two Gaussians of one width, grad log p(y | x) and D_c - D_r both lie along the line between the means."""
    two = AnalyticGMM.isotropic(torch.tensor([[-1.0, 0.5], [1.0, -0.3]]).double(), std=0.3, labels=torch.arange(2))
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    model = degrade(two.denoiser(SCHEDULE), class_blur=0.5)
    update = rule(model, labels, two.class_log_posterior, scale=4.0)(X, T) - model(X, T, labels)
    at = X.clone().requires_grad_()
    chosen = two.class_log_posterior(at, SCHEDULE.alpha(T), SCHEDULE.sigma(T)).gather(1, labels[:, None])
    (gradient,) = torch.autograd.grad(chosen.sum(), at)
    cosine = torch.nn.functional.cosine_similarity(update, gradient)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_no_graph_is_built_and_the_classifier_runs_once_a_step() -> None:
    seen: list[bool] = []

    def classifier(x0: Tensor) -> Tensor:
        seen.append(x0.requires_grad or torch.is_grad_enabled())
        return RING.class_log_posterior(x0)

    x = X.clone().requires_grad_()
    out = rule(classifier=classifier)(x, T)
    assert seen == [False]
    assert not out.requires_grad


def test_with_autoguidance_the_weaker_model_speaks_for_the_reference() -> None:
    weak = degrade(RING.denoiser(SCHEDULE, "x0"), class_blur=0.8)
    strong, weaker = CountNFE(MODEL), CountNFE(weak)
    value = rule(strong, scale=2.0, weaker=weaker)(X, T)
    assert (strong.count, weaker.count) == (1, 1)
    alpha, sigma = SCHEDULE.alpha(T), SCHEDULE.sigma(T)
    cond = MODEL(X, T, LABELS)
    clean = convert(cond, X, alpha, sigma, "eps", "x0")
    reference, share = confusion(RING.class_log_posterior(clean).exp(), LABELS)
    away = weak(X, T, reference)
    expected = away + (1 + 2.0 * share)[:, None] * (clean - away)
    torch.testing.assert_close(convert(value, X, alpha, sigma, "eps", "x0"), expected)


def test_another_weight() -> None:
    constant = rule(scale=0.0, weight=lambda share: torch.full_like(share, 3.0))(X, T)
    cond = MODEL(X, T, LABELS)
    clean = convert(cond, X, SCHEDULE.alpha(T), SCHEDULE.sigma(T), "eps", "x0")
    reference, _ = confusion(RING.class_log_posterior(clean).exp(), LABELS)
    torch.testing.assert_close(constant, cond + 2.0 * (cond - MODEL(X, T, reference)))


def test_more_scale_more_of_the_class() -> None:
    labels = torch.arange(8).repeat(25)
    noise = SCHEDULE.prior(200, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def accuracy(scale: float) -> float:
        x = ddim(rule(labels=labels, scale=scale), noise, grids.power(SCHEDULE, 25))
        return float((RING.class_log_posterior(x).argmax(1) == labels).double().mean())

    assert accuracy(0.0) < accuracy(1.0) - 0.05 < accuracy(8.0)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="scale must be"):
        rule(scale=-1.0)
    with pytest.raises(TypeError, match="classifier must be callable"):
        rule(classifier="resnet")
    with pytest.raises(ValueError, match="probabilities must have shape"):
        confusion(torch.ones(3, 1), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="probabilities must have shape"):
        rule(classifier=lambda x0: torch.zeros(2, 8))(X, T)
    split = Denoiser(lambda x, t, c: Split(x, x), SCHEDULE)
    with pytest.raises(TypeError, match="weaker must return one prediction"):
        rule(weaker=split)(X, T)
    assert isinstance(rule(Denoiser(lambda x, t, c: x, SCHEDULE))(X, T), Tensor)


def test_labels_that_no_class_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels must be in \[0, 4\)"):
        confusion(torch.full((2, 4), 0.25), torch.tensor([0, 4]))
    with pytest.raises(TypeError, match="labels must be integers"):
        confusion(torch.full((2, 4), 0.25), torch.rand(2))


def test_a_weaker_model_starts_anew_with_each_run_as_well() -> None:
    weaker = CountNFE(MODEL)
    guided = rule(weaker=weaker)
    for _ in range(2):
        ddim(guided, X, grids.power(SCHEDULE, 5))
        assert weaker.count == 5


def test_what_cannot_guide_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="weaker must have a schedule and a prediction"):
        rule(weaker=torch.nn.Identity())
    with pytest.raises(TypeError, match="cond must be a tensor, got int"):
        rule(labels=3)
    with pytest.raises(TypeError, match="labels must be integers, int64 or int32, got torch.bool"):
        confusion(torch.full((2, 3), 1 / 3), torch.tensor([True, False]))
