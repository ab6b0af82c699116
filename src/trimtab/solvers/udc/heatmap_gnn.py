r"""A graph network whose heat map says which node should follow which, given how a solution began.

Nodes $v$ and the edges $e$ of a sparse graph are refined by anisotropic layers,

$$
v_i \leftarrow v_i + \mathrm{SiLU}\Big(\mathrm{BN}\big(U v_i + \mathrm{mean}_j\, \sigma(e_{ij}) \odot V v_j\big)\Big),
\qquad
e_{ij} \leftarrow e_{ij} + \mathrm{SiLU}\big(\mathrm{BN}(P e_{ij} + Q v_i + R v_j)\big),
$$

once for a problem. A partial solution then asks with its first node, its last node and the mean of those visited, and
each edge answers: the heat of row $i$ is the softmax of the answers over the neighbours of $i$.

References:
    Xavier Bresson and Thomas Laurent, "An Experimental Study of Neural Networks for Variable Graphs", ICLR workshop
    2018: the layer. Zhi Zheng et al., "UDC", NeurIPS 2024, arXiv 2407.00312: the head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import silu

from trimtab.ops.arguments import integer, real_problem
from trimtab.solvers.udc.construction import Trace, Walk
from trimtab.solvers.udc.problems import Graph

FLOOR = 1e-5  # probability of a node that is no neighbour, before those not allowed are left out


class HeatmapGNN(nn.Module):
    """Heat maps of problems' sparse graphs.

    Args:
        node_features: number of features of a node: 2 for `TSP` and `Knapsack`, 3 for `CVRP`.
        edge_features: number of features of an edge: 1, or 2 for `CVRP`.
        width: of the embeddings.
        depth: number of layers.

    Raises:
        TypeError: a number is no integer.
        ValueError: a number is below 1.

    Example:
        >>> from trimtab.solvers import TSP
        >>> graph = TSP.random(4, 30).graph(neighbours=8)
        >>> net = HeatmapGNN(2, 1, depth=2)
        >>> start = torch.zeros(4, 5, dtype=torch.long)
        >>> heat = net.heat(net.embed(graph), start, start, torch.zeros(4, 5, 30, dtype=torch.bool))
        >>> heat.shape
        torch.Size([4, 5, 30, 8])
    """

    def __init__(self, node_features: int, edge_features: int = 1, width: int = 64, depth: int = 12) -> None:
        super().__init__()
        if integer("node_features", node_features) * integer("edge_features", edge_features) < 1:
            raise ValueError(
                f"node_features and edge_features must be at least 1, got {node_features}, {edge_features}"
            )
        if integer("width", width) * integer("depth", depth) < 1:
            raise ValueError(f"width and depth must be at least 1, got {width} and {depth}")
        self.node_in = nn.Linear(node_features, width)
        self.edge_in = nn.Linear(edge_features, width)
        self.layers = nn.ModuleList(_Layer(width) for _ in range(depth))
        self.from_first, self.from_last, self.from_visited, self.from_edge = (_head(width) for _ in range(4))

    def embed(self, graph: Graph) -> Embedding:
        """Runs the layers."""
        weight = self.node_in.weight
        nodes, edges = silu(self.node_in(graph.nodes.to(weight))), silu(self.edge_in(graph.edges.to(weight)))
        for layer in self.layers:
            nodes, edges = layer(nodes, edges, graph.neighbours)
        return Embedding(self.from_first(nodes), self.from_last(nodes), self.from_visited(nodes), self.from_edge(edges))

    def heat(
        self,
        embedding: Embedding,
        first: Int[Tensor, "batch samples"],
        last: Int[Tensor, "batch samples"],
        visited: Bool[Tensor, "batch samples nodes"],
    ) -> Float[Tensor, "batch samples nodes k"]:
        """Log-probabilities of each node's neighbours, given how solutions began."""
        if problem := real_problem(first=first, last=last, visited=visited):
            raise TypeError(problem)
        share = visited.to(embedding.visited) / visited.sum(-1, keepdim=True).clamp_min(1)
        query = _rows(embedding.first, first) + _rows(embedding.last, last) + share @ embedding.visited
        return torch.einsum("bsd,bnkd->bsnk", query, embedding.edges).log_softmax(-1)

    def policy(self, graph: Graph, refresh: int) -> HeatPolicy:
        """What builds solutions of the graph's problems, with a new heat map every `refresh` steps."""
        return HeatPolicy(self, graph, refresh)


class Embedding(NamedTuple):
    """What the layers made of a graph: the parts of a query, (batch, nodes, width), and edges that answer it."""

    first: Tensor
    last: Tensor
    visited: Tensor
    edges: Tensor


class HeatPolicy:
    """Chooses the next node by the heat map's row of the last one; heat is refreshed every so many steps.

    Args:
        net: what makes heat maps.
        graph: of the problems.
        refresh: steps between heat maps.
    """

    def __init__(self, net: HeatmapGNN, graph: Graph, refresh: int) -> None:
        self._net, self._graph, self._refresh = net, graph, refresh
        self._embedding = net.embed(graph)
        self._visited: list[Tensor] = []
        self._heat: Tensor | None = None
        self._steps = 0

    def __call__(
        self, walk: Walk, allowed: Bool[Tensor, "batch samples nodes"]
    ) -> Float[Tensor, "batch samples nodes"]:
        if self._heat is None or self._steps % self._refresh == 0:
            self._visited.append(walk.visited)
            self._heat = self._net.heat(self._embedding, walk.first, walk.current, walk.visited)
        self._steps += 1
        return self._rows(self._heat, walk.current[..., None], allowed[:, :, None])[:, :, 0]

    def log_prob(self, trace: Trace) -> Float[Tensor, "batch samples"]:
        """The log-probability of a trace that this policy made, with its gradient."""
        total = self._embedding.first.new_zeros(trace.first.shape)
        for number, visited in enumerate(self._visited):
            steps = slice(number * self._refresh, (number + 1) * self._refresh)
            current = trace.current[..., steps]
            heat = self._net.heat(self._embedding, trace.first, current[..., 0], visited)
            chosen = trace.actions[..., steps, None]
            total = total + self._rows(heat, current, trace.allowed[..., steps, :]).gather(-1, chosen).sum((-2, -1))
        return total

    def _rows(self, heat: Tensor, current: Tensor, allowed: Tensor) -> Tensor:
        """Log-probabilities (batch, samples, steps, nodes) of what may follow the nodes (batch, samples, steps)."""
        k = heat.shape[-1]
        row = heat.gather(2, current[..., None].expand(*current.shape, k)).exp()
        neighbours = self._graph.neighbours.gather(1, current.flatten(1)[..., None].expand(-1, -1, k))
        spread = torch.zeros(allowed.shape, device=heat.device, dtype=heat.dtype)
        weight = (spread.scatter(-1, neighbours.reshape(row.shape), row) + FLOOR).masked_fill(~allowed, 0.0)
        # The mask comes after the logarithm: its gradient at zero would not be finite.
        return (weight + ~allowed).log().masked_fill(~allowed, -torch.inf) - weight.sum(-1, keepdim=True).log()


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.node, self.message, self.source, self.target, self.edge = (nn.Linear(width, width) for _ in range(5))
        self.node_norm, self.edge_norm = nn.BatchNorm1d(width), nn.BatchNorm1d(width)

    def forward(self, nodes: Tensor, edges: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
        message = (edges.sigmoid() * _rows(self.message(nodes), neighbours)).mean(2)
        ends = self.source(nodes)[:, :, None] + _rows(self.target(nodes), neighbours)
        return (
            nodes + silu(_over_features(self.node_norm, self.node(nodes) + message)),
            edges + silu(_over_features(self.edge_norm, self.edge(edges) + ends)),
        )


def _head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))


def _over_features(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    """Batch normalisation over everything but the last dimension: all nodes, or edges, of all graphs together."""
    normed: Tensor = norm(x.flatten(0, -2))
    return normed.view_as(x)


def _rows(values: Float[Tensor, "batch nodes width"], index: Int[Tensor, "batch *shape"]) -> Tensor:
    flat = index.flatten(1)
    return values.gather(1, flat[..., None].expand(-1, -1, values.shape[-1])).view(*index.shape, values.shape[-1])
