from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.losses import adaptive_calibration_error, area_under_risk_coverage, expected_calibration_error

DIAGNOSTICS = [expected_calibration_error, area_under_risk_coverage]


def two_class(confidence: list[float], correct: list[bool]) -> tuple[torch.Tensor, torch.Tensor]:
    p = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([p, 1 - p], 1), 1 - torch.tensor(correct).long()


def test_error_by_hand() -> None:
    # Bins of width 0.1: (0.6, 0.7] holds accuracy 1/2 at confidence 0.66, (0.9, 1] accuracy 1 at 0.95.
    probs, targets = two_class([0.64, 0.68, 0.95, 0.95], [True, False, True, True])
    expected = 0.5 * abs(0.5 - 0.66) + 0.5 * abs(1 - 0.95)
    assert expected_calibration_error(probs, targets, bins=10) == pytest.approx(expected)


def test_bins_are_open_on_the_left_and_closed_on_the_right() -> None:
    probs, targets = two_class([0.75, 0.76], [True, False])
    # One bin holds both, gap |1/2 - 0.755|; two bins on either side of 0.75 hold one each.
    assert expected_calibration_error(probs, targets, bins=1) == pytest.approx(0.255)
    assert expected_calibration_error(probs, targets, bins=4) == pytest.approx((0.25 + 0.76) / 2)


def test_certain_and_right_is_perfect() -> None:
    probs, targets = torch.eye(3), torch.arange(3)
    assert expected_calibration_error(probs, targets) == 0
    assert area_under_risk_coverage(probs, targets) == 0
    assert expected_calibration_error(probs, (targets + 1) % 3) == 1
    assert area_under_risk_coverage(probs, (targets + 1) % 3) == 1


def test_calibrated_draws_have_a_small_error() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(50_000, 4, generator=generator).softmax(1)
    targets = torch.multinomial(probs, 1, generator=generator)[:, 0]
    assert expected_calibration_error(probs, targets) < 0.01
    assert expected_calibration_error(probs.pow(3) / probs.pow(3).sum(1, keepdim=True), targets) > 0.1


def test_area_by_hand() -> None:
    probs, targets = two_class([0.9, 0.8, 0.7, 0.6], [True, False, True, False])
    assert area_under_risk_coverage(probs, targets) == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)


def test_errors_ranked_last_have_the_smaller_area() -> None:
    good = area_under_risk_coverage(*two_class([0.9, 0.8, 0.7, 0.6], [True, True, False, False]))
    bad = area_under_risk_coverage(*two_class([0.9, 0.8, 0.7, 0.6], [False, False, True, True]))
    assert good < bad


def test_ties_count_with_their_mean() -> None:
    one = area_under_risk_coverage(*two_class([0.9, 0.7, 0.7], [True, False, True]))
    other = area_under_risk_coverage(*two_class([0.9, 0.7, 0.7], [True, True, False]))
    assert one == other == pytest.approx((0 + 0.5 / 2 + 1 / 3) / 3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 30))
def test_order_of_samples_does_not_matter(seed: int, size: int, bins: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(size, 3, generator=generator).mul(3).softmax(1)
    targets = torch.randint(3, (size,), generator=generator)
    order = torch.randperm(size, generator=generator)
    for diagnostic in (lambda p, t: expected_calibration_error(p, t, bins=bins), area_under_risk_coverage):
        value = diagnostic(probs, targets)
        assert 0 <= value <= 1
        assert diagnostic(probs[order], targets[order]) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("diagnostic", DIAGNOSTICS)
@pytest.mark.parametrize(
    ("probs", "targets", "error", "name"),
    [
        (torch.tensor([[2.0, -1.0]]), torch.tensor([0]), ValueError, "probs"),
        (torch.tensor([[0.5, torch.nan]]), torch.tensor([0]), ValueError, "probs"),
        (torch.tensor([[0.5, 0.2]]), torch.tensor([0]), ValueError, "probs"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), ValueError, "empty"),
        (torch.eye(2), torch.tensor([0]), ValueError, "targets"),
        (torch.eye(2).long(), torch.tensor([0, 1]), TypeError, "probs"),
        (torch.eye(2), torch.tensor([0.0, 1.0]), TypeError, "targets"),
    ],
)
def test_bad_arguments_are_refused_by_name(diagnostic, probs, targets, error, name) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=name):
        diagnostic(probs, targets)


def test_bins_must_be_positive() -> None:
    with pytest.raises(ValueError, match="bins"):
        expected_calibration_error(torch.eye(2), torch.arange(2), bins=0)


def test_adaptive_bins_hold_equally_many_samples() -> None:
    """Three pairs in order of confidence, whose gaps sum to -0.1, 0.5 and -0.9, however the samples are ordered."""
    confidence = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9, 1.0], dtype=torch.float64)
    probs, right = torch.stack([confidence, 1 - confidence], 1), torch.tensor([1, 0, 1, 1, 0, 1])
    for order in (torch.arange(6), torch.tensor([4, 1, 5, 0, 3, 2])):
        assert adaptive_calibration_error(probs[order], 1 - right[order], bins=3) == pytest.approx(1.5 / 6)
        each = (right - confidence).abs().mean()
        assert adaptive_calibration_error(probs[order], 1 - right[order], bins=100) == pytest.approx(float(each))


def test_adaptive_error_of_calibrated_predictions_is_small() -> None:
    draws = torch.Generator().manual_seed(0)
    probs = torch.randn(20_000, 4, generator=draws).mul(2).softmax(1)
    targets = torch.multinomial(probs, 1, generator=draws).squeeze(1)
    assert adaptive_calibration_error(probs, targets) < 0.015
    sharpened = probs.pow(2) / probs.pow(2).sum(1, keepdim=True)
    assert adaptive_calibration_error(sharpened, targets) > 0.08
    with pytest.raises(ValueError, match="bins"):
        adaptive_calibration_error(probs, targets, bins=0)


def test_adaptive_error_does_not_depend_on_the_order_of_equal_confidences() -> None:
    probs, targets = two_class([0.8] * 8 + [0.9] * 4, [True] * 4 + [False] * 4 + [True, False] * 2)
    orders = [torch.randperm(12, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    found = {round(adaptive_calibration_error(probs[order], targets[order], bins=4), 12) for order in orders}
    # Bins of three: the first two are at 0.8 with half of them right, the third and the last likewise in their parts.
    assert found == {round((8 * 0.3 + 4 * 0.4) / 12, 12)}
