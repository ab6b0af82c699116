r"""The style of an image or a feature map: the mean and the deviation of each channel.

$$
\mu_{nc} = \operatorname{mean}_{hw} x, \qquad \sigma_{nc} = \sqrt{\operatorname{var}_{hw} x + \varepsilon}, \qquad
x' = \frac{x - \mu}{\sigma}\, \sigma' + \mu'
$$

keeps what is shown and changes how it looks. The variance is the unbiased one; statistics are taken in float32 at
least.
"""

from __future__ import annotations

from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import floating_tensor, real_problem

Statistics = Float[Tensor, "batch channels 1 1"]


def instance_statistics(
    x: Float[Tensor, "batch channels height width"], eps: float = 1e-6
) -> tuple[Statistics, Statistics]:
    """Mean and deviation of each channel of each sample, over its pixels; differentiable.

    Args:
        x: images or feature maps of at least two pixels.
        eps: added to the variance.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: `x` is not (batch, channels, height, width), or of fewer than two pixels, or `eps` is negative.

    Example:
        >>> mean, std = instance_statistics(torch.tensor([[[[1.0, 3.0]]]]), eps=0.0)
        >>> mean.item(), round(std.item(), 4)
        (2.0, 1.4142)
    """
    x = _checked(x)
    if not (isinstance(eps, float | Real) and 0 <= eps < torch.inf):
        raise ValueError(f"eps must be at least 0 and finite, got {eps!r}")
    variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True)
    return mean, (variance + eps).sqrt()


def standardize(x: Float[Tensor, "batch channels height width"], eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """What is left of `x` without its style, and the style: `(x - mean) / std`, mean, std.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: `x` is not (batch, channels, height, width), or of fewer than two pixels.

    Example:
        >>> content, mean, std = standardize(torch.rand(2, 3, 4, 4))
        >>> torch.allclose(restyle(content, mean, std).mean((2, 3), keepdim=True), mean)
        True
    """
    mean, std = instance_statistics(x, eps)
    return (x - mean) / std, mean, std


def restyle(content: Float[Tensor, "batch channels height width"], mean: Statistics, std: Statistics) -> Tensor:
    """Content in a style: `content * std + mean`.

    Raises:
        TypeError: an argument is no real tensor.
        ValueError: there is not one mean and one deviation for each channel of each sample.

    Example:
        >>> restyle(torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1, 1), 3.0), torch.ones(1, 1, 1, 1))
        tensor([[[[3., 3.]]]])
    """
    if problem := real_problem(content=content, mean=mean, std=std):
        raise TypeError(problem)
    if content.ndim != 4 or not mean.shape == std.shape == (*content.shape[:2], 1, 1):
        raise ValueError(
            "content, mean and std must be (batch, channels, height, width) and twice (batch, channels, 1, 1), got "
            f"{tuple(content.shape)}, {tuple(mean.shape)} and {tuple(std.shape)}"
        )
    return content * std + mean


def _checked(x: Tensor) -> Tensor:
    x = floating_tensor("x", x)
    if x.ndim != 4 or x.shape[2] * x.shape[3] < 2:
        raise ValueError(
            f"x must have shape (batch, channels, height, width) with at least two pixels, got {tuple(x.shape)}"
        )
    return x
