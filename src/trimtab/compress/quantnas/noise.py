"""Noise of the size of quantisation's error, and the convolution that has it in place of quantisers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.compress.fake_quant import quant_range
from trimtab.ops.arguments import integer, one_of, real_problem, tensor_problem

Noise = Literal["gaussian", "uniform"]


def error_scale(x: Float[Tensor, "..."], bits: int) -> Float[Tensor, ""]:
    """Standard deviation of the normal noise that stands for quantisation: half a step of the range.

    Example:
        >>> error_scale(torch.tensor([-1.0, 0.5, 2.0]), 2)
        tensor(0.5000)
    """
    quant_range(bits, signed=False)
    low, high = x.detach().aminmax()
    found: Tensor = (high - low) / (2 * (2**bits - 1))
    return found


def quantization_noise(
    x: Float[Tensor, "..."],
    bits: int,
    noise: Noise = "gaussian",
    *,
    eps: Float[Tensor, "..."] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "..."]:
    """What is quantised, and the noise that stands for the error; no gradient passes.

    Args:
        x: what would be quantised.
        bits: of the format.
        noise: normal, of half a step as deviation, or uniform over a step.
        eps: the draw itself, standard normal or uniform in [-1/2, 1/2].
        generator: for the draw, where there is none.

    Example:
        >>> quantization_noise(torch.tensor([0.0, 3.0]), 2, eps=torch.tensor([1.0, -1.0]))
        tensor([0.5000, 2.5000])
    """
    if problem := tensor_problem(x=x, eps=eps):
        raise TypeError(problem)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if not x.numel():
        raise ValueError(f"x must not be empty, got shape {tuple(x.shape)}")
    one_of("noise", noise, get_args(Noise))
    eps = _drawn(x, noise, generator) if eps is None else eps
    return x.detach() + error_scale(x, bits) * (1.0 if noise == "gaussian" else 2.0) * eps


def noisy_mixture(
    x: Float[Tensor, "..."],
    shares: Float[Tensor, " bits"],
    bits: Sequence[int],
    noise: Noise = "gaussian",
    *,
    legacy: bool = False,
    eps: Float[Tensor, "..."] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "..."]:
    """Noisy copies for all numbers of bits, mixed by their shares, and the clean one, through which gradients pass.

    Args:
        x: what would be quantised.
        shares: of each number of bits, at least 0; they take gradients.
        bits: the numbers of bits.
        noise: see `quantization_noise`.
        legacy: the clean one's weight is `1 / (len(bits) + 1)` undivided, as in the authors' release.
        eps: the draw itself: one for normal noise, one for each number of bits in front for uniform noise.
        generator: for the draw, where there is none.

    Raises:
        ValueError: there is not one share for each number of bits.

    Example:
        >>> x = torch.tensor([0.0, 3.0], requires_grad=True)
        >>> noisy_mixture(x, torch.tensor([0.5, 0.5]), (2, 8), eps=torch.zeros(2)).sum().backward()
        >>> x.grad  # a third, over four thirds
        tensor([0.2500, 0.2500])
    """
    if problem := tensor_problem(x=x, shares=shares, eps=eps):
        raise TypeError(problem)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if not x.numel():
        raise ValueError(f"x must not be empty, got shape {tuple(x.shape)}")
    if shares.shape != (len(bits),):
        raise ValueError(
            f"shares must have shape ({len(bits)},), one for each number of bits, got {tuple(shares.shape)}"
        )
    clean = 1 / (len(bits) + 1)
    total = shares.sum() + clean
    parts = shares / total
    scales = torch.stack([error_scale(x, width) for width in bits])
    held = x.detach()
    mixed = (clean if legacy else clean / total) * x + parts.sum() * held
    if noise == "gaussian":
        eps = _drawn(x, noise, generator) if eps is None else eps
        tiny = torch.finfo(held.dtype).tiny
        return mixed + ((parts * scales).square().sum() + tiny).sqrt() * eps
    one_of("noise", noise, get_args(Noise))
    for n in range(len(bits)):
        mixed = mixed + 2 * parts[n] * scales[n] * (_drawn(x, noise, generator) if eps is None else eps[n])
    return mixed


def _drawn(x: Tensor, noise: str, generator: torch.Generator | None) -> Tensor:
    device = x.device if generator is None else generator.device
    if noise == "gaussian":
        return torch.randn(x.shape, dtype=x.dtype, device=device, generator=generator).to(x.device)
    return torch.rand(x.shape, dtype=x.dtype, device=device, generator=generator).to(x.device) - 0.5


class QuantNoiseConv2d(nn.Conv2d):
    """A convolution of ReLU'd inputs that imitates several numbers of bits at once; size is kept.

    Args:
        in_channels, out_channels, kernel_size: of the convolution.
        bits: the numbers of bits.
        noise, legacy: see `noisy_mixture`.
        groups: of the convolution.

    Attributes:
        generator: for the noise; torch's own where it is None.
        macs: multiply-adds per sample of the last call.

    Example:
        >>> conv = QuantNoiseConv2d(3, 4, 3, bits=(4, 8))
        >>> conv(torch.randn(2, 3, 5, 5), torch.tensor([1.0, 0.0])).shape, conv.macs
        (torch.Size([2, 4, 5, 5]), 2700)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bits: Sequence[int] = (4, 8),
        *,
        noise: Noise = "gaussian",
        legacy: bool = False,
        groups: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)
        self.bits = tuple(integer("bits", width, 1, 24) for width in bits)
        if not self.bits:
            raise ValueError("bits must hold at least one number, got none")
        self.noise: Noise = one_of("noise", noise, get_args(Noise))
        self.legacy, self.macs = legacy, 0
        self.generator: torch.Generator | None = None

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "batch channels height width"], shares: Float[Tensor, " bits"]
    ) -> Float[Tensor, "batch out height width"]:
        """The convolution, with weights and inputs of the mixture.

        Args:
            x: inputs, before ReLU.
            shares: of each number of bits.
        """
        weight, given = self.imitate(self.weight, shares), self.imitate(x.relu(), shares)
        out = self._conv_forward(given, weight, None)
        self.macs = out[0].numel() * self.weight[0].numel()
        found: Tensor = out
        return found

    def imitate(self, x: Float[Tensor, "..."], shares: Float[Tensor, " bits"]) -> Float[Tensor, "..."]:
        """What stands for the quantised weights or inputs."""
        if problem := real_problem(shares=shares):
            raise TypeError(problem)
        return noisy_mixture(x, shares, self.bits, self.noise, legacy=self.legacy, generator=self.generator)
