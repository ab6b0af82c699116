from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.semisup import HPM, absolute_loss_prediction, hard_patch_mask, patchify, relative_loss_prediction

DOUBLE = torch.float64


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


class Model(nn.Module):
    """Gives the patches and the predicted losses it was told, moved by a weight."""

    def __init__(self, patches: Tensor, predicted: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=DOUBLE))
        self.register_buffer("patches", patches)
        self.register_buffer("predicted", predicted)
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        self.masks.append(mask)
        return self.patches + self.weight, self.predicted + self.weight


def rule(predicted: Tensor | None = None, **options: object) -> HPM:
    model = Model(draws(3, 4, 4, seed=1), draws(3, 4, seed=2) if predicted is None else predicted)
    return HPM(model, **{"patch": 2, "epochs": 10, "mask_ratio": 0.5, **options})  # type: ignore[arg-type]


def test_patches_are_rows_of_pixels() -> None:
    x = draws(2, 3, 4, 6)
    found = patchify(x, 2)
    assert found.shape == (2, 6, 12)
    torch.testing.assert_close(found[1, 4], x[1, :, 2:4, 2:4].flatten())
    torch.testing.assert_close(F.fold(found.mT, (4, 6), 2, stride=2), x)


def test_masks_hide_as_many_in_every_row_and_the_hardest_among_them() -> None:
    predicted = draws(50, 196)
    generator = torch.Generator().manual_seed(0)
    for epoch, guided in ((0, 0), (199, 73)):
        mask = hard_patch_mask(predicted, 0.75, 0.5 * (epoch + 1) / 200, generator=generator)
        assert (mask.sum(1) == 147).all()
        hardest = predicted.topk(guided, 1).indices
        assert mask.gather(1, hardest).all()
    mask = hard_patch_mask(predicted, 0.75, 1.0, generator=generator)
    assert torch.equal(mask, torch.zeros_like(mask).scatter_(1, predicted.topk(147, 1).indices, True))


def test_without_guidance_masks_are_even() -> None:
    predicted = draws(1, 8).expand(4000, 8)
    share = hard_patch_mask(predicted, 0.75, 0.0, generator=torch.Generator().manual_seed(0)).double().mean(0)
    torch.testing.assert_close(share, torch.full((8,), 0.75, dtype=DOUBLE), rtol=0, atol=0.03)


def test_the_rest_comes_from_the_noise_alone() -> None:
    predicted, noise = draws(5, 9), torch.rand(5, 9, generator=torch.Generator().manual_seed(1))
    mask = hard_patch_mask(predicted, 0.5, 0.4, noise=noise)  # five hidden, two of them guided
    for row in range(5):
        guided = set(predicted[row].topk(2).indices.tolist())
        others = sorted(set(range(9)) - guided, key=lambda j: -float(noise[row, j]))[:3]
        assert set(mask[row].nonzero()[:, 0].tolist()) == guided | set(others)


def test_relative_loss_agrees_with_a_loop_over_pairs() -> None:
    predicted, target = draws(3, 5), draws(3, 5, seed=1).round()  # with ties
    values = [
        -torch.log(torch.sigmoid(p[j] - p[i]))
        for p, m in zip(predicted, target, strict=True)
        for i in range(5)
        for j in range(5)
        if m[j] > m[i]
    ]
    torch.testing.assert_close(relative_loss_prediction(predicted, target), torch.stack(values).mean())


def test_relative_loss_knows_only_the_order() -> None:
    predicted, target = draws(3, 5), draws(3, 5, seed=1)
    value = relative_loss_prediction(predicted, target)
    torch.testing.assert_close(relative_loss_prediction(predicted + 7, target), value)
    torch.testing.assert_close(relative_loss_prediction(predicted, target.exp()), value)
    assert relative_loss_prediction(1e4 * target, target) < 1e-6
    torch.testing.assert_close(relative_loss_prediction(-1e4 * target, target).isfinite(), torch.tensor(True))
    assert relative_loss_prediction(0 * predicted, target).item() == pytest.approx(math.log(2))
    assert relative_loss_prediction(predicted, torch.ones(3, 5)).item() == 0
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(relative_loss_prediction(predicted[:, order], target[:, order]), value)


def test_absolute_loss_standardises_each_image() -> None:
    predicted, target = draws(3, 5), draws(3, 5, seed=1)
    standard = (target - target.mean(1, keepdim=True)) / target.std(1, unbiased=False, keepdim=True)
    torch.testing.assert_close(
        absolute_loss_prediction(predicted, target), F.mse_loss(predicted, standard), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        absolute_loss_prediction(predicted, 1e-3 * target),
        absolute_loss_prediction(predicted, target),
        rtol=1e-3,
        atol=0,
    )
    assert absolute_loss_prediction(predicted, torch.ones(3, 5)).isfinite()


def test_the_losses_are_constants_of_the_prediction() -> None:
    for loss in (relative_loss_prediction, absolute_loss_prediction):
        predicted, target = draws(3, 5).requires_grad_(), draws(3, 5, seed=1).requires_grad_()
        loss(predicted, target).backward()
        assert predicted.grad is not None
        assert target.grad is None
        assert torch.autograd.gradcheck(lambda p, f=loss, m=target: f(p, m), draws(3, 5).requires_grad_())


def test_the_loss_of_a_batch_is_that_of_its_hidden_patches() -> None:
    x, mask = draws(3, 1, 4, 4), torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 1]]).bool()
    held = rule(prediction_weight=0.3)
    found = held.loss(x, mask=mask)
    losses = (patchify(x, 2) - held.model.patches).square().mean(2)
    hidden, predicted = losses[mask].view(3, 2), held.model.predicted[mask].view(3, 2)
    torch.testing.assert_close(found["reconstruction"], hidden.mean())
    torch.testing.assert_close(found["prediction"], relative_loss_prediction(predicted, hidden))
    torch.testing.assert_close(found["total"], found["reconstruction"] + 0.3 * found["prediction"])
    assert not found["prediction"].requires_grad
    absolute = rule(objective="absolute").loss(x, mask=mask)
    torch.testing.assert_close(absolute["prediction"], absolute_loss_prediction(predicted, hidden))


def test_patches_may_be_standardised() -> None:
    x = draws(3, 1, 4, 4)
    target = patchify(x, 2)
    standard = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    assert rule(normalize=True).patch_losses(x, standard).abs().max() < 1e-12


def test_the_teacher_sees_the_whole_image_and_guides_more_and_more() -> None:
    x = draws(3, 1, 4, 4)
    held = rule(max_hard=1.0)
    held.set_epoch(9)
    mask = held.mask(x)
    assert torch.equal(mask, torch.zeros_like(mask).scatter_(1, held.model.predicted.topk(2, 1).indices, True))
    assert not held.teacher.model.masks[-1].any()
    assert held.model.masks == []
    for epoch in range(10):
        held.set_epoch(epoch)
        assert held.hard == pytest.approx((epoch + 1) / 10)
    plain = rule(max_hard=0.0)
    plain.mask(x)
    assert plain.teacher.model.masks == []  # nobody is asked


def test_the_teachers_decay_goes_from_the_first_to_the_last_value() -> None:
    held = rule(epochs=400, decay=(0.5, 0.9), decay_epochs=100)
    with torch.no_grad():
        held.model.weight.fill_(1.0)
    for epoch, decay in ((0, 0.5), (50, 0.7), (100, 0.9), (399, 0.9)):
        held.set_epoch(epoch)
        with torch.no_grad():
            held.teacher.model.weight.zero_()
        held.update()
        assert held.teacher.model.weight.item() == pytest.approx(1 - decay)


def test_state_goes_round_with_the_epoch() -> None:
    held, other = rule(), rule()
    held.set_epoch(7)
    other.load_state_dict(held.state_dict())
    assert other.epoch == 7
    with pytest.raises(ValueError, match="state_dict"):
        other.load_state_dict({**held.state_dict(), "more": torch.zeros(1)})


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: patchify(x, 3), "patch"),
        (lambda x: patchify(x[0], 2), "x"),
        (lambda x: hard_patch_mask(x, 0.5, 0.5), "predicted"),
        (lambda x: hard_patch_mask(x[:, 0, 0], 1.0, 0.5), "mask_ratio"),
        (lambda x: hard_patch_mask(x[:, 0, 0], 0.5, 1.5), "hard"),
        (lambda x: hard_patch_mask(x[:, 0, 0], 0.5, 0.5, noise=x[:1, 0, 0]), "noise"),
        (lambda x: relative_loss_prediction(x[:, 0, 0], x[:1, 0, 0]), "target"),
        (lambda x: relative_loss_prediction(x[:0, 0, 0], x[:0, 0, 0]), "predicted"),
        (lambda x: rule(mask_ratio=0.0), "mask_ratio"),
        (lambda x: rule(max_hard=-0.1), "max_hard"),
        (lambda x: rule(objective="best"), "objective"),
        (lambda x: rule(decay=(1.5, 0.9)), "decay"),
        (lambda x: rule().set_epoch(10), "epoch"),
        (lambda x: rule().loss(x[:0]), "x"),
        (lambda x: rule().loss(x[..., :3]), "patch"),
        (lambda x: rule().loss(x, mask=torch.ones(3, 5, dtype=torch.bool)), "mask"),
    ],
)
def test_bad_input_is_refused_by_name(call: Callable[[Tensor], object], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must"):
        call(draws(3, 1, 4, 4))


def test_the_hardest_are_as_many_as_their_share_says() -> None:
    predicted = torch.arange(200.0)[None]
    noise = 0.9 * torch.cat([torch.ones(100), torch.zeros(100)])[None]  # of the rest the easiest are hidden
    found = hard_patch_mask(predicted, 0.5, 0.29, noise=noise)  # 0.29 times 100 is 28.999999999999996
    assert found[0, 100:].sum() == 29


@pytest.mark.parametrize(("patches", "ratio"), [(100, 0.9), (100, 0.8), (10, 0.9), (196, 0.75)])
def test_shares_of_whole_numbers_are_met(patches: int, ratio: float) -> None:
    predicted, noise = draws(1, patches), torch.rand(1, patches)
    assert hard_patch_mask(predicted, ratio, 0.0, noise=noise).sum() == round(ratio * patches)


def test_a_state_of_a_longer_training_is_refused_before_anything_changes() -> None:
    longer, shorter = rule(epochs=20), rule(epochs=10)
    longer.set_epoch(12)
    with torch.no_grad():
        longer.model.weight.fill_(3.0)
    with pytest.raises(ValueError, match=r"^state_dict must be of an epoch in \[0, 10\), got 12"):
        shorter.load_state_dict(longer.state_dict())
    assert shorter.epoch == 0
    assert shorter.model.weight == 0


@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1e8, 1e20])
def test_absolute_losses_have_no_unit(scale: float) -> None:
    predicted, target = torch.randn(2, 9), torch.rand(2, 9)
    wanted = absolute_loss_prediction(predicted, target)
    torch.testing.assert_close(absolute_loss_prediction(predicted, scale * target), wanted)


def test_a_mask_of_other_patches_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="^mask must be"):
        rule().loss(draws(3, 1, 4, 4), mask=torch.ones(3, 5, dtype=torch.bool))
