from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.semisup import (
    QueueDistributionAlignment,
    ShrinkMatch,
    ShrinkMatchHead,
    shrink_class_space,
    shrink_loss,
)


def predictions(batch: int = 40, classes: int = 6, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(batch, classes, generator=generator, dtype=torch.float64)).softmax(1)


def logits(batch: int = 40, classes: int = 6, seed: int = 5) -> torch.Tensor:
    return torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loop(probs: torch.Tensor, strong: torch.Tensor, threshold: float) -> torch.Tensor:
    """The procedure as the paper tells it, sample by sample, class by class."""
    values = []
    for p, s in zip(probs, strong, strict=True):
        ordered, places = p.sort(descending=True)
        value = torch.zeros((), dtype=p.dtype)
        if ordered[0] < threshold:
            for first in range(2, len(p)):
                confidence = ordered[0] / (ordered[0] + ordered[first:].sum())
                if confidence >= threshold or first == len(p) - 1:
                    left = torch.cat([s[places[:1]], s[places[first:]]])
                    if confidence >= threshold:
                        value = ordered[0] * F.cross_entropy(left[None], torch.tensor([0]))
                    break
        values.append(value)
    return torch.stack(values)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 9), st.floats(0.3, 0.97))
def test_it_is_the_loop(seed: int, classes: int, threshold: float) -> None:
    probs, strong = predictions(20, classes, seed), logits(20, classes, seed + 1)
    torch.testing.assert_close(
        shrink_loss(probs, strong, threshold, reduction="none"), by_loop(probs, strong, threshold)
    )


def test_worked_example() -> None:
    probs = torch.tensor([[0.04, 0.5, 0.06, 0.4]])
    kept, reached = shrink_class_space(probs, 0.8)  # 0.5 / 0.6 = 0.833
    assert kept.tolist() == [[True, True, True, False]]
    assert reached.tolist() == [True]
    strong = torch.tensor([[0.0, 1.0, 2.0, 5.0]])
    expected = 0.5 * (math.log(1 + math.e + math.e**2) - 1)
    assert shrink_loss(probs, strong, 0.8).item() == pytest.approx(expected, rel=1e-6)


def test_top_and_least_likely_class_always_stay() -> None:
    probs = predictions(200, scale=0.5)
    kept, _ = shrink_class_space(probs, 0.95)
    for place in (probs.argmax(1), probs.argmin(1)):
        assert kept.gather(1, place[:, None]).all()


def test_a_stricter_threshold_leaves_fewer_classes() -> None:
    probs = predictions(200)
    counts = [shrink_class_space(probs, tau)[0].sum(1) for tau in (0.5, 0.7, 0.9, 0.99)]
    assert all((fewer <= more).all() for more, fewer in itertools.pairwise(counts))


def test_with_three_classes_only_the_runner_up_can_go() -> None:
    kept, reached = shrink_class_space(torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.37, 0.03]]), 0.9)
    assert kept.tolist() == [[True, False, True]] * 2
    assert reached.tolist() == [False, True]  # 0.5 / 0.7, 0.6 / 0.63


def test_certain_samples_and_hopeless_ones_contribute_nothing() -> None:
    probs = torch.tensor([[0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25], [0.5, 0.46, 0.02, 0.02]])
    strong = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = shrink_loss(probs, strong, 0.9, reduction="none")
    assert (value[:2] == 0).all()
    assert value[2] > 0
    value.sum().backward()
    assert strong.grad is not None
    assert (strong.grad[:2] == 0).all()
    assert strong.grad[2, 1] == 0  # the class that was taken away
    assert (strong.grad[2, [0, 2, 3]] != 0).all()
    assert strong.grad.isfinite().all()


def test_means_are_over_the_whole_batch_and_predictions_are_constants() -> None:
    probs, strong = predictions().requires_grad_(), logits().requires_grad_()
    single = shrink_loss(probs, strong, 0.8, reduction="none")
    assert (single == 0).any()
    torch.testing.assert_close(shrink_loss(probs, strong, 0.8), single.sum() / len(probs))
    single.sum().backward()
    assert probs.grad is None


def rule(**options: object) -> ShrinkMatch:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ShrinkMatch(nn.Flatten(), nn.Linear(4, 5), **options)  # type: ignore[arg-type]


def batch(seed: int = 0, count: int = 30) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, weak, strong = (3 * torch.randn(n, 2, 2, generator=generator) for n in (6, count, count))
    return x, torch.randint(5, (6,), generator=generator), weak, strong


def test_the_total_is_its_parts_by_hand() -> None:
    held, (x, targets, weak, strong) = rule(threshold=0.7, momentum=0.9), batch()
    ratios = []
    for _ in range(3):
        found = held.loss(x, targets, weak, strong)
        p, s = held(weak).softmax(1).detach(), held(strong)
        certain = p.amax(1) >= 0.7
        ratios.append(certain.float().mean().item())
        torch.testing.assert_close(found["labelled"], F.cross_entropy(held(x), targets).detach())
        by_hand = -(p * s.log_softmax(1)).sum(1)[certain].sum() / len(weak)
        torch.testing.assert_close(found["certain"], by_hand.detach())
        assert held.certain_ratio.item() == pytest.approx(ratios[0], rel=1e-5)
        total = found["labelled"] + found["certain"] + found["uncertain"]
        torch.testing.assert_close(found["total"].detach(), total)
        reached = shrink_class_space(p, 0.7)[1]
        assert found["used"].item() == pytest.approx(reached.float().mean().item())
    other = batch(7)
    share = (held(other[2]).softmax(1).amax(1) >= 0.7).float().mean()
    held.loss(*other)
    torch.testing.assert_close(held.certain_ratio, 0.9 * torch.tensor(ratios[0]) + 0.1 * share)


def test_the_uncertain_term_has_the_running_share_of_certain_ones() -> None:
    one, other = rule(threshold=0.7), rule(threshold=0.7)
    for held, ratio in ((one, 0.25), (other, 0.5)):
        held.certain_ratio.fill_(ratio)
        held.started.fill_(True)
        held.momentum = 1.0
    first, second = (held.loss(*batch())["uncertain"] for held in (one, other))
    assert first > 0
    torch.testing.assert_close(2 * first, second)


def test_the_extra_head_learns_from_uncertain_strong_views_alone() -> None:
    held = rule(threshold=0.7)
    found = held.loss(*batch())
    found["total"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in held.extra_head.parameters() if p.ndim > 1)
    off = rule(threshold=0.7, shrink=0.0)
    off.loss(*batch())["total"].backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in off.extra_head.parameters())


def test_switched_off_it_is_fixmatch_with_soft_labels() -> None:
    held, (x, targets, weak, strong) = rule(threshold=0.7, shrink=0.0), batch()
    found = held.loss(x, targets, weak, strong)
    p = held(weak).softmax(1).detach()
    used = (p.amax(1) >= 0.7).float()
    soft = (used * F.cross_entropy(held(strong), p, reduction="none")).mean()
    torch.testing.assert_close(found["total"], F.cross_entropy(held(x), targets) + soft)
    assert found["used"].item() == pytest.approx(used.mean().item())


def test_no_gradient_comes_from_weak_views() -> None:
    held, (x, targets, weak, strong) = rule(threshold=0.7), batch()
    weak.requires_grad_()
    held.loss(x, targets, weak, strong)["total"].backward()
    assert weak.grad is None or (weak.grad == 0).all()


def test_alignment_comes_before_the_threshold() -> None:
    held, (x, targets, weak, strong) = rule(threshold=0.5, align=QueueDistributionAlignment(5)), batch()
    found = held.loss(x, targets, weak, strong)
    p = QueueDistributionAlignment(5)(held(weak).softmax(1).detach())
    by_hand = F.cross_entropy(held(strong), p, reduction="none")[p.amax(1) >= 0.5].sum() / len(weak)
    torch.testing.assert_close(found["certain"], by_hand.detach())


def test_more_unlabelled_samples_are_used_than_by_the_threshold() -> None:
    assert rule(threshold=0.9).loss(*batch())["used"] > rule(threshold=0.9, shrink=0.0).loss(*batch())["used"]


def test_half_precision_and_eval_mode() -> None:
    held = rule()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = held.loss(*batch())
    assert found["total"].dtype == torch.float32
    assert found["total"].isfinite()
    before = held.certain_ratio.clone()
    held.eval().loss(*batch(3))
    assert torch.equal(held.certain_ratio, before)
    double = rule().double()
    assert double.loss(*(part.double() if part.is_floating_point() else part for part in batch()))["total"].isfinite()


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: shrink_class_space(predictions(classes=2)), ValueError, "probs"),
        (lambda: shrink_class_space(predictions()[:0]), ValueError, "probs"),
        (lambda: shrink_class_space(predictions().long()), TypeError, "probs"),
        (lambda: shrink_class_space(predictions(), 1.0), ValueError, "threshold"),
        (lambda: shrink_loss(predictions(), logits(39)), ValueError, "logits"),
        (lambda: shrink_loss(predictions(), logits(), reduction="max"), ValueError, "reduction"),
        (lambda: rule(threshold=0.0), ValueError, "threshold"),
        (lambda: rule(momentum=1.1), ValueError, "momentum"),
        (lambda: rule(shrink=-1), ValueError, "shrink"),
        (lambda: ShrinkMatch(nn.Flatten(), nn.Identity()), TypeError, "head"),  # type: ignore[arg-type]
        (lambda: ShrinkMatch(nn.Flatten(), nn.Linear(4, 2)), ValueError, "head.out_features"),
        (lambda: ShrinkMatchHead(0, 3), ValueError, "feature_dim"),
        (lambda: rule().loss(*batch()[:3], batch()[3][1:]), ValueError, "x_strong"),
        (lambda: rule().loss(batch()[0], batch()[1][1:], *batch()[2:]), ValueError, "targets"),
        (lambda: rule().loss(batch()[0], batch()[1].float(), *batch()[2:]), TypeError, "targets"),
        (lambda: rule().loss(*batch()[:2], batch()[2][:0], batch()[3][:0]), ValueError, "x_weak"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, name) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=name):
        call()
