"""What trains on pseudo-labels: their cross-entropy, and opposite regularisers where there are some and none."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.domain.hiast.selection import kept_pixels
from trimtab.losses.segmentation import checked_maps
from trimtab.ops.arguments import (
    floating_tensor,
    integer,
    non_negative,
    one_of,
    same_shape,
)

Region = Literal["kept", "ignored"]


@dataclass(frozen=True)
class RegionTerms:
    """The two regularisers of a batch.

    Attributes:
        kld: in the kept region, the cross-entropy of the network's predictions against uniform ones.
        entropy: of the predictions in the ignored region.
    """

    kld: Tensor
    entropy: Tensor


def region_regularization(
    logits: Float[Tensor, "batch classes height width"],
    labels: Int[Tensor, "batch height width"],
    ignore_index: int = 255,
) -> RegionTerms:
    """What smooths predictions where there are pseudo-labels, and what sharpens them where there are none.

    Args:
        logits: scores of the classes for every pixel.
        labels: pseudo-labels, `ignore_index` where a pixel was not kept.
        ignore_index: that label.

    Returns:
        Means over the pixels of a region, divided by the number of classes as in the authors' code; 0 for a region
        without pixels.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes do not fit, there is no pixel, or a label is out of range.

    Example:
        >>> terms = region_regularization(torch.zeros(1, 4, 1, 2), torch.tensor([[[3, 255]]]))
        >>> round(terms.kld.item(), 4), round(terms.entropy.item(), 4)  # log(4) / 4
        (0.3466, 0.3466)
    """
    logits, kept = _regions(logits, labels, ignore_index)
    log_probs = logits.log_softmax(1)
    smooth, sharp = -log_probs.mean(1), -(log_probs.exp() * log_probs).sum(1)
    num_classes = logits.shape[1]
    return RegionTerms(_mean_where(smooth, kept) / num_classes, _mean_where(sharp, ~kept) / num_classes)


def region_soft_cross_entropy(
    logits: Float[Tensor, "batch classes height width"],
    target_probs: Float[Tensor, "batch classes height width"],
    labels: Int[Tensor, "batch height width"],
    *,
    region: Region = "ignored",
    ignore_index: int = 255,
) -> Tensor:
    """Cross-entropy against a teacher's probabilities in one region.

    Args:
        logits: scores of the classes for every pixel.
        target_probs: the teacher's; constants for the gradient.
        labels: pseudo-labels, which make the regions.
        region: "ignored" pixels or "kept" ones.
        ignore_index: label of the ignored ones.

    Returns:
        The mean over the region's pixels, divided by the number of classes; 0 where it has none.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes do not fit, there is no pixel, `region` is unknown or a label out of range.

    Example:
        >>> target = torch.tensor([[0.25, 0.75]]).view(1, 2, 1, 1)
        >>> value = region_soft_cross_entropy(torch.zeros(1, 2, 1, 1), target, torch.tensor([[[255]]]))
        >>> round(value.item(), 4)  # log(2) / 2
        0.3466
    """
    one_of("region", region, get_args(Region))
    logits, kept = _regions(logits, labels, ignore_index)
    target_probs = floating_tensor("target_probs", target_probs)
    same_shape("target_probs", target_probs, "logits", logits)
    pixels = -(target_probs.detach().to(logits) * logits.log_softmax(1)).sum(1)
    return _mean_where(pixels, kept if region == "kept" else ~kept) / logits.shape[1]


class HIASTLoss(nn.Module):
    """Cross-entropy on pseudo-labels with region-adaptive regularisation and, given a teacher's view, consistency.

    Args:
        kld_weight: of the smoothing of the kept region.
        entropy_weight: of the sharpening of the ignored region.
        consistency_weight: of the teacher's word in the ignored region.
        ignore_index: label of the ignored region.

    Raises:
        ValueError: a weight is negative.

    Example:
        >>> loss = HIASTLoss()
        >>> labels = torch.tensor([[[1, 255]]])
        >>> student, teacher = torch.zeros(1, 2, 1, 2), torch.full((1, 2, 1, 2), 0.5)
        >>> round(loss(student, labels, teacher).item(), 4)  # log(2) (1 + (0.1 + 1 + 0.5) / 2)
        1.2477
    """

    def __init__(
        self,
        *,
        kld_weight: float = 0.1,
        entropy_weight: float = 1.0,
        consistency_weight: float = 0.5,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.kld_weight = non_negative("kld_weight", kld_weight)
        self.entropy_weight = non_negative("entropy_weight", entropy_weight)
        self.consistency_weight = non_negative("consistency_weight", consistency_weight)
        self.ignore_index = integer("ignore_index", ignore_index, None)

    def forward(
        self,
        logits: Float[Tensor, "batch classes height width"],
        labels: Int[Tensor, "batch height width"],
        teacher_probs: Float[Tensor, "batch classes height width"] | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            logits: scores of the classes for every pixel, of the stronger view.
            labels: pseudo-labels with ignored pixels.
            teacher_probs: an averaged network's probabilities of a weaker view; without them there is no consistency.

        Raises:
            TypeError: a dtype is wrong.
            ValueError: shapes do not fit, there is no pixel, or a label is out of range.
        """
        logits, kept = _regions(logits, labels, self.ignore_index)
        if teacher_probs is not None:
            floating_tensor("teacher_probs", teacher_probs)
            same_shape("teacher_probs", teacher_probs, "logits", logits)
        entropy = F.cross_entropy(logits, torch.where(kept, labels, 0), reduction="none")
        terms = region_regularization(logits, labels, self.ignore_index)
        value = _mean_where(entropy, kept) + self.kld_weight * terms.kld + self.entropy_weight * terms.entropy
        if teacher_probs is None:
            return value
        word = region_soft_cross_entropy(logits, teacher_probs, labels, ignore_index=self.ignore_index)
        return value + self.consistency_weight * word


def _regions(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The logits, in float32 at least, and which pixels are kept."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int | Integral):
        raise TypeError(f"ignore_index must be an integer, got {type(ignore_index).__name__}")
    logits = checked_maps(logits, labels, names=("logits", "labels"))
    return logits, kept_pixels(labels, logits.shape[1], ignore_index)


def _mean_where(values: Tensor, region: Tensor) -> Tensor:
    """The mean over a region, 0 where that is empty, without a look at how large it is."""
    return torch.where(region, values, 0.0).sum() / region.sum().clamp(min=1)
