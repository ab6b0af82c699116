"""Series with holes: observed values are hidden, the last one kept is found, and holes are filled by a sample."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.ops.arguments import in_range, real_problem, same_shape

_LOOKED_BACK = 2**13  # entries at a time, so that nothing leaves the cache


def obs_dropout(
    mask: Bool[Tensor, "*batch steps features"],
    rate: float,
    *,
    keep: Bool[Tensor, "*batch steps features"] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Bool[Tensor, "*batch steps features"], Float[Tensor, " *batch"]]:
    """Hide each observed value with probability `rate`.

    Args:
        mask: what is observed.
        rate: rho, in [0, 1).
        keep: the draw itself, true where a value would stay.
        generator: draws `keep` otherwise.

    Returns:
        What stays visible, and the log-probability of the draw, summed over the values that were observed.

    Raises:
        TypeError: `mask` is not boolean.
        ValueError: `rate` is outside [0, 1), or `keep` has another shape.

    Example:
        >>> mask = torch.tensor([[True, True, False]])
        >>> visible, log_prob = obs_dropout(mask, 0.25, keep=torch.tensor([[True, False, False]]))
        >>> visible, log_prob  # log 0.75 + log 0.25
        (tensor([[ True, False, False]]), tensor(-1.6740))
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    in_range("rate", rate, 0, 1, "left")
    if keep is None:
        keep = torch.rand(mask.shape, generator=generator, device=mask.device) >= rate
    same_shape("keep", keep, "mask", mask)
    kept, hidden = (mask & keep).sum((-2, -1)), (mask & ~keep).sum((-2, -1))
    log_prob = kept * math.log1p(-rate) + (hidden * math.log(rate) if rate else 0.0)
    return mask & keep, log_prob


def last_observed(
    x: Float[Tensor, "*batch steps features"],
    mask: Bool[Tensor, "*batch steps features"],
    times: Float[Tensor, " steps"],
) -> tuple[Float[Tensor, "*batch steps features"], Float[Tensor, "*batch steps features"]]:
    """The last value observed at or before each step, and how long ago that was.

    Args:
        x: values; what is not observed is not read.
        mask: what is observed.
        times: of the steps, rising.

    Returns:
        Values and elapsed times; before a feature's first value, 0 and the time itself.

    Raises:
        TypeError: `x` or `times` is no real tensor, or `mask` not a boolean one.
        ValueError: the shapes differ.

    Example:
        >>> values, elapsed = last_observed(
        ...     torch.tensor([[5.0], [0.0], [7.0]]), torch.tensor([[True], [False], [True]]), torch.arange(3.0)
        ... )
        >>> values[:, 0], elapsed[:, 0]
        (tensor([5., 5., 7.]), tensor([0., 1., 0.]))
    """
    if not isinstance(x, Tensor) or not isinstance(times, Tensor):
        raise TypeError(f"x and times must be tensors, got {type(x).__name__} and {type(times).__name__}")
    if problem := real_problem(x=x, times=times):
        raise TypeError(problem)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    same_shape("mask", mask, "x", x)
    if times.shape != x.shape[-2:-1]:
        raise ValueError(f"times must be of shape {tuple(x.shape[-2:-1])}, one a step, got shape {tuple(times.shape)}")
    flat, observed = x.reshape(-1, *x.shape[-2:]), mask.reshape(-1, *x.shape[-2:])
    at_once = max(1, _LOOKED_BACK // max(1, flat[:1].numel())) if x.device.type == "cpu" else max(1, len(flat))
    pieces = zip(flat.split(at_once), observed.split(at_once), strict=True)
    values, when = (torch.cat(parts) for parts in zip(*(_look_back(*piece, times) for piece in pieces), strict=True))
    return values.view_as(x), (times[:, None] - when).view_as(x)


def _look_back(x: Tensor, mask: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """The last values observed and their times; zeros before the first."""
    # Steps are counted from 1, so that 0 says that nothing has been seen yet. Along the last dimension a running
    # maximum is several times faster.
    counted = torch.arange(1, x.shape[-2] + 1, device=x.device)
    at = (mask.mT.contiguous() * counted).cummax(-1).values.mT.contiguous()
    when = torch.cat([times.new_zeros(1), times]).index_select(0, at.flatten()).view_as(at)
    return torch.where(at > 0, x.gather(-2, at.sub(1).clamp_min_(0)), 0), when


def decay_impute(
    x: Float[Tensor, "*batch steps features"],
    mask: Bool[Tensor, "*batch steps features"],
    sample: Float[Tensor, "*batch steps features"],
    times: Float[Tensor, " steps"],
    weight: Float[Tensor, " features"],
    bias: Float[Tensor, " features"],
) -> Float[Tensor, "*batch steps features"]:
    r"""Fill holes by a sample that is blended with the last value observed.

    The share of the last value is $\gamma = \exp(-\max(0, w\,\delta + b))$ with $\delta$ the time since.

    Args:
        x: values; what is not observed is not read.
        mask: what is observed, and stays as it is.
        sample: generated values.
        times: of the steps.
        weight, bias: w and b of each feature.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> x, mask = torch.tensor([[4.0], [0.0]]), torch.tensor([[True], [False]])
        >>> decay_impute(x, mask, torch.zeros(2, 1), torch.arange(2.0), torch.ones(1), torch.zeros(1))[:, 0]
        tensor([4.0000, 1.4715])
    """
    if problem := real_problem(x=x, sample=sample, times=times, weight=weight, bias=bias):
        raise TypeError(problem)
    same_shape("sample", sample, "x", x)
    last, elapsed = last_observed(x, mask, times)
    share = (-(weight * elapsed + bias).relu()).exp()
    return torch.where(mask, x, (share * last).add_((1 - share) * sample))
