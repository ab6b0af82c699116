"""Proximal steps on the convex problem, whose duals have no kinks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trimtab.solvers.sparse_transport.ascent import ascend
from trimtab.solvers.sparse_transport.k_support import smooth_positive_parts
from trimtab.solvers.sparse_transport.relaxation import Relaxation

_SPREAD = 0.1  # share of the costs' range over which the first proximal term spreads a column
_WEAKEST = 0.03  # least proximal weight, as a share of the first; each is half of the one before
_INNER_STEPS = 100


def proximal_steps(relaxation: Relaxation, f: Tensor, max_steps: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The proximal point method from the sparse plan at `f`: potentials of the rows, a plan, evaluations taken."""
    a, b, reg, k = relaxation.a, relaxation.b, relaxation.reg, relaxation.k
    n = len(a)
    _, plan = relaxation.semidual(f)
    z = torch.cat([f, relaxation.best_columns(f)])
    span = float(relaxation.cost.max() - relaxation.cost.min())
    first = max(reg, _SPREAD * span / float(b.max()))
    for i in range(max_steps):
        weight = first * max(0.5**i, _WEAKEST)

        def look(z: Tensor, weight: float = weight, centre: Tensor = plan) -> tuple[float, Tensor]:
            scores = z[:n] + z[n:, None] - relaxation.cost + weight * centre
            values, plan = smooth_positive_parts(scores, reg, k, weight)
            slope = torch.cat([a - plan.sum(0), b - plan.sum(1)])
            return float(a @ z[:n] + b @ z[n:] - values.sum()), slope

        z, evaluations = ascend(look, z, _INNER_STEPS, gtol=1e-3 * 0.5**i / n)
        scores = z[:n] + z[n:, None] - relaxation.cost + weight * plan
        plan = smooth_positive_parts(scores, reg, k, weight)[1]
        yield z[:n], plan, evaluations
