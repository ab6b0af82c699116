"""Class-conditional sampling with guidance, from a mixture whose classifier and moments are exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.diffusion import AnalyticGMM, ClassifierFreeGuidance, CountNFE, VPLinear, ddim, degrade, dpm_solver
from trimtab.diffusion.denoiser import DenoiserLike
from trimtab.diffusion.guidance import Guidance
from trimtab.diffusion.mixtures import MixtureDenoiser
from trimtab.studies.engine.study import Budget, Entrant, Metric, Result, Task, Trial
from trimtab.studies.tools.mixtures import mixture
from trimtab.studies.tools.sample_quality import frechet_distance, knn_recall
from trimtab.studies.tools.samplers import GRIDS, Sampler

MakeGuidance = Callable[[DenoiserLike, Tensor, float], DenoiserLike]
"""Maps a denoiser, the classes to guide to and a scale to the guided denoiser."""

_SCALES = tuple(1.5**k for k in range(1, 9))
_HALVINGS = 3


@dataclass(frozen=True, kw_only=True)
class GuidedSampler(Entrant):
    """What a contestant of guided sampling brings; what it leaves out is classifier-free guidance and DDIM.

    Attributes:
        guidance: makes the guided denoiser.
        sampler: solves the sampling ODE.
    """

    guidance: MakeGuidance | None = None
    sampler: Sampler | None = None


def classifier_free(denoiser: DenoiserLike, labels: Tensor, scale: float, *, rescale: float = 0.0) -> DenoiserLike:
    """Classifier-free guidance."""
    return ClassifierFreeGuidance(denoiser, labels, scale=scale, rescale=rescale)


class LimitedInterval(Guidance):
    """Classifier-free guidance at middle noise levels alone; elsewhere the conditional model, at half of the cost.

    Kynkäänniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
    Models", NeurIPS 2024, arXiv 2404.07724; the interval of sigma / alpha is the one of theirs for Stable Diffusion XL.
    """

    def __init__(self, denoiser: DenoiserLike, cond: Tensor, scale: float) -> None:
        super().__init__(denoiser, cond)
        self.scale = scale

    def __call__(self, x: Tensor, t: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        cond = self.conditional(x, t)
        if not 0.28 < float(self.schedule.rho(t.flatten()[0])) <= 5.42:
            return cond
        return cond + (self.scale - 1) * (cond - self.unconditional(x, t))


@dataclass(frozen=True)
class Draws:
    """Noise, and the class that each of its samples is to have."""

    noise: Tensor
    labels: Tensor


@dataclass(frozen=True)
class GuidedSampling(Task[GuidedSampler]):
    """Guide an imperfect conditional model to its class, without leaving the data's distribution.

    The model confuses classes, as one trained on loose captions does: half of the condition's weight is spread over
    all classes, and unguided about half of the samples are of another class. Guidance repairs that at the price of
    contrast and coverage. All contestants are compared at the same class accuracy and the same number of model
    evaluations: each has the smallest guidance scale that gives it this accuracy on other draws, and as many steps as
    the evaluations allow. Classifier, mean and covariance of the data, a mixture fitted to digits,
    are exact; at the smoke budget it is a ring.

    Attributes:
        evaluations: of the model for a sample.
        accuracy: share of the samples that should be of the class asked for.
    """

    evaluations: int = 50
    accuracy: float = 0.99

    name: ClassVar[str] = "guided-sampling"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "frechet": Metric("Frechet distance at equal class accuracy", best="min"),
        "recall": Metric("recall (%)", percent=True),
        "contrast_error": Metric("contrast, relative error (%)", best="min", percent=True),
        "accuracy": Metric("samples of the class asked for (%)", best=None, percent=True),
        "scale": Metric("guidance scale", best=None),
        "evaluations": Metric("evaluations", best=None),
    }
    accepts: ClassVar[type[GuidedSampler]] = GuidedSampler
    tries: ClassVar[int] = 2
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"grid": ("quadratic", "log-SNR")}
    seeds: ClassVar[Mapping[Budget, int]] = {"smoke": 1, "laptop": 10, "paper": 10}
    cost: ClassVar[float] = 1.3

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"50 evaluations": many_evaluations, "20 evaluations": few_evaluations}

    @classmethod
    def references(cls) -> Mapping[str, GuidedSampler]:
        return {
            "CFG": GuidedSampler(),
            "CFG, rescaled": GuidedSampler(guidance=partial(classifier_free, rescale=0.7)),
            "CFG, limited interval": GuidedSampler(guidance=LimitedInterval),
            "CFG, DPM-Solver++": GuidedSampler(sampler=dpm_solver),
        }

    def run(self, trial: Trial, entrant: GuidedSampler) -> Result:
        contest = Contest.of(trial, entrant, self.evaluations)
        tuning = contest.draws(trial, trial.pick(smoke=32, laptop=400, paper=5000), stream=3)
        scale = contest.scale_of(self.accuracy, tuning)
        trial.report(0.7)
        shown = contest.draws(trial, trial.pick(smoke=64, laptop=1000, paper=5000), stream=0)
        x, data = contest.sample(shown, scale), contest.data
        frechet = frechet_distance(x, data.mean, data.cov)
        if trial.searching:
            return Result(score=-frechet)
        contrast = float(torch.sqrt(torch.cov(x.T).trace() / data.cov.trace()))
        return Result(
            {
                "frechet": frechet,
                "recall": knn_recall(x, data.sample(len(x), generator=trial.generator(1))),
                "contrast_error": abs(contrast - 1),
                "accuracy": contest.accuracy(x, shown.labels),
                "scale": scale,
                "evaluations": float(contest.count(contest.steps)),
            }
        )


@dataclass(frozen=True)
class Contest:
    """An entrant with a model to guide.

    Attributes:
        data: what the model should give.
        model: the conditional model, which confuses classes.
        guidance, sampler: the entrant's, or the plain ones.
        grid: name of the time grid.
        evaluations: what a sample may cost.
    """

    data: AnalyticGMM
    model: MixtureDenoiser
    guidance: MakeGuidance
    sampler: Sampler
    grid: str
    evaluations: int

    @classmethod
    def of(cls, trial: Trial, entrant: GuidedSampler, evaluations: int) -> Contest:
        """The contest of a run."""
        data = mixture(trial.pick(smoke="ring8", laptop="digits", paper="digits"))
        model = degrade(data.denoiser(VPLinear()), class_blur=0.5)
        grid = str(trial.setting.get("grid", "quadratic"))
        return cls(data, model, entrant.guidance or classifier_free, entrant.sampler or ddim, grid, evaluations)

    def draws(self, trial: Trial, size: int, stream: int) -> Draws:
        """Noise and classes, in the shares that they have in the data, or the exact moments would not be the target."""
        noise = self.model.schedule.prior(size, self.data.dim, generator=trial.generator(stream), dtype=torch.float64)
        shares = self.data.class_log_posterior(self.data.sample(size, generator=trial.generator(stream + 1))).exp()
        return Draws(noise, torch.multinomial(shares, 1, generator=trial.generator(stream + 2))[:, 0])

    def count(self, steps: int, scale: float = 2.0) -> int:
        """Evaluations for a sample in so many steps."""
        counted = CountNFE(self.model)
        noise = torch.ones(1, self.data.dim, dtype=torch.float64)
        self.sampler(self.guidance(counted, torch.zeros(1, dtype=torch.long), scale), noise, self.times(steps))
        return counted.count

    def times(self, steps: int) -> Tensor:
        """The time grid of so many steps."""
        return GRIDS[self.grid](self.model.schedule, steps)

    @cached_property
    def steps(self) -> int:
        """As many as the evaluations allow."""
        steps = 1
        while steps < self.evaluations and self.count(steps + 1) <= self.evaluations:
            steps += 1
        return steps

    def sample(self, draws: Draws, scale: float) -> Tensor:
        """Samples, guided to their classes."""
        return self.sampler(self.guidance(self.model, draws.labels, scale), draws.noise, self.times(self.steps))

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """Share of the samples that are of their class."""
        return float((self.data.class_log_posterior(x).argmax(1) == labels).double().mean())

    def scale_of(self, accuracy: float, draws: Draws) -> float:
        """The smallest scale at which samples have this accuracy; where none has, the one with the highest.

        Scales grow by half from 1 up to 26, since too much guidance may lower the accuracy again; where the accuracy is
        first reached, the interval is halved, of its logarithm.
        """
        reached: dict[float, float] = {}

        def enough(scale: float) -> bool:
            reached[scale] = self.accuracy(self.sample(draws, scale), draws.labels)
            return reached[scale] >= accuracy

        high = next((scale for scale in _SCALES if enough(scale)), None)
        if high is None:
            return max(reached, key=reached.__getitem__)
        low = high / _SCALES[0]
        for _ in range(_HALVINGS):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high


many_evaluations = GuidedSampling()
few_evaluations = GuidedSampling(evaluations=20)
