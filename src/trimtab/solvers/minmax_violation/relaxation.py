"""The relaxation: the best values where all between the least and the greatest level may be taken."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def relaxation(
    A: Float[Tensor, "m n"],
    b: Float[Tensor, "problems m"],
    low: Float[Tensor, "problems n"],
    high: Float[Tensor, "problems n"],
) -> tuple[Float[Tensor, "problems n"], Float[Tensor, " problems"]]:
    """The best continuous values between `low` and `high`, and their worst violation, by linear programming (HiGHS).

    Raises:
        RuntimeError: the linear programme could not be solved.
    """
    from scipy.optimize import linprog

    m, n = A.shape
    rows, ones = A.cpu().numpy(), np.ones((m, 1))
    both = np.block([[rows, -ones], [-rows, -ones]])
    values = []
    for target, below, above in zip(b.cpu().numpy(), low.cpu().numpy(), high.cpu().numpy(), strict=True):
        limits = [*zip(below, above, strict=True), (0, None)]
        found = linprog(np.append(np.zeros(n), 1.0), A_ub=both, b_ub=np.append(target, -target), bounds=limits)
        if found.x is None:
            raise RuntimeError(f"the relaxation could not be solved: {found.message}")
        values.append(found.x)
    solved = torch.from_numpy(np.stack(values)).to(A)
    return solved[:, :n], solved[:, n]
