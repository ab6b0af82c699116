"""Learning features from samples without labels, which a linear classifier then has to make do with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.data import adult, load
from trimtab.studies.engine.study import Metric, Result, Task, Trial
from trimtab.studies.tools import self_supervised
from trimtab.studies.tools.images import worth_halving
from trimtab.studies.tools.pretraining import Lesson, PreTraining, pretrain
from trimtab.studies.tools.probes import effective_rank, linear_accuracy, neighbours_accuracy


@dataclass(frozen=True)
class Labelled:
    """What is learnt from, and what features are judged by.

    Attributes:
        x: samples to learn from, whose labels nobody sees.
        x_probe, y_probe: labelled samples to fit the classifiers on; the first ones of `x`.
        x_held, y_held: settings are chosen on them.
        x_test, y_test: for testing; never looked at while settings are tried.
        cardinalities: as in `Lesson`.
        num_classes: number of classes.
    """

    x: Tensor
    x_probe: Tensor
    y_probe: Tensor
    x_held: Tensor
    y_held: Tensor
    x_test: Tensor
    y_test: Tensor
    cardinalities: tuple[int, ...]
    num_classes: int


@dataclass(frozen=True)
class Pretraining(Task[PreTraining]):
    """Learn from 4,000 samples without labels, in 200 steps of 96; a linear classifier tells what the features know.

    Encoder (64 features), batches and steps are the same for all; a contestant brings what is asked of the features
    and what it does to the samples, and may pass every sample through the encoder twice in a step (what more passes
    cost, the seconds show). The classifier (multinomial, ridge) is fitted to the standardised features of 1,000
    labelled samples, or of 100, and tested on 4,000 others; so is a vote of the 20 nearest by cosine. Each contestant
    chooses among six settings by the linear classifier on 1,000 held-out samples; the largest rate was added for
    everybody when most had chosen the larger of two. The effective rank is the exponential of the entropy of the
    singular values of the test samples' centred features: 1 where features have collapsed to a line.

    Attributes:
        dataset: "mnist" (at half of the resolution), "fashion_mnist", "digits" or a file `.npz`; or "adult", a table
            of people whose income is to be told. At the smoke budget digits, whose pixels make a small table.
    """

    dataset: str = "mnist"

    name: ClassVar[str] = "representation-learning"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "probe": Metric("accuracy of a linear classifier (%)", percent=True),
        "few_labels": Metric("accuracy of a linear classifier, 100 labels (%)", percent=True),
        "neighbours": Metric("accuracy of the 20 nearest neighbours (%)", percent=True),
        "rank": Metric("effective rank of the features", best=None),
        "seconds": Metric("training time (s)", best="min"),
    }
    accepts: ClassVar[type[PreTraining]] = PreTraining
    needs_images: ClassVar[bool] = True
    tries: ClassVar[int] = 6
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (1e-3, 4e-3, 1.6e-2)}
    cost: ClassVar[float] = 4.0

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"images": numerals, "table": incomes}

    @classmethod
    def references(cls) -> Mapping[str, PreTraining]:
        lr = {"lr": (1e-3, 4e-3, 1.6e-2)}
        return {
            "raw inputs": PreTraining(learner=self_supervised.RawInputs, search={}),
            "untrained encoder": PreTraining(learner=self_supervised.Untrained, search={}),
            "SimCLR": PreTraining(learner=self_supervised.SimCLR, search={**lr, "temperature": (0.2, 0.5)}),
            "MoCo": PreTraining(learner=self_supervised.MoCo, search={**lr, "temperature": (0.1, 0.2)}),
            "BYOL": PreTraining(learner=self_supervised.BYOL, search={**lr, "decay": (0.95, 0.99)}),
            "VICReg": PreTraining(learner=self_supervised.VICReg, search={**lr, "covariance": (0.04, 0.4)}),
            "masked autoencoder": PreTraining(
                learner=self_supervised.MaskedAutoencoder, search={**lr, "ratio": (0.25, 0.5)}
            ),
        }

    def samples(self, trial: Trial) -> Labelled:
        """The samples of a run, in an order that the seed decides."""
        size, probe, held, test = trial.pick(
            smoke=(400, 200, 100, 200), laptop=(4_000, 1_000, 1_000, 4_000), paper=(20_000, 10_000, 4_000, 10_000)
        )
        cardinalities: tuple[int, ...] = ()
        if self.dataset == "adult":
            x, y, x_test, y_test, cardinalities = _people(trial)
        else:
            data = load(self.datasets(trial.budget)[0])
            x, y, x_test, y_test = data.x_train, data.y_train, data.x_test, data.y_test
        order = torch.randperm(len(x), generator=trial.generator())[: size + held]
        tested = torch.randperm(len(x_test), generator=trial.generator(3))[:test]
        x, y, x_test, y_test = x[order], y[order], x_test[tested], y_test[tested]
        if not cardinalities and worth_halving(data, trial):
            x, x_test = F.avg_pool2d(x, 2), F.avg_pool2d(x_test, 2)
        x, y, x_test, y_test = (part.to(trial.device) for part in (x, y, x_test, y_test))
        seen = min(size, len(x) - held)
        classes = 1 + int(torch.cat([y, y_test]).max())
        return Labelled(x[:seen], x[:probe], y[:probe], x[-held:], y[-held:], x_test, y_test, cardinalities, classes)

    def run(self, trial: Trial, entrant: PreTraining) -> Result:
        data = self.samples(trial)
        steps = trial.pick(smoke=10, laptop=200, paper=10_000)
        lesson = Lesson(data.x, data.cardinalities, steps, min(96, len(data.x)), trial.setting, trial.seed)
        done = pretrain(entrant, lesson, trial)
        known = done.encode(data.x_probe)
        if trial.searching:
            return Result(score=linear_accuracy(known, data.y_probe, done.encode(data.x_held), data.y_held))
        unseen, few = done.encode(data.x_test), slice(0, 100)
        return Result(
            {
                "probe": linear_accuracy(known, data.y_probe, unseen, data.y_test),
                "few_labels": linear_accuracy(known[few], data.y_probe[few], unseen, data.y_test),
                "neighbours": neighbours_accuracy(known, data.y_probe, unseen, data.y_test),
                "rank": effective_rank(unseen),
                "seconds": done.seconds,
            },
            {"loss": done.losses} if done.losses.x else {},
        )


def _people(trial: Trial) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Adult's records without the income, which is the label; at the smoke budget 12 pixels of digits as numbers and
    4 as categories."""
    cardinalities: tuple[int, ...]
    if trial.budget == "smoke":
        data = load("digits")
        parts = [16 * part.flatten(1)[:, 18:34].double() for part in (data.x_train, data.x_test)]
        cardinalities, labels = (0,) * 12 + (17,) * 4, (data.y_train, data.y_test)
    else:
        table = adult()
        income = table.columns.index("income")
        kept = [j for j in range(len(table.columns)) if j != income]
        parts = [part[:, kept] for part in (table.train, table.test)]
        cardinalities = tuple(size if isinstance(size, int) else 0 for j, size in enumerate(table.domain) if j in kept)
        labels = (table.train[:, income].long(), table.test[:, income].long())
    numbers = torch.tensor([not count for count in cardinalities])
    mean = torch.where(numbers, parts[0].mean(0), 0.0)
    deviation = torch.where(numbers, parts[0].std(0), 1.0)
    # Codes stay as they are; a number that hardly varies is left where it is.
    x, x_test = (((part - mean) / deviation.clamp(min=1e-6)).float() for part in parts)
    return x, labels[0], x_test, labels[1], cardinalities


numerals = Pretraining()
incomes = Pretraining("adult")
