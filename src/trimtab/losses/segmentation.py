"""What segmentation losses share: the checks of their arguments, and the Dice loss.

Only shapes and types are looked at: reading values would make an accelerator wait.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def checked_maps(
    logits: Float[Tensor, "batch classes *space"],
    targets: Int[Tensor, "batch *space"],
    *,
    names: tuple[str, str] = ("logits", "targets"),
) -> Float[Tensor, "batch classes *space"]:
    """The logits, in float32 where they came in half precision, once they are known to suit the label maps.

    Args:
        logits: scores of the classes for every pixel or voxel.
        targets: label maps, int64.
        names: what the caller calls the two, for the messages.

    Raises:
        TypeError: if `logits` is not floating point or `targets` not int64.
        ValueError: if the shapes are not `(batch, classes, *space)` and `(batch, *space)`, or there is no pixel.

    Example:
        >>> checked_maps(torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16), torch.zeros(2, 4, 4, dtype=torch.int64)).dtype
        torch.float32
    """
    name, targets_name = names
    if not logits.is_floating_point():
        raise TypeError(f"{name}: dtype {logits.dtype}; it must be a floating-point type")
    if targets.dtype != torch.int64:
        raise TypeError(f"{targets_name}: dtype {targets.dtype}; it must be torch.int64 (class indices)")
    if logits.ndim < 3:
        raise ValueError(f"{name}: shape {tuple(logits.shape)}; it must be (batch, classes, height, width)")
    wanted = (logits.shape[0], *logits.shape[2:])
    if targets.shape != wanted:
        raise ValueError(
            f"{targets_name}: shape {tuple(targets.shape)}; it must be {wanted}, one label per pixel of {name}"
        )
    if logits.numel() == 0:
        raise ValueError(f"{name}: shape {tuple(logits.shape)} is empty; a loss needs at least one sample and pixel")
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def dice_loss(
    logits: Float[Tensor, "batch classes *space"], targets: Int[Tensor, "batch *space"], smooth: float = 1e-5
) -> Tensor:
    r"""One minus the soft Dice coefficient of the batch, \(\frac{2 \sum p y + s}{\sum p^2 + \sum y^2 + s}\).

    The sums run over all pixels of all samples, class by class; the classes, the background among them, count alike.

    Args:
        logits: scores of the classes for every pixel or voxel.
        targets: label maps, int64 in `[0, classes)`.
        smooth: keeps a class that is neither there nor predicted at a loss of zero.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if shapes do not fit, there is no pixel, or `smooth` is not positive.

    Example:
        >>> labels = torch.tensor([[[0, 1], [1, 1]]])
        >>> sure = 50.0 * torch.nn.functional.one_hot(labels).movedim(-1, 1)
        >>> dice_loss(sure, labels).item(), round(dice_loss(-sure, labels).item(), 4)
        (0.0, 1.0)
    """
    if not smooth > 0:
        raise ValueError(f"smooth: {smooth}; it must be positive")
    logits = checked_maps(logits, targets)
    probs = logits.softmax(1)
    labels = F.one_hot(targets, logits.shape[1]).movedim(-1, 1).to(probs)
    over = [axis for axis in range(logits.ndim) if axis != 1]
    both = (probs * labels).sum(over)
    either = probs.square().sum(over) + labels.sum(over)
    return 1 - ((2 * both + smooth) / (either + smooth)).mean()
