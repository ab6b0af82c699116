r"""Matching two graphs at the least cost of nodes and edges, as a layer with a gradient.

$$
\hat v = \arg\min_{v \text{ permutation}} \sum_{ia} u_{ia} v_{ia} + \sum_{(ij)(ab)} q_{ij,ab}\, v_{ia} v_{jb}
$$

The gradient is that of an interpolation: with $v'$ the solution at $u + \lambda\, \partial L / \partial v$,
$\partial L/\partial u = -(\hat v - v') / \lambda$, and likewise for $q$ with the products $v_{ia} v_{jb}$.

Reference: Marin Vlastelica, Anselm Paulus, Vit Musil, Georg Martius, Michal Rolinek, "Differentiation of Blackbox
Combinatorial Solvers", ICLR 2020, arXiv 1912.02175.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function

from trimtab.ops.arguments import all_finite, floating_tensor, looked_at, one_of, positive

Method = Literal["auto", "exact", "exchange"]

_EXACT = 6  # nodes up to which all permutations are tried


@torch.no_grad()
def match_graphs(
    u: Float[Tensor, "groups n n"],
    q: Float[Tensor, "groups edges_s edges_t"],
    edges_s: Int[Tensor, "groups edges_s 2"],
    edges_t: Int[Tensor, "groups edges_t 2"],
    *,
    method: Method = "auto",
) -> Int[Tensor, "groups n"]:
    """The matching of two graphs of the least cost, `sum u[i, p_i] + sum q[e, f]` over edges that are matched.

    Args:
        u: cost of matching node i of the first graph to node a of the second.
        q: cost of matching edge e of the first graph to edge f of the second, from source to source.
        edges_s, edges_t: source and target of each edge.
        method: "exact" tries all permutations; "exchange" starts from the best assignment for `u` and exchanges
            partners of two nodes for as long as it pays; "auto" is exact for up to six nodes.

    Returns:
        For each node of the first graph its partner in the second.

    Raises:
        TypeError: a cost is no floating-point tensor, or edges are not int64.
        ValueError: shapes do not fit, a cost is not finite, an edge ends at no node, or `method` is unknown.

    Example:
        >>> u = torch.tensor([[[0.0, -1.0], [0.0, -0.5]]])
        >>> no_edges = torch.zeros(1, 0, 2, dtype=torch.int64)
        >>> match_graphs(u, torch.zeros(1, 0, 0), no_edges, no_edges)
        tensor([[1, 0]])
    """
    one_of("method", method, get_args(Method))
    _check_costs(u, q, edges_s, edges_t)
    for name, cost in (("u", u), ("q", q)):
        if not all_finite(cost):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    u, joint = u.double(), _joint_costs(u, q, edges_s, edges_t)
    n = u.shape[1]
    if method == "exact" or (method == "auto" and n <= _EXACT):
        every = _permutations(n).to(u.device)
        best = [_costs(u[g : g + 1], joint[g : g + 1], every[None])[0].argmin() for g in range(len(u))]
        return every[torch.stack(best)] if best else every[:0]
    if not len(u):
        return torch.zeros(0, n, dtype=torch.int64, device=u.device)
    from scipy.optimize import linear_sum_assignment

    found = [torch.from_numpy(linear_sum_assignment(cost)[1]) for cost in u.cpu().numpy()]
    current = torch.stack(found).to(u.device)
    swaps = _swaps(n).to(u.device)
    cost = _costs(u, joint, current[:, None])[:, 0]
    least = 1e-12 * torch.maximum(u.abs().amax((1, 2)), joint.abs().amax((1, 2)))  # in units of the costs
    for _ in range(n * n):  # far more than it takes
        tried = current[:, swaps]
        values = _costs(u, joint, tried)
        better, which = values.min(1)
        gains = better < cost - least
        if not bool(gains.any()):
            break
        moved = tried[torch.arange(len(u), device=u.device), which]
        current, cost = torch.where(gains[:, None], moved, current), torch.where(gains, better, cost)
    return current


def black_box_matching(
    u: Float[Tensor, "groups n n"],
    q: Float[Tensor, "groups edges_s edges_t"],
    edges_s: Int[Tensor, "groups edges_s 2"],
    edges_t: Int[Tensor, "groups edges_t 2"],
    *,
    lam_grad: float = 80.0,
    method: Method = "auto",
) -> Float[Tensor, "groups n n"]:
    """The matching as permutation matrices, differentiable by interpolation; arguments as in `match_graphs`.

    Args:
        u, q, edges_s, edges_t, method: see there.
        lam_grad: how far the second solution looks along the gradient.

    Raises:
        TypeError, ValueError: as `match_graphs`, or `lam_grad` is not positive.

    Example:
        >>> u = torch.tensor([[[0.0, -1.0], [0.0, -0.5]]], requires_grad=True)
        >>> no_edges = torch.zeros(1, 0, 2, dtype=torch.int64)
        >>> v = black_box_matching(u, torch.zeros(1, 0, 0), no_edges, no_edges, lam_grad=1.0)
        >>> (v * (1 - torch.eye(2)) + (1 - v) * torch.eye(2)).sum().backward()
        >>> u.grad[0]  # descending it makes the true pairs cheap
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    positive("lam_grad", lam_grad)
    one_of("method", method, get_args(Method))
    _check_costs(u, q, edges_s, edges_t)
    v: Tensor = BlackBoxMatching.apply(u, q, edges_s, edges_t, lam_grad, method)  # type: ignore[no-untyped-call]
    return v


class BlackBoxMatching(Function):
    """The gradient of `black_box_matching`."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, q: Tensor, edges_s: Tensor, edges_t: Tensor, lam_grad: float, method: Method
    ) -> Tensor:
        v = F.one_hot(match_graphs(u, q, edges_s, edges_t, method=method), u.shape[1]).to(u)
        ctx.save_for_backward(u, q, edges_s, edges_t, v)
        ctx.lam_grad, ctx.method = lam_grad, method
        return v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        u, q, edges_s, edges_t, v = ctx.saved_tensors
        other = match_graphs(u + ctx.lam_grad * grads[0], q, edges_s, edges_t, method=ctx.method)
        v_other = F.one_hot(other, u.shape[1]).to(v)
        change = [_matched_edges(one, edges_s, edges_t) for one in (v, v_other)]
        return -(v - v_other) / ctx.lam_grad, -(change[0] - change[1]).to(q) / ctx.lam_grad, None, None, None, None


def _check_costs(u: Tensor, q: Tensor, edges_s: Tensor, edges_t: Tensor) -> None:
    floating_tensor("u", u)
    floating_tensor("q", q)
    if u.ndim != 3 or u.shape[1] != u.shape[2] or u.shape[1] < 2:
        raise ValueError(f"u must be (groups, n, n) with n of at least 2, got shape {tuple(u.shape)}")
    if not all(isinstance(edges, Tensor) and edges.dtype == torch.int64 for edges in (edges_s, edges_t)):
        raise TypeError("edges_s and edges_t must be int64 tensors, got others")
    if any(looked_at(edges) and ((edges < 0) | (edges >= u.shape[1])).any() for edges in (edges_s, edges_t)):
        raise ValueError(f"edges_s and edges_t must name nodes in [0, {u.shape[1]}), got others")
    for name, edges in (("edges_s", edges_s), ("edges_t", edges_t)):
        if edges.ndim != 3 or len(edges) != len(u) or edges.shape[2] != 2:
            raise ValueError(f"{name} must be ({len(u)}, edges, 2), got shape {tuple(edges.shape)}")
    wanted = (len(u), edges_s.shape[1], edges_t.shape[1])
    if q.shape != wanted:
        raise ValueError(f"q must be of shape {wanted}, got {tuple(q.shape)}")


def _joint_costs(u: Tensor, q: Tensor, edges_s: Tensor, edges_t: Tensor) -> Tensor:
    """Cost of i -> a together with j -> b, (groups, n * n, n * n), rows i n + a, columns j n + b; edges that come twice
    add up."""
    n = u.shape[1]
    rows = edges_s[:, :, None, 0] * n + edges_t[:, None, :, 0]
    columns = edges_s[:, :, None, 1] * n + edges_t[:, None, :, 1]
    joint = torch.zeros(len(u), n**4, dtype=torch.float64, device=u.device)
    return joint.scatter_add_(1, (rows * n * n + columns).flatten(1), q.double().flatten(1)).view(-1, n * n, n * n)


def _costs(u: Tensor, joint: Tensor, tried: Tensor) -> Tensor:
    """Of permutations (groups or 1, tried, n) in each group."""
    groups, n = u.shape[:2]
    pairs = tried + n * torch.arange(n, device=u.device)
    first = u.reshape(groups, -1).gather(1, pairs.flatten(1)).view(pairs.shape).sum(2)
    both = (pairs[..., :, None] * n * n + pairs[..., None, :]).flatten(1)
    return first + joint.flatten(1).gather(1, both).view(*pairs.shape, n).sum((2, 3))


def _matched_edges(v: Tensor, edges_s: Tensor, edges_t: Tensor) -> Tensor:
    """(groups, edges_s, edges_t), one where both ends of two edges are matched."""
    sources, targets = (
        v.gather(1, rows[..., None].expand(-1, -1, v.shape[2])).gather(
            2, columns[:, None].expand(-1, rows.shape[1], -1)
        )
        for rows, columns in zip(edges_s.unbind(2), edges_t.unbind(2), strict=True)
    )
    return sources * targets


@cache
def _permutations(n: int) -> Tensor:
    return torch.tensor(list(itertools.permutations(range(n))))


@cache
def _swaps(n: int) -> Tensor:
    """Positions after each exchange of two, (n (n - 1) / 2, n)."""
    pairs = list(itertools.combinations(range(n), 2))
    swaps = torch.arange(n).repeat(len(pairs), 1)
    for row, (i, j) in enumerate(pairs):
        swaps[row, i], swaps[row, j] = j, i
    return swaps
