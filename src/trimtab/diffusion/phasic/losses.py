"""What is learnt at which time, and the losses of features and of style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.diffusion.phasic.content import phase_gate
from trimtab.ops.arguments import finite_tensor, floating_tensor, one_of, positive, real_problem, same_shape

Form = Literal["paper", "code"]


class PhasicWeights(NamedTuple):
    """Weights at some times.

    Attributes:
        transfer: of the losses of content and style.
        target: of denoising the few target images.
    """

    transfer: Float[Tensor, "*shape"]
    target: Float[Tensor, "*shape"]


def phasic_weights(
    t: Float[Tensor, "*shape"],
    form: Form = "paper",
    *,
    total: float = 1000.0,
    t_switch: float = 300.0,
    alpha: float = 1.0,
    base: float = 20.0,
) -> PhasicWeights:
    """What is learnt at a time.

    Args:
        t: times, in steps of 0 to `total`.
        form: `paper` is m(t) (1 - w(t)) and w(t), w(t) = 1 - (t / total)^alpha; `code` the release's base^(t / total)
            and base^0.9 - base^(t / total), which is negative beyond nine tenths: the release trains below eight.
        total: number of steps.
        t_switch: where the gate m is a half; of the paper's form.
        alpha: exponent of the paper's form.
        base: of the release's.

    Raises:
        TypeError: `t` is a NumPy array or complex.
        ValueError: an argument is out of its range.

    Example:
        >>> phasic_weights(torch.tensor([0.0, 600.0, 1000.0])).target
        tensor([1.0000, 0.4000, 0.0000])
    """
    if problem := real_problem(t=t):
        raise TypeError(problem)
    if not 0 < base < math.inf:
        raise ValueError(f"base must be positive and finite, got {base}")
    one_of("form", form, get_args(Form))
    share = t / positive("total", total)
    if form == "code":
        grown = positive("base", base) ** share
        return PhasicWeights(grown, base**0.9 - grown)
    kept = share ** positive("alpha", alpha)
    return PhasicWeights(phase_gate(t, t_switch) * kept, 1 - kept)


class DirectionalDistributionLoss(nn.Module):
    """The squared distance of features from those of their source moved in the one direction of the domains.

    Args:
        direction: from the source's mean feature to the target's, shape (dim,).
        reduction: `mean` over the batch, or `none`; over the numbers of a feature it is always a mean.

    Raises:
        ValueError: `direction` is no finite vector, or for another `reduction`.

    Example:
        >>> loss = DirectionalDistributionLoss(torch.tensor([1.0, 0.0]))
        >>> loss(torch.tensor([[3.0, 2.0]]), torch.tensor([[2.0, 1.0]]))
        tensor(0.5000)
    """

    direction: Float[Tensor, " dim"]

    def __init__(self, direction: Float[Tensor, " dim"], *, reduction: Literal["mean", "none"] = "mean") -> None:
        super().__init__()
        direction = finite_tensor("direction", direction, ndim=1, floating=True)
        self.register_buffer("direction", direction.detach().clone())
        self.reduction = one_of("reduction", reduction, ("mean", "none"))

    @classmethod
    def between(
        cls,
        source: Float[Tensor, "n dim"],
        target: Float[Tensor, "m dim"],
        *,
        reduction: Literal["mean", "none"] = "mean",
    ) -> DirectionalDistributionLoss:
        """With the direction between the means of features of two sets."""
        return cls(target.mean(0) - source.mean(0), reduction=reduction)

    def forward(self, features: Float[Tensor, "batch dim"], source_features: Float[Tensor, "batch dim"]) -> Tensor:
        """The loss of features of generated images and of the images that they come from.

        Raises:
            ValueError: the batch is empty, or the shapes do not agree.
        """
        features = floating_tensor("features", features)
        source_features = floating_tensor("source_features", source_features)
        same_shape("source_features", source_features, "features", features)
        if features.ndim != 2 or features.shape[1:] != self.direction.shape or not len(features):
            wanted = f"(batch, {len(self.direction)}) with at least one sample"
            raise ValueError(f"features must have shape {wanted}, got {tuple(features.shape)}")
        error = (features - source_features - self.direction).square().mean(1)
        return error.mean() if self.reduction == "mean" else error


def gram_style_loss(
    maps: Sequence[Float[Tensor, "batch channels height width"]],
    style: Sequence[Float[Tensor, "shots channels height width"]],
) -> Float[Tensor, " batch"]:
    """The squared distance of Gram matrices of feature maps to those of the style images, a mean over these and layers.

    Gatys et al., "Image Style Transfer Using Convolutional Neural Networks", CVPR 2016.

    Args:
        maps: of generated images, layer by layer.
        style: of the few target images, likewise.

    Raises:
        ValueError: there is no layer, or not as many of both.

    Example:
        >>> ones = torch.ones(2, 3, 4, 4)
        >>> gram_style_loss([ones], [2 * ones])  # Gram matrices of ones and of fours
        tensor([9., 9.])
    """
    if not len(maps) or len(maps) != len(style):
        raise ValueError(f"maps and style must be as many layers, at least one, got {len(maps)} and {len(style)}")
    pairs = zip(map(_gram, maps), map(_gram, style), strict=True)
    parts = [(made[:, None] - wanted).square().mean((1, 2, 3)) for made, wanted in pairs]
    return torch.stack(parts).mean(0)


def _gram(maps: Tensor) -> Tensor:
    flat = maps.flatten(2)
    return flat @ flat.mT / flat.shape[2]
