"""The canvases of the task, and what its references do."""

from __future__ import annotations

import copy

import torch
from torch import nn

from trimtab.nets.unet import UNet
from trimtab.studies.engine.study import Trial
from trimtab.studies.semisup.sss import OfUNet, adapted
from trimtab.studies.tasks.cross_domain_segmentation import CrossDomainSegmentation, rare_digits
from trimtab.studies.tools.scene_adapting import class_weights, self_train, take_statistics
from trimtab.studies.tools.scenes import NUM_CLASSES, RARE, class_overlaps, compose, weathered

TRIAL = Trial(seed=1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_canvases_hold_two_to_four_labelled_digits() -> None:
    images, digits = torch.full((60, 1, 4, 4), 0.5), torch.arange(60) % 10
    scenes = compose(images, digits, 400, 4.0, seeded())
    assert scenes.x.shape == (400, 1, 12, 12)
    assert torch.equal(scenes.x[:, 0] > 0, scenes.y > 0)
    covered = (scenes.y > 0).sum((1, 2)) // 16
    assert covered.unique().tolist() == [2, 3, 4]
    share = torch.stack([(scenes.y == c).sum() for c in range(1, NUM_CLASSES)]).double()
    share /= share.sum()
    assert abs(float(share[[c - 1 for c in RARE]].sum()) - 1 / 5) < 0.04
    assert float(share.min()) > 0.03


def test_a_digit_is_what_its_label_says() -> None:
    digits = torch.arange(60) % 10
    images = (1 + digits.float()).div(20).clamp(min=0.3).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    scenes = compose(images, digits, 100, 1.0, seeded())
    there = scenes.y > 0
    torch.testing.assert_close(scenes.x[:, 0][there], scenes.y[there].float().div(20).clamp(min=0.3))


def test_weather_changes_images_alone() -> None:
    scenes = compose(torch.ones(60, 1, 4, 4), torch.arange(60) % 10, 20, 1.0, seeded())
    other = weathered(scenes, seeded(1))
    assert torch.equal(other.y, scenes.y)
    assert not torch.equal(other.x, scenes.x)
    assert ((other.x >= 0) & (other.x <= 1)).all()


def test_overlaps_in_closed_form() -> None:
    truth, found = torch.tensor([[[0, 0, 1, 1]]]), torch.tensor([[[0, 1, 1, 2]]])
    assert class_overlaps(found, truth, 4).tolist() == [0.5, 1 / 3, 0.0, 0.0]


def test_parts_are_drawn_by_the_seed_and_apart() -> None:
    source, target, test = rare_digits.scenes(TRIAL)
    again = rare_digits.scenes(TRIAL)
    assert all(torch.equal(a.x, b.x) for a, b in zip((source, target, test), again, strict=True))
    assert not torch.equal(source.x[:20], rare_digits.scenes(Trial(seed=2))[0].x[:20])
    assert source.x.mean() < target.x.mean()


def test_all_start_from_the_target_s_statistics() -> None:
    source, target, _ = rare_digits.scenes(TRIAL)
    lesson = rare_digits.lesson(TRIAL, source, target)
    assert not lesson.network.training
    for (name, ours), theirs in zip(
        lesson.network.state_dict().items(), lesson.unadapted.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs) != name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    other = copy.deepcopy(lesson.unadapted)
    take_statistics(other, target.x)
    assert torch.equal(other(target.x[:4]), lesson.network(target.x[:4]))


def test_self_training_takes_its_steps_and_keeps_the_statistics() -> None:
    source, target, _ = rare_digits.scenes(TRIAL)
    lesson = rare_digits.lesson(TRIAL, source, target)
    before, steps = copy.deepcopy(lesson.network), []
    trained = self_train(lesson, lambda probs: probs.argmax(1), after=lambda: steps.append(1))
    assert len(steps) == lesson.steps
    assert not torch.equal(trained.head.weight, before.head.weight)
    for layer, old in zip(trained.modules(), before.modules(), strict=True):
        if isinstance(layer, nn.BatchNorm2d):
            assert torch.equal(layer.running_mean, old.running_mean)


def test_rare_classes_weigh_more() -> None:
    weights = class_weights(rare_digits.scenes(TRIAL)[0])
    assert weights.argmin() == 0
    assert abs(float(weights.mean()) - 1) < 1e-6


def test_the_reference_that_is_told_is_the_only_one_to_see_labels() -> None:
    source, target, _ = rare_digits.scenes(TRIAL)
    wrong = type(target)(target.x, torch.zeros_like(target.y))
    for name, entrant in CrossDomainSegmentation.references().items():
        one, other = (
            TRIAL.seeded(lambda part=part, e=entrant: e.adapt(rare_digits.lesson(TRIAL, source, part)))
            for part in (target, wrong)
        )
        assert torch.equal(one(target.x[:2]), other(target.x[:2])) == (name != "labels of the target")


def test_around_a_u_net_nothing_changes() -> None:
    x = torch.rand(2, 1, 22, 22, generator=seeded())
    net = UNet(1, NUM_CLASSES, depth=2).eval()
    torch.testing.assert_close(OfUNet(net).eval()(x), net(x))


def test_sss_trains_what_it_is_given_and_keeps_the_statistics() -> None:
    source, target, _ = rare_digits.scenes(TRIAL)
    lesson = rare_digits.lesson(TRIAL, source, target)
    before = copy.deepcopy(lesson.network.state_dict())
    network = adapted(lesson)
    after = lesson.network.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items() if name.endswith("weight"))
    assert all(torch.equal(after[name], value) for name, value in before.items() if "running" in name)
    assert network(target.x[:2]).shape == (2, NUM_CLASSES, *target.x.shape[2:])
