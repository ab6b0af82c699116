"""Monte-Carlo check of a bound on zero-one error by a surrogate loss, over label distributions and scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.studies.study import Arm, Metric, Result, Task, Trial

# A surrogate's loss of every label, (draws, classes) from scores; its least risk, from label distributions; and the
# least excess risk that a zero-one excess entails, given the number of classes.
Loss = Callable[[Float[Tensor, "draws classes"]], Float[Tensor, "draws classes"]]
MinRisk = Callable[[Float[Tensor, "draws classes"]], Float[Tensor, " draws"]]
Transform = Callable[[Float[Tensor, " draws"], int], Float[Tensor, " draws"]]


@dataclass(frozen=True)
class ConsistencyBound(Task):
    """Draw label distributions and scores, and compare the excess zero-one risk with what the bound allows.

    A quarter each of the draws are: anything; two labels under scores that tell them apart by little; all labels
    but one tied for first place under scores that are nearly flat; scores near the distribution's own. The middle
    two are where bounds of this kind are reached.

    Attributes:
        classes: numbers of classes.
    """

    classes: tuple[int, ...] = (3, 10, 100)

    name: ClassVar[str] = "consistency-bound"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "tightness": Metric("largest share of the excess that the bound explains"),
        "violations": Metric("draws that violate the bound", best="min"),
    }

    def check(self, loss: Loss, min_risk: MinRisk, transform: Transform) -> Arm:
        """A surrogate loss with its bound.

        Args:
            loss: the loss of every label at the given scores.
            min_risk: its least expected value under a label distribution.
            transform: the least excess that a zero-one excess entails by the bound.
        """
        return self.arm(loss=loss, min_risk=min_risk, transform=transform)

    def run(self, trial: Trial, **options: Any) -> Result:
        loss: Loss = options["loss"]
        min_risk: MinRisk = options["min_risk"]
        transform: Transform = options["transform"]
        draws = trial.pick(smoke=400, laptop=2_000, paper=200_000)
        violations, tightness = 0.0, 1.0
        for stream, num_classes in enumerate(self.classes):
            q, scores = _draw(draws // 4, num_classes, trial.generator(stream))
            excess = (q * loss(scores)).sum(1) - min_risk(q)
            wrong = q.amax(1) - q.gather(1, scores.argmax(1, keepdim=True))[:, 0]
            needed = transform(wrong, num_classes)
            violations += float((needed > excess * (1 + 1e-6) + 1e-9).sum())
            # The ratio of two vanishing excesses is rounding.
            told = wrong > 1e-3
            tightness = min(tightness, float((needed[told] / excess[told]).amax()))
            trial.report((stream + 1) / len(self.classes))
        return Result({"tightness": tightness, "violations": violations})


def _draw(count: int, num_classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Label distributions and scores, four kinds of each in `count` draws."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    sharpness = (4 * uniform(count, 1)).exp2()
    anything = (sharpness * normal(count, num_classes)).softmax(1), 3 * normal(count, num_classes)

    margin = uniform(count)
    two = torch.zeros(count, num_classes, dtype=torch.float64)
    two[:, 0], two[:, 1] = (1 + margin) / 2, (1 - margin) / 2
    between = torch.full_like(two, -60.0)
    between[:, 0], between[:, 1] = 0.0, 1e-3 * uniform(count)

    gap = uniform(count) / (num_classes - 1)
    tied = ((1 + gap) / num_classes)[:, None].repeat(1, num_classes)
    tied[:, -1] -= gap
    flat = 1e-3 * uniform(count, num_classes)
    flat[:, -1] += 1e-3

    own = (sharpness * normal(count, num_classes)).softmax(1)
    near = own.clamp(min=1e-12).log() + 0.5 * normal(count, num_classes)
    labels, scores = zip(anything, (two, between), (tied, flat), (own, near), strict=True)
    return torch.cat(labels), torch.cat(scores)
