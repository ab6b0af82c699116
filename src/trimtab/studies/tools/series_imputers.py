"""What fills the holes of series where nothing new is brought: means, last values, lines, GRU-D and not-MIWAE."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.generative import Fillings, SupNotMIWAE, last_observed
from trimtab.nets import SeriesNet
from trimtab.studies.tools.series import Fitted, Holed, Lesson, one_way

_LATENT = 8


def fill_mean(lesson: Lesson) -> Fitted:
    """The observed mean of the feature."""
    return Fitted(lambda part: one_way(part.x))


def last_value(lesson: Lesson) -> Fitted:
    """The feature's last value; the mean before there is one."""
    return Fitted(lambda part: one_way(last_observed(part.x, part.mask, torch.arange(float(part.x.shape[1])))[0]))


def interpolate(lesson: Lesson) -> Fitted:
    """A line between the feature's neighbouring values, and the nearest one at the ends; the mean where it has none."""
    return Fitted(lambda part: one_way(interpolated(part)))


def interpolated(part: Holed) -> Tensor:
    """Series with lines across their holes."""
    times = torch.arange(float(part.x.shape[1]))
    before, since = last_observed(part.x, part.mask, times)
    after, until = (value.flip(1) for value in last_observed(part.x.flip(1), part.mask.flip(1), times))
    first, last = part.mask.int().cummax(1).values > 0, part.mask.flip(1).int().cummax(1).values.flip(1) > 0
    line = before + (after - before) * since / (since + until).clamp_min(1)
    return torch.where(first & last, line, torch.where(first, before, torch.where(last, after, 0)))


class GRUD(nn.Module):
    """A recurrent classifier whose inputs decay from the last value to the mean, and its state to zero.

    Che, Purushotham, Cho, Sontag and Liu, "Recurrent Neural Networks for Multivariate Time Series with Missing Values",
    Scientific Reports 2018, arXiv 1606.01865.
    """

    def __init__(self, features: int, num_classes: int, hidden: int = 32) -> None:
        super().__init__()
        self.input_decay = nn.Parameter(torch.full((features,), 0.1))
        self.input_bias = nn.Parameter(torch.zeros(features))
        self.state_decay = nn.Linear(features, hidden)
        self.cell = nn.GRUCell(2 * features, hidden)
        self.head = nn.Linear(hidden, num_classes)

    def fill(self, part: Holed) -> Tensor:
        """What the network reads."""
        last, elapsed = last_observed(part.x, part.mask, torch.arange(float(part.x.shape[1])))
        share = (-(self.input_decay * elapsed + self.input_bias).relu()).exp()
        return torch.where(part.mask, part.x, share * last)

    def forward(self, part: Holed) -> Tensor:
        # How long ago a feature was seen before this step: a value that is seen now has decayed nothing of the state.
        _, elapsed = last_observed(part.x, part.mask, torch.arange(float(part.x.shape[1])))
        waited = F.pad(elapsed, (0, 0, 1, 0))[:, :-1] + 1
        decay = (-self.state_decay(waited).relu()).exp()
        inputs = torch.cat([self.fill(part), part.mask.to(part.x)], -1)
        h = part.x.new_zeros(len(part), self.cell.hidden_size)
        for step in range(inputs.shape[1]):
            new = self.cell(inputs[:, step], decay[:, step] * h)
            h = torch.where(part.valid[:, step, None], new, h)
        logits: Tensor = self.head(h)
        return logits


def gru_d(lesson: Lesson) -> Fitted:
    """GRU-D."""
    series = lesson.series
    net = GRUD(series.x.shape[-1], lesson.num_classes)
    lesson.train(net, lambda index: F.cross_entropy(net(series[index]), lesson.y[index]))
    return Fitted(
        torch.no_grad()(lambda part: one_way(net.fill(part))), torch.no_grad()(lambda part: net(part).softmax(-1))
    )


def deep_imputer(lesson: Lesson, *, missingness: bool = True, latents: int = 5, **options: float | None) -> SupNotMIWAE:
    """supnotMIWAE with the task's networks, not yet trained."""
    features = lesson.series.x.shape[-1]
    return SupNotMIWAE(
        SeriesNet(2 * features, 2 * _LATENT),
        SeriesNet(_LATENT, 2 * features),
        SeriesNet(features, lesson.num_classes, pooled=True),
        features,
        missingness=per_feature(features) if missingness else None,
        num_latents=latents,
        **options,  # type: ignore[arg-type]
    )


def per_feature(features: int) -> nn.Module:
    """A logit of being observed for each feature, from all values of the step, by a network as the authors'."""
    return nn.Sequential(nn.Linear(features, 32), nn.Tanh(), nn.Linear(32, features))


def filler(net: SupNotMIWAE, lesson: Lesson) -> Callable[[Holed], Fillings]:
    """Fills by a trained model in 50 ways, ten latents with five fillings each."""

    def fill(part: Holed) -> Fillings:
        net.num_latents = 10
        return net.impute(part.x, part.mask, valid=part.valid, num_imputations=5, generator=lesson.trial.generator(6))

    return fill


def not_miwae(lesson: Lesson) -> Fitted:
    """not-MIWAE: the generative model alone, with a model of what is missing.

    Ipsen, Mattei and Frellsen, "not-MIWAE: Deep Generative Modelling with Missing not at Random Data", ICLR 2021, arXiv
    2006.12871.
    """
    series, draws = lesson.series, lesson.trial.generator(7)
    net = deep_imputer(lesson, rate=0.0, length_scale=None, decay=False)

    def loss(index: Tensor) -> Tensor:
        part = series[index]
        return net.loss(part.x, part.mask, valid=part.valid, generator=draws)["total"]

    lesson.train(net, loss)
    return Fitted(filler(net, lesson))
