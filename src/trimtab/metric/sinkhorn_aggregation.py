r"""Sinkhorn aggregation: an image's descriptor from patches that are assigned to clusters, or to a dustbin.

$$
V_k = \sum_n p_{kn} \, g_n
$$

with g the patches' features and p an entropic transport plan: each patch has mass 1, each cluster wants 1, and the
dustbin takes the rest. A patch with much of the backbone's attention is kept out of the dustbin, whose score is 1 less
the attention. The descriptor joins the sums, each of length 1, to a summary of the image.

References:
    Sergio Izquierdo, Javier Civera, "Optimal Transport Aggregation for Visual Place Recognition", CVPR 2024,
    arXiv 2311.15937 (SALAD, with a learned dustbin).
    Changwei Wang et al., "Focus on Local: Finding Reliable Discriminative Regions for Visual Place Recognition",
    AAAI 2025, arXiv 2504.09881 (the dustbin from attention).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.arguments import in_range, integer, number, tensor_problem


def log_sinkhorn(
    scores: Float[Tensor, "batch clusters patches"], dustbin: Float[Tensor, "batch patches"], num_iters: int = 3
) -> Float[Tensor, "batch clusters+1 patches"]:
    """The logarithm of an assignment of patches to clusters and a dustbin, by Sinkhorn sweeps that keep the gradient.

    Each patch has mass 1, exactly; each cluster wants mass 1 and the dustbin the rest, which further sweeps approach.
    (`trimtab.ops.sinkhorn` solves one problem to a tolerance, without a gradient through the sweeps; at convergence
    the two agree.)

    Args:
        scores: of the clusters.
        dustbin: score of the dustbin.
        num_iters: sweeps, at least 1.

    Returns:
        The dustbin is the last row.

    Raises:
        TypeError: if an argument is no floating-point tensor.
        ValueError: if shapes disagree, `num_iters` is below 1 or there are no more patches than clusters.

    Example:
        >>> log_sinkhorn(torch.zeros(1, 1, 4), torch.zeros(1, 4)).exp()  # one patch's worth for the only cluster
        tensor([[[0.2500, 0.2500, 0.2500, 0.2500],
                 [0.7500, 0.7500, 0.7500, 0.7500]]])
    """
    if problem := tensor_problem(scores=scores, dustbin=dustbin):
        raise TypeError(problem)
    if scores.ndim != 3 or dustbin.shape != (scores.shape[0], scores.shape[2]):
        raise ValueError(
            "scores and dustbin must be (batch, clusters, patches) and (batch, patches), "
            f"got shapes {tuple(scores.shape)} and {tuple(dustbin.shape)}"
        )
    integer("num_iters", num_iters)
    clusters, patches = scores.shape[1:]
    if patches <= clusters:
        raise ValueError(f"scores must have more patches than clusters, got {patches} and {clusters}")
    scores = torch.cat([scores, dustbin[:, None]], dim=1)
    log_mass = F.pad(scores.new_zeros(clusters), (0, 1), value=math.log(patches - clusters))
    by_patch = torch.zeros_like(dustbin)
    for _ in range(num_iters):
        by_cluster = log_mass - (scores + by_patch[:, None]).logsumexp(2)
        by_patch = -(scores + by_cluster[:, :, None]).logsumexp(1)
    return scores + by_cluster[:, :, None] + by_patch[:, None]


@dataclass(frozen=True)
class Aggregation:
    """What an aggregator makes of a feature map.

    Attributes:
        descriptor: of length 1.
        assignment: each patch's mass in each cluster; what is missing to 1 is in the dustbin.
    """

    descriptor: Float[Tensor, "batch width"]
    assignment: Float[Tensor, "batch clusters patches"]

    @property
    def confidence(self) -> Float[Tensor, "batch patches"]:
        """Mean mass over the clusters, in [0, 1 / clusters]: how much a patch counts."""
        return self.assignment.mean(1)


class SinkhornAggregator(nn.Module):
    """A global descriptor of a feature map: patches are assigned to clusters, whose sums are joined to a token.

    Args:
        channels: width of the feature map.
        clusters: number of clusters; maps must have more patches.
        cluster_dim: width of a cluster's sum.
        token_dim: width of the token's part.
        hidden: width of the three perceptrons' hidden layers.
        dropout: probability, in [0, 1).
        num_iters: Sinkhorn sweeps.
        importance_threshold: importance below this counts as none.

    Attributes:
        width: length of the descriptor, `token_dim + clusters * cluster_dim`.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> aggregate = SinkhornAggregator(32, clusters=8, cluster_dim=16, token_dim=24)
        >>> aggregation = aggregate(torch.randn(2, 32, 7, 9))
        >>> aggregation.descriptor.shape, aggregation.confidence.shape
        (torch.Size([2, 152]), torch.Size([2, 63]))
    """

    def __init__(
        self,
        channels: int,
        clusters: int = 64,
        cluster_dim: int = 128,
        token_dim: int = 256,
        *,
        hidden: int = 512,
        dropout: float = 0.3,
        num_iters: int = 3,
        importance_threshold: float = 0.01,
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "clusters": clusters, "cluster_dim": cluster_dim, "token_dim": token_dim}
        for name, size in (sizes | {"hidden": hidden, "num_iters": num_iters}).items():
            integer(name, size)
        in_range("dropout", dropout, 0, 1, "left")
        number("importance_threshold", importance_threshold)

        def patch_mlp(out: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(channels, hidden, 1), nn.Dropout(dropout), nn.ReLU(), nn.Conv2d(hidden, out, 1)
            )

        self.score, self.features = patch_mlp(clusters), patch_mlp(cluster_dim)
        self.token = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, token_dim))
        self.channels, self.num_iters, self.importance_threshold = channels, num_iters, importance_threshold
        self.width = token_dim + clusters * cluster_dim

    def forward(
        self,
        features: Float[Tensor, "batch channels height width"],
        token: Float[Tensor, "batch channels"] | None = None,
        importance: Float[Tensor, "batch patches"] | None = None,
    ) -> Aggregation:
        """The descriptor, and the assignment behind it.

        Args:
            features: the backbone's map, of any size.
            token: a summary of the image, such as a transformer's class token; the mean patch without one.
            importance: attention that each patch gets, such as `class_attention(...)`; the dustbin's score is 1 less
                it, and 1 everywhere without it.

        Raises:
            TypeError: if `features` is no floating-point tensor.
            ValueError: if a shape does not fit, the batch is empty, or the map has too few patches.
        """
        if problem := tensor_problem(features=features, token=token, importance=importance):
            raise TypeError(problem)
        if features.ndim != 4 or features.shape[1] != self.channels or 0 in features.shape:
            raise ValueError(
                f"features must be (batch, {self.channels}, height, width), got shape {tuple(features.shape)}"
            )
        batch, patches = features.shape[0], features[0, 0].numel()
        token = features.mean((2, 3)) if token is None else token
        if token.shape != (batch, self.channels):
            raise ValueError(f"token must be of shape {(batch, self.channels)}, got {tuple(token.shape)}")
        importance = features.new_zeros(batch, patches) if importance is None else importance
        if importance.shape != (batch, patches):
            raise ValueError(f"importance must be of shape {(batch, patches)}, got {tuple(importance.shape)}")
        kept = torch.where(importance >= self.importance_threshold, importance, 0.0)
        assignment = log_sinkhorn(self.score(features).flatten(2), 1 - kept, self.num_iters).exp()[:, :-1]
        sums = torch.einsum("bkn,bdn->bdk", assignment, self.features(features).flatten(2))
        parts = [F.normalize(self.token(token), dim=1), F.normalize(sums, dim=1).flatten(1)]
        return Aggregation(F.normalize(torch.cat(parts, dim=1), dim=1), assignment)


def class_attention(attention: Float[Tensor, "batch heads tokens tokens"], prefix: int = 1) -> Float[Tensor, "b n"]:
    """The attention that a transformer's class token pays to each patch, summed over heads.

    Args:
        attention: softmax weights of a block, rows attend to columns, the class token first.
        prefix: tokens in front of the patches (the class token, and registers).

    Raises:
        TypeError: if `attention` is no floating-point tensor or `prefix` no integer.
        ValueError: if the shape does not fit.

    Example:
        >>> class_attention(torch.full((1, 2, 5, 5), 0.2))
        tensor([[0.4000, 0.4000, 0.4000, 0.4000]])
    """
    if problem := tensor_problem(attention=attention):
        raise TypeError(problem)
    if attention.ndim != 4 or not 1 <= integer("prefix", prefix) < attention.shape[3]:
        raise ValueError(
            f"attention must be (batch, heads, tokens, tokens) with more than prefix={prefix} tokens, "
            f"got shape {tuple(attention.shape)}"
        )
    return attention[:, :, 0, prefix:].sum(1)
