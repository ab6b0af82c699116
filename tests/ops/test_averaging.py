"""Moving averages of weights: the closed form, buffers, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.ops.averaging import Teacher, frozen_copy, move_average


def layer(value: float) -> nn.BatchNorm1d:
    made = nn.BatchNorm1d(2)
    nn.init.constant_(made.weight, value)
    made.running_mean.fill_(value)
    return made


def test_closed_form() -> None:
    """After k moves towards a constant, the distance to it has shrunk by decay^k."""
    average, module = frozen_copy(layer(0.0)), layer(1.0)
    for _ in range(5):
        move_average(average, module, 0.8)
    torch.testing.assert_close(average.weight, torch.full((2,), 1 - 0.8**5))
    assert torch.equal(average.running_mean, module.running_mean)
    assert not average.weight.requires_grad
    assert not average.training


def test_ends() -> None:
    average, module = frozen_copy(layer(0.0)), layer(1.0)
    move_average(average, module, 1.0)
    assert torch.equal(average.weight, torch.zeros(2))
    move_average(average, module, 0.0)
    assert torch.equal(average.weight, module.weight)
    with torch.no_grad():
        module.weight.add_(1)
    assert torch.equal(average.weight, torch.ones(2))


def test_refused() -> None:
    average = frozen_copy(layer(0.0))
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\]"):
        move_average(average, layer(1.0), 1.5)
    with pytest.raises(ValueError, match="average must have the weights of module"):
        move_average(average, nn.Linear(2, 2), 0.5)
    assert torch.equal(average.weight, torch.zeros(2))


def test_warm_up_begins_with_a_copy() -> None:
    teacher = Teacher(layer(0.0), 0.6, warmup=True)
    kept = []
    for _ in range(5):
        kept.append(teacher.next_decay)
        teacher.update(layer(1.0))
    assert kept == pytest.approx([0, 1 / 2, 0.6, 0.6, 0.6])
    teacher = Teacher(layer(0.0), 0.999, warmup=True)
    for value in (3.0, 6.0, 9.0):
        teacher.update(layer(value))
    torch.testing.assert_close(teacher.model.weight, torch.full((2,), 6.0))  # the plain mean, while it warms up


@pytest.mark.parametrize(("buffers", "mean"), [("copy", 1.0), ("average", 0.1), ("own", 0.0)])
def test_buffers(buffers: str, mean: float) -> None:
    teacher = Teacher(layer(0.0), 0.9, buffers=buffers)  # type: ignore[arg-type]
    student = layer(1.0)
    student.num_batches_tracked.fill_(7)
    teacher.update(student)
    torch.testing.assert_close(teacher.model.running_mean, torch.full((2,), mean))
    assert teacher.model.num_batches_tracked == (0 if buffers == "own" else 7)


def test_only_own_statistics_come_from_the_batch() -> None:
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)) + 5
    for buffers in ("copy", "average", "own"):
        network = nn.Sequential(layer(1.0), nn.Dropout(0.5))
        teacher = nn.ModuleList([Teacher(network, buffers=buffers)]).train()[0]  # type: ignore[arg-type]
        assert not teacher.model[1].training
        moved = not torch.equal(teacher(x).mean(0), network.eval()(x).mean(0))
        assert moved == (buffers == "own")


def test_a_teacher_takes_no_gradient_and_is_no_part_of_the_network() -> None:
    network = layer(1.0)
    teacher = Teacher(network)
    assert not teacher(torch.ones(3, 2, requires_grad=True)).requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    assert teacher.model.weight.data_ptr() != network.weight.data_ptr()


def test_decay_of_one_update() -> None:
    teacher = Teacher(layer(0.0), 0.9)
    teacher.update(layer(1.0), decay=1.0)
    assert torch.equal(teacher.model.weight, torch.zeros(2))
    teacher.update(layer(1.0), decay=0.25)
    torch.testing.assert_close(teacher.model.weight, torch.full((2,), 0.75))


def test_a_teacher_resumes() -> None:
    teacher, again = Teacher(layer(0.0), 0.9, warmup=True), Teacher(layer(5.0), 0.9, warmup=True)
    for _ in range(3):
        teacher.update(layer(1.0))
    again.load_state_dict(teacher.state_dict())
    for held in (teacher, again):
        held.update(layer(2.0))
    assert again.updates == 4
    assert torch.equal(teacher.model.weight, again.model.weight)


def test_what_a_teacher_refuses_changes_nothing() -> None:
    teacher = Teacher(layer(0.0), 0.9)
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    for call in (
        lambda: teacher.update(nn.Linear(2, 2)),
        lambda: teacher.update(nn.BatchNorm1d(2, track_running_stats=False)),
        lambda: teacher.update(layer(1.0), decay=1.5),
        lambda: teacher.load_state_dict({}),
        lambda: teacher.load_state_dict({**Teacher(layer(1.0)).state_dict(), "model.weight": torch.ones(3)}),
        lambda: Teacher(layer(0.0), decay=-0.1),
        lambda: Teacher(layer(0.0), buffers="mean"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="must"):
            call()
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    assert teacher.updates == 0


def test_a_network_with_other_statistics_is_refused_before_a_weight_moves() -> None:
    average = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = {name: value.clone() for name, value in average.state_dict().items()}
    with pytest.raises(ValueError, match="^average must have the buffers of module"):
        move_average(average, nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)), 0.5)
    assert all(torch.equal(average.state_dict()[name], value) for name, value in before.items())
