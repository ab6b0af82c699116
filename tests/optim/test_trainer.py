"""SAM under transformers' Trainer against SAM in a plain loop."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trimtab.optim import SAM, TRAM, TwoPassTrainerMixin  # noqa: E402


class SharpnessAwareTrainer(TwoPassTrainerMixin, transformers.Trainer):  # type: ignore[misc]
    """On the squared error of any network."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        return (model(inputs["x"]) - inputs["labels"]).square().mean()

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))


def sam(model: nn.Module) -> SAM:
    return SAM(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), rho=0.5, model=model)


X = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
Y = X.sum(1, keepdim=True).sin()
DATA = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]


def trainer(model: nn.Module, folder: Path, optimizer: Any = None, **settings: Any) -> SharpnessAwareTrainer:
    defaults = {
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "remove_unused_columns": False,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    arguments = transformers.TrainingArguments(str(folder), **{**defaults, **settings})
    optimizer = sam(model) if optimizer is None else optimizer
    return SharpnessAwareTrainer(model, arguments, train_dataset=DATA, optimizers=(optimizer, None))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_steps_are_those_of_a_plain_loop(tmp_path: Path, accumulation: int) -> None:
    under, by_hand = network(), network()
    settings = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 2}
    trainer(under, tmp_path, **settings).train()
    optimizer = sam(by_hand)
    for _ in range(2):
        for start in range(0, 24, 4 * accumulation):
            batches = [slice(first, first + 4) for first in range(start, start + 4 * accumulation, 4)]

            def closure(batches: list[slice] = batches) -> Tensor:
                optimizer.zero_grad()
                losses = [(by_hand(X[batch]) - Y[batch]).square().mean() / accumulation for batch in batches]
                sum(losses).backward()  # type: ignore[union-attr]
                return sum(losses)  # type: ignore[return-value]

            optimizer.step(closure)
    torch.testing.assert_close(dict(under.named_parameters()), dict(by_hand.named_parameters()))
    torch.testing.assert_close(under[1].running_mean, by_hand[1].running_mean)
    assert under[1].num_batches_tracked == 12  # the second passes leave the statistics alone
    plain = network()
    torch.optim.SGD(plain.parameters(), lr=0.05)
    assert not torch.allclose(under[0].weight, plain[0].weight, atol=1e-3)


def test_a_checkpoint_resumes(tmp_path: Path) -> None:
    whole, half = network(), network()
    trainer(whole, tmp_path / "whole", max_steps=8).train()
    trainer(half, tmp_path, max_steps=4, save_strategy="steps", save_steps=4).train()
    resumed = network()
    trainer(resumed, tmp_path, max_steps=8).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict())


def test_weights_go_home_when_the_second_pass_fails(tmp_path: Path) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    under = trainer(model, tmp_path, max_steps=1)
    calls = []

    def failing(*_: Any, **__: Any) -> Tensor:
        calls.append(model[0].weight.detach().clone())
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return model(X[:4]).square().mean()

    under.compute_loss = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        under.train()
    assert not torch.equal(calls[1], calls[0])
    assert torch.equal(model[0].weight, before["0.weight"])


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="must begin with a TwoPassOptimizer, got SGD"):
        trainer(model, tmp_path, base)
    with pytest.raises(TypeError, match="closure returns the loss alone, got TRAM"):
        trainer(model, tmp_path, TRAM(base, model))


def test_batches_of_a_step_that_was_cut_off_count_no_more(tmp_path: Path) -> None:
    """An interrupt between two accumulated batches, and the same trainer goes on from the start."""
    model, fresh = network(), network()
    settings = {"gradient_accumulation_steps": 3, "num_train_epochs": 1}
    under = trainer(model, tmp_path, **settings)
    calls: list[int] = []

    class Interrupting(transformers.TrainerCallback):  # type: ignore[misc]
        def on_substep_end(self, *_: Any, **__: Any) -> None:
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt

    under.add_callback(Interrupting())
    with pytest.raises(KeyboardInterrupt):
        under.train()
    model.load_state_dict(fresh.state_dict())
    under.train()
    trainer(fresh, tmp_path, **settings).train()
    torch.testing.assert_close(model.state_dict(), fresh.state_dict())
