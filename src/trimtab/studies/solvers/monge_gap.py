"""The Monge gap: does it make a fitted map the optimal one, in the plane, in 10 dimensions and on the sphere?"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.nets.icnn import ConvexGradient, InputConvexNet
from trimtab.solvers import ResidualMLP
from trimtab.studies.study import Claim, Study
from trimtab.studies.tasks.transport_maps import Space, TransportMaps


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
    inner = ConvexGradient(InputConvexNet(dim))
    return Spherical(inner) if space == "sphere" else inner


PLACES = {
    "2-D": TransportMaps(dim=2),
    "10-D": TransportMaps(dim=10),
    "sphere": TransportMaps(space="sphere", dim=3),
}

# Of 0.001, 0.003 and 0.01: where the divergence from the target was least, on seed 100.
RATES = {
    "fit alone": {"2-D": 1e-3, "10-D": 1e-2, "sphere": 1e-3},
    "Monge gap": {"2-D": 1e-3, "10-D": 1e-2, "sphere": 1e-3},
    "ICNN": {"2-D": 1e-2, "10-D": 1e-2},
}

study = Study(
    paper="monge_gap",
    arms={
        **{f"fit alone, {where}": PLACES[where].learn(perceptron, lr=lr) for where, lr in RATES["fit alone"].items()},
        **{
            f"Monge gap, {where}": PLACES[where].learn(perceptron, strength=1.0, lr=lr)
            for where, lr in RATES["Monge gap"].items()
        },
        **{f"ICNN, {where}": PLACES[where].learn(convex, lr=lr) for where, lr in RATES["ICNN"].items()},
    },
    claims=[
        *(Claim(f"Monge gap, {where}", below=f"fit alone, {where}", on="uvp", times=2) for where in PLACES),
        *(Claim(f"Monge gap, {where}", below=f"fit alone, {where}", on="fit", by=-1.0) for where in PLACES),
        *(Claim(f"Monge gap, {where}", below=f"ICNN, {where}", on="uvp") for where in ("2-D", "10-D")),
    ],
    leaderboard=["fit alone, 2-D", "Monge gap, 2-D", "ICNN, 2-D"],
    log="y",
    notes="Source and target samples of 4,000 points are not paired; 600 steps of Adam on batches of 256. All arms "
    "share the fitting loss, a Sinkhorn divergence with an entropy of 5 % of the mean cost, and the strength "
    "of the gap is 1, not searched. Learning rates were searched for every arm alike (0.001, 0.003, 0.01) by "
    "the divergence of mapped held-out points on a seed that is not run here; the input-convex net's lies at "
    "the end of that range. It is trained on the same fitting loss, not by the min-max of the papers that "
    "introduced it. The perceptron is residual: it starts near the identity, which is itself optimal and helps "
    "it without the gap too. In 10 dimensions the divergence of 1,000 points is mostly the noise of the "
    "samples. On the sphere the cost is the squared geodesic distance, for which an input-convex net has no "
    "meaning; the map is one that is optimal for it.",
)
