from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.losses import AdaWAC, augmentation_consistency, dice_loss, mirror_ascent_log_odds

CLASSES, SIDE = 3, 4


def views(batch: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """Two views of some samples, in the order of the loss's arguments."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, batch, CLASSES, SIDE, SIDE, generator=generator, dtype=torch.float64)
    targets = torch.randint(CLASSES, (2, batch, SIDE, SIDE), generator=generator)
    features = torch.randn(2, batch, 6, 2, 2, generator=generator, dtype=torch.float64)
    index = torch.randperm(20, generator=generator)[:batch]
    return {
        "logits_1": logits[0],
        "logits_2": logits[1],
        "targets_1": targets[0],
        "targets_2": targets[1],
        "features_1": features[0],
        "features_2": features[1],
        "index": index,
    }


def terms(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy and consistency of every sample, one by one."""
    supervised, consistency = [], []
    for i in range(len(given["index"])):
        entropies = [F.cross_entropy(given[f"logits_{v}"][i : i + 1], given[f"targets_{v}"][i : i + 1]) for v in (1, 2)]
        supervised.append(sum(entropies) / 2)
        consistency.append(F.mse_loss(given["features_1"][i], given["features_2"][i]))
    return torch.stack(supervised), torch.stack(consistency)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 3))
def test_mirror_ascent_is_the_normalised_exponentiated_gradient(seed: int, lr: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_odds, first, second = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    pair = torch.stack([log_odds.sigmoid(), 1 - log_odds.sigmoid()], 1) * torch.stack([first, second], 1).mul(lr).exp()
    expected = pair / pair.sum(1, keepdim=True)
    torch.testing.assert_close(mirror_ascent_log_odds(log_odds, first, second, lr).sigmoid(), expected[:, 0])


def test_mirror_ascent_sends_no_gradient() -> None:
    losses = torch.ones(2, 3, requires_grad=True)
    assert not mirror_ascent_log_odds(torch.zeros(3), losses[0], losses[1], 1.0).requires_grad


def test_a_weight_near_zero_comes_back() -> None:
    # In single precision a stored weight of exp(-1000) is zero for ever.
    log_odds, large, none = torch.zeros(1), torch.tensor([1000.0]), torch.zeros(1)
    away = mirror_ascent_log_odds(log_odds, none, large, 1.0)
    assert away.sigmoid() == 0
    assert mirror_ascent_log_odds(away, large, none, 1.0).sigmoid() == 0.5


def test_constant_losses_give_the_closed_form() -> None:
    loss, given = AdaWAC(20, lr_weight=0.7, dac_weight=1.5).double(), views()
    supervised, consistency = terms(given)
    for step in range(1, 5):
        loss(**given)
        expected = torch.sigmoid(0.7 * step * (supervised - 1.5 * consistency))
        torch.testing.assert_close(loss.weights[given["index"], 0], expected)
        torch.testing.assert_close(loss.weights.sum(1), torch.ones(20).double())


def test_the_loss_is_the_weighted_sum_with_the_new_weights() -> None:
    loss, given = AdaWAC(20, lr_weight=0.7, dac_weight=1.5, dice_weight=0.3).double(), views()
    supervised, consistency = terms(given)
    for _ in range(2):
        value = loss(**given)
        w = loss.weights[given["index"]]
        weighted = (w[:, 0] * supervised + w[:, 1] * 1.5 * consistency).mean()
        dice = sum(dice_loss(given[f"logits_{v}"], given[f"targets_{v}"]) for v in (1, 2)) / 2
        torch.testing.assert_close(value, 0.7 * weighted + 0.3 * dice)


def test_without_steps_the_weights_stay_equal() -> None:
    loss, given = AdaWAC(20, lr_weight=0.0, dice_weight=0.0, dac_weight=1.0).double(), views()
    supervised, consistency = terms(given)
    torch.testing.assert_close(loss(**given), (supervised + consistency).mean() / 2)
    assert (loss.weights == 0.5).all()


def test_weights_are_constants_to_the_gradient() -> None:
    loss, given = AdaWAC(20, dice_weight=0.0).double(), views()
    for name in ("logits_1", "features_1"):
        given[name].requires_grad_()
    by_logits, by_features = torch.autograd.grad(loss(**given), [given["logits_1"], given["features_1"]])
    w = loss.weights[given["index"]]
    pixels = 5 * SIDE * SIDE
    probs = given["logits_1"].softmax(1) - F.one_hot(given["targets_1"], CLASSES).movedim(-1, 1)
    torch.testing.assert_close(by_logits, w[:, 0].view(-1, 1, 1, 1) * probs / (2 * pixels))
    apart = given["features_1"] - given["features_2"]
    torch.testing.assert_close(by_features, w[:, 1].view(-1, 1, 1, 1) * 2.0 * 2 * apart / (5 * 24))


def test_dense_labels_are_supervised_and_sparse_ones_made_consistent() -> None:
    # One network that knows nothing of either: the dense image costs more than the disagreement, the empty one less.
    given = views(2)
    given["targets_1"] = given["targets_2"] = torch.stack([torch.ones(SIDE, SIDE), torch.zeros(SIDE, SIDE)]).long()
    given["logits_1"] = given["logits_2"] = torch.tensor([3.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(2, 3, SIDE, SIDE)
    given["features_2"] = given["features_1"] + 0.5
    loss = AdaWAC(20)
    for _ in range(3):
        loss(**given)
    dense, empty = loss.weights[given["index"], 0]
    assert dense > 0.99
    assert empty < 0.01


def test_agreeing_views_are_ever_more_supervised() -> None:
    given = views()
    given["features_2"] = given["features_1"]
    loss, last = AdaWAC(20, lr_weight=0.1), torch.full((5,), 0.5)
    for _ in range(4):
        loss(**given)
        now = loss.weights[given["index"], 0]
        assert (now > last).all()
        last = now


def test_other_samples_keep_their_weights() -> None:
    loss, given = AdaWAC(20), views()
    loss(**given)
    others = torch.ones(20, dtype=torch.bool).index_fill_(0, given["index"], False)
    assert (loss.weights[others] == 0.5).all()
    assert (loss.weights[~others] != 0.5).all()


def test_evaluation_leaves_the_weights_and_uses_them() -> None:
    loss, given = AdaWAC(20).double(), views()
    loss(**given)
    before = loss.memory.rows.clone()
    loss.eval()
    assert loss(**given) == loss(**given)
    assert torch.equal(loss.memory.rows, before)


def test_consistency_is_the_mean_squared_difference() -> None:
    given = views()
    expected = terms(given)[1]
    torch.testing.assert_close(augmentation_consistency(given["features_1"], given["features_2"]), expected)
    half = augmentation_consistency(given["features_1"].bfloat16(), given["features_2"].bfloat16())
    assert half.dtype == torch.float32


def test_huge_losses_leave_finite_weights() -> None:
    given = views()
    given["logits_1"] = given["logits_1"] * 1e6
    given["features_1"][0] = 1e6
    loss = AdaWAC(20, lr_weight=1e3)
    for _ in range(3):
        assert loss(**given).isfinite()
    assert loss.memory.rows.isfinite().all()
    assert loss.weights.sum(1).eq(1).all()
    assert math.isclose(loss.weights[given["index"][0], 1].item(), 1.0)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lr_weight": -1.0}, "lr_weight"),
        ({"dac_weight": math.nan}, "dac_weight"),
        ({"dice_weight": 1.1}, "dice_weight"),
        ({"num_samples": 0}, "num_samples"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        AdaWAC(**{"num_samples": 20, **options})


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"logits_2": torch.zeros(5, CLASSES + 1, SIDE, SIDE)}, ValueError, "logits_2"),
        ({"targets_2": torch.zeros(5, SIDE, SIDE)}, TypeError, "targets_2"),
        ({"targets_1": torch.zeros(5, SIDE + 1, SIDE, dtype=torch.int64)}, ValueError, "targets_1"),
        ({"features_2": torch.zeros(5, 6, 2, 3)}, ValueError, "features_2"),
        ({"features_1": torch.zeros(4, 6, 2, 2), "features_2": torch.zeros(4, 6, 2, 2)}, ValueError, "features_1"),
        ({"features_1": torch.zeros(5, 6, 2, 2).long()}, TypeError, "features_1"),
        ({"index": torch.arange(4)}, ValueError, "index"),
        ({"index": torch.zeros(5, dtype=torch.int64)}, ValueError, "index"),
    ],
)
def test_bad_arguments_are_refused_before_anything_changes(
    change: dict[str, Tensor], error: type[Exception], match: str
) -> None:
    loss = AdaWAC(20)
    with pytest.raises(error, match=match):
        loss(**{**views(), **change})
    assert (loss.memory.rows == 0).all()


def test_bad_arguments_of_the_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="features_1"):
        augmentation_consistency(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="log_odds"):
        mirror_ascent_log_odds(torch.zeros(3), torch.zeros(2), torch.zeros(3), 1.0)
    with pytest.raises(ValueError, match="lr"):
        mirror_ascent_log_odds(torch.zeros(3), torch.zeros(3), torch.zeros(3), -1.0)
