"""Patch tokens summed up by cluster centres, and how near two sets of centres are under a transport plan."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import floating_tensor, integer, positive

_LEAST_REG = 0.05  # below it the kernel of opposite centres, exp(-2 / reg), nears what single precision cannot hold


def cluster_tokens(
    tokens: Float[Tensor, "batch n dim"], num_clusters: int, *, iters: int = 10
) -> Float[Tensor, "batch k dim"]:
    """The centres of each image's tokens, by k-means.

    It starts from a token and those farthest from all chosen before, so that the same tokens in another order have the
    same centres. Assignments are constants for the gradient, which flows through the means. A cluster that nothing is
    assigned to keeps the token that it started from.

    Args:
        tokens: of a batch of images.
        num_clusters: number of centres, at most that of tokens.
        iters: rounds of assignment; all are made, so that nothing waits for a test.

    Raises:
        TypeError: `tokens` is not floating point.
        ValueError: `tokens` has not three dimensions, or there are more clusters than tokens.

    Example:
        >>> tokens = torch.tensor([[[0.0], [1.0], [10.0], [12.0]]])
        >>> cluster_tokens(tokens, 2).flatten().sort().values
        tensor([ 0.5000, 11.0000])
    """
    tokens = floating_tensor("tokens", tokens)
    if tokens.ndim != 3:
        raise ValueError(f"tokens must have shape (batch, n, dim), got {tuple(tokens.shape)}")
    integer("num_clusters", num_clusters, 1, tokens.shape[1])
    integer("iters", iters)
    points = tokens.detach() - tokens.detach().mean(1, keepdim=True)
    start = _far_apart(points, num_clusters)[..., None].expand(-1, -1, tokens.shape[2])
    seeds = tokens.gather(1, start)
    with torch.no_grad():
        centres = points.gather(1, start)
        for _ in range(iters - 1):
            centres = _means(points, _assigned(points, centres), centres)
        member = _assigned(points, centres)
    return _means(tokens, member, seeds)


def _far_apart(tokens: Tensor, count: int) -> Tensor:
    """Indices of tokens, (batch, count): the one farthest from the mean, and each time the one farthest from all."""
    nearest = (tokens - tokens.mean(1, keepdim=True)).square().sum(2)
    chosen: list[Tensor] = []
    for number in range(count):
        chosen.append(nearest.argmax(1))
        here = tokens.gather(1, chosen[-1][:, None, None].expand(-1, 1, tokens.shape[2]))
        distance = (tokens - here).square().sum(2)
        nearest = distance if number == 0 else torch.minimum(nearest, distance)
    return torch.stack(chosen, 1)


def _assigned(points: Tensor, centres: Tensor) -> Tensor:
    """One-hot rows, (batch, n, k)."""
    # A point's own length does not decide which centre is nearest.
    distance = centres.square().sum(2)[:, None] - 2 * points @ centres.mT
    return F.one_hot(distance.argmin(2), centres.shape[1]).to(points)


def _means(points: Tensor, member: Tensor, fallback: Tensor) -> Tensor:
    count = member.sum(1)[..., None]
    return torch.where(count > 0, member.mT @ points / count.clamp_min(1), fallback)


def local_alignment(
    centres: Float[Tensor, "batch k dim"],
    target_centres: Float[Tensor, "batch m dim"],
    *,
    reg: float = 0.1,
    iters: int = 20,
) -> Float[Tensor, " batch"]:
    """The mean cosine of centres matched by an entropic transport plan between them, of uniform marginals.

    The plan is a constant for the gradient.

    Args:
        centres: of each image.
        target_centres: of each image's target.
        reg: weight of the plan's entropy; the cost is one less the cosine.
        iters: Sinkhorn sweeps; the authors make up to 100, and stop where little changes.

    Raises:
        TypeError: one of them is not floating point.
        ValueError: shapes do not fit, or `reg` is not positive.

    Example:
        >>> centres = torch.eye(3)[None]
        >>> local_alignment(centres, centres[:, [2, 0, 1]], reg=0.05)  # the same in another order
        tensor([1.])
    """
    centres, goal = floating_tensor("centres", centres), floating_tensor("target_centres", target_centres)
    if centres.ndim != 3 or goal.ndim != 3 or centres.shape[::2] != goal.shape[::2]:
        raise ValueError(
            "centres and target_centres must have shapes (batch, k, dim) and (batch, m, dim), "
            f"got {tuple(centres.shape)} and {tuple(goal.shape)}"
        )
    positive("reg", reg)
    similarity = F.normalize(goal, dim=2) @ F.normalize(centres, dim=2).mT
    with torch.no_grad():
        plan = _plan if reg >= _LEAST_REG else _log_plan
        found = plan((similarity - 1) / reg, integer("iters", iters))
    return (found * similarity).sum((1, 2))


def _plan(log_kernel: Tensor, iters: int) -> Tensor:
    kernel = log_kernel.exp()
    rows, columns = kernel.shape[1:]
    down = kernel.new_full((len(kernel), rows, 1), 1.0)
    for _ in range(iters):
        across = 1 / (columns * (kernel.mT @ down))
        down = 1 / (rows * (kernel @ across))
    return down * kernel * across.mT


def _log_plan(log_kernel: Tensor, iters: int) -> Tensor:
    """The same in logarithms, slower."""
    rows, columns = log_kernel.shape[1:]
    down = log_kernel.new_zeros(len(log_kernel), rows, 1)
    for _ in range(iters):
        across = -math.log(columns) - (log_kernel + down).logsumexp(1, keepdim=True)
        down = -math.log(rows) - (log_kernel + across).logsumexp(2, keepdim=True)
    return (down + log_kernel + across).exp()
