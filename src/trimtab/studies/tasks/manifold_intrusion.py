"""Three clusters in a line, of which the rare one in the middle lies where mixtures of the outer two fall."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.studies.mixing import Parts, RuleFactory, fit_rule, make_rule, mixtures
from trimtab.studies.study import Arm, Metric, Result, Task, Trial
from trimtab.studies.training import predict


def clusters(
    sizes: tuple[int, int, int], spread: float, generator: torch.Generator
) -> tuple[Float[Tensor, "samples 2"], Int[Tensor, " samples"]]:
    """Round clusters around (-1, 0), (0, 0) and (1, 0), one after the other, labelled 0, 1, 0."""
    centres = torch.tensor([-1.0, 0.0, 1.0]).repeat_interleave(torch.tensor(sizes))
    noise = spread * torch.randn(len(centres), 2, generator=generator)
    return torch.stack([centres, torch.zeros_like(centres)], 1) + noise, (centres == 0).long()


@dataclass(frozen=True)
class ManifoldIntrusion(Task):
    """Tell the middle cluster from the outer two with an MLP trained by Adam; in the test all three are of one size.

    Attributes:
        middle: share of the training samples that the middle cluster has. At a tenth, the mixtures of the outer
            clusters that fall on it outweigh its own samples and mixtures by two to one, if weights are uniform.
        spread: standard deviation of a cluster.
    """

    middle: float = 0.1
    spread: float = 0.15

    name: ClassVar[str] = "manifold-intrusion"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "test_accuracy": Metric("test accuracy (%)", percent=True),
        "middle_accuracy": Metric("test accuracy on the middle cluster (%)", percent=True),
        "intruding": Metric("mixtures of outer clusters that fall on the middle one (%)", best="min", percent=True),
        "seconds_per_step": Metric("time per step (s)", best="min"),
    }

    def train(self, rule: RuleFactory | None = None) -> Arm:
        """A contestant that builds its model from parts; without one it is a plain classifier."""
        return self.arm(rule=rule)

    def run(self, trial: Trial, rule: RuleFactory | None = None, **options: Any) -> Result:
        total = trial.pick(smoke=256, laptop=1024, paper=1024)
        middle = round(self.middle * total)
        left = (total - middle) // 2
        draws = trial.generator()
        x, y = clusters((left, middle, total - left - middle), self.spread, draws)
        each = 1000
        x_test, y_test = clusters((each, each, each), self.spread, draws)

        def trunk(side_by_side: int) -> nn.Module:
            return nn.Sequential(nn.Linear(2 * side_by_side, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())

        model = make_rule(rule, Parts(trunk, 64, 2), trial)
        epochs = trial.pick(smoke=20, laptop=250, paper=400)
        seconds = fit_rule(model, x.to(trial.device), y.to(trial.device), epochs=epochs, trial=trial)
        x_test, y_test = x_test.to(trial.device), y_test.to(trial.device)
        right = (predict(model, x_test).argmax(1) == y_test).float()
        outer = torch.stack([x_test[:each], x_test[-each:]])
        mixed = mixtures(model, outer, trial.generator(3))
        return Result(
            {
                "test_accuracy": right.mean().item(),
                "middle_accuracy": right[each : 2 * each].mean().item(),
                "intruding": (mixed.norm(dim=1) < 2 * self.spread).float().mean().item(),
                "seconds_per_step": seconds,
            }
        )
