"""Quantisers as modules: of weights, which are parametrizations, and of the inputs of layers."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from trimtab.compress.fake_quant.grid import TINY, affine_qparams, fake_quantize, lsq_quantize, quant_range
from trimtab.ops.arguments import floating_tensor, in_range, real_problem


def _of_channels(x: Tensor) -> tuple[int, ...]:
    """The shape in which one number a row of a weight broadcasts against it."""
    return (x.shape[0],) + (1,) * (x.dim() - 1)


class LSQWeight(nn.Module):
    """A parametrization that quantises a weight with a learned step.

    Args:
        weight: what will be quantised; the step starts at `2 mean|w| / sqrt(qmax)`.
        bits: of the format, which has a sign.
        per_channel: a step for each row of the weight (output channel).

    Attributes:
        step: the parameter, a single number or one a row.

    Raises:
        TypeError: `weight` is not a floating-point tensor.
        ValueError: `bits` is below 2 or above 24.

    Example:
        >>> from torch.nn.utils import parametrize
        >>> layer = nn.Linear(64, 8)
        >>> _ = parametrize.register_parametrization(layer, "weight", LSQWeight(layer.weight, 2))
        >>> len(layer.weight.unique()) <= 4
        True
    """

    def __init__(self, weight: Float[Tensor, "out ..."], bits: int, *, per_channel: bool = False) -> None:
        if not getattr(weight, "numel", lambda: 1)():
            raise ValueError(f"weight must not be empty, got shape {tuple(weight.shape)}")
        super().__init__()
        _, largest = quant_range(bits)
        sample = floating_tensor("weight", weight).detach()
        mean = sample.abs().flatten(1).mean(1).view(_of_channels(sample)) if per_channel else sample.abs().mean()
        self.bits, self.per_channel = bits, per_channel
        self.step = nn.Parameter((2 * mean / largest**0.5).clamp(min=TINY))
        self.scale = (sample.numel() / self.step.numel() * largest) ** -0.5

    def forward(self, weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
        return lsq_quantize(weight, self.step.to(weight), self.bits, scale=self.scale)

    def right_inverse(self, weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
        """A weight that is assigned is kept as it is, in full precision."""
        return weight


class LSQActivation(nn.Module):
    """Quantises the inputs of a layer with a learned step.

    Args:
        sample: of the inputs, a batch; the step starts at `2 mean|x| / sqrt(qmax)`.
        bits: of the format.
        signed: whether the format has negative numbers; whether the sample has, if None.

    Attributes:
        step: the parameter, a single number.
        enabled: whether it quantises; otherwise it gives back its input.

    Example:
        >>> import torch
        >>> quantizer = LSQActivation(torch.rand(100), 2)
        >>> quantizer.signed, len(quantizer(torch.rand(50)).unique()) <= 4
        (False, True)
    """

    def __init__(self, sample: Float[Tensor, "batch ..."], bits: int, *, signed: bool | None = None) -> None:
        super().__init__()
        sample = floating_tensor("sample", sample).detach()
        if not sample.numel():
            raise ValueError("sample must not be empty, got no values")
        self.bits, self.signed, self.enabled = bits, bool(sample.min() < 0) if signed is None else signed, True
        _, largest = quant_range(bits, self.signed)
        self.step = nn.Parameter((2 * sample.abs().mean() / largest**0.5).clamp(min=TINY))
        self.scale = (sample[0].numel() * largest) ** -0.5

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        if not self.enabled:
            return x
        return lsq_quantize(x, self.step.to(x), self.bits, signed=self.signed, scale=self.scale)


class MinMaxWeight(nn.Module):
    """A parametrization that quantises a weight between its present extremes, by rounding to the nearest.

    Args:
        weight: what will be quantised.
        bits: of the format, which has a sign.
        per_channel: a range for each row of the weight.
        symmetric: ranges are symmetric about zero.
        pass_clipped: see `fake_quantize`.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[-1.0, 0.2, 2.0]])
        >>> MinMaxWeight(weight, 2)(weight)
        tensor([[-1.,  0.,  2.]])
    """

    def __init__(
        self,
        weight: Float[Tensor, "out ..."],
        bits: int,
        *,
        per_channel: bool = True,
        symmetric: bool = False,
        pass_clipped: bool = False,
    ) -> None:
        if not getattr(weight, "numel", lambda: 1)():
            raise ValueError(f"weight must not be empty, got shape {tuple(weight.shape)}")
        super().__init__()
        quant_range(bits)
        floating_tensor("weight", weight)
        self.bits, self.per_channel, self.symmetric, self.pass_clipped = bits, per_channel, symmetric, pass_clipped

    def forward(self, weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
        if problem := real_problem(weight=weight):
            raise TypeError(problem)
        held = weight.detach()
        if self.per_channel:
            low, high = (end.view(_of_channels(held)) for end in held.flatten(1).aminmax(dim=1))
        else:
            low, high = held.aminmax()
        qparams = affine_qparams(low, high, self.bits, symmetric=self.symmetric)
        return fake_quantize(weight, *qparams, self.bits, pass_clipped=self.pass_clipped)

    def right_inverse(self, weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
        """A weight that is assigned is kept as it is, in full precision."""
        return weight


class MinMaxActivation(nn.Module):
    """Quantises the inputs of a layer between extremes that it has seen.

    Args:
        sample: of the inputs, a batch, which gives the first extremes.
        bits: of the format.
        momentum: weight of a batch in the moving averages of the extremes, while `observing`.
        pass_clipped: see `fake_quantize`.

    Attributes:
        low, high: the extremes, buffers.
        observing: whether a call moves the extremes.
        enabled: whether it quantises; otherwise it gives back its input.

    Example:
        >>> import torch
        >>> quantizer = MinMaxActivation(torch.tensor([0.0, 3.0]), 2)
        >>> quantizer(torch.tensor([0.4, 1.2, 7.0]))
        tensor([0., 1., 3.])
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, sample: Float[Tensor, "batch ..."], bits: int, *, momentum: float = 0.1, pass_clipped: bool = False
    ) -> None:
        super().__init__()
        quant_range(bits)
        sample = floating_tensor("sample", sample).detach()
        if not sample.numel():
            raise ValueError("sample must not be empty, got no values")
        self.bits, self.momentum, self.pass_clipped = bits, in_range("momentum", momentum, 0, 1), pass_clipped
        self.observing, self.enabled = False, True
        low, high = sample.aminmax()
        self.register_buffer("low", low.clone())
        self.register_buffer("high", high.clone())

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        if problem := real_problem(x=x):
            raise TypeError(problem)
        if self.observing:
            low, high = x.detach().aminmax()
            self.low.lerp_(low.to(self.low), self.momentum)
            self.high.lerp_(high.to(self.high), self.momentum)
        if not self.enabled:
            return x
        step, zero_point = (found.to(x) for found in affine_qparams(self.low, self.high, self.bits))
        return fake_quantize(x, step, zero_point, self.bits, pass_clipped=self.pass_clipped)
