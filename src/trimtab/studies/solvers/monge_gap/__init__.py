"""The Monge gap: does it make a fitted map the optimal one, in the plane, in 10 dimensions and on the sphere?

Source and target samples of 4,000 points are not paired; 400 steps of Adam on batches of 192. All arms share the
fitting loss, a Sinkhorn divergence with an entropy of 5 % of the mean cost, and the strength of the gap is 1, not
searched. Learning rates were chosen for every place and architecture among 0.001, 0.003 and 0.01, with 600 steps and
batches of 256, by the divergence of mapped held-out points on a seed that is not run here; those of 0.01 lie at the end
of that range. 'Short moves' replaces the gap by 0.03 times the mean squared distance that points move, which lowers the
cost of a map without knowing the best coupling. The input-convex net is trained on the same fitting loss, not by the
min-max of the papers that introduced it. The perceptron is residual: it starts near the identity, which is itself
optimal and helps it without the gap too. In 10 dimensions the divergence of 600 points is mostly the noise of the
samples. On the sphere the cost is the squared geodesic distance, for which an input-convex net has no meaning; the map
is one that is optimal for it.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.nets.icnn import ConvexGradient, InputConvexNet
from trimtab.solvers import ResidualMLP
from trimtab.studies.engine.study import Claim, Experiment, Study
from trimtab.studies.solvers.monge_gap.maps import METRICS, Space, TransportMaps


class Spherical(nn.Module):
    """A map followed by a projection onto the unit sphere."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Mapped points of length one."""
        return F.normalize(self.inner(x), dim=1)


def perceptron(dim: int, space: Space) -> nn.Module:
    """The unconstrained map."""
    return Spherical(ResidualMLP(dim)) if space == "sphere" else ResidualMLP(dim)


def convex(dim: int, space: Space) -> nn.Module:
    """The gradient of an input-convex network."""
    return ConvexGradient(InputConvexNet(dim))


def venue(name: str, maps: TransportMaps, lr: float, convex_lr: float | None) -> Experiment:
    """All contestants on one kind of map; those of a perceptron have one learning rate."""
    arms = {
        "fit alone": partial(maps.learn, perceptron, lr=lr),
        "short moves": partial(maps.learn, perceptron, lr=lr, short_moves=0.03),
        "Monge gap": partial(maps.learn, perceptron, lr=lr, strength=1.0),
    }
    if convex_lr is not None:
        arms["ICNN"] = partial(maps.learn, convex, lr=convex_lr)
    return Experiment(name, arms, METRICS, log="y", cost=4.0)


plane = venue("in the plane", TransportMaps(), 1e-3, 1e-2)
ten = venue("in 10 dimensions", TransportMaps(dim=10), 1e-2, 1e-2)
sphere = venue("on the sphere", TransportMaps(space="sphere", dim=3), 1e-3, None)

study = Study(
    paper="monge_gap",
    experiments=[plane, ten, sphere],
    headline=Claim("Monge gap", below="ICNN", on="uvp", at=ten),
    claims=[
        Claim("Monge gap", below="ICNN", on="uvp", at=plane),
        *(Claim("Monge gap", below="fit alone", on="uvp", times=2, at=where) for where in (plane, ten, sphere)),
        *(Claim("Monge gap", below="short moves", on="uvp", at=where) for where in (plane, ten)),
        Claim("Monge gap", below="fit alone", on="fit", by=-1.0, at=ten),
    ],
)
