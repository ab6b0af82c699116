"""The losses between bags' responses and their members' predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.losses.aggregate_responses.bags import Weighting
from trimtab.ops.arguments import class_indices, floating_tensor, in_range, indices, one_of

Elementwise = Callable[[Tensor, Tensor], Tensor]
Loss = Literal["mse", "bce"] | Elementwise


def bag_level_loss(
    pred: Float[Tensor, " batch"],
    bag_target: Float[Tensor, " bags"],
    bag_index: Int[Tensor, " batch"],
    *,
    loss: Loss = "mse",
    weighting: Weighting = "bag",
) -> Float[Tensor, ""]:
    """The loss between bags' responses and the means of their members' predictions.

    Args:
        pred: predictions; logits for "bce".
        bag_target: mean responses of the bags; for "bce" shares of positives, in [0, 1].
        bag_index: bag of each sample, in [0, bags). A batch should hold bags whole; those without a member in it do
            not count.
        loss: "mse" for the squared error, "bce" for cross-entropy with the mean of the members' probabilities (not of
            their logits), or a function of predictions and targets, both (n,), that returns losses (n,).
        weighting: whether each "bag" counts alike or each "sample", so that bags count by their size.

    Raises:
        TypeError: if a dtype is wrong (`pred` and `bag_target` floating point, `bag_index` int64).
        ValueError: if shapes do not fit, a batch is empty, a bag is out of range, or `loss` or `weighting` is unknown.

    Example:
        >>> pred, bag_index = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1])
        >>> bag_level_loss(pred, torch.tensor([3.0, 5.0]), bag_index)
        tensor(0.5000)
    """
    pred = _checked(pred, bag_target, bag_index, loss, weighting)
    sizes, weights = _weights(bag_target, bag_index, weighting, pred.dtype)
    target = bag_target.to(pred.dtype)
    if loss == "bce":
        log_right = _log_mean_exp(F.logsigmoid(pred), bag_index, sizes)
        log_wrong = _log_mean_exp(F.logsigmoid(-pred), bag_index, sizes)
        values = -target * log_right - (1 - target) * log_wrong
    else:
        means = torch.zeros_like(target).scatter_add(0, bag_index, pred) / sizes.clamp_min(1)
        values = _elementwise(loss)(means, target)
    # A bag without members may have a response, or a loss, that is no number.
    return _inner(weights, torch.where(weights > 0, values, 0.0))


def instance_level_loss(
    pred: Float[Tensor, " batch"],
    bag_target: Float[Tensor, " bags"],
    bag_index: Int[Tensor, " batch"],
    *,
    loss: Loss = "mse",
    weighting: Weighting = "bag",
) -> Float[Tensor, ""]:
    """The loss between each sample's prediction and its bag's response; arguments are those of `bag_level_loss`.

    Example:
        >>> pred, bag_index = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1])
        >>> instance_level_loss(pred, torch.tensor([3.0, 5.0]), bag_index)  # the variance within bags is 1 and 0
        tensor(1.)
    """
    pred = _checked(pred, bag_target, bag_index, loss, weighting)
    sizes, weights = _weights(bag_target, bag_index, weighting, pred.dtype)
    values = _elementwise(loss)(pred, bag_target.to(pred.dtype).index_select(0, bag_index))
    return _inner((weights / sizes.clamp_min(1)).index_select(0, bag_index), values)


class AggregateLoss(nn.Module):
    """The interpolating loss, called as `loss(pred, bag_target, bag_index)`.

    Args:
        rho: weight of the instance-level loss, in [0, 1]: 0 is the bag-level loss alone.
        loss: "mse", "bce" (predictions are logits) or an elementwise function, see `bag_level_loss`.
        weighting: whether each "bag" counts alike or each "sample".

    Raises:
        ValueError: if `rho` is outside [0, 1], or `loss` or `weighting` is unknown.

    Example:
        >>> loss = AggregateLoss(rho=0.5, loss="bce")
        >>> loss(torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.5, 1.0]), torch.tensor([0, 0, 1]))
        tensor(0.6931)
    """

    def __init__(self, rho: float, loss: Loss = "mse", weighting: Weighting = "bag") -> None:
        super().__init__()
        _check_kind(loss, weighting)
        self.rho = in_range("rho", rho, 0, 1)
        self.loss: Loss = loss
        self.weighting: Weighting = weighting

    def forward(
        self,
        pred: Float[Tensor, " batch"],
        bag_target: Float[Tensor, " bags"],
        bag_index: Int[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        """The loss of a batch of whole bags.

        Raises:
            TypeError: if a dtype is wrong.
            ValueError: if shapes do not fit, the batch is empty or a bag is out of range.
        """
        pred = floating_tensor("pred", pred)
        value = pred.new_zeros(())
        for weight, part in ((1 - self.rho, bag_level_loss), (self.rho, instance_level_loss)):
            if weight:
                value = value + weight * part(pred, bag_target, bag_index, loss=self.loss, weighting=self.weighting)
        return value


def _checked(pred: Tensor, bag_target: Tensor, bag_index: Tensor, loss: Loss, weighting: str) -> Tensor:
    """The predictions, in float32 where they came in half precision."""
    pred = floating_tensor("pred", pred)
    for name, values in (("pred", pred), ("bag_target", floating_tensor("bag_target", bag_target))):
        if values.ndim != 1 or not len(values):
            raise ValueError(f"{name} must be a vector with at least one entry, got shape {tuple(values.shape)}")
    class_indices("bag_index", bag_index)
    if bag_index.shape != pred.shape:
        raise ValueError(f"bag_index must be of shape {tuple(pred.shape)} as pred, got {tuple(bag_index.shape)}")
    indices("bag_index", bag_index, len(bag_target))
    _check_kind(loss, weighting)
    return pred


def _check_kind(loss: Loss, weighting: str) -> None:
    if not callable(loss) and loss not in ("mse", "bce"):
        raise ValueError(f"loss must be 'mse', 'bce' or a function of predictions and targets, got {loss!r}")
    one_of("weighting", weighting, get_args(Weighting))


def _elementwise(loss: Loss) -> Elementwise:
    if callable(loss):
        return loss
    if loss == "bce":
        return lambda pred, target: F.binary_cross_entropy_with_logits(pred, target, reduction="none")
    return lambda pred, target: (pred - target).square()


def _inner(weights: Tensor, values: Tensor) -> Float[Tensor, ""]:
    # autocast would take the products, and the loss, in half precision
    with torch.autocast(values.device.type, enabled=False):
        return weights @ values


def _weights(
    bag_target: Tensor, bag_index: Tensor, weighting: Weighting, dtype: torch.dtype
) -> tuple[Float[Tensor, " bags"], Float[Tensor, " bags"]]:
    """Sizes of the bags, and their weights, which sum to one and are zero for bags without members."""
    sizes = torch.zeros(len(bag_target), dtype=dtype, device=bag_target.device)
    sizes = sizes.scatter_add(0, bag_index, torch.ones(len(bag_index), dtype=dtype, device=bag_index.device))
    counted = sizes if weighting == "sample" else (sizes > 0).to(dtype)
    return sizes, counted / counted.sum()


def _log_mean_exp(values: Tensor, bag_index: Tensor, sizes: Tensor) -> Float[Tensor, " bags"]:
    """Logarithm of the mean of `exp(values)` in each bag, zero for bags without members."""
    floor = torch.finfo(values.dtype).min
    largest = torch.full_like(sizes, floor).scatter_reduce(0, bag_index, values.detach(), "amax")
    total = torch.zeros_like(sizes).scatter_add(0, bag_index, (values - largest.index_select(0, bag_index)).exp())
    there = sizes > 0
    return torch.where(there, largest + torch.where(there, total / sizes.clamp_min(1), 1.0).log(), 0.0)
