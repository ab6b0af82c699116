"""Class-conditional sampling with guidance, from a mixture whose classifier and moments are exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.diffusion import ClassifierFreeGuidance, CountNFE, VPLinear, degrade, deis, grids
from trimtab.diffusion.denoiser import DenoiserLike
from trimtab.studies.sample_quality import frechet_distance, knn_recall
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial
from trimtab.studies.tasks.mixture_sampling import Target, mixture

GuidanceFactory = Callable[[DenoiserLike, Tensor, float], DenoiserLike]


def classifier_free(denoiser: DenoiserLike, labels: Tensor, scale: float) -> DenoiserLike:
    """The contestant to beat."""
    return ClassifierFreeGuidance(denoiser, labels, scale=scale)


@dataclass(frozen=True)
class GuidedSampling(Task):
    """Guide an imperfect conditional model to its class, without leaving the data's distribution.

    The model confuses classes (`class_blur`), as one trained on loose captions does: unguided, about half of its
    samples are of another class. Guidance repairs that at the price of contrast and coverage. Sampling takes 25
    steps of DDIM; the classifier, the data's mean and its covariance are exact.

    Attributes:
        target: the mixture, "digits" or "ring8"; at the smoke budget always ring8.
        class_blur: share of the condition's weight that the model spreads over all classes.
        shrink: how far predictions are pulled to the data's mean.
        scale: the guidance scale of the numbers; the curves run over 2, 4, 8 and 15.
    """

    target: Target = "digits"
    class_blur: float = 0.5
    shrink: float = 0.0
    scale: float = 8.0

    name: ClassVar[str] = "guided-sampling"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "frechet": Metric("Frechet distance", best="min"),
        "accuracy": Metric("samples of the class asked for (%)", percent=True),
        "contrast_error": Metric("contrast, relative error", best="min"),
        "largest": Metric("largest pixel value", best=None),
        "recall": Metric("recall (%)", percent=True),
        "nfe": Metric("evaluations", best="min"),
    }

    def guide(self, guidance: GuidanceFactory | None = None) -> Arm:
        """A contestant `guidance(denoiser, labels, scale)`, a denoiser; without one, classifier-free guidance."""
        return self.arm(guidance=guidance)

    def run(self, trial: Trial, **options: Any) -> Result:
        wrap: GuidanceFactory = options.get("guidance", classifier_free)
        size = trial.pick(smoke=64, laptop=1000, paper=5000)
        scales = sorted({self.scale, *trial.pick(smoke=(2.0,), laptop=(2.0, 4.0, 15.0), paper=(2.0, 4.0, 15.0))})
        data = mixture(trial.pick(smoke="ring8", laptop=self.target, paper=self.target))
        schedule = VPLinear()
        model = degrade(data.denoiser(schedule), class_blur=self.class_blur, shrink=self.shrink)
        noise = schedule.prior(size, data.dim, generator=trial.generator(), dtype=torch.float64)
        real = data.sample(size, generator=trial.generator(1))
        # The classes have the shares they have in the data, or the exact moments would not be the target.
        shares = data.class_log_posterior(real).exp()
        labels = torch.multinomial(shares, 1, generator=trial.generator(2))[:, 0]

        found: dict[str, list[float]] = {name: [] for name in self.metrics}
        for done, scale in enumerate(scales):
            counted = CountNFE(model)
            x = deis(wrap(counted, labels, scale), noise, grids.power(schedule, 25), order=0)
            contrast = float(torch.sqrt(torch.cov(x.T).trace() / data.cov.trace()))
            values = {
                "frechet": frechet_distance(x, data.mean, data.cov),
                "accuracy": float((data.class_log_posterior(x).argmax(1) == labels).double().mean()),
                "contrast_error": abs(contrast - 1),
                "largest": float(x.abs().amax()),
                "recall": knn_recall(x, real),
                "nfe": float(counted.count),
            }
            for name, value in values.items():
                found[name].append(value)
            trial.report((done + 1) / len(scales))
        shown = scales.index(self.scale)
        return Result(
            {name: values[shown] for name, values in found.items()},
            {name: Curve(scales, found[name]) for name in ("frechet", "accuracy", "contrast_error", "recall")},
        )
