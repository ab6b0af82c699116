"""What every classification loss asks of its arguments, and how it reduces its values.

Only shapes, types and constructor arguments are looked at: reading values would make an accelerator wait.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

Reduction = Literal["none", "mean", "sum"]


def checked_logits(
    logits: Float[Tensor, "batch classes"],
    targets: Int[Tensor, " batch"],
    *,
    index: Int[Tensor, " batch"] | None = None,
    num_classes: int | None = None,
) -> Float[Tensor, "batch classes"]:
    """The logits, in float32 where they came in half precision, once they are known to suit the targets.

    Args:
        logits: scores of the classes.
        targets: labels, int64.
        index: positions of the samples in the training set, for losses that remember samples.
        num_classes: the width that the loss was made for; None takes any.

    Raises:
        TypeError: if `logits` is not floating point or `targets` not int64.
        ValueError: if the shapes are not `(batch, classes)` and `(batch,)`, the batch is empty, `index` has another
            length, or the width is not `num_classes`.

    Example:
        >>> checked_logits(torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor([0, 1])).dtype
        torch.float32
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits: dtype {logits.dtype}; it must be a floating-point type")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: dtype {targets.dtype}; it must be torch.int64 (class indices)")
    if logits.ndim != 2:
        raise ValueError(f"logits: shape {tuple(logits.shape)}; it must be (batch, classes)")
    if targets.shape != logits.shape[:1]:
        raise ValueError(
            f"targets: shape {tuple(targets.shape)}; it must be ({logits.shape[0]},), one label per row of logits"
        )
    if logits.shape[0] == 0:
        raise ValueError("logits: the batch is empty; a loss needs at least one sample")
    if index is not None and index.shape != targets.shape:
        raise ValueError(f"index: shape {tuple(index.shape)}; it must be {tuple(targets.shape)}, as that of targets")
    if num_classes is not None and logits.shape[1] != num_classes:
        raise ValueError(f"logits: {logits.shape[1]} classes; the loss was made for num_classes={num_classes}")
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def check_reduction(reduction: str) -> None:
    """Refuses a `reduction` other than "none", "mean" and "sum" with a ValueError."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction: {reduction!r}; it must be one of {', '.join(map(repr, get_args(Reduction)))}")


def reduce(values: Float[Tensor, " batch"], reduction: Reduction) -> Tensor:
    """The values of a batch as torch's losses return them: as they are, their mean, or their sum.

    Raises:
        ValueError: if `reduction` is unknown.

    Example:
        >>> reduce(torch.tensor([1.0, 3.0]), "mean")
        tensor(2.)
    """
    check_reduction(reduction)
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" else values.sum()
