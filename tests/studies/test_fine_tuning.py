"""Fine-tuning as a task: what is turned, measured and frozen."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from trimtab import nets
from trimtab.studies.engine.study import Trial
from trimtab.studies.finetune.sorsa import sorsa
from trimtab.studies.tasks.fine_tuning import (
    FineTuning,
    effective_weight,
    first_below,
    hidden_layers,
    linear_probe,
    lora,
    rotate,
    undecayed,
)
from trimtab.studies.tools.training import Plan, Training

task = FineTuning()
plan = Plan(100, 10, 1, 1, {"lr": 1e-3})


@pytest.fixture
def model() -> nets.Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nets.mlp(64, hidden=(16, 12))


def run(entrant: Training, seed: int = 1, lr: float = 3e-3) -> dict[str, float]:
    return dict(task.run(Trial(seed=seed, setting={"lr": lr, "weight_decay": 0.0}), entrant).metrics)


def test_rotation_by_a_right_angle_is_exact() -> None:
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(x, 0.0), x, atol=1e-5, rtol=0)
    turned = rotate(x, 90.0)
    assert any(torch.allclose(turned, x.rot90(k, (2, 3)), atol=1e-5) for k in (1, 3))
    torch.testing.assert_close(rotate(turned, -90.0), x, atol=1e-5, rtol=0)


def test_steps_to_a_loss_are_interpolated_in_the_logarithm() -> None:
    steps = [0.0, 10.0, 20.0]
    assert first_below(0.1, steps, [1.0, 0.5, 0.2]) == 20.0
    assert first_below(0.1, steps, [1.0, 0.1, 0.01]) == pytest.approx(10.0)
    assert first_below(0.1, steps, [10.0, 0.001, 0.001]) == pytest.approx(5.0)


@pytest.mark.parametrize("adapt", [partial(lora, True), partial(lora, "pissa"), sorsa, linear_probe])
def test_every_contestant_starts_from_the_pretrained_weights(model: nets.Classifier, adapt: object) -> None:
    if isinstance(adapt, partial):
        pytest.importorskip("peft")
    adapted = copy.deepcopy(model)
    adapt(adapted, plan)  # type: ignore[operator]
    assert hidden_layers(model) == ["features.1", "features.3"]
    for name in hidden_layers(model):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        torch.testing.assert_close(effective_weight(adapted, name), layer.weight, atol=1e-5, rtol=0)
    assert all(p.requires_grad for p in adapted.head.parameters())
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    head, ranks = 12 * 10 + 10, 8 * (64 + 16) + 8 * (16 + 12)
    assert trained - head == (0 if adapt is linear_probe else ranks + 16 if adapt is sorsa else ranks)


def test_the_same_seed_gives_the_same_numbers() -> None:
    first, second = (run(Training(prepare=sorsa, optimizer=undecayed), seed=3) for _ in range(2))
    assert set(first) == set(task.metrics)
    first.pop("ms_per_step"), second.pop("ms_per_step")
    assert first == second


def test_a_probe_leaves_the_features_and_full_tuning_learns_more() -> None:
    probe, full = run(Training(prepare=linear_probe, optimizer=undecayed)), run(Training(optimizer=undecayed))
    assert probe["vector_drift"] == pytest.approx(0.0, abs=1e-6)
    assert probe["singular_value_drift"] == pytest.approx(0.0, abs=1e-6)
    assert full["vector_drift"] > 0.001
    assert probe["trainable_parameters"] == 10 * 128 + 10 < full["trainable_parameters"]
    assert full["target_accuracy"] > probe["target_accuracy"] + 0.05
