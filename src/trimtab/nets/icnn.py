"""Input-convex networks, whose gradients are monotone maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class InputConvexNet(nn.Module):
    r"""A function that is strongly convex in its input: $\frac{1}{2}\lVert x \rVert^2$ plus an input-convex network.

    Weights between hidden layers are kept positive by a softplus, every layer also sees the input, and activations are
    softplus, convex and smooth. From Amos, Xu and Kolter, "Input Convex Neural Networks", ICML 2017, arXiv 1609.07152.

    Args:
        dim: of the input.
        hidden: widths of the layers.

    Example:
        >>> InputConvexNet(2)(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    def __init__(self, dim: int, hidden: Sequence[int] = (64, 64, 64)) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(nn.Linear(dim, width) for width in (*hidden, 1))
        # Positive weights add up: this start keeps the mean of a layer's output about that of its input.
        widths = list(zip(hidden, (*hidden[1:], 1), strict=True))
        self.between = nn.ParameterList(
            torch.randn(after, before) * 0.1 + torch.tensor(1 / before).expm1().log() for before, after in widths
        )

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """The function's values."""
        z: Tensor = F.softplus(self.inputs[0](x))
        for layer, weight in zip(list(self.inputs)[1:-1], list(self.between)[:-1], strict=True):
            z = F.softplus(layer(x) + F.linear(z, F.softplus(weight)))
        z = self.inputs[-1](x) + F.linear(z, F.softplus(self.between[-1]))
        return z.squeeze(1) + x.square().sum(1) / 2


class ConvexGradient(nn.Module):
    """The gradient of an input-convex network as a map: by Brenier's theorem, optimal for squared distances.

    Example:
        >>> ConvexGradient(InputConvexNet(2))(torch.zeros(5, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(self, potential: InputConvexNet) -> None:
        super().__init__()
        self.potential = potential

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """The gradient at every point; differentiable in the parameters."""
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.potential(at).sum(), at, create_graph=True)
        return gradient
