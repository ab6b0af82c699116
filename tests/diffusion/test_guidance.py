"""Classifier-free guidance and its rescaling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.diffusion import (
    AnalyticGMM,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    Denoiser,
    Split,
    VPLinear,
    classifier_free_guidance,
    convert,
    guidance_rescale,
)
from trimtab.diffusion.guidance import Guidance, class_gradient, rows_of
from trimtab.diffusion.prediction import PREDICTIONS

SCHEDULE = VPLinear()
RING = AnalyticGMM.ring(dtype=torch.float64)
LABELS = torch.arange(6)
X = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
T = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)


def test_it_is_the_score_of_the_sharpened_density() -> None:
    """score = grad log p(x) + w grad log p(c | x)."""
    alpha, sigma = SCHEDULE.alpha(T), SCHEDULE.sigma(T)
    at = X.clone().requires_grad_()
    chosen = RING.class_log_posterior(at, alpha, sigma).gather(1, LABELS[:, None])
    (gradient,) = torch.autograd.grad(chosen.sum(), at)
    guided = ClassifierFreeGuidance(RING.denoiser(SCHEDULE, "score"), LABELS, scale=5.0)(X, T)
    torch.testing.assert_close(guided, RING.score(X, alpha, sigma) + 5.0 * gradient)


def test_any_kind_of_prediction_gives_the_same_guidance() -> None:
    alpha, sigma = SCHEDULE.alpha(T), SCHEDULE.sigma(T)
    clean = [
        convert(
            ClassifierFreeGuidance(RING.denoiser(SCHEDULE, kind), LABELS, scale=3.0)(X, T), X, alpha, sigma, kind, "x0"
        )
        for kind in PREDICTIONS
    ]
    for other in clean[1:]:
        torch.testing.assert_close(other, clean[0])


def test_scales_that_need_one_branch_evaluate_one() -> None:
    asked: list[object] = []

    def model(x: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
        asked.append(cond)
        return x if cond == "a" else 2 * x

    denoiser = Denoiser(model, SCHEDULE)
    assert torch.equal(ClassifierFreeGuidance(denoiser, "a", "b", scale=1.0)(X, T), X)
    assert torch.equal(ClassifierFreeGuidance(denoiser, "a", "b", scale=0.0)(X, T), 2 * X)
    assert asked == ["a", "b"]
    torch.testing.assert_close(ClassifierFreeGuidance(denoiser, "a", "b", scale=3.0)(X, T), -X)
    torch.testing.assert_close(classifier_free_guidance(X, 2 * X, 3.0), -X)


def test_rescale_restores_the_spread() -> None:
    guided, cond = 3 * X.repeat(1, 4) + 1, X.repeat(1, 4)
    torch.testing.assert_close(guidance_rescale(guided, cond, 1.0).std(1), cond.std(1))
    assert torch.equal(guidance_rescale(guided, cond, 0.0), guided)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_has_no_spread_is_not_rescaled(dtype: torch.dtype) -> None:
    cond = torch.randn(2, 3, 4, dtype=dtype)
    for guided in (torch.zeros(2, 3, 4, dtype=dtype), torch.full((2, 3, 4), 0.1, dtype=dtype)):
        assert torch.equal(guidance_rescale(guided, cond), guided)
    mixed = torch.stack([torch.full((3, 4), 0.1, dtype=dtype), cond[1] * 3])
    out = guidance_rescale(mixed, cond, 1.0)
    assert torch.equal(out[0], mixed[0])
    torch.testing.assert_close(out[1], cond[1])
    one = torch.tensor([[2.0], [-1.0]], dtype=dtype)  # one number a sample
    assert torch.equal(guidance_rescale(one, one / 2), one)
    denoiser = Denoiser(lambda x, t, c=None: torch.zeros_like(x), SCHEDULE, "x0")
    x = torch.randn(2, 4, dtype=dtype)
    assert torch.equal(ClassifierFreeGuidance(denoiser, 1, scale=3.0, rescale=0.7)(x, T[:1].expand(2)), x * 0)


def test_rescale_is_diffusers() -> None:
    rescale = pytest.importorskip("diffusers.guiders.guider_utils").rescale_noise_cfg
    guided, cond = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(guidance_rescale(guided, cond, 0.7), rescale(guided, cond, 0.7))


def test_a_guided_prediction_is_brought_back_to_the_spread_of_the_conditional_one() -> None:
    x, t = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), T[:3]
    denoiser = Denoiser(lambda x, t, cond: x if cond == "a" else x.flip(1), SCHEDULE)
    guided = ClassifierFreeGuidance(denoiser, "a", "b", scale=4.0)(x, t)
    for share in (1.0, 0.6):
        found = ClassifierFreeGuidance(denoiser, "a", "b", scale=4.0, rescale=share)(x, t)
        ratio = x.std(1, keepdim=True) / guided.std(1, keepdim=True)
        torch.testing.assert_close(found, guided * (share * ratio + 1 - share))


def test_bad_input() -> None:
    denoiser = RING.denoiser(SCHEDULE)
    with pytest.raises(ValueError, match="scale must be finite"):
        ClassifierFreeGuidance(denoiser, LABELS, scale=float("nan"))
    with pytest.raises(ValueError, match=r"rescale must be in \[0, 1\]"):
        ClassifierFreeGuidance(denoiser, LABELS, rescale=2.0)
    with pytest.raises(TypeError, match="denoiser must have a schedule"):
        ClassifierFreeGuidance(torch.nn.Linear(2, 2), LABELS)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="must define __call__"):
        Guidance(denoiser, LABELS)(X, T)
    inner = Denoiser(lambda x, t, cond: Split(x, x), SCHEDULE)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="outermost"):
        ClassifierFreeGuidance(inner, LABELS)(X, T)


def test_the_true_classifier_makes_an_unconditional_model_conditional() -> None:
    x, t = torch.randn(8, 2, dtype=torch.float64), torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    plain = RING.denoiser(SCHEDULE, "v")
    labels = torch.arange(8)

    def classifier(x: Tensor, t: Tensor) -> Tensor:
        return 5.0 + RING.class_log_posterior(x, SCHEDULE.alpha(t), SCHEDULE.sigma(t))  # logits may be shifted

    with torch.no_grad():
        guided = ClassifierGuidance(
            Denoiser(lambda x, t, cond: plain(x, t), SCHEDULE, "v"), labels, classifier=classifier
        )(x, t)
    torch.testing.assert_close(guided, plain(x, t, labels))
    with pytest.raises(ValueError, match=r"classifier must return logits of shape \(8, classes\)"):
        ClassifierGuidance(plain, labels, classifier=lambda x, t: x.sum(1))(x, t)
    with pytest.raises(TypeError, match="classifier must be callable"):
        ClassifierGuidance(plain, labels, classifier=None)


def test_rows_of_a_condition() -> None:
    rows = torch.tensor([True, False, True])
    cond = (torch.arange(3), {"text": torch.ones(3, 2), "width": torch.tensor(8)}, None)
    label, rest, nothing = rows_of(cond, rows, batch=3)
    assert label.tolist() == [0, 2]
    assert rest["text"].shape == (2, 2)
    assert rest["width"] == 8
    assert nothing is None


def test_labels_and_amounts_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(2, 3)
    for labels in (torch.tensor([0, 3]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match=r"labels must be in \[0, 3\)"):
            class_gradient(lambda x: x, x, labels)
    with pytest.raises(TypeError, match="labels must be a tensor, got NoneType"):
        class_gradient(lambda x: x, x, None)  # type: ignore[arg-type]
    for amount in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"amount must be in \[0, 1\]"):
            guidance_rescale(x, x, amount)
    with pytest.raises(ValueError, match="guided must have the shape of cond"):
        guidance_rescale(x, x[:, :2])


def test_rescaling_never_mixes_samples() -> None:
    with pytest.raises(ValueError, match=r"cond must have shape \(batch, ...\), got \(4,\)"):
        guidance_rescale(torch.ones(4), torch.ones(4))


def test_the_gradient_of_a_classifier_is_there_in_inference_mode() -> None:
    def classifier(x: Tensor, t: Tensor) -> Tensor:
        return (1 + t[:, None]) * x @ RING.means.T

    def said() -> Tensor:
        model = Denoiser(lambda x, t, cond: x, SCHEDULE)
        return ClassifierGuidance(model, torch.arange(6), classifier=classifier)(X.clone(), T.clone())

    with torch.inference_mode():
        inner = said()
    assert torch.equal(inner.clone(), said())


def test_labels_are_integers_of_a_kind_that_indexes() -> None:
    for kind in (torch.bool, torch.uint8):
        with pytest.raises(TypeError, match="labels must be integers, int64 or int32"):
            class_gradient(lambda x: x, torch.zeros(2, 2), torch.ones(2, dtype=kind))
