from __future__ import annotations

import pytest
import torch

from trimtab.losses import classwise_calibration_error, expected_calibration_error


def test_by_hand() -> None:
    # Class 0: one bin of two samples, frequency 1/2 at 0.8; class 1: frequency 1/2 at 0.2; class 2: never, at 0.
    probs = torch.tensor([[0.8, 0.2, 0.0], [0.8, 0.2, 0.0]])
    assert classwise_calibration_error(probs, torch.tensor([0, 1])) == pytest.approx((0.3 + 0.3 + 0) / 3)


def test_gaps_of_different_bins_do_not_cancel() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    targets = torch.tensor([1, 1])
    assert classwise_calibration_error(probs, targets) == pytest.approx(((0.9 + 0.1) / 2 + (0.9 + 0.1) / 2) / 2)
    assert classwise_calibration_error(probs, targets, bins=1) == pytest.approx(0.5)


def test_labels_drawn_from_the_probabilities_are_calibrated() -> None:
    probs = torch.rand(50_000, 4, dtype=torch.float64).pow(2)
    probs = probs / probs.sum(1, keepdim=True)
    targets = torch.multinomial(probs, 1)[:, 0]
    assert classwise_calibration_error(probs, targets) < 0.01
    assert classwise_calibration_error(probs, (targets + 1) % 4) > 0.05


def test_sees_what_the_predicted_class_hides() -> None:
    """Always sure of class 0 and right, but between classes 1 and 2 the rest is on the wrong one."""
    probs = torch.tensor([[0.8, 0.2, 0.0]]).repeat(10, 1)
    targets = torch.tensor([0] * 8 + [2] * 2)
    assert expected_calibration_error(probs, targets) == pytest.approx(0, abs=1e-6)
    assert classwise_calibration_error(probs, targets) == pytest.approx(0.4 / 3, abs=1e-6)


@pytest.mark.parametrize(
    ("probs", "targets", "bins", "message"),
    [
        (torch.full((2, 2), 0.5), torch.zeros(2).long(), 0, "bins"),
        (torch.full((2, 2), 0.5), torch.zeros(3).long(), 15, "targets"),
        (torch.full((0, 2), 0.5), torch.zeros(0).long(), 15, "probs"),
        (torch.full((2, 2), 0.5), torch.tensor([0, 2]), 15, "targets"),
        (torch.full((2, 2), 2.0), torch.zeros(2).long(), 15, "probs"),
        (torch.full((2, 2), float("nan")), torch.zeros(2).long(), 15, "probs"),
    ],
)
def test_bad_input_names_the_argument(probs: torch.Tensor, targets: torch.Tensor, bins: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classwise_calibration_error(probs, targets, bins)
