"""Dropout whose rate differs from example to example, and is a hyper-parameter by name."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.arguments import looked_at, tensor_problem


def per_example_dropout(
    x: Float[Tensor, "batch ..."],
    p: Float[Tensor, " batch"],
    *,
    channels: bool = False,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
) -> Float[Tensor, "batch ..."]:
    """Dropout with a rate for each example: an entry is zeroed with probability p, and divided by 1 - p otherwise.

    Args:
        x: input.
        p: rates in [0, 1]. No gradient passes to them.
        channels: zero whole channels (dimension 1) at a time.
        generator: for the draws.
        uniform: numbers in [0, 1) to use in place of drawn ones, of the shape of `x` or, with `channels`, of its
            first two dimensions and ones; an entry is zeroed where its number is below the rate.

    Raises:
        TypeError: an argument is no real tensor.
        ValueError: `p` or `uniform` is not of the right shape or, on the CPU, a rate is not in [0, 1].

    Example:
        >>> per_example_dropout(torch.ones(2, 3), torch.tensor([0.0, 1.0]))
        tensor([[1., 1., 1.],
                [0., 0., 0.]])
    """
    if problem := tensor_problem(x=x, p=p, uniform=uniform):
        raise TypeError(problem)
    if p.shape != x.shape[:1]:
        raise ValueError(f"p must be of shape {tuple(x.shape[:1])}, one rate an example, got {tuple(p.shape)}")
    if looked_at(p) and not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p must be rates in [0, 1], got {p}")
    shape = (*x.shape[:2], *[1] * (x.dim() - 2)) if channels else tuple(x.shape)
    if uniform is None:
        uniform = torch.rand(shape, generator=generator, dtype=x.dtype, device=x.device)
    elif uniform.shape != shape:
        raise ValueError(f"uniform must be of shape {shape}, got {tuple(uniform.shape)}")
    rate = p.detach().to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    return x * (uniform >= rate) / torch.where(rate < 1, 1 - rate, 1)


class TunedDropout(nn.Module):
    """Dropout at the rate of a named hyper-parameter, which may differ between examples."""

    hparam: str
    rate: Tensor | None
    generator: torch.Generator | None
    channels = False

    def __init__(self, hparam: str) -> None:
        super().__init__()
        self.tune(hparam)

    def tune(self, hparam: str) -> None:
        """Take the rate from this hyper-parameter."""
        self.hparam, self.rate, self.generator = hparam, None, None

    def forward(self, x: Tensor) -> Tensor:
        """Drop entries in training mode, at the rates that `responding` says.

        Raises:
            RuntimeError: in training mode, and outside of `responding` or without a rate there.
        """
        if not self.training:
            return x
        if self.rate is None:
            raise RuntimeError(f"dropout by {self.hparam!r} has no rate: call the network within responding(...)")
        return per_example_dropout(x, self.rate.expand(len(x)), channels=self.channels, generator=self.generator)

    def extra_repr(self) -> str:
        return f"hparam={self.hparam!r}"


class STNDropout(TunedDropout, nn.Dropout):
    """Dropout of single entries, at the rate of the hyper-parameter of this name."""


class STNDropout2d(TunedDropout, nn.Dropout2d):
    """Dropout of whole channels, at the rate of the hyper-parameter of this name."""

    channels = True
