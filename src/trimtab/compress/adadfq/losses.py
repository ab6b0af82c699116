"""Where two networks differ over an image, and how far that lies outside of two margins."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import in_range, integer, positive, same_shape, tensor_problem

_TINY = 1e-8


def difference_entropy(
    logits: Float[Tensor, "batch classes"], other: Float[Tensor, "batch classes"], temperature: float = 1.0
) -> Float[Tensor, " batch"]:
    """Entropy of the softmax of two networks' difference; `ln classes` where they agree up to a constant.

    Args:
        logits: of the one.
        other: of the other one.
        temperature: divides the difference, positive.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 2.0], [9.0, 0.0]])
        >>> difference_entropy(logits, torch.tensor([[0.0, 1.0], [0.0, 9.0]])).round(decimals=4)
        tensor([0.6931, 0.0000])
    """
    if problem := tensor_problem(logits=logits, other=other):
        raise TypeError(problem)
    same_shape("other", other, "logits", logits)
    log_probs = ((logits - other).float() / positive("temperature", temperature)).log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def boundary_loss(
    entropy: Float[Tensor, " batch"], num_classes: int, lower: float = 0.1, upper: float = 0.8
) -> Float[Tensor, ""]:
    """How far entropies, scaled between the batch's smallest and the largest there is, lie outside of two margins.

    Args:
        entropy: of each sample, of `difference_entropy`; at least two.
        num_classes: whose logarithm is the largest entropy.
        lower, upper: the margins, `0 <= lower <= upper <= 1`.

    Raises:
        ValueError: there are fewer than two samples, or the margins are out of order.

    Example:
        >>> import torch
        >>> entropy = torch.tensor([0.0, 0.5, 1.0]) * math.log(10)
        >>> round(boundary_loss(entropy, 10).item(), 4)  # 0.1 below and 0.2 above, of three samples
        0.1
    """
    if problem := tensor_problem(entropy=entropy):
        raise TypeError(problem)
    in_range("lower", lower, 0, 1), in_range("upper", upper, lower, 1)
    if entropy.dim() != 1 or len(entropy) < 2:
        raise ValueError(f"entropy must be of at least two samples, got shape {tuple(entropy.shape)}")
    least = entropy.min()
    scaled = (entropy - least) / (math.log(integer("num_classes", num_classes, 2)) - least).clamp(min=_TINY)
    return (lower - scaled).relu().mean() + (scaled - upper).relu().mean()
