"""The convex problem whose dual is solved: its two duals, its value, and feasible plans."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trimtab.ops.simplex import project_simplex
from trimtab.ops.sinkhorn import TransportProblem
from trimtab.ops.topk_simplex import top_entries_on_simplex
from trimtab.solvers.sparse_transport.k_support import column_plans, positive_parts, squared_k_support_norm

_TIE = 1e-3


class Relaxation:
    """The convex problem whose dual is solved, its plans transposed: one row for each column of the plan.

    Costs begin at zero, or how far a value may be from the optimum would depend on their origin; `least` is what was
    taken away, from costs and from the value of any plan.
    """

    def __init__(self, problem: TransportProblem, k: int) -> None:
        self.least = float(problem.cost.min())
        self.cost = (problem.cost.T - self.least).contiguous()
        self.a, self.b = problem.a, problem.b
        self.reg = problem.reg * problem.mass  # for plans of mass one
        self.k = min(k, len(self.a))

    def semidual(self, f: Tensor) -> tuple[float, Tensor]:
        """Its value at `f` and the sparse plan there, with the right column sums."""
        values, plan = column_plans(f - self.cost, self.b, self.reg, self.k)
        return float(self.a @ f - values.sum()), plan

    def dual(self, f: Tensor, g: Tensor) -> tuple[float, Tensor]:
        """Its value at potentials and the sparse plan there."""
        values, plan = positive_parts(f + g[:, None] - self.cost, self.reg, self.k)
        return float(self.a @ f + self.b @ g - values.sum()), plan

    def best_columns(self, f: Tensor) -> Tensor:
        """The `g` that maximises the dual for `f`: it leaves the largest entry of a column its share."""
        scores = f - self.cost
        _, plan = column_plans(scores, self.b, self.reg, self.k)
        share, index = plan.max(1)
        return self.reg * share - scores.gather(1, index[:, None]).squeeze(1)

    def feasible(self, plan: Tensor) -> Tensor:
        """A plan with both marginals near the given one.

        From Altschuler, Weed and Rigollet, "Near-linear time approximation algorithms for optimal transport via
        Sinkhorn iteration", NeurIPS 2017: what is too much is scaled down, what is missing is spread.
        """
        plan = plan * _cut(self.a, plan.sum(0))
        plan = plan * _cut(self.b, plan.sum(1))[:, None]
        rows, columns = (self.a - plan.sum(0)).clamp_min(0), (self.b - plan.sum(1)).clamp_min(0)
        missing = rows.sum()
        return torch.addr(plan, columns, rows / missing) if float(missing) > 0 else plan

    def value(self, plan: Tensor) -> float:
        """Of the relaxed problem at a feasible plan: an upper bound of its optimum."""
        penalty = squared_k_support_norm(plan, self.k).sum()
        return float((self.cost * plan).sum() + self.reg / 2 * penalty)

    def size(self, value: float) -> float:
        """Of a value, which the least cost, that every plan must pay, is not in."""
        return abs(value)

    def gap(self, upper: float, lower: float) -> float:
        """Of a value known to be between the two, as a share of its size."""
        size = max(self.size(upper), self.size(lower))
        return max(upper - lower, 0.0) / size if size > 0 else 0.0

    def error(self, plan: Tensor) -> float:
        """L1 distance of a plan's row sums from the marginal."""
        return float((self.a - plan.sum(0)).abs().sum())

    def sparsest(self, f: Tensor, relaxed: Tensor) -> Tensor:
        """The sparse plan at `f` which, where entries tie for the k-th place, keeps those that `relaxed` uses most."""
        index = relaxed.topk(self.k, dim=1).indices
        scores = (f - self.cost).gather(1, index)
        shares, order = top_entries_on_simplex(scores / (self.reg * self.b[:, None]), self.k)
        return torch.zeros_like(relaxed).scatter_(1, index.gather(1, order), self.b[:, None] * shares)

    def fullest(self, f: Tensor) -> Tensor:
        """The sparse plan at `f` which, where entries tie for the k-th place, fills the rows that lack most.

        Column by column, with what the columns before have left. Entries tie whose shares differ by less than `_TIE`.
        """
        scores = (f - self.cost) / (self.reg * self.b[:, None])
        last = scores.topk(self.k, dim=1).values[:, -1:]
        certain, tied = scores > last + _TIE, scores >= last - _TIE
        missing, plan = self.a.clone(), torch.zeros_like(scores)
        for column in tied.sum(1).argsort().tolist():  # those with the least choice first
            wish = missing.masked_fill(certain[column], math.inf).masked_fill(~tied[column], -math.inf)
            index = wish.topk(self.k).indices
            taken = self.b[column] * project_simplex(scores[column, index])
            plan[column, index] = taken
            missing[index] -= taken
        return plan


def _cut(wanted: Tensor, found: Tensor) -> Tensor:
    return (wanted / found.clamp_min(torch.finfo(found.dtype).tiny)).clamp_max(1)
