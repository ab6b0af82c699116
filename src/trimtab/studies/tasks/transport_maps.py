"""Learning a transport map from two samples, where the optimal map is known."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from trimtab.ops.point_costs import PointCost, sphere_distance
from trimtab.solvers import MongeMap, monge_gap, sinkhorn_divergence
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial

Space = Literal["plane", "sphere"]
MapFactory = Callable[[int, Space], nn.Module]


def squared_sphere_distance(x: Tensor, y: Tensor) -> Tensor:
    """The cost on the sphere."""
    return sphere_distance(x, y).square()


@dataclass(frozen=True)
class TransportMaps(Task):
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

    name: ClassVar[str] = "transport-maps"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "uvp": Metric("unexplained variance of the optimal map, L2-UVP (%)", best="min"),
        "fit": Metric("Sinkhorn divergence from the target, % of its variance", best="min"),
        "gap": Metric("exact Monge gap", best="min"),
        "seconds": Metric("time to train (s)", best="min"),
    }

    def __post_init__(self) -> None:
        if self.space not in get_args(Space):
            raise ValueError(f"space must be one of {', '.join(get_args(Space))}, got {self.space!r}")
        if self.dim < 2 or (self.space == "sphere" and self.dim != 3):
            raise ValueError(f"dim must be at least 2, and 3 for the sphere, got {self.dim}")

    @property
    def cost(self) -> PointCost:
        """Whose optimal map is sought."""
        return squared_sphere_distance if self.space == "sphere" else "sqeuclidean"

    def learn(self, net: MapFactory, *, strength: float = 0.0, lr: float = 1e-3) -> Arm:
        """A contestant: the map's architecture, the strength of the Monge gap, and the learning rate."""
        return self.arm(net=net, strength=strength, lr=lr)

    def run(self, trial: Trial, **options: Any) -> Result:
        count = trial.pick(smoke=128, laptop=4000, paper=20_000)
        steps, batch = trial.pick(smoke=5, laptop=600, paper=10_000), trial.pick(smoke=32, laptop=256, paper=1024)
        truth = self.optimal_map(trial.generator(1))
        source, other, held_out = (self.source(count, trial.generator(stream)) for stream in (2, 3, 4))
        target = truth(other)
        with torch.random.fork_rng():
            torch.manual_seed(trial.seed)
            net = options["net"](self.dim, self.space)
        model = MongeMap(
            net,
            cost=self.cost,
            strength=options.get("strength", 0.0),
            lr=options.get("lr", 1e-3),
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
        some = trial.pick(smoke=64, laptop=1000, paper=2000)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="sinkhorn stopped")
            fit = sinkhorn_divergence(mapped[:some], target[:some], reg=0.01)
        gap = monge_gap(held_out[:some].double(), mapped[:some].double(), self.cost, reg=0.0)
        return Result(
            {
                "uvp": float(100 * (mapped - wanted).square().sum(1).mean() / variance),
                "fit": float(100 * fit / variance),
                "gap": float(gap),
                "seconds": seconds,
            },
            {"fit": Curve(list(range(1, steps + 1)), model.fit_curve_)},
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
