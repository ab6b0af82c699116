"""Labelled images as the classification tasks hand them to a contestant."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab import nets
from trimtab.data import ClassificationData, load
from trimtab.nets.vit import vit
from trimtab.studies.engine.study import Trial
from trimtab.studies.tools.training import Training, Workbench

Net = Literal["cnn", "mlp", "vit"]
Counts = tuple[int | None, int | None]


@dataclass(frozen=True)
class Images:
    """A training set, held-out samples for choices, and a test set, on their device.

    Attributes:
        x, y: what is trained on; labels may be wrong.
        x_held, y_held: a fifth as many again, labelled as badly; settings are chosen on them.
        x_test, y_test: for testing; never looked at while settings are tried.
        wrong: which training labels are wrong.
        num_classes: number of classes.
    """

    x: Float[Tensor, "n channels height width"]
    y: Int[Tensor, " n"]
    x_held: Float[Tensor, "held channels height width"]
    y_held: Int[Tensor, " held"]
    x_test: Float[Tensor, "test channels height width"]
    y_test: Int[Tensor, " test"]
    wrong: Bool[Tensor, " n"]
    num_classes: int

    @classmethod
    def of(cls, data: ClassificationData, targets: Int[Tensor, " all"], device: str, *, halve: bool = False) -> Images:
        """Hold out a fifth of the training part of some data, with these labels.

        Rows of numbers, which come in any units, are standardised by the training part's columns.

        Args:
            data: the images.
            targets: labels of the training part.
            device: where to.
            halve: at half of the resolution, which makes a run three times as short.
        """
        held = len(targets) // 5
        images = [F.avg_pool2d(x, 2) if halve else x for x in (data.x_train, data.x_test)]
        if data.x_train.ndim == 2:
            spread, centre = torch.std_mean(data.x_train[held:], 0)
            images = [(x - centre) / torch.where(spread > 0, spread, 1) for x in images]
        x, x_test = (part.to(device) for part in images)
        y, wrong = targets.to(device), (targets != data.y_train).to(device)
        return cls(
            x[held:], y[held:], x[:held], y[:held], x_test, data.y_test.to(device), wrong[held:], data.num_classes
        )

    def network(self, net: Net) -> nn.Module:
        """A new classifier, for rows of numbers an MLP in any case; torch's global state decides its weights."""
        shape = tuple(self.x.shape[1:])
        if net == "mlp" or len(shape) == 1:
            return nets.mlp(self.x[0].numel(), num_classes=self.num_classes)
        if net == "vit":
            return vit(shape, self.num_classes)
        return nets.small_cnn(shape, self.num_classes)

    def bench(self, trial: Trial, entrant: Training, net: Net, epochs: int, **options: Any) -> Workbench:
        """What a contestant works with."""
        return Workbench(
            entrant,
            lambda: self.network(net),
            (self.x, self.y),
            (self.x_held, self.y_held),
            num_classes=self.num_classes,
            epochs=epochs,
            trial=trial,
            **options,
        )


def some_images(
    trial: Trial, name: str, *, smoke: Counts, laptop: Counts, paper: Counts = (None, None)
) -> ClassificationData:
    """Random images of a data set, digits at the smoke budget, at half of the resolution where a run should be short.

    Args:
        trial: the run, whose budget and seed say which.
        name: of the data set.
        smoke, laptop, paper: how many for training and for testing; None takes all.
    """
    whole = load("digits" if trial.budget == "smoke" else name)
    data = whole.subset(*trial.pick(smoke=smoke, laptop=laptop, paper=paper), generator=trial.generator())
    if not worth_halving(data, trial):
        return data
    return replace(data, x_train=F.avg_pool2d(data.x_train, 2), x_test=F.avg_pool2d(data.x_test, 2))


def some_clothes(trial: Trial) -> Images:
    """Four thousand small images of clothes, a fifth of them held out, and two thousand for testing."""
    data = some_images(trial, "fashion_mnist", smoke=(400, 200), laptop=(4000, 2000))
    return Images.of(data, data.y_train, trial.device)


def worth_halving(data: ClassificationData, trial: Trial) -> bool:
    """Whether images are of 28 pixels or more, and a run should be short."""
    return trial.budget != "paper" and len(data.in_shape) == 3 and min(data.in_shape[1:]) >= 28


def shown_epochs(epochs: int, points: int = 10) -> set[int]:
    """The 0-based epochs after which a curve gets a point, the last one among them: testing takes time too."""
    step = max(1, -(-epochs // points))
    return {epoch for epoch in range(epochs) if (epochs - 1 - epoch) % step == 0}


@torch.no_grad()
def tensor_bytes(optimizers: Any) -> float:
    """Bytes of the optimizers' states, scalars left out."""
    values = [v for optimizer in optimizers for held in optimizer.state.values() for v in held.values()]
    return float(sum(t.numel() * t.element_size() for t in values if isinstance(t, Tensor) and t.dim()))
