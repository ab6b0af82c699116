"""Units in which squares of very long and very short vectors neither overflow nor vanish."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import looked_at

_SHORT = 1e-10  # squares of vectors of this length, and of the inverse, are far from the ends of single precision


@torch.no_grad()
def power_of_two_unit(v: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
    """For each sample a power of two near its largest entry; 1 where all are zero or one is not finite.

    Division by it is exact, so that a length, or a cosine, computed in these units is the same to the last bit wherever
    it can be computed without them.

    Args:
        v: vectors, one a sample.

    Returns:
        Shape (batch, 1, ...).

    Example:
        >>> v = torch.tensor([[3e-30, 4e-30]])
        >>> unit = power_of_two_unit(v)
        >>> unit * (v / unit).norm(), v.square().sum().sqrt()
        (tensor([[5.0000e-30]]), tensor(0.))
    """
    largest = v.abs().amax(tuple(range(1, v.ndim)), keepdim=True)
    unit = largest / (2 * torch.frexp(largest).mantissa)
    return torch.where((unit > 0) & torch.isfinite(unit), unit, 1)


def squares_are_kept(lengths: Float[Tensor, "..."]) -> bool:
    """Whether vectors of these lengths are known to need no unit; an accelerator is not made to wait for the answer.

    Args:
        lengths: as they come out without a unit.

    Example:
        >>> squares_are_kept(torch.tensor([3.0, 5.0])), squares_are_kept(torch.tensor([3.0, 0.0]))
        (True, False)
    """
    return looked_at(lengths) and all(_SHORT < length < 1 / _SHORT for length in lengths.flatten().tolist())
