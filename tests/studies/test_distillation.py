"""Distillation as a task: whose student it is, what it is told, and what is measured."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from trimtab.compress import Transformer
from trimtab.data.text import python_sources
from trimtab.studies.compress import autodistil, laptop_diff
from trimtab.studies.engine.study import Trial, settings_of
from trimtab.studies.losses import ps_kd
from trimtab.studies.tasks import distillation
from trimtab.studies.tasks.distillation import (
    Distillation,
    Distilling,
    Pupil,
    distances,
    new_blocks,
    own_blocks,
    stages_of,
    student_of,
    told,
)
from trimtab.studies.tools.training import Plan

TOKENS = torch.randint(30, (6, 9), generator=torch.Generator().manual_seed(0))
X, Y, INDEX = TOKENS[:, :-1], TOKENS[:, 1:], torch.arange(6)
ENTRANTS = {
    name: entrant
    for study in (autodistil.study, laptop_diff.study, ps_kd.study)
    for name, entrant in study.contestants(own_blocks).items()
    if isinstance(entrant, Distilling)
}
TAUGHT = {name: entrant for name, entrant in ENTRANTS.items() if entrant.objective is not None}


def teacher() -> Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Transformer(30, 8, depth=4, hidden=24, heads=2, head_dim=12, mlp=48).eval().requires_grad_(False)


def pupil(start: distillation.Start = "teacher", **setting: float) -> Pupil:
    whole = teacher()
    student = student_of(whole, start, Trial(seed=1)) if start == "teacher" else student_of_another(whole)
    return Pupil(student, whole, stages_of(student), Plan(6, 30, 2, 3, setting))


def student_of_another(whole: Transformer) -> nn.Module:
    """As the teacher's size is not the task's here."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = Transformer(30, 8, depth=4, hidden=24, heads=2, head_dim=12, mlp=48)
    return student_of(other, "teacher", Trial(seed=1))


def test_the_student_has_the_second_of_every_two_blocks() -> None:
    given = pupil()
    assert given.stages == ("layers.1", "layers.3")
    for name, value in given.student.state_dict().items():
        assert torch.equal(value, given.teacher.state_dict()[name])
    assert not any(name.startswith(("layers.0", "layers.2")) for name in given.student.state_dict())
    half = sum(p.numel() for p in given.student.get_submodule("layers").parameters())
    assert 2 * half == sum(p.numel() for p in given.teacher.get_submodule("layers").parameters())
    assert all(p.requires_grad for p in given.student.parameters())
    assert not any(p.requires_grad for p in given.teacher.parameters())


def test_new_blocks_are_the_seeds_and_know_nothing_of_the_teacher() -> None:
    whole = Transformer(30, 8)
    one, two, other = (student_of(whole, "new", Trial(seed=seed)) for seed in (1, 1, 2))
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
        assert "weight" not in name or "norm" in name or not torch.equal(value, other.state_dict()[name])
    assert not torch.equal(one.state_dict()["head.weight"], whole.head.weight)


@pytest.mark.parametrize("name", TAUGHT)
def test_objectives_teach_the_student_alone(name: str) -> None:
    entrant = TAUGHT[name]
    given = pupil("new", **settings_of(own_blocks.grid(entrant))[0])
    assert entrant.objective is not None
    objective = entrant.objective(given)
    if hasattr(objective, "set_epoch"):
        objective.set_epoch(0)
    loss = objective(X, Y, INDEX)
    assert loss.ndim == 0
    assert loss > 0
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in given.student.parameters())
    assert all(p.grad is None for p in given.teacher.parameters())


@pytest.mark.parametrize("name", ["soft targets", "hidden states", "relational KD", "LAPTOP-Diff's distillation"])
def test_a_student_like_its_teacher_has_only_the_text_to_learn(name: str) -> None:
    entrant = TAUGHT[name]
    whole = teacher()
    same = Pupil(whole, whole, ("layers.1", "layers.3"), Plan(6, 30, 2, 3, settings_of(own_blocks.grid(entrant))[0]))
    assert entrant.objective is not None
    text = distillation.text_loss(whole(X), Y)
    share = 0.5 if name in ("soft targets", "hidden states") else 1.0
    torch.testing.assert_close(entrant.objective(same)(X, Y, INDEX), share * text)


def test_relations_come_first_and_the_text_after() -> None:
    given = pupil("new", share=0.5)
    objective = autodistil.relations_first(given)
    found = [objective(X, Y, INDEX) for _ in range(6)]  # two epochs of three steps
    relation = autodistil.relations(given.student, given.teacher, X, Y)
    text = distillation.text_loss(given.student(X), Y)
    assert [torch.equal(value, relation) for value in found] == [True] * 3 + [False] * 3
    assert [torch.equal(value, text) for value in found] == [False] * 3 + [True] * 3


def test_the_own_past_is_that_of_the_same_character() -> None:
    given = pupil("new")
    objective = ps_kd.OwnPast(given)
    objective.set_epoch(0)
    text = distillation.text_loss(given.student(X), Y)
    torch.testing.assert_close(objective(X, Y, INDEX), text)  # nothing has been foretold yet
    past = given.student(X).detach().softmax(2)
    with torch.no_grad():
        given.student.get_parameter("head.weight").mul_(1.5)
    objective.set_epoch(1)
    turned = torch.tensor([4, 2, 0])  # windows come in another order, and not all of them
    found = objective(X[turned], Y[turned], INDEX[turned])
    now = given.student(X[turned])
    foretold = -(past[turned] * now.log_softmax(2)).sum(2).mean()
    torch.testing.assert_close(found, 0.2 * distillation.text_loss(now, Y[turned]) + 0.8 * foretold)


def test_distances_are_of_pairs_and_in_units_of_their_mean() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    found = distances(x)
    wanted = torch.stack([(x[i] - x[j]).norm() for i, j in itertools.combinations(range(5), 2)])
    torch.testing.assert_close(found, wanted / wanted.mean())
    torch.testing.assert_close(found, distances(100 * x + 3), rtol=1e-4, atol=1e-4)


def test_what_is_told_of_a_student() -> None:
    whole, other = teacher(), pupil("new").student
    loss, agreement, divergence = told(whole, whole, (X, Y))
    assert agreement == 1.0
    assert divergence == pytest.approx(0, abs=1e-6)
    assert loss == pytest.approx(distillation.text_loss(whole(X), Y).item(), rel=1e-5)
    _, agreement, divergence = told(other.eval(), whole, (X, Y))
    own, theirs = other(X), whole(X)
    assert agreement == pytest.approx((own.argmax(2) == theirs.argmax(2)).double().mean().item())
    wanted = (theirs.softmax(2) * (theirs.log_softmax(2) - own.log_softmax(2))).sum(2).mean().item()
    assert divergence == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("task", [own_blocks, new_blocks])
def test_a_run_tells_all_and_a_search_only_the_score(task: Distillation) -> None:
    entrant = Distillation.references()["hard labels"]
    found = task.run(Trial(setting={"lr": 1e-3}), entrant).metrics
    assert found.keys() == task.metrics.keys()
    assert all(map(math.isfinite, found.values()))
    searched = task.run(Trial(setting={"lr": 1e-3}, searching=True), entrant)
    assert not searched.metrics
    assert searched.score is not None
    assert searched.score < 0


def test_the_teacher_is_one_in_all_runs_and_a_bound() -> None:
    found = [own_blocks.run(Trial(seed=seed), Distillation.references()["teacher"]).metrics for seed in (0, 1)]
    assert all(metrics.keys() == {"test_loss"} for metrics in found)
    text = python_sources()
    one, two = (distillation.teacher_of(text, 32, Trial(seed=seed)).state_dict() for seed in (0, 1))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_an_objective_is_told_the_epoch() -> None:
    epochs: list[int] = []

    class Watching:
        def __init__(self, given: Pupil) -> None:
            self.given = given

        def set_epoch(self, epoch: int) -> None:
            epochs.append(epoch)

        def __call__(self, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            assert len(index) == len(x) == 32
            return distillation.text_loss(self.given.student(x), y)

    own_blocks.run(Trial(setting={"lr": 1e-3}), Distilling(objective=Watching))
    assert epochs == [0]
