"""The black-box task: an oracle that counts rightly, scenes without leaks, and references that keep the rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trimtab.studies.engine.study import Trial
from trimtab.studies.tasks.black_box import Attack, any_class, given_class
from trimtab.studies.tools.oracle import Oracle


class Sign(nn.Module):
    """Class 1 where the mean is above a half."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1, keepdim=True)
        return torch.cat([0.5 - mean, mean - 0.5], 1)


def oracle(budget: int = 10, targeted: bool = False) -> Oracle:
    x, y = torch.full((3, 1, 2, 2), 0.45), torch.zeros(3, dtype=torch.int64)
    return Oracle(Sign(), x, y, 1 - y, 0.1, budget, targeted=targeted)


def bright(value: float, count: int = 1) -> Tensor:
    return torch.full((count, 1, 2, 2), value)


class TestOracle:
    def test_counts_every_image_and_remembers_the_first_that_fooled(self):
        asked = oracle()
        asked(torch.cat([bright(0.4), bright(0.52), bright(0.53)]), torch.tensor([1, 1, 1]))
        asked(torch.cat([bright(0.54), bright(0.4)]), torch.tensor([1, 0]))
        assert asked.queries.tolist() == [1, 4, 0]
        assert asked.first.tolist() == [0, 2, 0]
        assert asked.open_rows().tolist() == [0, 2]

    def test_what_is_outside_the_ball_does_not_count_as_success(self):
        asked = oracle()
        asked(bright(0.56, 3))
        assert asked.first.tolist() == [0, 0, 0]
        fallen, after = asked.outcome(torch.cat([bright(0.6), bright(0.54), bright(0.4)]))
        assert fallen.tolist() == [False, True, False]
        assert after.tolist() == [1, 1, 1]

    def test_a_spent_budget_is_refused_and_nothing_is_counted(self):
        asked = oracle(budget=2)
        asked(bright(0.4, 3))
        with pytest.raises(ValueError, match="queries"):
            asked(bright(0.4, 4), torch.tensor([0, 1, 1, 2]))
        assert asked.queries.tolist() == [1, 1, 1]

    def test_crafting_alone_needs_no_query(self):
        fallen, after = oracle(targeted=True).outcome(bright(0.54, 3))
        assert fallen.all()
        assert after.tolist() == [0, 0, 0]


@pytest.fixture(scope="module")
def scene():
    return given_class.scene(Trial())


def test_a_scene_has_right_victims_and_no_goal_that_is_their_class(scene):
    said = scene.oracle(scene.x)
    assert (said.argmax(1) == scene.y).all()
    assert (scene.goals != scene.y).all()
    assert scene.examples.shape == scene.x.shape
    for goal, image in zip(scene.goals, scene.examples, strict=True):
        assert any(torch.equal(image, own) for own in scene.own_x[scene.own_y == goal])
    assert (scene.margin(said) > 0).all()


def test_halves_are_disjoint_and_victims_are_nobodys():
    data = given_class.halves(Trial())
    box, own, test = ({tuple(v.flatten().tolist()) for v in part[0]} for part in (data.box, data.own, data.test))
    assert len(box & own) <= 1
    assert len((box | own) & test) <= 1


@pytest.mark.parametrize("task", [any_class, given_class])
def test_standing_still_fools_nobody(task):
    found = task.run(Trial(), Attack(craft=lambda scene: scene.x)).metrics
    assert found["success"] == 0
    assert found["queries"] == 60


def test_refusals():
    with pytest.raises(ValueError, match="eps"):
        type(any_class)(eps=0.0)
