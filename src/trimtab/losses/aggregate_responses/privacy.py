"""Bag means that keep the labels private."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.losses.aggregate_responses.bags import bag_sizes
from trimtab.ops.arguments import finite_tensor, positive, tensor


def private_bag_means(
    y: Float[Tensor, " n"],
    bag_index: Int[Tensor, " n"],
    *,
    bound: float,
    epsilon: float,
    generator: torch.Generator | None = None,
    noise: Float[Tensor, " bags"] | None = None,
) -> Float[Tensor, " bags"]:
    r"""Bag means that keep each response $\varepsilon$-differentially private (the labels, not the features).

    Responses are clipped to [-bound, bound], so that one of them moves its bag's mean by no more than `2 bound / k`;
    bags are disjoint, so that the privacy of one is the privacy of all. The noise is Laplace's with the scale
    `2 bound / (k epsilon)`. The paper's is half of that, for responses that move a mean by `bound / k` only; where they
    lie in [-bound, bound], as here, it keeps no more than `2 epsilon`. As every mechanism on floating-point numbers
    it is not hardened against attacks on their last digits.

    Args:
        y: responses; a tensor or an array.
        bag_index: bag of each, in [0, bags), every bag with at least one; it must not depend on `y`.
        bound: largest absolute response that is kept, positive; the paper takes it of the order of sqrt(log n).
        epsilon: privacy, positive; smaller is stricter.
        generator: of the noise.
        noise: (bags,) draws of the Laplace distribution with scale 1, in place of drawing them.

    Raises:
        TypeError: if `y` is not floating point or `bag_index` not int64.
        ValueError: if shapes do not fit, a response is not finite, a bag is empty, or `bound` or `epsilon` is not
            positive.

    Example:
        >>> y, bag_index = torch.tensor([1.0, 2.0, 9.0, 0.0]), torch.tensor([0, 0, 1, 1])
        >>> private_bag_means(y, bag_index, bound=5.0, epsilon=1.0, noise=torch.tensor([0.0, 0.1]))
        tensor([1.5000, 3.0000])
    """
    bound, epsilon = positive("bound", bound), positive("epsilon", epsilon)
    y, bag_index = finite_tensor("y", y, ndim=1, floating=True), tensor("bag_index", bag_index)
    if not len(y):
        raise ValueError("y must hold at least one response, got none")
    sizes = torch.from_numpy(bag_sizes(bag_index.cpu().numpy(), len(y))).to(y)
    if noise is None:
        uniform = torch.rand(2, len(sizes), generator=generator, dtype=torch.float64).clamp_min(1e-300)
        noise = (uniform[0] / uniform[1]).log().to(y)  # the difference of two exponential draws
    noise = finite_tensor("noise", noise)
    if noise.shape != sizes.shape:
        raise ValueError(f"noise must be {tuple(sizes.shape)}, one draw a bag, got shape {tuple(noise.shape)}")
    sums = torch.zeros_like(sizes).index_add(0, bag_index.to(y.device), y.clamp(-bound, bound))
    return (sums + 2 * bound / epsilon * noise) / sizes
