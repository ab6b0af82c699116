"""Class-conditional sampling with guidance, from a mixture whose classifier and moments are exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.diffusion import (
    AnalyticGMM,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    CountNFE,
    Denoiser,
    VPLinear,
    classifier_free_guidance,
    ddim,
    degrade,
    dpm_solver,
)
from trimtab.diffusion.denoiser import DenoiserLike, StepCallback
from trimtab.diffusion.guidance import Guidance
from trimtab.diffusion.mixtures import MixtureDenoiser
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Budget, Entrant, Metric, Result, Task, Trial
from trimtab.studies.tools.guiding_classifiers import noisy_classifier
from trimtab.studies.tools.mixtures import mixture
from trimtab.studies.tools.sample_quality import frechet_distance, knn_recall
from trimtab.studies.tools.samplers import GRIDS, Sampler
from trimtab.studies.tools.trajectories import sampler_trajectories

_RATIO, _SCALES, _HALVINGS, _LEAST = 1.5, 8, 3, 1e-3
LARGEST = _RATIO**_SCALES


class GuidedModel(CountNFE):
    """The model to guide: it counts its evaluations, those of its weaker version among them."""

    denoiser: MixtureDenoiser

    def __init__(self, denoiser: MixtureDenoiser) -> None:
        super().__init__(denoiser)

    @property
    def weaker(self) -> Denoiser:
        """A model that confuses classes more, as a smaller or less trained one does, to guide away from."""
        weak = degrade(self.denoiser, class_blur=(1 + self.denoiser.class_blur) / 2)

        def evaluate(x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            self.add(x)
            return weak(x, t, cond)

        return Denoiser(evaluate, self.schedule, self.prediction)


MakeGuidance = Callable[[GuidedModel, Tensor, float], DenoiserLike]
"""Maps the model, the classes to guide to and a scale to the guided denoiser."""


@dataclass(frozen=True, kw_only=True)
class GuidedSampler(Entrant):
    """What a contestant of guided sampling brings; what it leaves out is classifier-free guidance and DDIM.

    Attributes:
        guidance: makes the guided denoiser.
        prepare: makes `guidance` from a run and its data, where something has to be trained first.
        sampler: solves the sampling ODE.
        largest: the largest of the eight scales that are tried first, each half larger than the one before.
        adaptive: whether what a step costs depends on the scale and on the sample.
    """

    guidance: MakeGuidance | None = None
    prepare: Callable[[Trial, AnalyticGMM], MakeGuidance] | None = None
    sampler: Sampler | None = None
    largest: float = LARGEST
    adaptive: bool = False


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


class Autoguidance(Guidance):
    """Guidance away from a weaker version of the model with the same condition.

    Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", NeurIPS 2024, arXiv 2406.02507.
    """

    def __init__(self, denoiser: GuidedModel, cond: Tensor, scale: float) -> None:
        super().__init__(denoiser, cond)
        self.weaker, self.scale = denoiser.weaker, scale

    def __call__(self, x: Tensor, t: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        return classifier_free_guidance(self.conditional(x, t), self.weaker(x, t, self.cond), self.scale)


def noise_aware(trial: Trial, data: AnalyticGMM) -> MakeGuidance:
    """Guidance by a classifier that was trained on noisy samples."""
    classifier = noisy_classifier(trial, data, VPLinear())

    def guide(denoiser: DenoiserLike, labels: Tensor, scale: float) -> DenoiserLike:
        return ClassifierGuidance(denoiser, labels, classifier=classifier, scale=scale)

    return guide


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
    the evaluations allow. Classifier, mean and covariance of the data, a mixture fitted to digits, are exact; at the
    smoke budget it is a ring. Whoever guides by a classifier has trained one of its own on samples of the data: the
    exact one only judges.

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
        "contrast_error": Metric("relative error of the contrast (%)", best="min", percent=True),
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
        return {
            "50 evaluations": many_evaluations,
            "20 evaluations": few_evaluations,
            "10 evaluations": fewest_evaluations,
            "50 evaluations, 90 % accuracy": moderate_accuracy,
            "20 evaluations, 90 % accuracy": moderate_accuracy_few,
            "10 evaluations, 90 % accuracy": moderate_accuracy_fewest,
        }

    @classmethod
    def references(cls) -> Mapping[str, GuidedSampler]:
        return {
            "CFG": GuidedSampler(),
            "CFG, rescaled": GuidedSampler(guidance=partial(classifier_free, rescale=0.7)),
            "CFG, limited interval": GuidedSampler(guidance=LimitedInterval),
            "CFG, DPM-Solver++": GuidedSampler(sampler=dpm_solver),
            "autoguidance": GuidedSampler(guidance=Autoguidance),
            "classifier guidance": GuidedSampler(prepare=noise_aware, largest=6.0),
        }

    def run(self, trial: Trial, entrant: GuidedSampler) -> Result:
        contest = Contest.of(trial, entrant, self.evaluations)
        tuning = contest.draws(trial, trial.pick(smoke=32, laptop=400, paper=5000), stream=3)
        scale = contest.scale_of(self.accuracy, tuning)
        trial.report(0.7)
        shown = contest.draws(trial, trial.pick(smoke=64, laptop=1000, paper=5000), stream=0)
        (x, spent), data = contest.sample(shown, scale), contest.data
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
                "evaluations": spent,
            },
            pictures={
                "samples": picture(x, shown.labels),
                **({} if trial.seed else contest.trajectories(shown, scale)),
            },
        )


@dataclass(frozen=True)
class Contest:
    """An entrant with a model to guide.

    Attributes:
        data: what the model should give.
        model: the conditional model, which confuses classes.
        entrant: whose guidance and sampler they are.
        guidance: the entrant's, or the plain one.
        grid: name of the time grid.
        evaluations: what a sample may cost, on average.
        pilot: draws on which the cost of an adaptive entrant is counted.
    """

    data: AnalyticGMM
    model: MixtureDenoiser
    entrant: GuidedSampler
    guidance: MakeGuidance
    grid: str
    evaluations: int
    pilot: Draws

    @classmethod
    def of(cls, trial: Trial, entrant: GuidedSampler, evaluations: int) -> Contest:
        """The contest of a run."""
        data = mixture(trial.pick(smoke="ring8", laptop="digits", paper="digits"))
        model = degrade(data.denoiser(VPLinear()), class_blur=0.5)
        made = entrant.prepare(trial, data) if entrant.prepare else entrant.guidance
        grid = str(trial.setting.get("grid", "quadratic"))
        pilot = draws(trial, data, 64 if entrant.adaptive else 1, stream=6)
        return cls(data, model, entrant, made or classifier_free, grid, evaluations, pilot)

    def draws(self, trial: Trial, size: int, stream: int) -> Draws:
        """Noise and classes, in the shares that they have in the data, or the exact moments would not be the target."""
        return draws(trial, self.data, size, stream)

    @property
    def scales(self) -> list[float]:
        """What is tried, rising."""
        return [self.entrant.largest / _RATIO**k for k in reversed(range(_SCALES))]

    def count(self, steps: int, scale: float | None = None) -> float:
        """Evaluations for a sample in so many steps, on average over the pilot."""
        return self._run(self.pilot, self.entrant.largest if scale is None else scale, steps)[1]

    def times(self, steps: int) -> Tensor:
        """The time grid of so many steps."""
        return GRIDS[self.grid](self.model.schedule, steps)

    @cached_property
    def steps(self) -> int:
        """As many as the evaluations allow, at the largest scale."""
        return self._most_steps(self.entrant.largest, 1)

    def steps_at(self, scale: float) -> int:
        """As many as the evaluations allow, at a scale; of an adaptive entrant this depends on it."""
        return self._most_steps(scale, self.steps) if self.entrant.adaptive else self.steps

    def _most_steps(self, scale: float, guess: int) -> int:
        steps = guess
        while steps > 1 and self.count(steps, scale) > self.evaluations:
            steps -= 1
        while steps < self.evaluations and self.count(steps + 1, scale) <= self.evaluations:
            steps += 1
        return steps

    def sample(self, draws: Draws, scale: float) -> tuple[Tensor, float]:
        """Samples, guided to their classes, and the evaluations for one of them."""
        return self._run(draws, scale, self.steps_at(scale))

    def trajectories(self, draws: Draws, scale: float) -> Mapping[str, Picture]:
        """A picture of the trajectories of 20 samples."""
        few = Draws(draws.noise[:20], draws.labels[:20])
        run = partial(self._run, few, scale, self.steps_at(scale))
        return sampler_trajectories(self.entrant.sampler or ddim, few.noise, run, self.data)

    def _run(self, draws: Draws, scale: float, steps: int, **told: StepCallback) -> tuple[Tensor, float]:
        counted = GuidedModel(self.model)
        sampler: Callable[..., Tensor] = self.entrant.sampler or ddim
        x = sampler(self.guidance(counted, draws.labels, scale), draws.noise, self.times(steps), **told)
        return x, counted.per_sample

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """Share of the samples that are of their class."""
        return float((self.data.class_log_posterior(x).argmax(1) == labels).double().mean())

    def scale_of(self, accuracy: float, draws: Draws) -> float:
        """The smallest scale at which samples have this accuracy; where none has, the one with the highest.

        Scales grow by half, to 26 for most, since too much guidance may lower the accuracy again; should the smallest
        do, smaller ones are tried until one does not. Where the accuracy is first reached, the interval is halved, of
        its logarithm.
        """
        reached: dict[float, float] = {}

        def enough(scale: float) -> bool:
            reached[scale] = self.accuracy(self.sample(draws, scale)[0], draws.labels)
            return reached[scale] >= accuracy

        high = next((scale for scale in self.scales if enough(scale)), None)
        if high is None:
            return max(reached, key=reached.__getitem__)
        low = high / _RATIO
        while high <= self.scales[0] and low > _LEAST and enough(low):
            low, high = low / _RATIO, low
        for _ in range(_HALVINGS):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high


def draws(trial: Trial, data: AnalyticGMM, size: int, stream: int) -> Draws:
    """Noise and classes, in the shares that they have in the data."""
    noise = VPLinear().prior(size, data.dim, generator=trial.generator(stream), dtype=torch.float64)
    shares = data.class_log_posterior(data.sample(size, generator=trial.generator(stream + 1))).exp()
    return Draws(noise, torch.multinomial(shares, 1, generator=trial.generator(stream + 2))[:, 0])


def picture(x: Tensor, labels: Tensor) -> Picture:
    """The first samples of each class: digits side by side, or points in the plane."""
    if x.shape[1] == 2:
        return Picture.density(x, -1.5, 1.5)
    first = [(labels == label).nonzero()[:3, 0] for label in range(10)]
    rows = torch.stack([x[[int(of[k]) for of in first if len(of) > k]] for k in range(3)])
    return Picture.grid((rows.flatten(0, 1).reshape(-1, 8, 8) + 1) / 2)


many_evaluations = GuidedSampling()
few_evaluations = GuidedSampling(evaluations=20)
fewest_evaluations = GuidedSampling(evaluations=10)
moderate_accuracy = GuidedSampling(accuracy=0.9)
moderate_accuracy_few = GuidedSampling(evaluations=20, accuracy=0.9)
moderate_accuracy_fewest = GuidedSampling(evaluations=10, accuracy=0.9)
