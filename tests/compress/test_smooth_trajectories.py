from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from trimtab.compress import (
    TrajectoryMatcher,
    balance_factor,
    clip_weight,
    gradient_penalty,
    perturb,
    representative_init,
    train_expert,
    trajectory_loss,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


PARAMS = 3 * 4 + 4 + 4 * 2 + 2
IMAGES, TARGETS = drawn(4, 3), torch.tensor([0, 0, 1, 1])
SEGMENT = 0.3 * drawn(4, PARAMS, seed=1)
LR = torch.tensor(0.1, dtype=torch.float64)


def test_balance_factors_are_logarithms_to_the_base_of_five() -> None:
    assert balance_factor(10, 20) == pytest.approx(math.log(8) / math.log(5))
    assert balance_factor(9, 20) == pytest.approx(math.log(5) / math.log(9))
    assert balance_factor(13, 21) == pytest.approx(math.log(11, 5))
    values = [balance_factor(start, 20) for start in range(20)]
    assert values == sorted(values)


def test_the_loss_of_an_expert_rises_in_ten_epochs() -> None:
    assert [clip_weight(e) for e in range(12)] == pytest.approx([*(0.5 + 0.05 * e for e in range(10)), 1, 1])


def test_the_gradient_penalty_is_its_formula() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(32, 2)).double()
    x = drawn(2, 3, 4, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(gradient_penalty(model, x), (gradient.norm(dim=1) - 1).square().mean())
    images = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
    torch.testing.assert_close(gradient_penalty(model, x, per="image"), images)
    gradient_penalty(model, x).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model[0].weight.grad.abs().sum() > 0


def test_a_gradient_of_length_one_costs_nothing_and_one_of_zero_stays_finite() -> None:
    model = nn.Linear(2, 1).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.6, 0.8]]))
    assert gradient_penalty(model, drawn(5, 2)).item() == pytest.approx(0, abs=1e-12)
    nn.init.zeros_(model.weight)
    gradient_penalty(model, drawn(5, 2)).backward()
    assert model.weight.grad.isfinite().all()


def test_a_plain_expert_is_sgd() -> None:
    model = network()
    path = train_expert(model, IMAGES, TARGETS, 4, lr=0.1, clip=False, penalty=0.0, batch_size=4)
    torch.testing.assert_close(path[0], parameters_to_vector(model.parameters()).detach(), rtol=0, atol=0)
    own = copy.deepcopy(model)
    optimizer = torch.optim.SGD(own.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    for epoch in range(4):
        optimizer.zero_grad()
        F.cross_entropy(own(IMAGES), TARGETS).backward()
        optimizer.step()
        torch.testing.assert_close(path[epoch + 1], parameters_to_vector(own.parameters()).detach())


def test_smoothing_enters_the_experts_loss() -> None:
    model = network()
    path = train_expert(model, IMAGES, TARGETS, 1, lr=0.1, momentum=0.0, weight_decay=0.0, batch_size=4, penalty=3.0)
    loss = 0.5 * F.cross_entropy(model(IMAGES), TARGETS) + 3.0 * gradient_penalty(model, IMAGES)
    gradient = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    moved = torch.cat(
        [
            torch.zeros(p.numel()) if g is None else g.flatten()
            for g, p in zip(gradient, model.parameters(), strict=True)
        ]
    )
    torch.testing.assert_close(path[0] - path[1], 0.1 * moved)


def test_the_rate_of_an_expert_falls_after_half() -> None:
    plain = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "clip": False, "penalty": 0.0, "batch_size": 4}
    model = nn.Linear(3, 2).double()
    path = train_expert(model, IMAGES, TARGETS, 6, **plain)  # type: ignore[arg-type]
    for epoch in range(6):
        vector_to_parameters(path[epoch], model.parameters())
        gradient = torch.autograd.grad(F.cross_entropy(model(IMAGES), TARGETS), list(model.parameters()))
        step = (0.1 if epoch < 5 else 0.06) * torch.cat([g.flatten() for g in gradient])
        torch.testing.assert_close(path[epoch] - path[epoch + 1], step)


def test_only_kernels_are_perturbed_and_by_no_more_than_alpha() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2)).double()
    weights, noise = drawn(18 + 2 + 4 + 2), drawn(26, seed=1)
    moved = perturb(weights, model, 0.5, noise=noise)
    assert torch.equal(moved[18:], weights[18:])
    torch.testing.assert_close(moved[:18], weights[:18] * (1 + 0.5 * noise[:18] / noise[:18].norm()))
    assert (moved - weights)[:18].norm() <= 0.5 * weights[:18].abs().max()
    both = perturb(weights, model, 0.5, least_dims=2, noise=noise)
    assert torch.equal(both[18:20], weights[18:20])
    assert not torch.equal(both[20:24], weights[20:24])
    torch.testing.assert_close(perturb(weights, model, 0.0), weights)
    again = [perturb(weights, model, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*again)
    for wrong in ({"weights": weights[1:]}, {"noise": noise[1:]}, {"alpha": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must"):
            perturb(**{"weights": weights, "model": model, "noise": noise, **wrong})  # type: ignore[arg-type]


def test_first_images_are_real_ones_near_the_centres() -> None:
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])
    features = torch.cat([centre + 0.1 * drawn(10, 2, seed=i).float() for i, centre in enumerate(centres)])
    targets = torch.arange(40) // 20
    pixels = torch.arange(40.0)[:, None]
    images, labels = representative_init(features, pixels, targets, 2, random_state=0)
    assert labels.tolist() == [0, 0, 1, 1]
    assert sorted((images[:, 0] // 10).tolist()) == [0, 1, 2, 3]
    for image in images[:, 0].long():
        near = features[image // 10 * 10 : image // 10 * 10 + 10]
        distance = (near - near.mean(0)).norm(dim=1)
        assert distance[image % 10] == distance.min()
    assert len(representative_init(features, pixels, targets, 20, random_state=0)[0].unique()) == 40
    for wrong in (
        (features, pixels, targets, 21),
        (features[1:], pixels, targets, 1),
        (features, pixels[1:], targets, 1),
    ):
        with pytest.raises(ValueError, match="must"):
            representative_init(*wrong)


def test_a_student_that_does_not_move_has_a_ratio_of_one() -> None:
    losses = trajectory_loss(network(), IMAGES, TARGETS, SEGMENT, 0 * LR, steps=6, intermediate="adaptive")
    assert losses["final"].item() == pytest.approx(1)
    assert losses["intermediate"].item() == pytest.approx(1 / 3 + 2 / 3)


def by_hand(images: Tensor, start: Tensor, steps: int, lr: float, momentum: float, scale: float) -> list[Tensor]:
    """The student's weights after each step, by torch's own optimizer."""
    model = network()
    vector_to_parameters(start.clone(), model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=momentum)
    path = [start]
    for _ in range(steps):
        optimizer.zero_grad()
        (scale * F.cross_entropy(model(images), TARGETS)).backward()
        optimizer.step()
        path.append(parameters_to_vector(model.parameters()).detach().clone())
    return path


def test_the_loss_is_that_of_the_students_path() -> None:
    start = SEGMENT[0] + 0.1
    path = by_hand(IMAGES, start, 7, 0.1, 0.9, 1.3)

    def ratio(step: int, epoch: int) -> Tensor:
        return (path[step] - SEGMENT[epoch]).square().sum() / (start - SEGMENT[epoch]).square().sum()

    for intermediate, first, second in (("all", 1, 1), ("adaptive", 1 / 3, 2 / 3), (None, 0, 0)):
        found = trajectory_loss(
            network(),
            IMAGES,
            TARGETS,
            SEGMENT,
            LR,
            steps=7,
            scale=1.3,
            start=start,
            intermediate=intermediate,  # type: ignore[arg-type]
        )
        torch.testing.assert_close(found["final"], ratio(7, 3))
        torch.testing.assert_close(found["intermediate"], first * ratio(2, 1) + second * ratio(4, 2))
        torch.testing.assert_close(found["total"], found["final"] + found["intermediate"])


def test_a_student_that_arrives_costs_nothing() -> None:
    path = by_hand(IMAGES, SEGMENT[0], 6, 0.1, 0.9, 1.0)
    losses = trajectory_loss(network(), IMAGES, TARGETS, torch.stack(path[::2]), LR, steps=6)
    assert losses["total"].item() == pytest.approx(0, abs=1e-20)


def test_gradients_to_images_and_rate_agree_with_differences() -> None:
    def total(images: Tensor, lr: Tensor) -> Tensor:
        return trajectory_loss(network(), images, TARGETS, SEGMENT[:3], lr, steps=2)["total"]

    assert torch.autograd.gradcheck(total, (IMAGES.clone().requires_grad_(), LR.clone().requires_grad_()))


def test_batches_take_their_images_alone() -> None:
    batches = [torch.tensor([0, 2]), torch.tensor([2, 3])]
    images = IMAGES.clone().requires_grad_()
    trajectory_loss(network(), images, TARGETS, SEGMENT[:2], LR, steps=2, batches=batches)["total"].backward()
    assert images.grad is not None
    assert (images.grad.abs().sum(1) > 0).tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": TARGETS[1:]}, "targets must"),
        ({"images": IMAGES[:0], "targets": TARGETS[:0]}, "targets must"),
        ({"segment": SEGMENT[:1]}, "segment must"),
        ({"segment": SEGMENT[:, 1:]}, "segment must"),
        ({"steps": 2}, "steps must"),
        ({"start": SEGMENT[0, 1:]}, "start must"),
        ({"intermediate": "some"}, "intermediate must"),
        ({"batches": [torch.tensor([0])]}, "batches must"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    whole = {"model": network(), "images": IMAGES, "targets": TARGETS, "segment": SEGMENT, "lr": LR, "steps": 6}
    with pytest.raises(ValueError, match=message):
        trajectory_loss(**{**whole, **change})


def matcher(**options: Any) -> TrajectoryMatcher:
    paths = torch.stack([SEGMENT, SEGMENT.flip(0)]).repeat(1, 2, 1)
    held = {"steps": 4, "length": 2, "least_dims": 2, "generator": torch.Generator().manual_seed(5), "optimizer": adam}
    return TrajectoryMatcher(network(), paths, IMAGES, TARGETS, **{**held, **options})


def adam(images: Tensor, lr: Tensor) -> torch.optim.Optimizer:
    return torch.optim.Adam([{"params": [images], "lr": 0.05}, {"params": [lr], "lr": 1e-3}])


def test_plain_matching_is_what_is_left_when_all_is_off() -> None:
    rule = matcher(alpha=0.0, intermediate=None, balance=False, optimizer=None, lr=0.1)
    expected = trajectory_loss(
        network(), IMAGES, TARGETS, SEGMENT.flip(0)[1:4], LR, steps=4, intermediate=None, start=SEGMENT[2]
    )
    found = rule.step(expert=1, start=1)
    torch.testing.assert_close(found["total"], expected["final"])
    again = matcher(alpha=0.0, intermediate=None, balance=False, optimizer=None, lr=0.1)
    images = IMAGES.clone().requires_grad_()
    trajectory_loss(network(), images, TARGETS, SEGMENT.flip(0)[1:4], LR, steps=4, intermediate=None)[
        "total"
    ].backward()
    again.step(expert=1, start=1)
    torch.testing.assert_close(again.images.detach(), IMAGES - 1000.0 * images.grad)  # type: ignore[operator]


def test_starts_are_balanced_and_perturbed() -> None:
    noise = drawn(PARAMS, seed=8)
    rule = matcher(max_start=4, alpha=0.7, lr=0.1)
    begin = perturb(SEGMENT[3], network(), 0.7, least_dims=2, noise=noise)
    path = SEGMENT.repeat(2, 1)[3:6]
    expected = trajectory_loss(network(), IMAGES, TARGETS, path, LR, steps=4, start=begin, scale=balance_factor(3, 4))
    torch.testing.assert_close(rule.step(expert=0, start=3, noise=noise), expected)


def test_matching_lowers_the_loss() -> None:
    rule = matcher(alpha=0.0, lr=0.3)
    losses = [rule.step(expert=0, start=0)["total"].item() for _ in range(25)]
    assert losses[-1] < 0.98 * losses[0]
    assert rule.lr > 0


def test_a_state_continues_exactly_and_a_foreign_one_changes_nothing() -> None:
    rule, other = matcher(batch_size=2), matcher(batch_size=2)
    for _ in range(2):
        rule.step()
    other.load_state_dict(rule.state_dict())
    torch.testing.assert_close(other.step(), rule.step(), rtol=0, atol=0)
    assert torch.equal(other.images, rule.images)
    before = rule.state_dict()
    for wrong in ({**before, "images": IMAGES[1:]}, {**before, "optimizer": {}}, {}):
        with pytest.raises(ValueError, match="state must"):
            rule.load_state_dict(wrong)
    torch.testing.assert_close(rule.state_dict(), before, rtol=0, atol=0)


def test_images_that_look_alike_are_chosen_once_each() -> None:
    features = torch.tensor([[0.0], [0.0], [0.0], [5.0]])
    images = torch.arange(4.0)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there are fewer places than centres
        chosen, labels = representative_init(features, images, torch.zeros(4, dtype=torch.int64), 3, random_state=0)
    assert len(chosen.unique()) == 3
    assert labels.tolist() == [0] * 3


def test_every_start_that_leaves_room_is_drawn_and_the_rate_stays_positive() -> None:
    held = matcher()
    assert held.max_start == held.trajectories.shape[1] - held.length
    starts = {held._drawn(held.max_start) for _ in range(200)}
    assert starts == set(range(held.max_start))
    last = matcher(optimizer=lambda images, lr: torch.optim.SGD([images, lr], lr=1e9))
    with torch.no_grad():
        last.lr.fill_(1e-3)
    for _ in range(3):
        last.step()
        assert last.lr >= 1e-6


def test_what_does_not_fit_is_refused() -> None:
    for options, message in (
        ({"length": 8}, "length must"),
        ({"max_start": 7}, "max_start must"),
        ({"steps": 1}, "steps must"),
        ({"batch_size": 5}, "batch_size must"),
        ({"lr": 0.0}, "lr must"),
    ):
        with pytest.raises(ValueError, match=message):
            matcher(**options)
    with pytest.raises(ValueError, match="trajectories must"):
        TrajectoryMatcher(network(), SEGMENT, IMAGES, TARGETS)
    with pytest.raises(ValueError, match="batch normalisation"):
        train_expert(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double(), IMAGES, TARGETS, 1)
    rule = matcher()
    for arguments in ({"start": 6}, {"expert": 2}, {"noise": drawn(3)}):
        with pytest.raises(ValueError, match="must be"):
            rule.step(**arguments)  # type: ignore[arg-type]
