r"""Importance weights of samples from a proposal: the bound on a likelihood, and how many samples they are worth.

For log-ratios $\ell_k = \log p(x, z_k) - \log q(z_k \mid x)$ of $K$ samples,

$$
\log p(x) \ge E\Bigl[\log \tfrac1K \sum_k e^{\ell_k}\Bigr], \qquad w_k = \frac{e^{\ell_k}}{\sum_j e^{\ell_j}},
\qquad \mathrm{ESS} = \frac{1}{\sum_k w_k^2},
$$

and the bound tightens with $K$; $K = 1$ is the evidence lower bound.

Reference: Yuri Burda, Roger Grosse and Ruslan Salakhutdinov, "Importance Weighted Autoencoders", ICLR 2016, arXiv
1509.00519.
"""

from __future__ import annotations

import math
from numbers import Integral

from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import floating_tensor


def log_mean_exp(values: Float[Tensor, "..."], dim: int = 0) -> Float[Tensor, "..."]:
    """The logarithm of the mean of exponentials along a dimension, without overflow.

    Raises:
        TypeError: `values` is no floating-point tensor, or `dim` no integer.
        ValueError: there is nothing along the dimension.

    Example:
        >>> import torch
        >>> log_mean_exp(torch.tensor([1000.0, 1000.0]))
        tensor(1000.)
    """
    if not isinstance(dim, int | Integral):
        raise TypeError(f"dim must be an integer, got {dim!r}")
    if isinstance(values, Tensor) and values.ndim and not values.shape[dim]:
        raise ValueError(f"values must be at least one along dimension {dim}, got shape {tuple(values.shape)}")
    values = floating_tensor("values", values)
    return values.logsumexp(dim) - math.log(values.shape[dim])


def importance_weights(log_ratios: Float[Tensor, "..."], dim: int = 0) -> Float[Tensor, "..."]:
    """Self-normalised weights: they sum to one along the dimension of the samples.

    Raises:
        TypeError: `log_ratios` is no floating-point tensor.

    Example:
        >>> import torch
        >>> importance_weights(torch.tensor([0.0, 0.0, 0.0, 0.0]))
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    return floating_tensor("log_ratios", log_ratios).softmax(dim)


def effective_sample_size(log_ratios: Float[Tensor, "..."], dim: int = 0) -> Float[Tensor, "..."]:
    """How many equally weighted samples the weighted ones are worth, from 1 to their number.

    Raises:
        TypeError: `log_ratios` is no floating-point tensor, or `dim` no integer.
        ValueError: there is nothing along the dimension.

    Example:
        >>> import torch
        >>> effective_sample_size(torch.zeros(4)), effective_sample_size(torch.tensor([0.0, -100.0]))
        (tensor(4.), tensor(1.))
    """
    if not isinstance(dim, int | Integral):
        raise TypeError(f"dim must be an integer, got {dim!r}")
    if isinstance(log_ratios, Tensor) and log_ratios.ndim and not log_ratios.shape[dim]:
        raise ValueError(f"log_ratios must be at least one along dimension {dim}, got shape {tuple(log_ratios.shape)}")
    return 1 / importance_weights(log_ratios, dim).square().sum(dim)
