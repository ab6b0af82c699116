"""The loop of trainings that no workbench supervises, and networks that are trained once for all who want them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trimtab.studies.engine.study import Trial
from trimtab.studies.tools.descent import descend, descent_step, reported, shuffled
from trimtab.studies.tools.trained_once import trained_once


def test_a_step_goes_downhill_and_gives_back_the_loss_it_started_from() -> None:
    x = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([x], lr=0.1)
    x.grad = torch.tensor([100.0, 100.0])  # of something else, which does not count
    loss = descent_step(optimizer, x.square().sum() / 2)
    assert not loss.requires_grad
    assert float(loss) == 12.5
    torch.testing.assert_close(x.data, torch.tensor([2.7, 3.6]))


def test_a_gradient_is_cut_to_the_norm() -> None:
    x = nn.Parameter(torch.tensor([3.0, 4.0]))
    descent_step(torch.optim.SGD([x], lr=1.0), x.square().sum() / 2, clip=0.5)
    torch.testing.assert_close(x.data, torch.tensor([2.7, 3.6]), atol=1e-5, rtol=0)


def test_batches_are_drawn_one_before_each_loss() -> None:
    x, seen = nn.Parameter(torch.zeros(1)), list[str]()

    def batches() -> object:
        for k in range(2):
            seen.append(f"draw {k}")
            yield k

    def loss(batch: int) -> Tensor:
        seen.append(f"loss {batch}")
        return x.sum()

    descend(torch.optim.SGD([x], lr=1.0), loss, batches(), after=lambda k: seen.append(f"after {k}"))  # type: ignore[arg-type]
    assert seen == ["draw 0", "loss 0", "after 0", "draw 1", "loss 1", "after 1"]
    assert float(x.detach()) == -2.0


def test_the_rate_falls_to_nothing_or_as_a_schedule_says() -> None:
    x = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([x], lr=1.0)
    descend(optimizer, lambda _: x.sum(), range(4), anneal=4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
    assert float(x.detach()) == pytest.approx(-(1 + (1 + 0.5**0.5) / 2 + 0.5 + (1 - 0.5**0.5) / 2))
    optimizer = torch.optim.SGD([x], lr=1.0)
    descend(optimizer, lambda _: x.sum(), range(2), anneal=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_what_is_done_is_reported_after_each_step() -> None:
    told = list[float]()
    assert [(step, len(told)) for step in reported(4, told.append)] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert told == [0.25, 0.5, 0.75, 1.0]


def test_every_epoch_shows_all_samples_once_in_a_new_order() -> None:
    parts = list(shuffled(7, 3, 2, torch.Generator().manual_seed(0)))
    assert [len(part) for part in parts] == [3, 3, 1, 3, 3, 1]
    first, second = torch.cat(parts[:3]), torch.cat(parts[3:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(7))
    assert first.tolist() != second.tolist()


def test_a_network_is_trained_by_the_first_and_read_back_by_the_others(tmp_path: Path) -> None:
    trial, trainings = Trial(artifacts=tmp_path), list[int]()

    def one() -> nn.Linear:
        network = trial.seeded(lambda: nn.Linear(2, 1))

        def train() -> None:
            trainings.append(1)
            nn.init.constant_(network.weight, 7.0)

        return trained_once(trial, network, train, key="sevens")

    first, second = one(), one()
    assert len(trainings) == 1
    torch.testing.assert_close(first.weight, torch.full((1, 2), 7.0))
    torch.testing.assert_close(second.weight, first.weight)


def test_the_weights_may_be_those_of_another_network() -> None:
    network, average = nn.Linear(2, 1), nn.Linear(2, 1)
    assert trained_once(Trial(), network, lambda: average, key="average") is network
    torch.testing.assert_close(network.weight, average.weight)
