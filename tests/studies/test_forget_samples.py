"""Forgetting samples as a task: what is to be forgotten, what everybody is judged by, and what methods reduce to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.nets import mlp
from trimtab.studies.engine.study import Trial
from trimtab.studies.tasks.forget_samples import ForgetSamples, judged, nothing, random_clothes, without
from trimtab.studies.tools.network_stack import NetworkStack, stacked_cross_entropy, train_on_subsets
from trimtab.studies.unlearning.d2dgn import Nodes, taught
from trimtab.studies.unlearning.datamodel_matching.samples import attribution, direct
from trimtab.unlearning import predict_without

TRIAL = Trial(seed=3, setting={"lr": 1e-3})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stack_of(models: int, features: int = 4) -> NetworkStack:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NetworkStack(lambda: mlp(features, (5,), 3), models)


def test_a_stack_is_its_networks() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = [mlp(4, (5,), 3) for _ in range(3)]
    stack, x = stack_of(3), torch.randn(6, 4, generator=seeded())
    torch.testing.assert_close(stack(x), torch.stack([network(x) for network in networks], 1))
    own = torch.randn(6, 3, 4, generator=seeded(1))
    apart = torch.stack([network(own[:, k]) for k, network in enumerate(networks)], 1)
    torch.testing.assert_close(stack(own), apart)


def test_networks_of_a_stack_do_not_know_of_one_another() -> None:
    stack, x, y = stack_of(3), torch.randn(6, 4, generator=seeded()), torch.randint(3, (6,), generator=seeded())
    logits = stack(x)
    torch.testing.assert_close(
        stacked_cross_entropy(logits, y), sum(F.cross_entropy(logits[:, k], y) for k in range(3))
    )
    stacked_cross_entropy(logits[:, :1], y).backward()
    for weight in stack.parameters():
        assert weight.grad is not None
        assert weight.grad[0].abs().max() > 0
        assert weight.grad[1:].abs().max() == 0


def test_networks_are_trained_on_their_own_samples_alone() -> None:
    x, y = torch.randn(8, 4, generator=seeded()), torch.randint(3, (8,), generator=seeded())
    masks = torch.zeros(2, 8, dtype=torch.bool)
    masks[0, :4], masks[1, 4:] = True, True
    options = {"steps": 3, "lr": 0.01}
    one = train_on_subsets(stack_of(2), masks, x, y, generator=seeded(), **options)  # type: ignore[arg-type]
    x[4:] += 1
    two = train_on_subsets(stack_of(2), masks, x, y, generator=seeded(), **options)  # type: ignore[arg-type]
    for before, after in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(before[0], after[0])
        assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("which", ["random", "cluster"])
def test_what_is_forgotten_is_not_retained(which: str) -> None:
    task = ForgetSamples(which=which)  # type: ignore[arg-type]
    lesson = task.lesson(TRIAL)
    forget, retained = set(lesson.forget.tolist()), set(lesson.retained.tolist())
    assert forget
    assert not forget & retained
    assert forget | retained == set(range(len(lesson.samples.x)))
    if which == "cluster":
        assert lesson.samples.y[lesson.forget].unique().tolist() == [3]
    seen, held, test = (
        {row.numpy().tobytes() for row in part} for part in (lesson.samples.x, lesson.samples.held, lesson.samples.test)
    )
    assert len(seen | held | test) == len(seen) + len(held) + len(test)
    other = task.lesson(Trial(seed=4))
    assert torch.equal(other.samples.x, lesson.samples.x)
    assert set(other.forget.tolist()) != forget


def test_masks_leave_the_samples_out() -> None:
    assert without(torch.tensor([2]), 2, 4).tolist() == [[True, True, False, True]] * 2


def test_networks_that_are_the_oracles_are_at_no_distance() -> None:
    lesson = random_clothes.lesson(TRIAL)
    oracles = random_clothes.oracles(lesson)
    found = judged(lesson, oracles, oracles)
    assert found["klom"] == found["membership"] == 0
    apart = judged(lesson, nothing(lesson), oracles)
    assert apart["klom"] > 0
    assert apart["klom"] == pytest.approx((apart["klom_forget"] + apart["klom_retain"] + apart["klom_validation"]) / 3)
    assert 0 <= apart["membership_auc"] <= 1


def test_settings_are_tried_on_other_unseen_samples() -> None:
    one = random_clothes.lesson(TRIAL)
    two = random_clothes.lesson(Trial(seed=3, setting={"lr": 1e-3}, searching=True))
    asked: list[torch.Tensor] = []

    def answer(x: torch.Tensor) -> torch.Tensor:
        asked.append(x)
        logits: torch.Tensor = one.trained(x)
        return logits

    oracles = random_clothes.oracles(one)
    for lesson in (one, two):
        judged(lesson, answer, oracles)
    assert torch.equal(asked[0][len(one.samples.x) :], one.samples.test)
    assert torch.equal(asked[1][len(one.samples.x) :], one.samples.held)


def test_the_datamodels_own_answer_is_its_prediction() -> None:
    lesson = random_clothes.lesson(TRIAL)
    inputs, coef = lesson.samples.inputs, attribution(lesson)
    assert coef.shape == (len(lesson.samples.x), len(inputs), 1, lesson.samples.classes)
    x = lesson.samples.test
    expected = predict_without(lesson.trained(x), coef[:, -len(x) :], lesson.forget)
    torch.testing.assert_close(direct(replace(lesson, prepared=coef))(x), expected)


def test_two_teachers_of_samples() -> None:
    stack = stack_of(3)
    x, edges = torch.randn(6, 4, generator=seeded()), torch.empty(2, 0, dtype=torch.int64)
    (logits,) = Nodes(stack).layers(x.repeat_interleave(3, 0), edges)
    torch.testing.assert_close(logits.unflatten(0, (6, 3)), stack(x))
    lesson = random_clothes.lesson(TRIAL)
    before = [p.clone() for p in lesson.trained.parameters()]
    student = taught(lesson, start="trained")
    assert isinstance(student, nn.Module)
    for own, start, now in zip(student.parameters(), before, lesson.trained.parameters(), strict=True):
        assert torch.equal(start, now)
        assert not torch.equal(own, start)
        assert (own - start).abs().max() < 0.1
