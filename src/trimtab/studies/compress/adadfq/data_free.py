"""Quantising a network without data: with the images of a generator, with noise, and without training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab import compress
from trimtab.nets import Classifier
from trimtab.ops.tempered_kl import tempered_kl
from trimtab.studies.engine.study import Trial
from trimtab.studies.tools.compressing import CompressionData, Target
from trimtab.studies.tools.descent import descend

MEAN, STD = 0.29, 0.33
"""Of Fashion-MNIST's pixels, which those who trained a network publish with it."""


class GDFQ(compress.AdaDFQ):
    """The generator that AdaDFQ is measured by: images that the full-precision network takes for their labels."""

    def maker_losses(self, taught: Tensor, said: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"label": F.cross_entropy(taught, labels)}

    def student_loss(self, taught: Tensor, said: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(said, labels) + tempered_kl(said, taught, 20.0).mean()


class Unbounded(compress.AdaDFQ):
    """Without margins: nothing keeps the disagreement from being too small or too large."""

    def maker_losses(self, taught: Tensor, said: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = super().maker_losses(taught, said, labels)
        return {name: value for name, value in found.items() if name != "boundary"}


def noise(data: CompressionData, count: int, generator: torch.Generator) -> Tensor:
    """Images of the right mean and deviation and nothing else."""
    drawn = torch.randn(count, *data.images.x.shape[1:], generator=generator)
    return (MEAN + STD * drawn).to(data.images.x.device)


def untrained(model: Classifier, data: CompressionData, target: Target, trial: Trial) -> nn.Module:
    """Rounded, with ranges from noise."""
    return compress.prepare_quantized(
        model,
        noise(data, 256, trial.generator(6)),
        target.bits,
        weight=partial(compress.MinMaxWeight, pass_clipped=True),
        inputs=partial(compress.MinMaxActivation, pass_clipped=True),
        ends=target.ends,
    ).eval()


def authors_sgd(student: nn.Module, trial: Trial) -> torch.optim.SGD:
    """What trains a student."""
    lr = float(trial.setting["lr"])
    return torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4)


def generated(
    model: Classifier,
    data: CompressionData,
    target: Target,
    trial: Trial,
    *,
    kind: Callable[..., compress.AdaDFQ] = compress.AdaDFQ,
    gamma: float = 1.0,
) -> nn.Module:
    """Train on images of a generator, which has a start of its own; no image of the data is looked at."""
    student = untrained(model, data, target, trial)
    channels, height, width = data.images.x.shape[1:]
    shape, classes = (channels, height, width), data.images.num_classes
    start = lambda: compress.ConditionalGenerator(shape, classes, width=12, mean=MEAN, std=STD)
    maker = trial.seeded(start, stream=8).to(data.images.x.device)
    slow = authors_sgd(student, trial)
    quick = torch.optim.Adam(maker.parameters(), lr=1e-3, betas=(0.5, 0.999))
    alone = data.steps // 5
    rule = kind(model, student, maker, slow, quick, gamma=gamma, warmup=alone, generator=trial.generator(7))
    for _ in range(alone + data.steps):
        rule.step(32)
    return student.eval()


def on_noise(model: Classifier, data: CompressionData, target: Target, trial: Trial) -> nn.Module:
    """Distil on noise."""
    student, draws = untrained(model, data, target, trial), trial.generator(7)

    def loss(x: Tensor) -> Tensor:
        with torch.no_grad():
            taught = model(x)
        return tempered_kl(student(x), taught, 20.0).mean()

    descend(authors_sgd(student, trial), loss, (noise(data, 32, draws) for _ in range(data.steps)))
    return student.eval()
