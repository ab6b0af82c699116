"""Similarities between all pairs of rows.

Under autocast the matrix products keep the precision of their arguments: half precision would tell cosines apart by
no more than 0.004.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import tensor_problem


def pairwise_cosine(a: Float[Tensor, "n dim"], b: Float[Tensor, "m dim"] | None = None) -> Float[Tensor, "n m"]:
    """Cosine of the angle between every row of `a` and every row of `b` (of `a` itself where `b` is None).

    A row of zeros has cosine zero with everything. Rounding may lead just outside [-1, 1]; clamp before an arc cosine.

    Raises:
        TypeError: an argument is no real tensor.

    Example:
        >>> pairwise_cosine(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    if problem := tensor_problem(a=a, b=b):
        raise TypeError(problem)
    with torch.autocast(a.device.type, enabled=False):
        a = F.normalize(a, dim=-1)
        return a @ (a if b is None else F.normalize(b, dim=-1)).mT
