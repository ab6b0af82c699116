"""What every classification loss asks of its arguments, and how it reduces its values.

Nothing here makes an accelerator wait: there, a label out of range is an error that the device itself raises.
"""

from __future__ import annotations

from typing import Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import class_indices, floating_tensor, indices, one_of

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
        targets: labels, int64; no label is left out, -100 neither.
        index: positions of the samples in the training set, for losses that remember samples.
        num_classes: the width that the loss was made for; None takes any.

    Raises:
        TypeError: if an argument is no tensor, `logits` is not floating point or `targets` not int64.
        ValueError: if the shapes are not `(batch, classes)` and `(batch,)`, the batch is empty, `index` has another
            length, the width is not `num_classes`, or a label is out of range.

    Example:
        >>> import torch
        >>> checked_logits(torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor([0, 1])).dtype
        torch.float32
    """
    logits = floating_tensor("logits", logits)
    class_indices("targets", targets)
    if logits.ndim != 2:
        raise ValueError(f"logits must be (batch, classes), got shape {tuple(logits.shape)}")
    if targets.shape != logits.shape[:1]:
        raise ValueError(
            f"targets must be of shape ({logits.shape[0]},), one label per row of logits, got {tuple(targets.shape)}"
        )
    if logits.shape[0] == 0:
        raise ValueError("logits must hold at least one sample, got an empty batch")
    if index is not None and index.shape != targets.shape:
        raise ValueError(f"index must be of shape {tuple(targets.shape)} as targets, got {tuple(index.shape)}")
    if num_classes is not None and logits.shape[1] != num_classes:
        raise ValueError(f"logits must have num_classes={num_classes} columns, got {logits.shape[1]}")
    indices("targets", targets, logits.shape[1])
    return logits


def check_reduction(reduction: str) -> None:
    """Refuses a `reduction` other than "none", "mean" and "sum" with a ValueError."""
    one_of("reduction", reduction, get_args(Reduction))


def reduce(values: Float[Tensor, " batch"], reduction: Reduction) -> Tensor:
    """The values of a batch as torch's losses return them: as they are, their mean, or their sum.

    Raises:
        ValueError: if `reduction` is unknown.

    Example:
        >>> import torch
        >>> reduce(torch.tensor([1.0, 3.0]), "mean")
        tensor(2.)
    """
    check_reduction(reduction)
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" else values.sum()
