from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import nn

from trimtab import nets
from trimtab.finetune import SORSAConfig, apply_adapter
from trimtab.studies.study import Trial
from trimtab.studies.tasks.finetune_transfer import (
    FinetuneTransfer,
    effective_weight,
    hidden_layers,
    linear_probe,
    lora,
    rotate,
    warm_cosine,
)

task = FinetuneTransfer()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the runner does; many small products gain nothing from more
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> nets.Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nets.mlp(64, hidden=(16, 12))


def test_rotation_by_a_right_angle_is_exact() -> None:
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(x, 0.0), x, atol=1e-5, rtol=0)
    turned = rotate(x, 90.0)
    assert any(torch.allclose(turned, x.rot90(k, (2, 3)), atol=1e-5) for k in (1, 3))
    torch.testing.assert_close(rotate(turned, -90.0), x, atol=1e-5, rtol=0)


def test_schedule_warms_up_and_ends_at_zero() -> None:
    factors = [warm_cosine(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == factors[10] == 1.0
    assert factors[100] == pytest.approx(0.0)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def sorsa(model: nets.Classifier) -> None:
    apply_adapter(model, SORSAConfig(r=8, target_modules=hidden_layers(model)))


@pytest.mark.parametrize("adapt", [lora, partial(lora, init="pissa"), sorsa, linear_probe])
def test_every_contestant_starts_from_the_pretrained_weights(model: nets.Classifier, adapt: object) -> None:
    if isinstance(adapt, partial) or adapt is lora:
        pytest.importorskip("peft")
    adapted = copy.deepcopy(model)
    adapt(adapted)  # type: ignore[operator]
    assert hidden_layers(model) == ["features.1", "features.3"]
    for name in hidden_layers(model):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        torch.testing.assert_close(effective_weight(model, name), layer.weight, atol=1e-6, rtol=0)
        torch.testing.assert_close(effective_weight(adapted, name), layer.weight, atol=1e-5, rtol=0)
    assert not any(p.requires_grad for p in adapted.head.parameters())
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    ranks = 8 * (64 + 16) + 8 * (16 + 12)
    assert trained == {linear_probe: 0, sorsa: ranks + 16}.get(adapt, ranks)  # type: ignore[call-overload]


def test_the_same_seed_gives_the_same_numbers() -> None:
    runs = [task.tune(sorsa)(Trial(seed=3)).metrics for _ in range(2)]
    assert {k: v for k, v in runs[0].items() if k != "ms_per_step"} == {
        k: v for k, v in runs[1].items() if k != "ms_per_step"
    }
    assert set(runs[0]) == set(task.metrics)


def test_a_probe_forgets_nothing_and_full_tuning_learns_more() -> None:
    probe, full = (task.tune(adapt)(Trial(seed=1)).metrics for adapt in (linear_probe, None))
    assert probe["vector_drift"] == pytest.approx(0.0, abs=1e-6)
    assert probe["singular_value_drift"] == pytest.approx(0.0, abs=1e-6)
    assert full["vector_drift"] > 0.01
    assert probe["trainable_parameters"] == 10 * 128 + 10 < full["trainable_parameters"]
    assert full["target_accuracy"] > probe["target_accuracy"] + 0.1


def test_the_penalty_is_given_the_base_rate_once_a_step() -> None:
    rates: list[float] = []

    def penalty(model: nn.Module, lr: float) -> torch.Tensor:
        rates.append(lr)
        return 1e3 * sum(p.square().sum() for p in model.parameters() if p.requires_grad)  # type: ignore[return-value]

    shrunk = task.tune(penalty=penalty)(Trial(seed=1)).metrics
    assert rates == [1e-3] * 40 + [1e-2] * 40
    assert shrunk["target_accuracy"] < task.tune()(Trial(seed=1)).metrics["target_accuracy"] - 0.1
