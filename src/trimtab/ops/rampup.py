"""Coefficients that rise over the first steps of training."""

from __future__ import annotations

import math

from trimtab.ops.arguments import non_negative


def sigmoid_rampup(step: float, length: float) -> float:
    r"""Rises as $\exp(-5 (1 - s)^2)$ with $s = \mathrm{step} / \mathrm{length}$, from 0.0067 to 1, where it stays.

    From Laine and Aila, "Temporal Ensembling for Semi-Supervised Learning", ICLR 2017.

    Args:
        step: how far training is.
        length: when the rise ends, in the unit of `step`; 0 for no rise, the value is then 1.

    Raises:
        ValueError: if `step` or `length` is negative or not finite.

    Example:
        >>> [round(sigmoid_rampup(step, 10), 4) for step in (0, 5, 10, 20)]
        [0.0067, 0.2865, 1.0, 1.0]
    """
    step, length = non_negative("step", step), non_negative("length", length)
    if step >= length:
        return 1.0
    return math.exp(-5.0 * (1.0 - step / length) ** 2)
