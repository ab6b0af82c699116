"""L-BFGS on the duals."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trimtab.solvers.sparse_transport.relaxation import Relaxation

Form = Literal["semidual", "dual"]

_CHECK_EVERY = 10  # iterations of L-BFGS between two looks at the duality gap
_PATIENCE = 30  # iterations in which the dual must rise by as much as the tolerance
_MEMORY = 20  # pairs that L-BFGS keeps


def lbfgs_on_dual(
    relaxation: Relaxation, form: Form, tol: float, max_iter: int
) -> tuple[Tensor, Tensor, list[float], list[float], int]:
    """L-BFGS on one of the duals until the gap is closed or it rises no more.

    Returns:
        The rows' potentials, those of the last iterations whose plan is nearest to the rows' masses (at a kink that
        jumps from one iterate to the next, while the dual's value hardly moves), the dual's value and the error of the
        rows after each iteration, and how often the dual was computed.
    """
    a, b = relaxation.a, relaxation.b
    n = len(a)
    last: dict[bytes, tuple[float, Tensor, Tensor]] = {}
    values: list[float] = []
    errors: list[float] = []
    recent: deque[tuple[float, Tensor]] = deque(maxlen=_PATIENCE)

    def look(z: Tensor) -> tuple[float, Tensor]:
        value, plan = relaxation.semidual(z) if form == "semidual" else relaxation.dual(z[:n], z[n:])
        slope = a - plan.sum(0)
        last.clear()
        last[z.cpu().numpy().tobytes()] = value, plan, slope
        return value, slope if form == "semidual" else torch.cat([slope, b - plan.sum(1)])

    def note(z: Tensor) -> tuple[float, Tensor]:
        key = z.cpu().numpy().tobytes()
        if key not in last:
            look(z)
        value, plan, slope = last[key]
        values.append(value)
        errors.append(float(slope.abs().sum()))
        recent.append((errors[-1], z[:n]))
        return value, plan

    def after_iteration(z: Tensor) -> None:
        value, plan = note(z)
        if len(values) % _CHECK_EVERY == 0:
            if form == "dual":
                value, plan = relaxation.semidual(z[:n])
            if relaxation.gap(relaxation.value(relaxation.feasible(plan)), value) <= tol:
                raise StopIteration
            if len(values) > _PATIENCE and values[-1] - values[-1 - _PATIENCE] <= tol * relaxation.size(values[-1]):
                raise StopIteration

    start = a.new_zeros(n if form == "semidual" else n + len(b))
    note(start)
    z, evaluations = ascend(look, start, max_iter, after_iteration=after_iteration)
    balanced = min(recent, key=lambda seen: seen[0])[1]
    return z[:n], balanced, values, errors, 1 + evaluations


def ascend(
    look: Callable[[Tensor], tuple[float, Tensor]],
    start: Tensor,
    max_iter: int,
    *,
    gtol: float = 0.0,
    after_iteration: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, int]:
    """Maximises a concave function, given as value and gradient, by SciPy's L-BFGS: where it ended, evaluations."""
    from scipy.optimize import minimize

    if max_iter == 0:
        return start, 0

    def read(x: np.ndarray) -> Tensor:
        return torch.as_tensor(x.copy()).to(start.device)

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = look(read(x))
        return -value, -slope.cpu().numpy()

    found = minimize(
        loss,
        start.cpu().numpy(),
        method="L-BFGS-B",
        jac=True,
        callback=None if after_iteration is None else lambda x: after_iteration(read(x)),
        options={"maxiter": max_iter, "maxfun": 20 * max_iter, "maxcor": _MEMORY, "ftol": 0.0, "gtol": gtol},
    )
    return read(found.x), int(found.nfev)
