from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.domain import (
    HardClassPaste,
    HIASTLoss,
    InstanceAdaptiveSelector,
    hard_class_odds,
    region_regularization,
    region_soft_cross_entropy,
)
from trimtab.domain.hiast import class_quantiles


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def probabilities(seed: int = 0, classes: int = 4) -> Tensor:
    return (3 * drawn(1, classes, 6, 5, seed=seed)).softmax(1)


# --- instance adaptive selection


def test_quantiles_are_those_of_numpy() -> None:
    confidence = torch.rand(200, generator=seeded(), dtype=torch.float64)
    labels = torch.randint(3, (200,), generator=seeded(1))
    wanted, extra = torch.tensor([0.0, 0.37, 1.0, 0.5]), torch.tensor([0.9, 0.2, 0.4, 0.7])
    expected = [
        np.quantile(np.append(confidence[labels == c].numpy(), extra[c].double()), float(wanted[c].double()))
        for c in range(4)
    ]
    torch.testing.assert_close(class_quantiles(confidence, labels, wanted, extra), torch.tensor(expected))


def test_thresholds_follow_the_formula() -> None:
    selector = InstanceAdaptiveSelector(4, alpha=0.4, beta=0.7, gamma=2.0, init=0.8)
    expected = np.full(4, 0.8)
    for seed in range(3):
        probs = probabilities(seed)
        labels = selector(probs)
        confidence, classes = (part.numpy() for part in probs.max(1))
        for c in range(4):
            values = np.append(confidence[classes == c], expected[c])
            expected[c] = 0.7 * expected[c] + 0.3 * np.quantile(values, 1 - 0.4 * expected[c] ** 2)
        np.testing.assert_allclose(selector.thresholds, expected)
        assert ((selector.thresholds > 0) & (selector.thresholds < 1)).all()
        kept = confidence >= expected[classes]
        np.testing.assert_array_equal(labels, np.where(kept, classes, 255))


def test_a_class_that_is_absent_keeps_its_threshold() -> None:
    selector = InstanceAdaptiveSelector(3)
    probs = torch.tensor([0.7, 0.2, 0.1]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    selector(probs)
    assert torch.equal(selector.thresholds[1:], torch.full((2,), 0.9, dtype=torch.float64))
    assert selector.thresholds[0] < 0.9


def test_the_ends_of_alpha() -> None:
    probs = probabilities()
    confidence, classes = probs.max(1)
    for alpha, chosen in ((0.0, torch.amax), (1.0, torch.amin)):
        selector = InstanceAdaptiveSelector(4, alpha=alpha, beta=0.0, gamma=0.0, init=0.5)
        selector(probs)
        for c in range(4):
            values = torch.cat([confidence[classes == c], torch.tensor([0.5])])
            torch.testing.assert_close(selector.thresholds[c], chosen(values, dim=0))


def test_a_threshold_of_one_is_held_back() -> None:
    selector = InstanceAdaptiveSelector(2, alpha=0.0, beta=0.0)
    probs = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    assert selector(probs).item() == 0
    assert selector.thresholds[0].item() == pytest.approx(0.999)


def test_lower_thresholds_keep_a_smaller_share() -> None:
    """Of equal confidences, a class that is hard already is trusted less."""
    easy, hard = (InstanceAdaptiveSelector(2, beta=0.0, init=init) for init in (0.95, 0.5))
    probs = torch.rand(1, 1, 30, 30, generator=seeded()) / 2 + 0.5
    probs = torch.cat([probs, 1 - probs], 1)
    kept = [(selector(probs) != 255).float().mean().item() for selector in (easy, hard)]
    assert kept[0] == pytest.approx(0.5 * 0.95**8, abs=0.01)
    assert kept[1] == pytest.approx(0.5 * 0.5**8, abs=0.01)


def test_confidence_is_a_running_mean_of_kept_pixels() -> None:
    selector = InstanceAdaptiveSelector(4, momentum=0.6)
    expected = np.zeros(4)
    for seed in range(3):
        probs = probabilities(seed)
        labels = selector(probs)
        for c in range(4):
            if (labels == c).any():
                mean = float(probs.max(1).values[labels == c].mean())
                expected[c] = mean if expected[c] == 0 else 0.6 * expected[c] + 0.4 * mean
    np.testing.assert_allclose(selector.confidence, expected)


def test_a_selector_resumes_and_keeps_what_is_refused_out() -> None:
    selector, again = InstanceAdaptiveSelector(4), InstanceAdaptiveSelector(4)
    selector(probabilities())
    again.load_state_dict(selector.state_dict())
    assert torch.equal(selector(probabilities(1)), again(probabilities(1)))
    before = copy.deepcopy(selector.state_dict())
    for error, match, call in [
        (ValueError, "probs must be", lambda: selector(probabilities(classes=3))),
        (ValueError, "probs must be", lambda: selector(probabilities()[0])),
        (ValueError, "probs must be", lambda: selector(probabilities()[:0])),
        (ValueError, "probs must be in", lambda: selector(3 * probabilities())),
        (ValueError, "probs must be finite", lambda: selector(probabilities() * float("nan"))),
        (TypeError, "probs must be floating point", lambda: selector(probabilities().long())),
        (ValueError, "state_dict must be of 4 classes", lambda: selector.load_state_dict({})),
        (ValueError, "alpha must be", lambda: InstanceAdaptiveSelector(4, alpha=1.1)),
        (ValueError, "beta must be", lambda: InstanceAdaptiveSelector(4, beta=-0.1)),
        (ValueError, "gamma must be", lambda: InstanceAdaptiveSelector(4, gamma=-1.0)),
        (ValueError, "init must be", lambda: InstanceAdaptiveSelector(4, init=1.0)),
        (ValueError, "num_classes must be", lambda: InstanceAdaptiveSelector(0)),
        (ValueError, "ignore_index must be none", lambda: InstanceAdaptiveSelector(4, ignore_index=3)),
    ]:
        with pytest.raises(error, match=match):
            call()
    assert all(torch.equal(before[name], value) for name, value in selector.state_dict().items())


# --- hard class pasting


def test_odds_are_the_square_of_what_is_lacking() -> None:
    confidence = torch.tensor([0.9, 0.5, 0.99, 0.7, 0.6], dtype=torch.float64)
    hard, odds = hard_class_odds(confidence, 3)
    assert hard.tolist() == [False, True, False, True, True]
    expected = torch.tensor([0, 0.25, 0, 0.09, 0.16], dtype=torch.float64) / 0.5
    torch.testing.assert_close(odds, expected)
    assert hard_class_odds(torch.ones(3), 2)[1].sum() == pytest.approx(1.0)


def scene(classes: list[int], area: int = 1) -> Tensor:
    """A map of zeros with `area` pixels of each of these classes, row by row."""
    labels = torch.zeros(6, 6, dtype=torch.int64)
    for row, c in enumerate(classes):
        labels[row, :area] = c
    return labels


def paster(labels: Tensor, num_hard: int = 4, **options: object) -> HardClassPaste:
    confidence = torch.tensor([0.95, 0.1, 0.5, 0.5, 0.8])
    x = torch.arange(len(labels)).float().view(-1, 1, 1, 1).expand(-1, 1, 6, 6)
    return HardClassPaste(x, labels, confidence, num_hard, **options)  # type: ignore[arg-type]


def test_drawn_classes_have_their_odds() -> None:
    paste = paster(torch.stack([scene([c]) for c in (1, 2, 3, 4)]), max_donors=1)
    donors = paste.draw(20_000, generator=seeded())[:, 0]
    share = donors.bincount(minlength=4) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.81, 0.25, 0.25, 0.04]) / 1.35, rtol=0, atol=0.015)


def test_all_hard_regions_of_a_donor_are_copied() -> None:
    labels = torch.stack([scene([1, 4]), scene([2, 3], 2)])
    labels[1, 5] = 255
    paste = paster(labels, num_hard=3)  # 1, 2 and 3
    x, base = torch.full((1, 1, 6, 6), -1.0), scene([4, 4, 4], 6)[None]
    found, found_labels = paste(x, base, donors=torch.tensor([[1]]))
    region = (labels[1] == 2) | (labels[1] == 3)
    assert torch.equal(found_labels[0], torch.where(region, labels[1], base[0]))
    assert torch.equal(found[0, 0], torch.where(region, 1.0, -1.0))
    assert (x == -1).all()  # what came stays as it was
    assert torch.equal(paste(x, base, donors=torch.tensor([[-1, -1]]))[1], base)
    _, both = paste(x, base, donors=torch.tensor([[0, 1]]))  # the last one is on top
    assert both[0, 0, :2].tolist() == [2, 2]
    assert both[0, 1, 0] == 3


def test_a_donor_of_itself_changes_nothing() -> None:
    labels = torch.stack([scene([1, 2]), scene([3])])
    paste = paster(labels)
    found, found_labels = paste(paste.x, labels, donors=torch.tensor([[0], [1]]))
    assert torch.equal(found, paste.x)
    assert torch.equal(found_labels, labels)


def test_donors_are_drawn_until_half_of_the_hard_classes_are_there() -> None:
    one_each = paster(torch.stack([scene([c]) for c in (1, 2, 3, 4)]))
    donors = one_each.draw(500, generator=seeded())
    assert ((donors >= 0).sum(1) == 2).all()  # two of the four
    assert (donors[:, 0] != donors[:, 1]).all()
    two_each = paster(torch.stack([scene([1, 2]), scene([3, 4])]))
    assert ((two_each.draw(500, generator=seeded()) >= 0).sum(1) == 1).all()
    assert paster(torch.zeros(2, 6, 6, dtype=torch.int64)).draw(3).eq(-1).all()
    assert one_each.draw(0).shape == (0, 3)


def test_the_smallest_regions_are_not_drawn() -> None:
    labels = torch.stack([scene([1], 1), *[scene([1], 3)] * 9, scene([2], 1)])
    paste = paster(labels, num_hard=2, drop=0.1)
    donors = paste.draw(2_000, generator=seeded())
    assert not (donors == 0).any()
    assert (donors == 10).any()  # the only image of its class is never left out
    assert (paster(labels, num_hard=2, drop=0.0).draw(2_000, generator=seeded()) == 0).any()


def test_pasting_is_decided_by_the_generator() -> None:
    paste = paster(torch.stack([scene([c]) for c in (1, 2, 3, 4)]))
    before = torch.get_rng_state()
    one, same, other = (paste.draw(50, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_pasting_refuses() -> None:
    labels = torch.stack([scene([1]), scene([2])])
    paste = paster(labels)
    for error, match, call in [
        (ValueError, "num_hard must be in", lambda: paster(labels, num_hard=6)),
        (ValueError, "max_donors must be", lambda: paster(labels, max_donors=0)),
        (ValueError, "drop must be", lambda: paster(labels, drop=1.0)),
        (ValueError, "ignore_index must be none", lambda: paster(labels, ignore_index=0)),
        (ValueError, "labels must be in", lambda: paster(labels + 4)),
        (ValueError, "confidence must be in", lambda: hard_class_odds(torch.tensor([0.5, 1.5]), 1)),
        (ValueError, "x and labels must be", lambda: paste(paste.x, labels[:1])),
        (ValueError, "x must be images of shape", lambda: paste(paste.x[..., :3], labels[..., :3])),
        (ValueError, "donors must be of shape", lambda: paste(paste.x, labels, donors=torch.tensor([0, 1]))),
        (TypeError, "labels must be int64", lambda: paste(paste.x, labels.float())),
    ]:
        with pytest.raises(error, match=match):
            call()


# --- the loss

LABELS = torch.tensor([[[0, 255, 2], [255, 1, 255]], [[3, 3, 255], [1, 0, 2]]])
LOGITS = 2 * drawn(2, 4, 2, 3)


def test_regularisers_of_the_two_regions() -> None:
    log_probs, kept = LOGITS.log_softmax(1).movedim(1, -1), LABELS != 255
    kld = np.mean([-(row.sum() / 4).item() / 4 for row in log_probs[kept]])
    entropy = np.mean([-(row.exp() * row).sum().item() / 4 for row in log_probs[~kept]])
    found = region_regularization(LOGITS, LABELS)
    assert found.kld.item() == pytest.approx(kld)
    assert found.entropy.item() == pytest.approx(entropy)


def test_uniform_predictions_have_log_c_over_c() -> None:
    found = region_regularization(torch.zeros(2, 4, 2, 3), LABELS)
    assert found.kld.item() == pytest.approx(math.log(4) / 4)
    assert found.entropy.item() == pytest.approx(math.log(4) / 4)


def test_regularisers_pull_opposite_ways() -> None:
    """One towards uniform predictions, the other away from them, and each in its region alone."""
    logits = LOGITS.clone().requires_grad_()
    found = region_regularization(logits, LABELS)
    away = logits.detach().softmax(1) - 0.25  # the gradient of the first, up to its factor
    (smooth,) = torch.autograd.grad(found.kld, logits, retain_graph=True)
    (sharp,) = torch.autograd.grad(found.entropy, logits)
    kept = (LABELS != 255)[:, None]
    torch.testing.assert_close(smooth, torch.where(kept, away, 0.0) / kept.sum() / 4)
    assert (torch.where(kept, sharp, 0.0) == 0).all()
    assert ((sharp * away).sum(1)[LABELS == 255] < 0).all()


def test_soft_cross_entropy_of_a_region() -> None:
    target = (2 * drawn(2, 4, 2, 3, seed=1)).softmax(1).requires_grad_()
    pixels = F.cross_entropy(LOGITS, target.detach(), reduction="none")
    for region, where in (("ignored", LABELS == 255), ("kept", LABELS != 255)):
        found = region_soft_cross_entropy(LOGITS.clone().requires_grad_(), target, LABELS, region=region)  # type: ignore[arg-type]
        assert found.item() == pytest.approx(pixels[where].mean().item() / 4)
        found.backward()
    assert target.grad is None


def test_the_loss_is_the_sum_of_its_parts() -> None:
    target = drawn(2, 4, 2, 3, seed=1).softmax(1)
    terms = region_regularization(LOGITS, LABELS)
    entropy = F.cross_entropy(LOGITS, LABELS, ignore_index=255)
    word = region_soft_cross_entropy(LOGITS, target, LABELS)
    loss = HIASTLoss(kld_weight=0.3, entropy_weight=0.7, consistency_weight=1.1)
    without = entropy + 0.3 * terms.kld + 0.7 * terms.entropy
    torch.testing.assert_close(loss(LOGITS, LABELS), without)
    torch.testing.assert_close(loss(LOGITS, LABELS, target), without + 1.1 * word)
    off = HIASTLoss(kld_weight=0, entropy_weight=0, consistency_weight=0)
    torch.testing.assert_close(off(LOGITS, LABELS, target), entropy)


def test_empty_regions_cost_nothing() -> None:
    target = torch.full((2, 4, 2, 3), 0.25, dtype=torch.float64)
    logits = LOGITS.clone().requires_grad_()
    nothing_kept = HIASTLoss(entropy_weight=0, consistency_weight=0)(logits, torch.full_like(LABELS, 255), target)
    nothing_ignored = HIASTLoss(kld_weight=0)(logits, torch.zeros_like(LABELS), target)
    assert nothing_kept.item() == 0
    torch.testing.assert_close(nothing_ignored, F.cross_entropy(logits, torch.zeros_like(LABELS)))
    (nothing_kept + nothing_ignored).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_loss_refuses() -> None:
    loss = HIASTLoss()
    for error, match, call in [
        (ValueError, "kld_weight must be", lambda: HIASTLoss(kld_weight=-1)),
        (ValueError, "entropy_weight must be", lambda: HIASTLoss(entropy_weight=-1)),
        (ValueError, "consistency_weight must be", lambda: HIASTLoss(consistency_weight=-1)),
        (ValueError, "labels must be of shape", lambda: loss(LOGITS, LABELS[:1])),
        (ValueError, "labels must be in", lambda: loss(LOGITS, LABELS + 2)),
        (ValueError, "teacher_probs must be", lambda: loss(LOGITS, LABELS, LOGITS[:1])),
        (TypeError, "labels must be int64", lambda: loss(LOGITS, LABELS.int())),
        (TypeError, "logits must be floating point", lambda: loss(LOGITS.long(), LABELS)),
        (ValueError, "region must be", lambda: region_soft_cross_entropy(LOGITS, LOGITS, LABELS, region="all")),  # type: ignore[arg-type]
    ]:
        with pytest.raises(error, match=match):
            call()
