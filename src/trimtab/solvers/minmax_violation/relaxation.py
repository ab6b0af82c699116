"""The relaxation: the best values where all between the least and the greatest level may be taken."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_SMALL, _LARGE = 1e-4, 1e6  # between them numbers are left in their unit


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
    # To HiGHS numbers below 1e-9 are zero, and those above 1e20 infinite.
    of_values = _unit(torch.stack([low.abs().max(), high.abs().max()]))
    of_violations = _unit(A.abs() * of_values)
    A, b, low, high = A * (of_values / of_violations), b / of_violations, low / of_values, high / of_values
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
    return solved[:, :n] * of_values, solved[:, n] * of_violations


def _unit(sizes: Tensor) -> float:
    """A power of two near the largest of some sizes; one where that is neither very large nor very small."""
    largest = float(sizes.max())
    return 1.0 if largest == 0 or _SMALL <= largest <= _LARGE else 2.0 ** round(math.log2(largest))
