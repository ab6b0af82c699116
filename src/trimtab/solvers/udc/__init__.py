r"""Large routing and packing problems by two networks: one divides a problem, the other solves the pieces.

For many instances of one kind, too large for a constructive network, that come from one distribution to train on; or
to run a good solver of small problems (2-opt, an exact one, a network of your own) on the pieces of large ones:
`dcr_round` takes any callable.

A graph network proposes a whole solution, node by node, from a heat map that is refreshed every $n$ steps (*divide*).
It is cut into pieces of $n$ nodes, which are normalised and solved all at once; each is replaced only if the new one is
better (*conquer*). The next round cuts elsewhere, half a piece further, so that where pieces met is repaired too
(*reunion*). Both networks learn together by REINFORCE: the conqueror from the candidates $y$ of each piece $s$, the
divider $\pi$ from the cost $C$ of its proposals $x$ after all rounds, so that it is judged by what can be repaired:

$$
\mathcal{L} = \mathbb{E}_{x \sim \pi}\big[(C(x^{(r)}) - \bar C)\, \log \pi(x)\big]
+ \sum_{t=1}^{r} \mathbb{E}_{y \sim \kappa(\cdot \mid s_t)}\big[(c(y) - \bar c)\, \log \kappa(y \mid s_t)\big],
$$

where $\bar C$ is the mean over proposals for the same instance, and $\bar c$ over candidates for the same piece.
Networks read normalised instances and learn from normalised costs, so that neither the unit nor the origin of places,
weights and values matters.

Reference:
    Zhi Zheng, Changliang Zhou, Tong Xialiang, Mingxuan Yuan and Zhenkun Wang, "UDC: A Unified Neural Divide-and-Conquer
    Framework for Large-Scale Combinatorial Optimization Problems", NeurIPS 2024, arXiv 2407.00312.

Where this differs from the authors' release: both losses are taken in one optimizer step, instead of one step for every
round and network; pieces of vehicle routes and groups of items share what capacity is free; instances may be batched.
"""

from trimtab.solvers.udc.construction import rollout
from trimtab.solvers.udc.cvrp import CVRP, OpenRoutes
from trimtab.solvers.udc.heatmap_gnn import HeatmapGNN
from trimtab.solvers.udc.knapsack import Knapsack, SubKnapsacks
from trimtab.solvers.udc.path_constructor import PathConstructor
from trimtab.solvers.udc.problems import Graph, Pieces, Problem
from trimtab.solvers.udc.routing import nearest_neighbour, path_length, shortest_paths, tour_length, two_opt
from trimtab.solvers.udc.solver import (
    UDC,
    SubSolver,
    UDCLoss,
    UDCResult,
    constructor_loss,
    dcr_round,
    keep_better,
    policy_gradient_loss,
)
from trimtab.solvers.udc.tsp import TSP, OpenPaths

__all__ = [
    "CVRP",
    "TSP",
    "UDC",
    "Graph",
    "HeatmapGNN",
    "Knapsack",
    "OpenPaths",
    "OpenRoutes",
    "PathConstructor",
    "Pieces",
    "Problem",
    "SubKnapsacks",
    "SubSolver",
    "UDCLoss",
    "UDCResult",
    "constructor_loss",
    "dcr_round",
    "keep_better",
    "nearest_neighbour",
    "path_length",
    "policy_gradient_loss",
    "rollout",
    "shortest_paths",
    "tour_length",
    "two_opt",
]
