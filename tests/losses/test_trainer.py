"""ELR and a loss with epochs under transformers' Trainer against a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trimtab.losses import ELR, IndexedDataset, IndexedTrainerMixin  # noqa: E402


class NoisyLabelTrainer(IndexedTrainerMixin, transformers.Trainer):  # type: ignore[misc]
    """In the order of the data."""

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Classifier(nn.Module):
    """A network that answers as those of Hugging Face do, and whose own loss is cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        logits = self.layer(x)
        own = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return transformers.utils.ModelOutput({**own, "logits": logits})


class Epochs(nn.Module):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[int] = []
        self.seen: list[list[int]] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def forward(self, logits: Tensor, targets: Tensor, index: Tensor) -> Tensor:
        self.seen.append(index.tolist())
        return nn.functional.cross_entropy(logits, targets)


X = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
Y = torch.arange(24) % 4
DATA = IndexedDataset([{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)])


def trainer(model: nn.Module, criterion: nn.Module, folder: Path, data: Any = DATA, **settings: Any) -> Any:
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
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    return NoisyLabelTrainer(
        model, arguments, criterion=criterion, train_dataset=data, eval_dataset=data, optimizers=(optimizer, None)
    )


@pytest.mark.parametrize("accumulation", [1, 3])
def test_steps_are_those_of_a_plain_loop(tmp_path: Path, accumulation: int) -> None:
    under, by_hand = Classifier(), Classifier()
    criteria = [ELR(24, 4) for _ in range(2)]
    settings = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 3}
    trainer(under, criteria[0], tmp_path, **settings).train()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.5, momentum=0.9)
    for _ in range(3):
        for number, index in enumerate(torch.arange(24).split(4), 1):
            (criteria[1](by_hand(X[index])["logits"], Y[index], index) / accumulation).backward()
            if number % accumulation == 0:
                optimizer.step()
                optimizer.zero_grad()
    torch.testing.assert_close(under.state_dict(), by_hand.state_dict())
    torch.testing.assert_close(criteria[0].state_dict(), criteria[1].state_dict())


def test_a_checkpoint_resumes_with_its_memory(tmp_path: Path) -> None:
    criteria = [ELR(24, 4) for _ in range(3)]
    models = [Classifier() for _ in range(3)]
    trainer(models[0], criteria[0], tmp_path / "whole", max_steps=14).train()
    trainer(models[1], criteria[1], tmp_path, max_steps=7, save_strategy="steps", save_steps=7).train()
    last = trainer(models[2], criteria[2], tmp_path, max_steps=14)
    last.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    torch.testing.assert_close(models[2].state_dict(), models[0].state_dict())
    torch.testing.assert_close(criteria[2].state_dict(), criteria[0].state_dict())


def test_epochs_begin_once_each_and_every_sample_comes_with_its_index(tmp_path: Path) -> None:
    criterion = Epochs()
    trainer(Classifier(), criterion, tmp_path, num_train_epochs=3, gradient_accumulation_steps=2).train()
    assert criterion.epochs == [0, 1, 2]
    assert criterion.seen == 3 * [list(range(first, first + 4)) for first in range(0, 24, 4)]


def test_evaluation_is_the_models_own_loss_and_leaves_the_memory(tmp_path: Path) -> None:
    model, criterion = Classifier(), ELR(24, 4)
    under = trainer(model, criterion, tmp_path, max_steps=2)
    under.train()
    before = criterion.memory.rows.clone()
    found = under.evaluate()["eval_loss"]
    assert found == pytest.approx(nn.functional.cross_entropy(model(X)["logits"], Y).item(), rel=1e-5)
    assert torch.equal(criterion.memory.rows, before)


def test_an_index_that_is_lost_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="remove_unused_columns must be False"):
        trainer(Classifier(), ELR(24, 4), tmp_path, remove_unused_columns=True)
    without = trainer(Classifier(), ELR(24, 4), tmp_path, DATA.dataset, max_steps=1)
    with pytest.raises(ValueError, match=r"column index, got \['labels', 'x'\]"):
        without.train()
