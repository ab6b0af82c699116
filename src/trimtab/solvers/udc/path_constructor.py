r"""A small attention network that solves short pieces of a problem by building their solutions step by step.

Attention without dot products, whose weights know the pieces' affinities $A$ (negative distances, say). With
$s = \log_2 n$ for $n$ nodes and a learnt $\alpha$, a node with query $q$ reads

$$
\sigma(q) \odot \frac{\sum_j \exp(\alpha s A_{\cdot j} + k_j) \odot v_j}{\sum_j \exp(\alpha s A_{\cdot j} + k_j)},
$$

in the layers as in the decoder, whose query comes from the node to end at, the last one visited and what capacity is
left. The next node's logits are $c \tanh(r^\top h_j / \sqrt{d} + \alpha' s A_{\cdot j})$ for the decoder's reading $r$.

References:
    Changliang Zhou et al., "Instance-Conditioned Adaptation for Large-scale Generalization of Neural Combinatorial
    Optimization", 2024, arXiv 2405.01906: the network. Zhi Zheng et al., "UDC", NeurIPS 2024, arXiv 2407.00312: its use
    on sub-paths, from both ends.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import integer, positive, real_problem
from trimtab.solvers.udc.construction import Trace, Walk, rollout
from trimtab.solvers.udc.problems import Pieces


class PathConstructor(nn.Module):
    """Builds candidates for pieces; a sub-solver for `dcr_round`.

    Args:
        node_features: number of features of a node: 3 for pieces of a `TSP` or `Knapsack`, 6 of a `CVRP`.
        context_features: what else is known at a step: 0 for a `TSP`, 1 for a `Knapsack`, 2 for a `CVRP`.
        width: of the embeddings.
        depth: number of layers.
        hidden: width of the layers' perceptrons.
        clip: largest logit.

    Raises:
        TypeError: a number is not of its type.
        ValueError: a number is out of its range.

    Example:
        >>> from trimtab.solvers import OpenPaths
        >>> paths = OpenPaths(torch.rand(6, 10, 2, generator=torch.Generator().manual_seed(0)))
        >>> candidates = PathConstructor(3, width=16, depth=1, hidden=32)(paths)
        >>> candidates.shape, bool(paths.cost(candidates).isfinite().all())
        (torch.Size([6, 2, 10]), True)
    """

    def __init__(
        self,
        node_features: int,
        context_features: int = 0,
        width: int = 128,
        depth: int = 6,
        hidden: int = 512,
        clip: float = 50.0,
    ) -> None:
        super().__init__()
        if integer("node_features", node_features) < 1 or integer("context_features", context_features, 0) < 0:
            raise ValueError(f"node_features must be at least 1, got {node_features}")
        if integer("width", width) * integer("depth", depth) * integer("hidden", hidden) < 1:
            raise ValueError(f"width, depth and hidden must be at least 1, got {width}, {depth} and {hidden}")
        if positive("clip", clip) < 0:
            raise ValueError(f"clip must be positive, got {clip}")
        self.node_in = nn.Linear(node_features, width)
        self.layers = nn.ModuleList(_Layer(width, hidden) for _ in range(depth))
        self.from_goal = nn.Linear(width, width, bias=False)
        self.from_current = nn.Linear(width + context_features, width, bias=False)
        self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.read_alpha = nn.Parameter(torch.ones(()))
        self.logit_alpha = nn.Parameter(torch.ones(()))
        self.clip = clip

    @torch.no_grad()
    def forward(
        self,
        pieces: Pieces,
        candidates: int = 2,
        *,
        greedy: bool = True,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Candidates (pieces, candidates, n, ...). Greedy ones of open paths differ by the end they begin at."""
        draws = 0 if greedy else None
        return pieces.read(rollout(pieces.walk(candidates), self.policy(pieces), draws=draws, generator=generator))

    def embed(self, pieces: Pieces) -> PieceEmbedding:
        """Runs the layers."""
        nodes: Tensor = self.node_in(pieces.features.to(self.node_in.weight))
        bias = math.log2(nodes.shape[1]) * pieces.affinity.to(nodes)
        for layer in self.layers:
            nodes = layer(nodes, bias)
        return PieceEmbedding(nodes, bias, *_shared(self.key(nodes), self.value(nodes)))

    def log_probs(
        self,
        embedding: PieceEmbedding,
        goal: Int[Tensor, "pieces steps"],
        current: Int[Tensor, "pieces steps"],
        context: Float[Tensor, "pieces steps features"],
        allowed: Bool[Tensor, "pieces steps nodes"],
    ) -> Float[Tensor, "pieces steps nodes"]:
        """Log-probabilities of the next node, for any number of steps of each piece at once."""
        if problem := real_problem(goal=goal, current=current, context=context, allowed=allowed):
            raise TypeError(problem)
        nodes = embedding.nodes
        query = self.from_goal(_rows(nodes, goal)) + self.from_current(
            torch.cat([_rows(nodes, current), context.to(nodes)], -1)
        )
        bias = _rows(embedding.bias, current)
        weights = (self.read_alpha * bias).masked_fill(~allowed, -torch.inf)
        read = query.sigmoid() * _attention_free(weights, embedding.keys, embedding.keyed_values)
        scores = read @ nodes.mT / math.sqrt(nodes.shape[-1]) + self.logit_alpha * bias
        logits: Tensor = self.clip * scores.tanh()
        return logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)

    def policy(self, pieces: Pieces) -> PathPolicy:
        """What builds solutions of these pieces."""
        return PathPolicy(self, pieces)


class PieceEmbedding(NamedTuple):
    """What the layers made of pieces: their nodes, the bias of attention, and the decoder's keys and keyed values."""

    nodes: Tensor
    bias: Tensor
    keys: Tensor
    keyed_values: Tensor


class PathPolicy:
    """Chooses the next node of pieces, whose nodes are embedded once.

    Args:
        net: what chooses.
        pieces: what is to be solved.
    """

    def __init__(self, net: PathConstructor, pieces: Pieces) -> None:
        self._net = net
        self._embedding = net.embed(pieces)

    def __call__(
        self, walk: Walk, allowed: Bool[Tensor, "pieces candidates nodes"]
    ) -> Float[Tensor, "pieces candidates nodes"]:
        return self._net.log_probs(self._embedding, walk.goal, walk.current, walk.context(), allowed)

    def log_prob(self, trace: Trace) -> Float[Tensor, "pieces candidates"]:
        """The log-probability of a trace that this policy made, with its gradient."""
        goal = trace.goal[..., None].expand_as(trace.current)
        steps = (part.flatten(1, 2) for part in (goal, trace.current, trace.context, trace.allowed))
        scores = self._net.log_probs(self._embedding, *steps)
        return scores.gather(-1, trace.actions.flatten(1, 2)[..., None]).view_as(trace.actions).sum(-1)


class _Layer(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.alpha = nn.Parameter(torch.ones(()))
        self.perceptron = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.norms = nn.ModuleList(nn.InstanceNorm1d(width, affine=True) for _ in range(2))

    def forward(self, nodes: Tensor, bias: Tensor) -> Tensor:
        keys, keyed_values = _shared(self.key(nodes), self.value(nodes))
        read = self.query(nodes).sigmoid() * _attention_free(self.alpha * bias, keys, keyed_values)
        nodes = self.norms[0]((nodes + read).mT).mT
        normed: Tensor = self.norms[1]((nodes + self.perceptron(nodes)).mT).mT
        return normed


def _shared(
    key: Float[Tensor, "batch nodes width"], value: Float[Tensor, "batch nodes width"]
) -> tuple[Float[Tensor, "batch nodes width"], Float[Tensor, "batch nodes width"]]:
    """The exponentials of keys, up to a factor that cancels, and the values times them: the same for all queries."""
    keys = (key - key.amax(1, keepdim=True).detach()).exp()
    return keys, keys * value


def _attention_free(
    bias: Float[Tensor, "batch queries nodes"],
    keys: Float[Tensor, "batch nodes width"],
    keyed_values: Float[Tensor, "batch nodes width"],
) -> Float[Tensor, "batch queries width"]:
    """Means of the values, weighted by the exponentials of the bias and the keys."""
    weights = (bias - bias.amax(-1, keepdim=True).detach()).exp()
    return (weights @ keyed_values) / (weights @ keys).clamp_min(torch.finfo(keys.dtype).tiny)


def _rows(values: Float[Tensor, "batch nodes width"], index: Int[Tensor, "batch steps"]) -> Tensor:
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
