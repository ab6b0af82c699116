from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.ops.attack import pgd
from trimtab.robust import AAERLoss, abnormal_examples, single_step_adversary


def batch(seed: int = 0, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    before, after = torch.randn(2, size, 4, generator=generator, dtype=torch.float64)
    return after, torch.randint(4, (size,), generator=generator), before


def hand() -> tuple[Tensor, Tensor, Tensor]:
    """Two samples of two classes: the first is abnormal, the second is not."""
    before = torch.zeros(2, 2, dtype=torch.float64)
    after = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    return after, torch.tensor([0, 0]), before


def test_worked_example() -> None:
    after, targets, before = hand()
    losses = [math.log1p(math.exp(-3)), math.log1p(math.exp(1))]
    share, fall, moved = abnormal_examples(after, targets, before)
    assert share.item() == 0.5
    assert fall.item() == pytest.approx(math.log(2) - losses[0])
    assert moved.item() == pytest.approx(9 - 1)
    expected = sum(losses) / 2 + 2.0 * 0.5 * (3.0 * (math.log(2) - losses[0]) + 0.25 * 8)
    assert AAERLoss(2.0, 3.0, 0.25)(after, targets, before).item() == pytest.approx(expected)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_without_one_of_the_sets_it_is_cross_entropy(sign: float) -> None:
    _, targets, before = batch()
    after = before + sign * F.one_hot(targets, 4)  # every loss falls, or every loss rises
    loss = AAERLoss(ce_grad=True)
    logits = after.clone().requires_grad_()
    value = loss(logits, targets, before)
    torch.testing.assert_close(value, F.cross_entropy(after, targets))
    (gradient,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(gradient, (after.softmax(1) - F.one_hot(targets, 4)) / len(targets))
    assert abnormal_examples(after, targets, before).share.item() == (sign > 0)


def test_an_unmoved_output_is_normal() -> None:
    after, targets, _ = batch()
    assert abnormal_examples(after, targets, after.clone()).share.item() == 0


def test_what_was_before_the_step_is_a_constant() -> None:
    after, targets, before = batch()
    before.requires_grad_()
    AAERLoss(ce_grad=True)(after.requires_grad_(), targets, before).backward()
    assert before.grad is None


def test_as_released_the_losses_fall_moves_the_value_alone() -> None:
    after, targets, before = batch()
    after.requires_grad_()
    values = [AAERLoss(1.0, lam2, 1.5)(after, targets, before) for lam2 in (1.0, 5.0)]
    gradients = [torch.autograd.grad(value, after)[0] for value in values]
    assert values[1] > values[0]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize(("lam1", "lam2"), [(1.0, 1.0), (0.5, 1.0), (1.0, 3.0)])
def test_with_a_gradient_an_abnormal_samples_loss_counts_less(lam1: float, lam2: float) -> None:
    after, targets, before = hand()
    after.requires_grad_()
    (gradient,) = torch.autograd.grad(AAERLoss(lam1, lam2, 0.0, ce_grad=True)(after, targets, before), after)
    plain = (after.detach().softmax(1) - F.one_hot(targets, 2)) / 2
    torch.testing.assert_close(gradient[0], (1 - lam1 * lam2) * plain[0])
    torch.testing.assert_close(gradient[1], plain[1])


def test_the_movement_pulls_abnormal_outputs_back_and_no_others() -> None:
    after, targets, before = hand()
    after.requires_grad_()
    for lam3 in (1.0, 2.0):
        plain = AAERLoss(1.0, 0.0, 0.0)(after, targets, before)
        value = AAERLoss(1.0, 0.0, lam3)(after, targets, before)
        assert (value - plain).item() == pytest.approx(lam3 * 0.5 * 8)
        (gradient,) = torch.autograd.grad(value - plain, after)
        # share 1/2, one abnormal sample: the gradient of its squared distance, halved
        torch.testing.assert_close(gradient[0], lam3 * 0.5 * 2 * (after - before)[0].detach())
        torch.testing.assert_close(gradient[1], torch.zeros(2, dtype=torch.float64))


def test_outputs_that_move_less_than_the_normal_ones_cost_nothing() -> None:
    after, targets, before = hand()
    after = torch.stack([after[0] * 0.1, after[1] * 4])
    assert abnormal_examples(after, targets, before).output_change.item() == 0
    assert AAERLoss(1.0, 0.0, 9.0)(after, targets, before).item() == pytest.approx(
        F.cross_entropy(after, targets).item()
    )


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def scene() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Normed()
    generator = torch.Generator().manual_seed(1)
    return model, torch.rand(5, 6, generator=generator), torch.randint(3, (5,), generator=generator)


def test_the_step_is_fgsm_from_its_start() -> None:
    model, x, targets = scene()
    model.eval()
    start = 0.05 * torch.ones_like(x)
    found = single_step_adversary(model, x, targets, 0.1, alpha=1.25, start=start)
    torch.testing.assert_close(found.logits_init, model((x + start).clamp(0, 1)).detach())
    by_pgd = pgd(
        lambda moved: F.cross_entropy(model(moved), targets, reduction="none"),
        x,
        0.1,
        steps=1,
        step_size=0.125,
        start=start,
        bounds=(0.0, 1.0),
    )
    torch.testing.assert_close(found.x_adv, by_pgd)


def test_rs_stays_in_the_ball_and_n_may_leave_it() -> None:
    model, x, targets = scene()
    for noise, reach in (("rs", 0.1), ("n", 0.3)):
        found = single_step_adversary(model, x, targets, 0.1, noise=noise, generator=torch.Generator().manual_seed(0))
        change = (found.x_adv - x).abs().max().item()
        assert 0.5 * reach < change <= reach + 1e-6
        assert found.x_adv.min() >= 0
        assert found.x_adv.max() <= 1


@pytest.mark.parametrize(("noise", "start", "end"), [("rs", -1.0, 0.25), ("n", -2.0, -1.0), ("n", 2.0, 3.0)])
def test_a_step_is_a_quarter_longer_than_the_ball_for_rs_and_as_long_for_n(
    noise: Literal["rs", "n"], start: float, end: float
) -> None:
    def rising(x: Tensor) -> Tensor:  # the loss of class 0 rises with every input
        return torch.cat([-x.sum(1, keepdim=True), x.sum(1, keepdim=True)], 1)

    x = torch.rand(3, 4, dtype=torch.float64)
    found = single_step_adversary(
        rising, x, torch.zeros(3, dtype=torch.int64), 0.1, noise=noise, bounds=None, start=0.1 * start + 0 * x
    )
    torch.testing.assert_close(found.x_adv, x + 0.1 * end)


def test_starts_fill_the_ball_for_rs_and_one_of_twice_its_size_for_n() -> None:
    x, seen = torch.full((50, 40), 0.1), []

    def flat(moved: Tensor) -> Tensor:  # no gradient, so that a sample stays where it starts
        seen.append(moved.detach())
        return 0 * moved[:, :2]

    options = {"generator": torch.Generator().manual_seed(0)}
    for noise, reach in (("rs", 0.1), ("n", 0.2)):
        single_step_adversary(flat, x, torch.zeros(50, dtype=torch.int64), 0.1, noise=noise, bounds=None, **options)
        offset = seen[-1] - x
        assert 0.99 * reach < offset.max() <= reach + 1e-6
        assert -reach - 1e-6 <= offset.min() < -0.99 * reach
        single_step_adversary(flat, x, torch.zeros(50, dtype=torch.int64), 0.1, noise=noise, **options)
        assert seen[-1].min() >= 0  # the start too is an image


def test_the_model_keeps_its_mode_and_its_parameters_get_no_gradient() -> None:
    model, x, targets = scene()
    before = model.net[1].running_mean.clone()
    found = single_step_adversary(model, x, targets, 0.1)
    assert model.training
    assert not torch.equal(model.net[1].running_mean, before)  # it ran in training mode, as the authors' does
    assert all(p.grad is None for p in model.parameters())
    assert not found.x_adv.requires_grad
    assert not found.logits_init.requires_grad


def test_bad_arguments_are_refused_by_name() -> None:
    model, x, targets = scene()
    for options, name in (({"eps": 0.0}, "eps"), ({"alpha": -1.0}, "alpha"), ({"noise": "fgsm"}, "noise")):
        with pytest.raises(ValueError, match=name):
            single_step_adversary(model, x, targets, **{"eps": 0.1, **options})
    with pytest.raises(ValueError, match="start must be of shape"):
        single_step_adversary(model, x, targets, 0.1, start=x[:1])
    with pytest.raises(ValueError, match="at least one sample"):
        single_step_adversary(model, x[:0], targets[:0], 0.1)
    with pytest.raises(ValueError, match="targets"):
        single_step_adversary(model, x, targets[:-1], 0.1)
    with pytest.raises(TypeError, match="x must be floating point"):
        single_step_adversary(model, x.long(), targets, 0.1)
    for name in ("lam1", "lam2", "lam3"):
        with pytest.raises(ValueError, match=name):
            AAERLoss(**{name: -1.0})
    with pytest.raises(ValueError, match="logits_init"):
        abnormal_examples(torch.zeros(2, 3), torch.tensor([0, 1]), torch.zeros(2, 4))


def test_parity_with_torchattacks() -> None:
    torchattacks = pytest.importorskip("torchattacks")
    model, x, targets = scene()
    model.eval()
    images = x.view(5, 1, 2, 3)
    flat = nn.Sequential(nn.Flatten(), model).eval()
    torch.manual_seed(3)
    theirs = torchattacks.FFGSM(flat, eps=0.1, alpha=0.125)(images, targets)
    torch.manual_seed(3)
    start = torch.randn_like(images).uniform_(-0.1, 0.1)
    ours = single_step_adversary(flat, images, targets, 0.1, alpha=1.25, start=start).x_adv
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
