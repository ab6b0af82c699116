"""Training against attacks as a task: equal passes, what is drawn, and what references reduce to."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.nets import mlp
from trimtab.robust import AAERLoss, single_step_adversary
from trimtab.studies.engine.study import Trial
from trimtab.studies.robust.aaer import aaer, only_normal
from trimtab.studies.tasks.robust_accuracy import (
    Defence,
    RobustAccuracy,
    abnormal_share,
    interval_training,
    one_step,
)
from trimtab.studies.tools import defences
from trimtab.studies.tools.defences import Lesson, withstood

task = RobustAccuracy()
SETTING = {"lr": 0.1}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scene() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = mlp(64, hidden=(16,))
    x = torch.rand(20, 1, 8, 8, generator=seeded(1))
    return model, x, torch.randint(10, (20,), generator=seeded(2))


def lesson(progress: float = 1.0, eps: float = 0.1, **setting: float) -> Lesson:
    return Lesson(eps, 10, seeded(3), setting, progress)


def test_held_out_and_training_images_are_disjoint() -> None:
    images = task.images(Trial())
    train, held, test = (set(map(bytes, x.flatten(1).numpy())) for x in (images.x, images.x_held, images.x_test))
    assert len(held) == len(images.y_held) == len(images.y) // 4
    assert len(train | held | test) == len(train) + len(held) + len(test)


def test_who_needs_more_passes_makes_fewer_steps() -> None:
    images = task.images(Trial())
    made = []
    for passes in (1, 2, 8):
        plan = task.bench(Trial(), Defence(objective=defences.plain, passes=passes), images).plan
        made.append(plan.epochs * plan.steps_per_epoch * passes)
    assert made == pytest.approx([80, 80, 80], rel=0.25)


def test_every_reference_runs_and_the_same_seed_gives_the_same_numbers() -> None:
    for name, reference in task.references().items():
        runs = 2 if name == "GradAlign" else 1
        found = [dict(task.run(Trial(seed=4, setting=SETTING), reference).metrics) for _ in range(runs)]
        assert set(found[0]) == set(task.metrics), name
        for one in found:
            assert one.pop("seconds") > 0
            assert one["robust_accuracy"] <= one["pgd_accuracy"] <= 1
            assert one["certified_accuracy"] <= one["test_accuracy"]
        assert found[0] == found[-1], name


def test_searching_scores_on_held_out_images_alone() -> None:
    result = task.run(Trial(setting=SETTING, searching=True), Defence(objective=defences.plain))
    assert result.score is not None
    assert not result.metrics


def test_the_radius_rises_over_the_first_tenth() -> None:
    assert [round(lesson(progress).radius, 6) for progress in (0.0, 0.05, 0.1, 1.0)] == [0.001, 0.05, 0.1, 0.1]


def test_attacks_find_worse_images_and_more_steps_worse_ones() -> None:
    model, x, y = scene()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    shares = [withstood(model, x, y, eps, steps=10).float().mean().item() for eps in (0.0, 0.1, 0.5)]
    assert shares[0] == 1.0
    assert shares[0] > shares[1] > shares[2] == 0.0
    assert 0.0 <= abnormal_share(model, x, y, 0.05, seeded()) < 0.2


def test_objectives_reduce_to_plain_training_in_a_tiny_ball() -> None:
    model, x, y = scene()
    plain = defences.plain(lesson())(model, x, y)
    for make in (one_step, partial(one_step, noise="n"), defences.pgd_training, aaer, interval_training, only_normal):
        found = make(lesson(eps=1e-7, scale=1.0))(model, x, y)
        if make is only_normal:
            assert found.isfinite()
        elif make is not aaer:
            assert found.item() == pytest.approx(plain.item(), abs=5e-3), make
    assert defences.trades(lesson(eps=1e-7))(model, x, y).item() == pytest.approx(plain.item(), abs=5e-3)
    assert defences.grad_align(lesson(eps=1e-7))(model, x, y).item() == pytest.approx(plain.item(), abs=0.05)


def test_entrants_use_the_librarys_loss() -> None:
    model, x, y = scene()
    found = aaer(lesson(scale=2.0))(model, x, y)
    step = single_step_adversary(model, x, y, 0.1, generator=seeded(3))
    expected = AAERLoss(1.0, 5.0, 3.0)(model(step.x_adv), y, step.logits_init)
    assert found.item() == pytest.approx(expected.item())


def test_the_radius_of_a_task_is_checked() -> None:
    with pytest.raises(ValueError, match="eps must be in"):
        RobustAccuracy(eps=0.0)
