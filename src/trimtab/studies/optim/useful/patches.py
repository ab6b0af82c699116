"""Patches with an easy and a hard feature: which of them does a two-layer network learn, and how early?

Full-batch training from the same small filters for every contestant. An example's hard feature is weaker but always
there; the stronger, easy feature is there in a share of them. "Early" is the step at which the loss of plain gradient
descent first falls below 0.6, from 0.693.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.optim.useful import EarlyOutputs
from trimtab.studies.engine.study import Curve, Metric, Result, Trial

METRICS = {
    "early_ratio": Metric("easy over hard alignment, at gradient descent's early step", best="min"),
    "ratio_at_loss": Metric("easy over hard alignment, at the contestant's own loss of 0.6", best="min"),
    "final_ratio": Metric("easy over hard alignment at the end", best="min"),
    "found": Metric("examples told apart by their easy feature (%)", best=None, percent=True),
}
EASY, HARD, SHARE, NOISE, LR = 1.0, 0.7, 0.8, 0.3, 0.05

GradientDescent = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]
Selection = Callable[[EarlyOutputs, torch.Generator], Tensor]
# Training loss that counts as early: that of a network that knows nothing is log 2 = 0.693.
EARLY_LOSS = 0.6


class Patches(NamedTuple):
    """Examples of the toy problem; the easy feature is the first coordinate, the hard one the second."""

    x: Float[Tensor, "samples patches dim"]
    y: Int[Tensor, " samples"]
    has_easy: Bool[Tensor, " samples"]


def draw_patches(
    samples: int, dim: int, easy: float, hard: float, share: float, noise: float, generator: torch.Generator
) -> Patches:
    """A patch with the hard feature, one with the easy feature in a share of the examples, and two of noise.

    Features carry the label's sign; the patches stand in random order.
    """
    y = torch.randint(0, 2, (samples,), generator=generator)
    has_easy = torch.rand(samples, generator=generator) < share
    x = torch.zeros(samples, 4, dim)
    x[:, 0, 0] = easy * has_easy * (2 * y - 1)
    x[:, 1, 1] = hard * (2 * y - 1)
    x[:, 2:] = noise / dim**0.5 * torch.randn(samples, 2, dim, generator=generator)
    order = torch.rand(samples, 4, generator=generator).argsort(1)
    return Patches(x.take_along_dim(order[:, :, None], 1), y, has_easy)


class PatchNet(nn.Module):
    """Filters over patches, cubed and summed: the network of the paper's theory."""

    def __init__(self, filters: Float[Tensor, "filters dim"]) -> None:
        super().__init__()
        self.filters = nn.Parameter(filters.clone())

    def forward(self, x: Float[Tensor, "samples patches dim"]) -> Float[Tensor, " samples"]:
        return (x @ self.filters.T).pow(3).sum((1, 2))

    def ratio(self) -> float:
        """Alignment of the best filter with the easy feature, over that with the hard one."""
        easy, hard = self.filters.detach()[:, :2].max(0).values
        return float(easy / hard)


class Path(NamedTuple):
    """A training: loss on the original data and ratio of alignments before each step, and the outputs by step."""

    losses: list[float]
    ratios: list[float]
    outputs: list[Tensor]

    def early(self) -> int:
        """The first step at which the loss is below `EARLY_LOSS`; the last one where it never is."""
        return next((step for step, loss in enumerate(self.losses) if loss < EARLY_LOSS), len(self.losses) - 1)


def gradient_descent(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """The optimizer of the baseline."""
    return torch.optim.SGD(params, lr=lr)


def learn(select: Selection | None, optimizer: GradientDescent, trial: Trial) -> Result:
    """Train, on the data as they are or on what is chosen by the outputs at the early step."""
    samples, dim, filters = trial.pick(smoke=100, laptop=1000, paper=10_000), 50, 20
    data = draw_patches(samples, dim, EASY, HARD, SHARE, NOISE, trial.generator())
    start = 0.1 * torch.randn(filters, dim, generator=trial.generator(2))
    steps = trial.pick(smoke=200, laptop=500, paper=1000)

    def descend(net: PatchNet, indices: Tensor, make: GradientDescent) -> Path:
        stepper, path = make(net.parameters(), LR), Path([], [], [])
        counts = indices.bincount(minlength=samples).float()
        weights = counts / counts.sum()

        def closure() -> Tensor:
            stepper.zero_grad()
            losses = F.binary_cross_entropy_with_logits(net(data.x), data.y.float(), reduction="none")
            loss = weights @ losses
            loss.backward()
            return loss.detach()

        for step in range(steps):
            with torch.no_grad():
                outputs = net(data.x)
            path.outputs.append(outputs)
            path.losses.append(F.binary_cross_entropy_with_logits(outputs, data.y.float()).item())
            path.ratios.append(net.ratio())
            stepper.step(closure)  # type: ignore[arg-type]
            trial.report((step + 1) / steps)
        return path

    everything = torch.arange(samples)
    plain = descend(PatchNet(start), everything, gradient_descent)
    early, indices = plain.early(), everything
    if select is not None:
        losses = F.binary_cross_entropy_with_logits(plain.outputs[early], data.y.float(), reduction="none")
        indices = select(EarlyOutputs(plain.outputs[early].unsqueeze(1), data.y, losses), trial.generator(3))
    net = PatchNet(start)
    path = descend(net, indices, optimizer)
    repeated = indices.bincount(minlength=samples) > 1
    return Result(
        {
            "early_ratio": path.ratios[early],
            "ratio_at_loss": path.ratios[path.early()],
            "final_ratio": net.ratio(),
            "found": (
                repeated[~data.has_easy].float().mean() / 2 + (~repeated)[data.has_easy].float().mean() / 2
            ).item(),
        },
        {"ratio": Curve([float(step) for step in range(0, steps, 10)], path.ratios[::10], "step")},
    )
