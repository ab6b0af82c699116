"""How many samples of known and of novel classes are right, under one match of predictions and classes."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Int
from torch import Tensor

from trimtab.ops.arguments import tensor as read_tensor
from trimtab.ops.cluster_scores import matched_classes
from trimtab.semisup.legogcd.terms import check_mask


@dataclass(frozen=True)
class GCDAccuracy:
    """Shares of right samples under one match of predictions and classes.

    Attributes:
        all: of all samples.
        known: of those of known classes; NaN without any.
        novel: of the others; NaN without any.
    """

    all: float
    known: float
    novel: float


def gcd_accuracy(targets: Int[Tensor, " n"], predicted: Int[Tensor, " n"], known: Bool[Tensor, " n"]) -> GCDAccuracy:
    """How many samples are right, of known and of novel classes, under the one best match over all of them.

    Args:
        targets: true classes.
        predicted: predicted ones, whose names mean nothing.
        known: which samples are of known classes.

    Raises:
        TypeError: if `targets` or `predicted` are no integers, or `known` is not boolean.
        ValueError: if lengths differ, or there are no samples.

    Example:
        >>> import torch
        >>> targets, predicted = torch.tensor([0, 0, 1, 1]), torch.tensor([5, 5, 7, 5])
        >>> gcd_accuracy(targets, predicted, targets < 1)
        GCDAccuracy(all=0.75, known=1.0, novel=0.5)
    """
    found = matched_classes(targets, predicted)
    right = (found == read_tensor("targets", targets).cpu()).double()
    known = read_tensor("known", known).cpu()
    check_mask("known", known, len(right))
    return GCDAccuracy(float(right.mean()), float(right[known].mean()), float(right[~known].mean()))
