"""What segmentation losses share: the checks of their arguments, and the Dice loss.

Nothing here makes an accelerator wait: there, a label out of range is an error that the device itself raises.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.ops.arguments import class_indices, floating_tensor, indices, positive


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
    logits = floating_tensor(name, logits)
    class_indices(targets_name, targets)
    if logits.ndim < 3:
        raise ValueError(f"{name} must be (batch, classes, height, width), got shape {tuple(logits.shape)}")
    wanted = (logits.shape[0], *logits.shape[2:])
    if targets.shape != wanted:
        raise ValueError(
            f"{targets_name} must be of shape {wanted}, one label per pixel of {name}, got {tuple(targets.shape)}"
        )
    if logits.numel() == 0:
        raise ValueError(f"{name} must hold at least one sample and pixel, got an empty shape {tuple(logits.shape)}")
    return logits


def known_labels(targets: Int[Tensor, "..."], num_classes: int, ignore_index: int | None) -> Bool[Tensor, "..."] | None:
    """Where the labels are to be learnt, or None where all are; a label that is neither is refused.

    Nothing waits for an accelerator: there a wrong label is an error that the device raises.

    Raises:
        ValueError: if a label is neither a class nor `ignore_index`.

    Example:
        >>> known_labels(torch.tensor([0, 255, 2]), 3, ignore_index=255)
        tensor([ True, False,  True])
    """
    if ignore_index is None:
        indices("targets", targets, num_classes)
        return None
    known = targets != ignore_index
    indices("targets", torch.where(known, targets, 0), num_classes)
    return known


def dice_loss(
    logits: Float[Tensor, "batch classes *space"],
    targets: Int[Tensor, "batch *space"],
    smooth: float = 1e-5,
    *,
    ignore_index: int | None = None,
) -> Tensor:
    r"""One minus the soft Dice coefficient of the batch, $\frac{2 \sum p y + s}{\sum p^2 + \sum y^2 + s}$.

    The sums run over all pixels of all samples, class by class; the classes, the background among them, count alike.

    Args:
        logits: scores of the classes for every pixel or voxel.
        targets: label maps, int64 in `[0, classes)`.
        smooth: keeps a class that is neither there nor predicted at a loss of zero.
        ignore_index: label of the pixels to leave out of all sums, as void ones; by default there are none.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if shapes do not fit, there is no pixel, `smooth` is not positive, or a label is neither a class nor
            `ignore_index`.

    Example:
        >>> labels = torch.tensor([[[0, 1], [1, 1]]])
        >>> sure = 50.0 * torch.nn.functional.one_hot(labels).movedim(-1, 1)
        >>> dice_loss(sure, labels).item(), round(dice_loss(-sure, labels).item(), 4)
        (0.0, 1.0)
    """
    positive("smooth", smooth)
    logits = checked_maps(logits, targets)
    known = known_labels(targets, logits.shape[1], ignore_index)
    probs = logits.softmax(1)
    classes = (targets if known is None else torch.where(known, targets, 0)).unsqueeze(1)
    labels = torch.zeros_like(probs).scatter_(1, classes, 1.0)  # in the layout and the type of the probabilities
    if known is not None:
        probs, labels = (torch.where(known.unsqueeze(1), part, 0.0) for part in (probs, labels))
    over = [axis for axis in range(logits.ndim) if axis != 1]
    both = (probs * labels).sum(over)
    either = probs.square().sum(over) + labels.sum(over)
    return 1 - ((2 * both + smooth) / (either + smooth)).mean()
