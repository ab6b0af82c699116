from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trimtab.losses import (
    ADELE,
    LearningCurve,
    MultiScaleConsistencyLoss,
    class_iou,
    correct_labels,
    fit_learning_curve,
    memorization_epoch,
    multi_scale_consistency,
    multi_scale_logits,
)

BACK, TOP, SHOE = 0, 1, 2


# The learning curve


@pytest.mark.parametrize("truth", [(0.8, 0.9, 3.0), (0.5, 0.6, 1.5), (0.95, 0.99, 8.0)])
def test_a_curve_of_the_family_is_recovered(truth: tuple[float, float, float]) -> None:
    found = fit_learning_curve(LearningCurve(*truth).value(np.arange(1, 41)))
    assert found == pytest.approx(truth, rel=1e-3)


def test_slope_is_the_derivative() -> None:
    curve = LearningCurve(0.8, 0.9, 3.0)
    assert curve.slope(1.0) == pytest.approx(0.8 * 0.9 / 3 * math.exp(-1 / 3))
    t = np.linspace(0.5, 20, 50)
    np.testing.assert_allclose((curve.value(t + 1e-6) - curve.value(t - 1e-6)) / 2e-6, curve.slope(t), rtol=1e-5)
    np.testing.assert_allclose(curve.deceleration(t), (curve.slope(1.0) - curve.slope(t)) / curve.slope(1.0))


def test_the_end_of_the_curve_weighs_more_than_its_start() -> None:
    # Two measurements, each off by 0.1: the fit follows the later one.
    iou = LearningCurve(0.7, 0.9, 3.0).value(np.arange(1, 21))
    early, late = iou.copy(), iou.copy()
    early[1] += 0.1
    late[-1] += 0.1
    moved = [abs(fit_learning_curve(y).value(20) - iou[-1]) for y in (early, late)]
    assert moved[1] > 5 * moved[0]


def test_times_of_measurement_may_be_given() -> None:
    curve, times = LearningCurve(0.8, 0.9, 3.0), np.linspace(0, 12, 12)  # the release's grid, which begins at 0
    assert fit_learning_curve(curve.value(times), times) == pytest.approx(tuple(curve), rel=1e-3)


def first_slow_epoch(curve: LearningCurve, r: float) -> int:
    """By its definition, epoch by epoch."""
    t = 1
    while abs(curve.slope(1.0) - curve.slope(t)) / abs(curve.slope(1.0)) <= r:
        t += 1
    return t


@settings(max_examples=20, deadline=None)
@given(st.floats(0.3, 1), st.floats(0.5, 0.99), st.floats(0.8, 5), st.floats(0.3, 0.95), st.integers(0, 4))
def test_memorisation_begins_where_the_slope_has_fallen(a: float, b: float, c: float, r: float, flat: int) -> None:
    curve = LearningCurve(a, b, c)
    if curve.value(1) < 0.13:  # no first rise of 0.1 from the flat start at 0.02
        return
    iou = np.concatenate([np.full(flat, 0.02), curve.value(np.arange(1, 31))])
    expected = flat + first_slow_epoch(curve, r)
    edge = (
        abs(curve.deceleration(expected - flat) - r) < 1e-3 or abs(curve.deceleration(expected - flat - 1) - r) < 1e-3
    )
    found = memorization_epoch(iou, r, total_epochs=400)
    assert found == expected or (edge and abs((found or 0) - expected) <= 1)


def test_a_larger_fall_is_reached_later() -> None:
    iou = LearningCurve(0.8, 0.9, 3.0).value(np.arange(1, 31))
    epochs = [memorization_epoch(iou, r) for r in (0.3, 0.5, 0.7, 0.9)]
    assert epochs == sorted(set(epochs))


def test_the_future_is_not_known_before_it_is_measured() -> None:
    iou = LearningCurve(0.8, 0.9, 3.0).value(np.arange(1, 31))
    start = memorization_epoch(iou)
    assert start is not None
    assert memorization_epoch(iou[: start - 1]) is None
    assert memorization_epoch(iou[:start]) == start
    assert memorization_epoch(iou[: start - 1], total_epochs=30) == start


def test_without_learning_there_is_no_memorisation() -> None:
    assert memorization_epoch(np.full(50, 0.05), total_epochs=1000) is None
    assert memorization_epoch(np.linspace(0, 1, 50)) is None  # no epoch gains 0.1
    assert memorization_epoch([0.5, 0.7, 0.7], total_epochs=1000) is None  # too few points


def test_a_class_known_from_the_first_epoch_is_learning() -> None:
    assert memorization_epoch([0.9, 0.9, 0.9]) is None
    assert memorization_epoch([0.9, 0.9, 0.9, 0.9]) is not None


@pytest.mark.parametrize(
    "iou", [[], [[0.1, 0.2]], [0.1, 1.2, 0.3, 0.4], [-0.1, 0.5, 0.6, 0.7], [0.1, math.nan, 0.5, 0.6]]
)
def test_bad_iou_is_refused(iou: list[float]) -> None:
    for call in (fit_learning_curve, memorization_epoch):
        with pytest.raises(ValueError, match="iou"):
            call(iou)


def test_bad_arguments_of_the_curve_are_refused() -> None:
    iou = [0.2, 0.4, 0.5, 0.55]
    with pytest.raises(ValueError, match="at least 4"):
        fit_learning_curve(iou[:3])
    for epochs in ([1, 2, 3], [-1, 0, 1, 2]):
        with pytest.raises(ValueError, match="epochs"):
            fit_learning_curve(iou, epochs)
    for r in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="r must"):
            memorization_epoch(iou, r)
    with pytest.raises(ValueError, match="total_epochs"):
        memorization_epoch(iou, total_epochs=3)


def test_class_iou_counts_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, labels = torch.randint(4, (2, 3, 7, 7), generator=generator)
    labels[0, 0] = 255
    labels[1, 1, 0] = -100
    known = (labels >= 0) & (labels < 4)
    for k, value in enumerate(class_iou(predicted, labels, 4).tolist()):
        p, y = ((predicted == k) & known).numpy(), ((labels == k) & known).numpy()
        assert value == pytest.approx((p & y).sum() / (p | y).sum())
    assert class_iou(labels[2], labels[2], 5).tolist() == [1, 1, 1, 1, 0]
    with pytest.raises(ValueError, match="predicted"):
        class_iou(predicted[0], labels, 4)


# The correction


def certain(classes: Tensor, num_classes: int = 4, by: float = 0.9) -> Tensor:
    """Probabilities of `by` for these classes, and the rest for all."""
    rest = (1 - by) / (num_classes - 1)
    return (F.one_hot(classes, num_classes) * (by - rest) + rest).movedim(-1, 1).float()


def test_what_may_change_and_what_may_not() -> None:
    # From an unmarked class, to one, from one to a marked class, to and from the ground, to a class not in the image.
    labels = torch.tensor([[[SHOE, TOP, SHOE, TOP, BACK, TOP]]])
    wanted = torch.tensor([[[BACK, SHOE, TOP, BACK, TOP, 3]]])
    assert correct_labels(labels, certain(wanted), [TOP]).tolist() == [[[SHOE, TOP, SHOE, BACK, TOP, TOP]]]
    assert correct_labels(labels, certain(wanted), [TOP, SHOE]).tolist() == [[[BACK, SHOE, TOP, BACK, TOP, TOP]]]
    all_three = correct_labels(labels, certain(wanted), [TOP, SHOE, 3])
    assert all_three.tolist() == [[[BACK, SHOE, TOP, BACK, TOP, TOP]]]  # class 3 is not in the image
    free = correct_labels(labels, certain(wanted), [TOP, SHOE, 3], class_constraint=False)
    assert free.tolist() == wanted.tolist()
    assert correct_labels(labels, certain(wanted), []).tolist() == labels.tolist()
    assert labels.tolist() == [[[SHOE, TOP, SHOE, TOP, BACK, TOP]]]


def test_only_confident_predictions_count() -> None:
    labels = torch.tensor([[[TOP, TOP, BACK, BACK]]])
    wanted = torch.tensor([[[BACK, TOP, TOP, TOP]]])
    for by, tau_fg, tau_bg, expected in (
        (0.75, 0.8, 0.8, [TOP, TOP, BACK, BACK]),
        (0.75, 0.7, 0.8, [TOP, TOP, TOP, TOP]),
        (0.75, 0.8, 0.7, [BACK, TOP, BACK, BACK]),
        (0.75, 0.7, 0.7, [BACK, TOP, TOP, TOP]),
    ):
        found = correct_labels(labels, certain(wanted, by=by), [TOP], tau_fg=tau_fg, tau_bg=tau_bg)
        assert found.flatten().tolist() == expected
    at_the_threshold = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1)  # exact in binary
    assert correct_labels(torch.tensor([[[BACK]]]), at_the_threshold, [TOP], tau_fg=0.75).item() == BACK


def test_images_are_corrected_apart() -> None:
    labels = torch.tensor([[[TOP, BACK]], [[SHOE, BACK]], [[BACK, BACK]]])
    wanted = torch.full((3, 1, 2), TOP)
    # Without the constraint an image of other classes still stays as it is.
    for constraint in (True, False):
        found = correct_labels(labels, certain(wanted), [TOP], class_constraint=constraint)
        assert found.tolist() == [[[TOP, TOP]], [[SHOE, BACK]], [[BACK, BACK]]]


def test_pixels_found_to_be_background_may_become_pixels_to_ignore() -> None:
    labels = torch.tensor([[[TOP, BACK, SHOE, TOP]]])
    wanted = torch.tensor([[[BACK, BACK, BACK, TOP]]])
    assert correct_labels(labels, certain(wanted), [TOP], removed_index=255).tolist() == [[[255, BACK, SHOE, TOP]]]
    assert correct_labels(labels, certain(wanted), [TOP]).tolist() == [[[BACK, BACK, SHOE, TOP]]]


def test_labels_out_of_range_are_refused() -> None:
    labels = torch.tensor([[[TOP, 77]]])
    with pytest.raises(ValueError, match="labels must be"):
        correct_labels(labels, certain(torch.tensor([[[TOP, TOP]]])), [TOP])
    with pytest.raises(ValueError, match="probs must be"):
        correct_labels(torch.tensor([[[TOP]]]), torch.full((1, 3, 1, 1), float("nan")), [TOP])
    with pytest.raises(ValueError, match="predicted must be"):
        class_iou(torch.tensor([3]), torch.tensor([0]), 3)


def test_ignored_pixels_stay_ignored() -> None:
    labels = torch.tensor([[[TOP, 255, -100, BACK]]])
    found = correct_labels(labels, certain(torch.full((1, 1, 4), TOP)), [TOP])
    assert found.tolist() == [[[TOP, 255, -100, TOP]]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sets(st.integers(1, 4), max_size=4), st.booleans())
def test_correction_agrees_with_its_definition_pixel_by_pixel(seed: int, classes: set[int], constraint: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (3, 4, 5), generator=generator)
    labels[1][labels[1] > 2] = 0
    probs = (4 * torch.randn(3, 5, 4, 5, generator=generator)).softmax(1)
    found = correct_labels(labels, probs, classes, tau_fg=0.6, tau_bg=0.7, class_constraint=constraint)
    for n, i, j in np.ndindex(3, 4, 5):
        old, p, there = labels[n, i, j].item(), probs[n, :, i, j], set(labels[n].flatten().tolist())
        new = int(p.argmax())
        confident = p[1:].max() > 0.6 or p[0] > 0.7
        allowed = {0} | classes
        change = confident and old in allowed and new in allowed and bool(there & classes)
        if constraint:
            change = change and (new == 0 or new in there)
        assert found[n, i, j] == (new if change else old)
    again = correct_labels(found, probs, classes, tau_fg=0.6, tau_bg=0.7, class_constraint=constraint)
    if constraint:  # without it, an image may gain the class that makes it take part
        assert torch.equal(again, found)


def test_volumes_are_corrected_as_images_are() -> None:
    labels, wanted = torch.randint(3, (2, 2, 4, 6)), torch.randint(3, (2, 2, 4, 6))
    flat = correct_labels(labels.flatten(2), certain(wanted.flatten(2)), [TOP, SHOE])
    assert torch.equal(correct_labels(labels, certain(wanted), [TOP, SHOE]).flatten(2), flat)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"classes": [0]}, ValueError, "classes"),
        ({"classes": [4]}, ValueError, "classes"),
        ({"tau_fg": 1.0}, ValueError, "tau_fg"),
        ({"tau_bg": -0.1}, ValueError, "tau_bg"),
        ({"labels": torch.zeros(1, 2, 3, dtype=torch.int64)}, ValueError, "labels"),
        ({"labels": torch.zeros(1, 2, 2)}, TypeError, "labels"),
        ({"probs": torch.zeros(1, 4, 2, 2, dtype=torch.int64)}, TypeError, "probs"),
    ],
)
def test_bad_arguments_of_the_correction_are_refused(
    change: dict[str, object], error: type[Exception], match: str
) -> None:
    labels = torch.zeros(1, 2, 2, dtype=torch.int64)
    arguments = {"labels": labels, "probs": certain(labels), "classes": [1], **change}
    with pytest.raises(error, match=match):
        correct_labels(**arguments)  # type: ignore[arg-type]


# Both together


def followed(adele: ADELE, epochs: int, fast: float = 1.0, slow: float = 3.0) -> list[list[int]]:
    curves = LearningCurve(0.8, 0.9, fast), LearningCurve(0.8, 0.9, slow)
    return [adele.update([0.95, *(float(curve.value(epoch)) for curve in curves)]) for epoch in range(1, epochs + 1)]


def test_classes_are_marked_apart_and_stay_marked() -> None:
    adele = ADELE(3)
    marked = followed(adele, 12)
    fast, slow = (first_slow_epoch(LearningCurve(0.8, 0.9, c), 0.9) for c in (1.0, 3.0))
    assert fast != slow
    assert adele.started == {TOP: fast, SHOE: slow}
    assert [epoch + 1 for epoch, labels in enumerate(marked) if labels] == [fast, slow]
    # Correction changes the labels, and with them the curve; the mark remains.
    adele.update([0.95, 0.1, 0.1])
    assert adele.due == [TOP, SHOE]


def test_only_classes_that_are_due_are_corrected() -> None:
    adele, labels = ADELE(3), torch.tensor([[[TOP, SHOE]]])
    probs = certain(torch.zeros_like(labels), 3)
    assert torch.equal(adele.correct(labels, probs), labels)
    followed(adele, 5)  # only the fast class is marked
    assert adele.correct(labels, probs).tolist() == [[[BACK, SHOE]]]
    strict = ADELE(3, tau_bg=0.95)
    followed(strict, 12)
    assert torch.equal(strict.correct(labels, probs), labels)


def test_correction_may_be_rarer_than_every_epoch() -> None:
    adele = ADELE(3, every=5)
    curves = LearningCurve(0.8, 0.9, 1.0), LearningCurve(0.8, 0.9, 3.0)
    due = {}
    for epoch in range(1, 16):
        adele.update([0.95, *(float(curve.value(epoch)) for curve in curves)])
        due[epoch] = adele.due
    start = adele.started
    assert {epoch for epoch, labels in due.items() if TOP in labels} == {start[TOP], 5, 10, 15}
    assert {epoch for epoch, labels in due.items() if SHOE in labels} == {start[SHOE], 10, 15}


def test_state_is_carried_over() -> None:
    whole, first, second = ADELE(3), ADELE(3), ADELE(3)
    followed(whole, 8)
    followed(first, 8)
    state = first.state_dict()
    second.load_state_dict(state)
    for adele in (whole, second):
        for epoch in range(9, 13):
            adele.update(torch.tensor([0.95, 0.8, LearningCurve(0.8, 0.9, 3.0).value(epoch)]))
    assert second.started == whole.started
    assert len(state["history"]) == 8  # a snapshot


@pytest.mark.parametrize(
    "options", [{"num_classes": 1}, {"r": 0.0}, {"r": 1.0}, {"tau_fg": 1.0}, {"tau_bg": -0.1}, {"every": 0}]
)
def test_bad_options_are_refused_by_name(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        ADELE(**{"num_classes": 3, **options})  # type: ignore[arg-type]


def test_bad_epochs_are_refused_and_leave_no_trace() -> None:
    adele = ADELE(3)
    for iou in ([0.5, 0.5], [0.5, 0.5, math.nan], [0.5, 0.5, 1.5]):
        with pytest.raises(ValueError, match="iou"):
            adele.update(iou)
    assert not adele.history
    with pytest.raises(ValueError, match="probs"):
        adele.correct(torch.zeros(1, 2, 2, dtype=torch.int64), torch.zeros(1, 4, 2, 2))


# Consistency across scales


def scales(count: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(4, count, 5, 6, 6, generator=generator, dtype=torch.float64)


def test_equal_predictions_agree() -> None:
    one = scales(1)
    mild = multi_scale_consistency((one / 3).expand(-1, 3, -1, -1, -1), 0.0)
    torch.testing.assert_close(mild, torch.zeros(4).double())
    # The mean is cut to [0.001, 0.999]: what is beyond costs the difference.
    sure = torch.tensor([1.0, 0.0]).double().mul(50).view(1, 1, 2, 1, 1).expand(1, 3, 2, 1, 1)
    assert multi_scale_consistency(sure, 0.0).item() == pytest.approx(-math.log(0.999))


def test_disagreement_is_the_mean_divergence_from_the_mean() -> None:
    logits = scales()
    probs = logits.softmax(2)
    mean = probs.mean(1, keepdim=True).clamp(1e-3, 1 - 1e-3)
    assert (mean == 1e-3).any()
    expected = (probs * (probs / mean).log()).sum(2).mean((1, 2, 3))
    torch.testing.assert_close(multi_scale_consistency(logits, 0.0), expected)
    torch.testing.assert_close(multi_scale_consistency(logits[:, [2, 0, 1]], 0.0), expected)
    assert (expected > 0).all()
    assert (expected < math.log(3)).all()


def test_opposite_certainties_are_farthest_apart() -> None:
    logits = 1e4 * torch.eye(3).view(1, 3, 3, 1, 1)
    torch.testing.assert_close(multi_scale_consistency(logits, 0.3), torch.tensor([math.log(3)]))


def test_images_without_confidence_do_not_count() -> None:
    logits = scales() / 10
    logits[1, :, 2, 3, 3] += 5  # one confident pixel suffices for the whole image
    found, all_of_them = multi_scale_consistency(logits, 0.8), multi_scale_consistency(logits, 0.0)
    assert (found > 0).tolist() == [False, True, False, False]
    assert found[1] == all_of_them[1]


def test_an_image_that_is_sure_counts_even_where_certainty_is_asked_for() -> None:
    sure = 60 * F.one_hot(torch.tensor([[0, 1], [1, 0]]), 2).movedim(-1, 0).float().expand(1, 3, -1, -1, -1)
    assert multi_scale_consistency(sure, 1.0).item() == pytest.approx(-math.log(0.999))
    assert multi_scale_consistency(sure / 60, 1.0).item() == 0


def test_pixels_to_ignore_have_no_say_in_confidence() -> None:
    logits = scales() / 10
    logits[1, :, 2, 3, 3] += 5
    counted = torch.ones(4, 6, 6, dtype=torch.bool)
    counted[1, 3, 3] = False
    assert not multi_scale_consistency(logits, 0.8, counted=counted).any()
    targets = torch.zeros(4, 6, 6, dtype=torch.int64)
    fit = sum(F.cross_entropy(logits[:, s], targets) for s in range(3)) / 3
    assert MultiScaleConsistencyLoss(lam=5.0)(logits, targets) > fit + 0.1 * multi_scale_consistency(logits, 0.8).mean()
    targets[1, 3, 3] = -100
    loss = MultiScaleConsistencyLoss(lam=5.0)(logits, targets)
    torch.testing.assert_close(loss, MultiScaleConsistencyLoss(lam=0.0)(logits, targets))


def test_a_constant_mean_gives_the_same_gradient() -> None:
    logits = (scales() / 3).requires_grad_()  # so mild that the mean is not cut
    (gradient,) = torch.autograd.grad(multi_scale_consistency(logits, 0.0).sum(), logits)
    log_probs = logits.log_softmax(2)
    log_mean = (log_probs.logsumexp(1, keepdim=True) - math.log(3)).detach()
    held = (log_probs.exp() * (log_probs - log_mean)).sum(2).mean((1, 2, 3)).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(held, logits)[0])


def test_the_loss_is_cross_entropy_at_every_scale_and_the_agreement() -> None:
    logits, targets = scales(), torch.randint(5, (4, 6, 6))
    fit = sum(F.cross_entropy(logits[:, s], targets) for s in range(3)) / 3
    torch.testing.assert_close(MultiScaleConsistencyLoss(lam=0.0)(logits, targets), fit)
    expected = fit + 2 * multi_scale_consistency(logits, 0.5).mean()
    torch.testing.assert_close(MultiScaleConsistencyLoss(lam=2.0, rho=0.5)(logits, targets), expected)


def test_ignored_pixels_cost_nothing() -> None:
    logits, targets = scales(), torch.randint(5, (4, 6, 6))
    loss = MultiScaleConsistencyLoss(lam=0.0, ignore_index=255)
    partly = torch.where(torch.rand(4, 6, 6) < 0.5, targets, 255)
    pixels = F.cross_entropy(logits[:, 0], targets, reduction="none")
    torch.testing.assert_close(loss(logits[:, :1], partly), (pixels * (partly != 255)).mean())
    assert loss(logits, torch.full_like(targets, 255)) == 0


def test_predictions_at_other_scales_come_back_to_the_same_places() -> None:
    seen: list[tuple[int, ...]] = []

    def model(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x

    smooth = torch.linspace(0, 1, 20).expand(2, 1, 10, 20)
    views = multi_scale_logits(model, smooth, (0.7, 1.0, 1.5), flip=True)
    assert seen == [(2, 1, 7, 14)] * 2 + [(2, 1, 10, 20)] * 2 + [(2, 1, 15, 30)] * 2
    # A ramp is kept by resizing, and mirrored copies are mirrored back.
    torch.testing.assert_close(views, smooth[:, None].expand(-1, 6, -1, -1, -1))


def test_a_scaled_image_has_the_size_that_torch_gives_it() -> None:
    image, seen = torch.rand(1, 1, 11, 9), []

    def model(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape[2:]))
        return x

    multi_scale_logits(model, image, (0.7, 1.5, 0.55))
    scaled = [F.interpolate(image, scale_factor=scale, mode="bilinear") for scale in (0.7, 1.5, 0.55)]
    assert seen == [tuple(x.shape[2:]) for x in scaled]


def test_mirrored_copies_are_seen_mirrored() -> None:
    # A model that marks the left edge marks the right one of a mirrored image.
    def model(x: Tensor) -> Tensor:
        return torch.cat([x[..., :1], torch.zeros_like(x[..., 1:])], dim=-1)

    image = torch.arange(1.0, 5.0).expand(1, 1, 2, 4)
    plain, mirrored = multi_scale_logits(model, image, (1.0,), flip=True)[0, :, 0, 0]
    assert plain.tolist() == [1, 0, 0, 0]
    assert mirrored.tolist() == [0, 0, 0, 4]


def test_coarse_outputs_are_brought_to_the_images_size() -> None:
    model = nn.Conv2d(1, 3, 3, stride=2, padding=1)
    assert multi_scale_logits(model, torch.rand(2, 1, 11, 8), (1.0, 0.05)).shape == (2, 2, 3, 11, 8)


def test_bad_arguments_of_the_consistency_are_refused() -> None:
    images = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="images"):
        multi_scale_logits(nn.Identity(), images[0])
    for bad in ((), (1.0, 0.0), (math.inf,)):
        with pytest.raises(ValueError, match="scales"):
            multi_scale_logits(nn.Identity(), images, bad)
    with pytest.raises(ValueError, match="lam"):
        MultiScaleConsistencyLoss(lam=-1.0)
    with pytest.raises(ValueError, match="rho"):
        MultiScaleConsistencyLoss(rho=1.5)
    with pytest.raises(ValueError, match="rho"):
        multi_scale_consistency(scales(), rho=-0.5)
    with pytest.raises(ValueError, match="logits"):
        multi_scale_consistency(scales()[:, 0, 0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_overlap_of_masks_in_narrow_types(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, labels = (torch.randint(40, (500,), generator=generator) // 2 * 2 for _ in range(2))
    predicted[:250] = labels[:250]
    expected = [
        ((predicted == k) & (labels == k)).sum().item() / max(1, ((predicted == k) | (labels == k)).sum().item())
        for k in range(40)
    ]
    assert class_iou(predicted.to(dtype), labels.to(dtype), 40).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("ignore", [0, 1, 2])
def test_pixels_to_ignore_stay_whatever_their_label(ignore: int) -> None:
    labels = torch.tensor([[[0, 0, 1, 2, 2]]])
    probs = torch.zeros(1, 3, 1, 5)
    probs[:, 1, :, :4], probs[:, 2, :, 4], probs[:, 0, :, 0] = 1.0, 1.0, 0.0
    found = correct_labels(labels, probs, [1, 2], class_constraint=False, ignore_index=ignore)
    assert torch.equal(found[labels == ignore], labels[labels == ignore])
    assert not torch.equal(found, labels)


def test_no_time_before_the_start_and_no_mask_of_another_shape() -> None:
    with pytest.raises(ValueError, match="t must be at least 0"):
        LearningCurve(0.8, 0.9, 3.0).value([-1.0, 2.0])
    with pytest.raises(ValueError, match=r"counted must be of shape \(2, 4, 4\)"):
        multi_scale_consistency(torch.zeros(2, 3, 5, 4, 4), counted=torch.ones(4, dtype=torch.bool))
