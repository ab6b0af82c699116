"""Learning a transport map from two samples, where the optimal map is known."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from trimtab.ops.point_costs import PointCost, sphere_distance
from trimtab.solvers import MongeMap, monge_gap, sinkhorn_divergence
from trimtab.studies.engine.study import Curve, Metric, Result, Trial

Space = Literal["plane", "sphere"]
METRICS: Mapping[str, Metric] = {
    "uvp": Metric("unexplained variance of the optimal map, L2-UVP (%)", best="min"),
    "fit": Metric("Sinkhorn divergence from the target, of its variance (%)", best="min"),
    "gap": Metric("exact Monge gap", best="min"),
    "seconds": Metric("time to train (s)", best="min"),
}


def squared_sphere_distance(x: Tensor, y: Tensor) -> Tensor:
    """The cost on the sphere."""
    return sphere_distance(x, y).square()


class Moves(nn.Module):
    """A map that tells by how much it moves points.

    Args:
        inner: the map.
        tell: is called with the mean squared distance of each batch.
    """

    def __init__(self, inner: nn.Module, tell: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.inner, self.tell = inner, tell

    def forward(self, x: Tensor) -> Tensor:
        """Mapped points."""
        mapped: Tensor = self.inner(x)
        self.tell((mapped - x).square().sum(1).mean())
        return mapped


@dataclass(frozen=True)
class TransportMaps:
    r"""Learn the optimal map from samples of its source and of its target, not paired.

    In the "plane" (of any dimension) the source is a standard Gaussian and the map the gradient of a convex function,
    $\frac{1}{2} |x|^2$ plus ten steep softplus ridges in random directions; the cost is the squared distance. On the
    "sphere" in 3 dimensions the source is uniform and the map moves along the gradient of a smooth function, little
    enough to be optimal for the squared geodesic distance.

    Attributes:
        space: "plane" or "sphere".
        dim: of the plane; 3 for the sphere.
    """

    space: Space = "plane"
    dim: int = 2

    @property
    def cost(self) -> PointCost:
        """Whose optimal map is sought."""
        return squared_sphere_distance if self.space == "sphere" else "sqeuclidean"

    def learn(
        self,
        net: Callable[[int, Space], nn.Module],
        trial: Trial,
        *,
        lr: float,
        strength: float = 0.0,
        short_moves: float = 0.0,
    ) -> Result:
        """One run of a map's architecture.

        Args:
            net: makes it of the dimension and the space.
            trial: as always.
            lr: learning rate.
            strength: of the Monge gap.
            short_moves: weight of the mean squared distance by which points are moved.
        """
        count = trial.pick(smoke=128, laptop=4000, paper=20_000)
        steps, batch = trial.pick(smoke=5, laptop=400, paper=10_000), trial.pick(smoke=32, laptop=192, paper=1024)
        truth = self.optimal_map(trial.generator(1))
        source, other, held_out = (self.source(count, trial.generator(stream)) for stream in (2, 3, 4))
        target = truth(other)
        inner = trial.seeded(lambda: net(self.dim, self.space))
        moved: list[Tensor] = []

        def fit_and_moves(mapped: Tensor, goal: Tensor) -> Tensor:
            return sinkhorn_divergence(mapped, goal, tol=1e-3) + short_moves * moved.pop()

        model = MongeMap(
            Moves(inner, moved.append) if short_moves else inner,
            fitting_loss=fit_and_moves if short_moves else None,
            cost=self.cost,
            strength=strength,
            lr=lr,
            max_iter=steps,
            batch_size=batch,
            random_state=trial.seed,
        )
        started = time.process_time()
        model.fit(source, target)
        seconds = time.process_time() - started
        trial.report(0.9)
        mapped, wanted = torch.as_tensor(model.transform(held_out)), truth(held_out)
        variance = (wanted - wanted.mean(0)).square().sum(1).mean()
        some = trial.pick(smoke=64, laptop=600, paper=2000)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="sinkhorn stopped")
            fit = sinkhorn_divergence(mapped[:some], target[:some], reg=0.01)
        gap = monge_gap(held_out[:some].double(), mapped[:some].double(), self.cost, reg=0.0)
        shown = range(0, steps, max(1, steps // 40))
        return Result(
            {
                "uvp": float(100 * (mapped - wanted).square().sum(1).mean() / variance),
                "fit": float(100 * fit / variance),
                "gap": float(gap),
                "seconds": seconds,
            },
            {"fit": Curve([step + 1 for step in shown], [model.fit_curve_[step] for step in shown], "step")},
        )

    def source(self, count: int, generator: torch.Generator) -> Tensor:
        """A sample of the source."""
        x = torch.randn(count, self.dim, generator=generator)
        return x / x.norm(dim=1, keepdim=True) if self.space == "sphere" else x

    def optimal_map(self, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        """The trial's map."""
        return spherical_map(generator) if self.space == "sphere" else ridge_map(self.dim, generator)


def ridge_map(dim: int, generator: torch.Generator, ridges: int = 10) -> Callable[[Tensor], Tensor]:
    """The gradient of half the squared norm plus steep softplus ridges."""
    directions = torch.randn(ridges, dim, generator=generator)
    directions = directions / directions.norm(dim=1, keepdim=True)
    offsets = torch.randn(ridges, generator=generator)

    def gradient(x: Tensor) -> Tensor:
        u = directions.to(x)
        slope: Tensor = x + 2 * torch.sigmoid(5 * (x @ u.T - offsets.to(x))) @ u
        return slope

    return gradient


def spherical_map(generator: torch.Generator, size: float = 0.4) -> Callable[[Tensor], Tensor]:
    """Along the geodesic in the direction of the tangential gradient of a random quadratic and linear function."""
    form = torch.randn(3, 3, generator=generator)
    form, shift = form + form.T, torch.randn(3, generator=generator)
    scale = size / float(torch.linalg.matrix_norm(form, 2) + shift.norm())

    def along(x: Tensor) -> Tensor:
        slope = scale * (x @ form.to(x) + shift.to(x))
        tangent = slope - (slope * x).sum(1, keepdim=True) * x
        angle = tangent.norm(dim=1, keepdim=True)
        moved: Tensor = angle.cos() * x + torch.sinc(angle / math.pi) * tangent
        return moved

    return along
