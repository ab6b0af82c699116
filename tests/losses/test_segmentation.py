from __future__ import annotations

import pytest
import torch

from trimtab.losses import dice_loss


def maps(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 6, 5, generator=generator), torch.randint(3, (3, 6, 5), generator=generator)


def test_equals_monais_over_the_batch() -> None:
    logits, targets = maps()
    peer = pytest.importorskip("monai.losses").DiceLoss(
        softmax=True, to_onehot_y=True, squared_pred=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5
    )  # class 3 is nowhere in the targets
    torch.testing.assert_close(dice_loss(logits, targets), peer(logits, targets[:, None]))


def test_a_class_nowhere_costs_nothing_and_a_missed_one_all() -> None:
    targets = torch.zeros(1, 2, 2, dtype=torch.int64)
    ground = torch.tensor([50.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert dice_loss(ground, targets).item() == pytest.approx(0.0, abs=1e-6)
    assert dice_loss(ground.roll(1, 1), targets).item() == pytest.approx(2 / 3, abs=1e-4)


def test_places_and_volumes_are_alike() -> None:
    logits, targets = maps()
    torch.testing.assert_close(dice_loss(logits.flatten(2), targets.flatten(1)), dice_loss(logits, targets))


@pytest.mark.parametrize(
    ("logits", "targets", "error", "match"),
    [
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), ValueError, "logits"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 5, dtype=torch.int64), ValueError, "targets"),
        (torch.zeros(0, 3, 4), torch.zeros(0, 4, dtype=torch.int64), ValueError, "empty"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4), TypeError, "targets"),
        (torch.zeros(2, 3, 4).long(), torch.zeros(2, 4, dtype=torch.int64), TypeError, "logits"),
    ],
)
def test_bad_arguments_are_refused(
    logits: torch.Tensor, targets: torch.Tensor, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        dice_loss(logits, targets)


def test_smoothing_must_be_positive() -> None:
    with pytest.raises(ValueError, match="smooth"):
        dice_loss(*maps(), smooth=0.0)
