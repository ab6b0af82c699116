"""The training loop and what enters it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab.studies.engine.study import Trial
from trimtab.studies.tasks.label_noise import LabelNoise, symmetric
from trimtab.studies.tools import baselines
from trimtab.studies.tools.images import some_images
from trimtab.studies.tools.training import Plan, Supervised, Training, Workbench, fit, fitted, predict

SETTING = {"lr": 0.05, "weight_decay": 5e-4, "rate": 0.5, "alpha": 1.0, "rho": 0.05, "forget_rate": 0.2}


def bench(entrant: Training, seed: int = 0, setting: dict[str, Any] | None = None) -> Workbench:
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(70, 5, generator=draws), torch.randint(3, (70,), generator=draws)
    trial = Trial(seed=seed, setting=SETTING if setting is None else setting)
    return Workbench(
        entrant,
        lambda: nn.Linear(5, 3),
        (x, y),
        (x[:0], y[:0]),
        num_classes=3,
        epochs=4,
        trial=trial,
        batch_size=32,
    )


def weights(work: Workbench) -> Tensor:
    rule = Supervised(work)
    fit(work, rule)
    return torch.cat([p.detach().flatten() for p in rule.network.parameters()])


def test_plain_training_is_sgd_on_the_shuffled_batches() -> None:
    work = bench(Training())
    network = work.network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    order = work.trial.generator(1)
    for _ in range(4):
        for index in torch.randperm(70, generator=order)[:64].view(2, 32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(work.x[index]), work.y[index]).backward()
            optimizer.step()
            schedule.step()
    expected = torch.cat([p.detach().flatten() for p in network.parameters()])
    torch.testing.assert_close(weights(work), expected)


def test_a_fitted_network_is_that_of_a_bench_at_the_rate_that_is_said() -> None:
    work, told = bench(Training()), list[float]()
    trial = replace(work.trial, report=told.append)

    def of(lr: float | None) -> Tensor:
        network = trial.seeded(lambda: nn.Linear(5, 3))
        done = fitted(trial, Training(), network, (work.x, work.y), num_classes=3, epochs=4, lr=lr, batch_size=32)
        assert done is network
        assert not network.training
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    torch.testing.assert_close(of(None), weights(work))
    assert told
    told.clear()
    torch.testing.assert_close(of(0.1), weights(bench(Training(), setting={"lr": 0.1})))
    assert not told  # a part of a run does not report


def test_some_images_are_digits_in_a_run_of_seconds() -> None:
    some = some_images(Trial(seed=1), "mnist", smoke=(30, 10), laptop=(3000, 500))
    assert (some.name, some.in_shape, len(some.y_train), len(some.y_test)) == ("digits", (1, 8, 8), 30, 10)
    other = some_images(Trial(seed=2), "mnist", smoke=(30, 10), laptop=(3000, 500))
    assert not torch.equal(some.x_train, other.x_train)


def test_the_seed_decides_everything_and_the_global_state_nothing() -> None:
    found = []
    for state in range(2):
        torch.manual_seed(state)
        found.append(weights(bench(Training(), seed=3)))
    assert torch.equal(*found)
    assert not torch.equal(found[0], weights(bench(Training(), seed=4)))


def test_a_penalty_and_a_loss_are_told_what_they_need() -> None:
    told: list[tuple[str, Any]] = []

    class Remembers(nn.Module):
        def set_epoch(self, epoch: int) -> None:
            told.append(("loss epoch", epoch))

        def forward(self, logits: Tensor, targets: Tensor, index: Tensor) -> Tensor:
            told.append(("index", index))
            return nn.functional.cross_entropy(logits, targets)

    class Shrinks:
        def __init__(self, network: nn.Module, plan: Plan) -> None:
            self.network = network

        def __call__(self, logits: Tensor, x: Tensor, index: Tensor) -> Tensor:
            return sum((p.square().sum() for p in self.network.parameters()), torch.zeros(()))

        def update(self) -> None:
            told.append(("update", None))

    work = bench(Training(loss=lambda plan: Remembers(), penalty=Shrinks))
    shrunk = weights(work)
    assert [value for name, value in told if name == "loss epoch"] == [0, 1, 2, 3]
    assert sum(name == "update" for name, _ in told) == 8
    seen = torch.cat([value for name, value in told if name == "index"][:2])
    assert len(seen.unique()) == 64
    assert shrunk.norm() < weights(bench(Training())).norm()


def test_groups_of_a_preparation_reach_the_optimizer() -> None:
    def freeze_bias(network: nn.Module, plan: Plan) -> list[dict[str, Any]]:
        return [{"params": [network.weight], "lr": 0.0}]

    before = bench(Training()).network().weight
    rule = Supervised(work := bench(Training(prepare=freeze_bias)))
    fit(work, rule)
    torch.testing.assert_close(rule.network.weight, before)


def test_a_rule_stands_alone() -> None:
    with pytest.raises(ValueError, match="rule must stand without loss"):
        Training(rule=baselines.mixed_inputs, loss=baselines.label_smoothing)


@pytest.mark.parametrize("name", LabelNoise.references())
def test_references_are_fixed_by_the_seed(name: str) -> None:
    entrant = LabelNoise.references()[name]
    setting = {key: values[-1] for key, values in symmetric.grid(entrant).items()}
    found = []
    for state in range(2):
        torch.manual_seed(state)
        found.append(symmetric.run(Trial(seed=1, setting=setting), entrant).metrics)
    first, second = ({k: v for k, v in metrics.items() if k != "seconds"} for metrics in found)
    assert first == second


def test_no_clean_label_and_no_test_image_is_seen_while_settings_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    entrant = LabelNoise.references()["cross-entropy"]
    trial = Trial(seed=1, setting={"lr": 0.05, "weight_decay": 5e-4}, searching=True)
    score = symmetric.run(trial, entrant).score
    whole = LabelNoise.images

    def without_test(self: LabelNoise, trial: Trial) -> Any:
        images = whole(self, trial)
        images.x_test.fill_(torch.nan), images.y_test.fill_(0)
        return images

    monkeypatch.setattr(LabelNoise, "images", without_test)
    assert symmetric.run(trial, entrant).score == score
    images = whole(symmetric, trial)
    assert images.wrong.float().mean() > 0.3  # the labels that are learned from and those that choose are as wrong
    assert len(images.y_held) == len(images.y) // 4


def test_predicting_leaves_the_mode_as_it_was() -> None:
    network = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.9))
    x = torch.randn(10, 5)
    torch.testing.assert_close(predict(network.train(), x, batch_size=3), network[0](x))
    assert network.training
