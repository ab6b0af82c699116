"""Real series with holes: fill them, and classify the series."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.data import japanese_vowels, load
from trimtab.generative import Fillings
from trimtab.losses.calibration import expected_calibration_error
from trimtab.nets import SeriesNet
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Curve, Entrant, Metric, Result, Task, Trial
from trimtab.studies.tools.series import Fitted, Holed, Lesson
from trimtab.studies.tools.series_imputers import fill_mean, gru_d, interpolate, last_value, not_miwae

Missing = Literal["large", "random"]
_LONGEST_WAIT = 8


@dataclass(frozen=True, kw_only=True)
class Imputer(Entrant):
    """What a contestant brings.

    Attributes:
        fit: learns from a lesson how to fill holes, and how to classify if it has a way of its own; else the task's
            classifier is trained on the series that it fills.
        shown: whether the task's classifier also sees what was observed.
    """

    fit: Callable[[Lesson], Fitted]
    shown: bool = False


@dataclass(frozen=True)
class Imputation(Task[Imputer]):
    """Fill the holes of real series, and classify the series, of which 60 % is missing in training and in testing.

    Values are about the observed mean of their feature, in units of its deviation. All networks are of one
    kind and width, and each is trained by Adam for as many steps on as many series. What is filled in is compared with
    what was taken away; many fillings by their mean, and as a distribution by the continuous ranked probability score,
    which for a single filling is the absolute error.

    Attributes:
        dataset: "japanese_vowels" (utterances of nine men, twelve coefficients a step) or "digits" (images as series
            of their eight rows); at the smoke budget digits.
        missing: "large" (the odds of being missing grow e-fold with a deviation, so that what is observed misleads) or
            "random".
        rate: share of the values that is missing.
    """

    dataset: str = "japanese_vowels"
    missing: Missing = "large"
    rate: float = 0.6

    name: ClassVar[str] = "imputation"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "rmse": Metric("error of what is filled in (deviations)", best="min"),
        "crps": Metric("ranked probability score (deviations)", best="min"),
        "accuracy": Metric("accuracy (%)", percent=True),
        "nll": Metric("negative log-likelihood of the class (nats)", best="min"),
        "ece": Metric("calibration error (%)", best="min", percent=True),
    }
    accepts: ClassVar[type[Imputer]] = Imputer
    cost: ClassVar[float] = 6.0

    def __post_init__(self) -> None:
        if self.missing not in get_args(Missing):
            raise ValueError(f"missing must be one of {', '.join(get_args(Missing))}, got {self.missing!r}")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate must be in (0, 1), got {self.rate}")

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"voices": voices, "rows of digits": rows}

    @classmethod
    def references(cls) -> Mapping[str, Imputer]:
        return {
            "mean": Imputer(fit=fill_mean),
            "mean, mask shown": Imputer(fit=fill_mean, shown=True),
            "last value": Imputer(fit=last_value),
            "interpolation": Imputer(fit=interpolate),
            "GRU-D": Imputer(fit=gru_d),
            "not-MIWAE": Imputer(fit=not_miwae),
        }

    def run(self, trial: Trial, entrant: Imputer) -> Result:
        train, y_train, test, y_test = self.series(trial)
        classes = int(y_train.max()) + 1
        # About thirty epochs of the few voices, and as long for the digits as there is time.
        steps = trial.pick(smoke=4, laptop=600 if self.dataset == "digits" else 300, paper=3000)
        lesson = Lesson(train.holed, y_train, classes, steps, trial)
        fitted = trial.seeded(partial(entrant.fit, lesson), stream=1)
        trial.report(0.5)
        probs = fitted.probs or trial.seeded(partial(two_stages, fitted, lesson, entrant.shown), stream=2)
        found = [(fitted.fill(part), probs(part)) for part in test.holed.split(100)]
        return judged(test, [filled for filled, _ in found], torch.cat([p for _, p in found]), y_test)

    def series(self, trial: Trial) -> tuple[Holes, Tensor, Holes, Tensor]:
        """Training and test series with their holes, which the trial's seed draws, and their classes."""
        data = load("digits") if trial.budget == "smoke" or self.dataset == "digits" else japanese_vowels()
        parts = [part[:, 0] if part.ndim == 4 else part for part in (data.x_train, data.x_test)]
        few = 60 if trial.budget == "smoke" else None
        x_train, y_train, x_test, y_test = parts[0][:few], data.y_train[:few], parts[1][:few], data.y_test[:few]
        observed = [self.observed(x, trial.generator(stream)) for stream, x in ((3, x_train), (4, x_test))]
        mean = torch.where(observed[0], x_train, torch.nan).nanmean((0, 1))
        unit = deviation(x_train)
        holes = [Holes((x - mean) / unit, mask) for x, mask in zip((x_train, x_test), observed, strict=True)]
        return holes[0], y_train, holes[1], y_test

    def observed(self, x: Tensor, generator: torch.Generator) -> Bool[Tensor, "n steps features"]:
        """Which values are observed: of those there are, a share of 1 - rate on average."""
        there = ~x.isnan()
        draw = torch.rand(x.shape, generator=generator)
        if self.missing == "random":
            return there & (draw >= self.rate)
        size = (x - x.nanmean((0, 1))) / deviation(x)
        low, high = -20.0, 20.0
        for _ in range(30):  # halve the interval of the offset at which the share is the one wanted
            offset = (low + high) / 2
            low, high = (offset, high) if (size[there] + offset).sigmoid().mean() < self.rate else (low, offset)
        return there & (draw >= (size + low).sigmoid())


voices = Imputation()
rows = Imputation("digits")


@dataclass(frozen=True)
class Holes:
    """Whole series, NaN past their ends, and what of them is observed."""

    truth: Float[Tensor, "n steps features"]
    mask: Bool[Tensor, "n steps features"]

    @property
    def holed(self) -> Holed:
        """What a contestant is given."""
        valid = ~self.truth.isnan().any(-1)
        return Holed(torch.where(self.mask, self.truth, 0), self.mask, valid)


def deviation(x: Float[Tensor, "n steps features"]) -> Float[Tensor, " features"]:
    """Each feature's standard deviation; at least a tenth of the largest, for pixels that are nearly always white."""
    found = (x - x.nanmean((0, 1))).square().nanmean((0, 1)).sqrt()
    return found.clamp_min(0.1 * float(found.max()))


def two_stages(fitted: Fitted, lesson: Lesson, shown: bool) -> Callable[[Holed], Tensor]:
    """The task's classifier, trained on the filled series."""
    series = lesson.series
    features = series.x.shape[-1]
    net = SeriesNet(features * (1 + shown), lesson.num_classes, pooled=True)

    def inputs(part: Holed) -> Tensor:
        filled = torch.cat([fitted.fill(piece).mean for piece in part.split(100)])
        return torch.cat([filled, part.mask.to(filled)], -1) if shown else filled

    filled = inputs(series)
    lesson.train(net, lambda index: F.cross_entropy(net(filled[index], series.valid[index]), lesson.y[index]))
    return torch.no_grad()(lambda part: net(inputs(part), part.valid).softmax(-1))


def judged(test: Holes, fillings: list[Fillings], probs: Float[Tensor, "n classes"], y: Int[Tensor, " n"]) -> Result:
    """The numbers of a run, and the error over the time since a feature was last seen."""
    gaps = ~test.mask & ~test.truth.isnan()
    errors, scores = [], []
    for part, gap, filled in zip(test.truth.split(100), gaps.split(100), fillings, strict=True):
        errors.append((filled.mean - part)[gap])
        scores.append(ranked_probability_score(filled, part)[gap])
    error = torch.cat(errors)
    waited = waiting(test.mask)[gaps]
    waits = [wait for wait in range(1, _LONGEST_WAIT + 1) if bool((waited == wait).any())]
    return Result(
        {
            "rmse": float(error.square().mean().sqrt()),
            "crps": float(torch.cat(scores).mean()),
            "accuracy": float((probs.argmax(1) == y).float().mean()),
            "nll": float(F.nll_loss(probs.clamp_min(1e-12).log(), y)),
            "ece": expected_calibration_error(probs / probs.sum(1, keepdim=True), y),
        },
        {
            "error": Curve(
                waits, [float(error[waited == w].square().mean().sqrt()) for w in waits], "steps since last seen"
            )
        },
        pictures={"filled": _sheet(test, fillings[0])},
    )


def ranked_probability_score(fillings: Fillings, truth: Tensor) -> Tensor:
    """The continuous ranked probability score of weighted fillings, for every value: E|X - x| - E|X - X'| / 2.

    Gneiting and Raftery, "Strictly Proper Scoring Rules, Prediction, and Estimation", JASA 2007.
    """
    samples, weights = fillings.samples, fillings.weights[:, :, None, None]
    apart = (weights * (samples - truth).abs()).sum(0)
    ordered, order = samples.sort(0)
    below = weights.expand_as(samples).gather(0, order).cumsum(0)[:-1]
    spread: Tensor = (ordered.diff(dim=0) * below * (1 - below)).sum(0)
    return apart - spread


def waiting(mask: Bool[Tensor, "n steps features"]) -> Int[Tensor, "n steps features"]:
    """Steps since a feature was last observed, or since before the series began."""
    step = torch.arange(mask.shape[1])[:, None]
    return step - torch.where(mask, step, -1).cummax(1).values


def _sheet(test: Holes, fillings: Fillings, columns: int = 8) -> Picture:
    """Some series as they are, with their holes, and filled; time runs to the right."""
    truth = test.truth[:columns]
    seen = torch.where(test.mask[:columns], truth, torch.nan)
    filled = torch.where(truth.isnan(), torch.nan, fillings.mean[:columns])
    images = torch.cat([truth, seen, filled]).transpose(1, 2)
    return Picture.grid((images + 2) / 4, columns=columns)
