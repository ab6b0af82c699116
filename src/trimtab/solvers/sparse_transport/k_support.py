"""The conjugates of squared norms on k non-zeros, and the k-support norm, by the largest entries of each row."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.topk_simplex import project_descending


def column_plans(
    scores: Float[Tensor, "m n"], b: Float[Tensor, " m"], reg: float, k: int
) -> tuple[Float[Tensor, " m"], Float[Tensor, "m n"]]:
    r"""The semi-dual's terms: $\max_{t \in \Delta^k_{b_j}} s_j^\top t - \frac{\gamma}{2} \lVert t \rVert^2$.

    Args:
        scores: (m, n), one row for each column of the plan, $\alpha - c_j$.
        b: (m,) masses, positive.
        reg: $\gamma$.
        k: most non-zeros.

    Returns:
        The values (m,) and the maximisers (m, n), a subgradient of their sum.

    Example:
        >>> values, plans = column_plans(torch.tensor([[1.0, 2.0, 0.0]]), torch.ones(1), reg=2.0, k=2)
        >>> values, plans
        (tensor([1.1250]), tensor([[0.2500, 0.7500, 0.0000]]))
    """
    top, index = scores.topk(k, dim=1)
    mass = b[:, None]
    t = mass * project_descending(top / (reg * mass))
    values = (top * t).sum(1) - reg / 2 * t.square().sum(1)
    return values, torch.zeros_like(scores).scatter_(1, index, t)


def positive_parts(
    scores: Float[Tensor, "m n"], reg: float, k: int
) -> tuple[Float[Tensor, " m"], Float[Tensor, "m n"]]:
    r"""The dual's terms: $\max_{t \ge 0, \lVert t \rVert_0 \le k} s_j^\top t - \frac{\gamma}{2} \lVert t \rVert^2$.

    As `column_plans`, for columns whose mass is free.

    Example:
        >>> positive_parts(torch.tensor([[1.0, 2.0, 0.5, -1.0]]), reg=2.0, k=2)
        (tensor([1.2500]), tensor([[0.5000, 1.0000, 0.0000, 0.0000]]))
    """
    top, index = scores.topk(k, dim=1)
    top = top.clamp_min(0)
    return top.square().sum(1) / (2 * reg), torch.zeros_like(scores).scatter_(1, index, top / reg)


def squared_k_support_norm(t: Float[Tensor, "m n"], k: int) -> Float[Tensor, " m"]:
    r"""The square of the k-support norm of each row, the convex hull of $\lVert t \rVert^2$ on k non-zeros.

    It is the least $\sum_i t_i^2 / \theta_i$ over $0 \le \theta \le 1$ with $\sum_i \theta_i \le k$ (Argyriou, Foygel
    and Srebro, "Sparse Prediction with the k-Support Norm", NeurIPS 2012): the largest entries have $\theta = 1$ and
    the others share what is left in proportion.

    Example:
        >>> squared_k_support_norm(torch.tensor([[3.0, 1.0, 1.0]]), k=2)  # 3² + (1 + 1)²
        tensor([13.])
        >>> squared_k_support_norm(torch.tensor([[3.0, 1.0, 1.0]]), k=1)  # (3 + 1 + 1)²
        tensor([25.])
    """
    size = t.abs()
    total, top = size.sum(1, keepdim=True), size.topk(k, dim=1).values
    # With 0 .. k-1 entries taken whole, the others, `tail` in sum, share k .. 1.
    whole = top.square().cumsum(1) - top.square()
    tail = (total - top.cumsum(1) + top).clamp_min(0)
    left = torch.arange(k, 0, -1, device=t.device)
    allowed = top * left <= tail + 16 * torch.finfo(t.dtype).eps * total
    return (whole + tail.square() / left).masked_fill(~allowed, math.inf).amin(1)


def smooth_positive_parts(
    scores: Float[Tensor, "m n"], reg: float, k: int, smoothing: float
) -> tuple[Float[Tensor, " m"], Float[Tensor, "m n"]]:
    r"""The dual's terms made smooth: $\max_{t \ge 0} s^\top t - \frac{\gamma}{2} \lVert t \rVert^2_{(k)} -
    \frac{\delta}{2} \lVert t \rVert^2$, with the k-support norm.

    Its maximiser takes the largest entries whole, $s_i / (\gamma + \delta)$, and those about the k-th place in part,
    $(s_i - \gamma \kappa) / \delta$, with $\kappa$ such that the parts, $\theta_i = (s_i / \kappa - \gamma) / \delta$
    in [0, 1], sum to k.

    Returns:
        The values (m,) and the maximisers (m, n), the gradient of their sum.

    Example:
        >>> smooth_positive_parts(torch.tensor([[2.0, 2.0, 0.5]]), reg=1.0, k=1, smoothing=1.0)[1]  # half of each
        tensor([[0.6667, 0.6667, 0.0000]])
    """
    positive = scores.clamp_min(0)
    whole, part = positive > 0, torch.zeros_like(scores, dtype=torch.bool)
    kappa = torch.zeros_like(scores[:, :1])
    crowded = (whole.sum(1) > k).nonzero().squeeze(1)
    if len(crowded):
        s = positive[crowded]
        kappa[crowded] = _tie_level(s, reg, k, smoothing)
        level = kappa[crowded]
        whole[crowded] = s >= level * (reg + smoothing)
        part[crowded] = (s > level * reg) & ~whole[crowded]
    t = torch.where(whole, positive / (reg + smoothing), 0.0)
    t = torch.where(part, (positive - reg * kappa) / smoothing, t)
    norm = torch.where(whole, t.square(), kappa * t).sum(1)
    values = (positive * t).sum(1) - reg / 2 * norm - smoothing / 2 * t.square().sum(1)
    return values, t


def _tie_level(s: Tensor, reg: float, k: int, smoothing: float) -> Tensor:
    """The level kappa, (rows, 1), at which the parts of a row's entries sum to k; rows have more than k positive ones.

    In 1/kappa the sum is piecewise linear: Newton's method, kept within a bracket, ends on the right piece.
    """
    top = s.topk(k + 1, dim=1).values
    first, last = (reg + smoothing) / top[:, k - 1 : k], reg / top[:, k:]  # the k-th is whole; the next takes no part
    lower, upper = torch.minimum(first, last), torch.maximum(first, last)
    u = lower
    for _ in range(100):
        parts = ((s * u - reg) / smoothing).clamp_(0, 1)
        excess = parts.sum(1, keepdim=True) - k
        lower, upper = torch.where(excess < 0, u, lower), torch.where(excess < 0, upper, u)
        done = (excess.abs() <= 1e-13 * k) | (upper - lower <= 4e-16 * upper)
        if bool(done.all()):
            break
        whole, partly = parts >= 1, (parts > 0) & (parts < 1)
        taken = smoothing * (k - whole.sum(1, keepdim=True)) + reg * partly.sum(1, keepdim=True)
        newton = taken / (s * partly).sum(1, keepdim=True)  # no number where no entry takes part
        strictly_inside = (newton > lower) & (newton < upper)
        u = torch.where(done, u, torch.where(strictly_inside, newton, (lower + upper) / 2))
    return u.reciprocal()
