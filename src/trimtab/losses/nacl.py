r"""Neighbour-aware calibration (NACL) of segmentation: logits are drawn to the class proportions around each pixel.

For a segmentation network that is too sure of itself, above all at borders where annotators differ. It bounds the
logits and softens them where labels are mixed, with a weight of its own, which label smoothing by neighbours
(`SVLSLoss`) lacks.

$$
\mathcal{L} = \frac{1}{n} \sum_{p} \Bigl( -\log \mathrm{softmax}(l_p)_{y_p}
+ \frac{\alpha}{K} \sum_{k} \bigl| u_{pk} - l_{pk} \bigr| \Bigr), \qquad
u_{pk} = \frac{1}{s^d} \sum_{q \in N_s(p)} \mathbb{1}[y_q = k]
$$

over the $n$ pixels (or voxels) $p$, where $N_s(p)$ is the window of side $s$ around $p$ in $d$ dimensions and $l_p$ are
the raw logits.

Reference: Murugesan, Adiga Vasudeva, Liu, Lombaert, Ben Ayed, Dolz, "Neighbor-Aware Calibration of Segmentation
Networks with Penalty-Based Constraints", Medical Image Analysis 2024, arXiv 2401.14487. Spatially varying label
smoothing is from Islam and Glocker, "Spatially Varying Label Smoothing: Capturing Uncertainty from Expert Annotations",
IPMI 2021, arXiv 2104.05788.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.losses.checks import Reduction, check_reduction
from trimtab.losses.segmentation import checked_maps, known_labels
from trimtab.ops.arguments import class_indices, integer, non_negative, number, one_of

Kernel = Literal["mean", "gaussian", "min", "max", "median", "mode"]
Padding = Literal["background", "ignore", "replicate"]


def neighborhood_proportions(
    targets: Int[Tensor, "batch *space"],
    num_classes: int,
    *,
    kernel_size: int = 3,
    kernel: Kernel = "mean",
    sigma: float = 1.0,
    padding: Padding = "background",
    ignore_index: int = -100,
) -> Float[Tensor, "batch classes *space"]:
    """Which classes, and how much of each, are in the window around every pixel: the target of the logits.

    Args:
        targets: a class for every pixel or voxel, in two or three dimensions of space; int64.
        num_classes: number of classes, K.
        kernel_size: side of the window, odd.
        kernel: "mean" for the proportions; "gaussian" for the weights of SVLS, half on the pixel itself and half on
            the others in proportion to a Gaussian; "min", "max", "median" or "mode" for all on the lowest, highest,
            middle or most frequent class of the window (the lower one of equals), as the authors compare.
        sigma: width of the Gaussian, in pixels, at least 0.25.
        padding: what lies outside the image: "background" is class 0, as in the authors' code for all kernels but
            "gaussian"; "replicate" is the nearest pixel, as for "gaussian" there; "ignore" is nothing.
        ignore_index: pixels of this label count as nothing.

    Returns:
        Non-negative float32 numbers that sum to one over the classes; zeros where the window holds nothing.

    Raises:
        TypeError: if `targets` is not int64, or a number is not of its type.
        ValueError: if the shape or an option does not fit, or a label is neither a class nor `ignore_index`.

    Example:
        >>> targets = torch.tensor([[[0, 0, 1], [0, 0, 1], [0, 0, 1]]])
        >>> neighborhood_proportions(targets, 2)[0, :, 1, 1]  # six pixels of class 0 and three of class 1
        tensor([0.6667, 0.3333])
    """
    class_indices("targets", targets)
    if targets.ndim not in (3, 4) or targets.numel() == 0:
        raise ValueError(
            "targets must be (batch, height, width) or (batch, depth, height, width), and not empty, "
            f"got shape {tuple(targets.shape)}"
        )
    _check_options(num_classes, kernel_size, kernel, sigma, padding)
    if not isinstance(ignore_index, int | Integral):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
    known_labels(targets, num_classes, ignore_index)
    labels = _padded(targets, kernel_size // 2, padding)
    labels = torch.where(labels == ignore_index, -1, labels)[:, None]
    classes = torch.arange(num_classes, device=targets.device).view(-1, *[1] * (targets.ndim - 1))
    proportions = _window_sums((labels == classes).float(), kernel_size, kernel, sigma)
    proportions /= proportions.sum(1, keepdim=True).clamp_min(torch.finfo(proportions.dtype).tiny)
    if kernel in ("mean", "gaussian"):
        return proportions
    if kernel == "mode":
        chosen = proportions.argmax(1, keepdim=True)
    elif kernel == "max":
        chosen = num_classes - 1 - (proportions > 0).flip(1).long().argmax(1, keepdim=True)
    else:
        # The lowest class that, with those below it, fills any part or half of the window; half but for rounding.
        share = 0.0 if kernel == "min" else 0.5 - 1e-4
        chosen = (proportions.cumsum(1) > share).long().argmax(1, keepdim=True)
    return ((classes == chosen) & (proportions > 0).any(1, keepdim=True)).to(proportions.dtype)


def _padded(targets: Tensor, radius: int, padding: Padding) -> Tensor:
    """The labels with a margin on all sides of the image, -1 where there is nothing."""
    if padding != "replicate":
        return F.pad(targets, [radius] * 2 * (targets.ndim - 1), value=0 if padding == "background" else -1)
    for dim in range(1, targets.ndim):
        places = torch.arange(-radius, targets.shape[dim] + radius, device=targets.device)
        targets = targets.index_select(dim, places.clamp(0, targets.shape[dim] - 1))
    return targets


def _window_sums(planes: Tensor, size: int, kernel: Kernel, sigma: float) -> Tensor:
    """Weighted sums over all windows that fit, one axis after the other: of ones, or of the weights of SVLS."""
    middle = size // 2
    line = [math.exp(-0.5 * ((place - middle) / sigma) ** 2) if kernel == "gaussian" else 1.0 for place in range(size)]
    total, centre = planes, planes
    for dim in range(2, planes.ndim):
        length = planes.shape[dim] - size + 1
        centre = centre.narrow(dim, middle, length)
        summed = total.narrow(dim, middle, length).clone()
        for place in (*range(middle), *range(middle + 1, size)):
            summed.add_(total.narrow(dim, place, length), alpha=line[place])
        total = summed
    if kernel != "gaussian" or size == 1:
        return total
    # The Gaussian is one at its centre, so the weight of the others is what is left of its sum.
    return centre + (total - centre) / (sum(line) ** (planes.ndim - 2) - 1)


class NACLLoss(nn.Module):
    """Cross-entropy and the distance of logits to neighbourhood proportions, called as `loss(logits, targets)`.

    With `alpha=0` it is cross-entropy.

    Args:
        num_classes: number of classes, K.
        kernel_size: side of the window, odd.
        kernel: see `neighborhood_proportions`.
        distance: "l1", or "l2" for the squared difference.
        alpha: weight of the distance; the authors use 0.1.
        on: what is drawn to the proportions, the raw "logits" or the "softmax".
        sigma: width of the Gaussian of that kernel.
        padding: what lies outside the image, see `neighborhood_proportions`.
        ignore_index: pixels of this label have no loss and count in no neighbourhood.
        reduction: "mean" (over the pixels that are not ignored), "sum", or "none" for a value per pixel.

    Raises:
        TypeError: if a number is not of its type.
        ValueError: if an option is out of range or unknown.

    Example:
        >>> loss = NACLLoss(num_classes=2)
        >>> targets = torch.zeros(1, 4, 4, dtype=torch.int64)
        >>> loss(torch.zeros(1, 2, 4, 4), targets)  # log(2) + 0.1 (1 + 0) / 2
        tensor(0.7431)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        kernel_size: int = 3,
        kernel: Kernel = "mean",
        distance: Literal["l1", "l2"] = "l1",
        alpha: float = 0.1,
        on: Literal["logits", "softmax"] = "logits",
        sigma: float = 1.0,
        padding: Padding = "background",
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_options(num_classes, kernel_size, kernel, sigma, padding)
        one_of("distance", distance, ("l1", "l2"))
        one_of("on", on, ("logits", "softmax"))
        non_negative("alpha", alpha)
        check_reduction(reduction)
        if not isinstance(ignore_index, int | Integral):
            raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
        self.num_classes = num_classes
        self.kernel_size = kernel_size
        self.kernel: Kernel = kernel
        self.distance = distance
        self.alpha = alpha
        self.on = on
        self.sigma = sigma
        self.padding: Padding = padding
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(
        self, logits: Float[Tensor, "batch classes *space"], targets: Int[Tensor, "batch *space"]
    ) -> Float[Tensor, ""] | Float[Tensor, "batch *space"]:
        """The loss of a batch.

        Args:
            logits: scores of the classes, in two or three dimensions of space.
            targets: a class for every pixel or voxel.

        Raises:
            TypeError: if a dtype is wrong (`logits` floating point, `targets` int64).
            ValueError: if shapes do not fit, the batch is empty, or a label is neither a class nor `ignore_index`.
        """
        logits = _checked(logits, targets, self.num_classes)
        wanted = neighborhood_proportions(
            targets,
            self.num_classes,
            kernel_size=self.kernel_size,
            kernel=self.kernel,
            sigma=self.sigma,
            padding=self.padding,
            ignore_index=self.ignore_index,
        )
        gap = wanted - (logits if self.on == "logits" else logits.softmax(1))
        penalty = (gap.abs() if self.distance == "l1" else gap.square()).mean(1)
        fit = F.cross_entropy(logits, targets, ignore_index=self.ignore_index, reduction="none")
        return _reduced(fit + self.alpha * penalty, targets != self.ignore_index, self.reduction)


class SVLSLoss(nn.Module):
    """Cross-entropy with spatially varying label smoothing, called as `loss(logits, targets)`.

    A pixel's label keeps half of the mass, and the labels around it share the other half by a Gaussian. NACL's authors
    show that this is cross-entropy with a constraint on class proportions whose weight cannot be chosen.

    Args:
        num_classes: number of classes.
        kernel_size: side of the window, odd; more than 1, or nothing is smoothed.
        sigma: width of the Gaussian, in pixels.
        padding: what lies outside the image, see `neighborhood_proportions`.
        ignore_index: pixels of this label have no loss and lend no mass.
        reduction: "mean" (over the pixels that are not ignored), "sum", or "none" for a value per pixel.

    Raises:
        TypeError: if a number is not of its type.
        ValueError: if an option is out of range or unknown.

    Example:
        >>> loss = SVLSLoss(num_classes=2)
        >>> loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64))  # log(2)
        tensor(0.6931)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        kernel_size: int = 3,
        sigma: float = 1.0,
        padding: Padding = "replicate",
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_options(num_classes, kernel_size, "gaussian", sigma, padding)
        check_reduction(reduction)
        if not isinstance(ignore_index, int | Integral):
            raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
        self.num_classes = num_classes
        self.kernel_size = kernel_size
        self.sigma = sigma
        self.padding: Padding = padding
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(
        self, logits: Float[Tensor, "batch classes *space"], targets: Int[Tensor, "batch *space"]
    ) -> Float[Tensor, ""] | Float[Tensor, "batch *space"]:
        """The loss of a batch; arguments and errors are those of `NACLLoss.forward`."""
        logits = _checked(logits, targets, self.num_classes)
        soft = neighborhood_proportions(
            targets,
            self.num_classes,
            kernel_size=self.kernel_size,
            kernel="gaussian",
            sigma=self.sigma,
            padding=self.padding,
            ignore_index=self.ignore_index,
        )
        return _reduced(-(soft * logits.log_softmax(1)).sum(1), targets != self.ignore_index, self.reduction)


def _check_options(num_classes: int, kernel_size: int, kernel: str, sigma: float, padding: str) -> None:
    integer("num_classes", num_classes)
    if integer("kernel_size", kernel_size) % 2 == 0:
        raise ValueError(f"kernel_size must be odd, so that a window has a centre, got {kernel_size}")
    # A narrower Gaussian is zero beside its centre, and its shares could not be told.
    if number("sigma", sigma) < 0.25:
        raise ValueError(f"sigma must be at least 0.25 pixels, got {sigma}")
    one_of("kernel", kernel, get_args(Kernel))
    one_of("padding", padding, get_args(Padding))


def _checked(logits: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    logits = checked_maps(logits, targets)
    if logits.shape[1] != num_classes:
        raise ValueError(f"logits must have num_classes={num_classes} classes, got {logits.shape[1]}")
    return logits


def _reduced(values: Tensor, counted: Tensor, reduction: Reduction) -> Tensor:
    values = torch.where(counted, values, torch.zeros((), dtype=values.dtype, device=values.device))
    if reduction == "none":
        return values
    total = values.sum()
    # Where every pixel is ignored the loss is zero, and not 0 / 0.
    return total if reduction == "sum" else total / counted.sum().clamp_min(1)
