"""The elastic quantiser: learned steps for every number of bits and every form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.compress.fake_quant import grad_scale, quant_range, round_ste
from trimtab.ops.arguments import floating_tensor, integer, tensor_problem

_EPS = 1e-6
_SHRINKS, _NORM, _VALUES = 80, 2.4, 4096
_AT_ONCE = 2**20


def elastic_quantize(
    x: Float[Tensor, "..."],
    step: Float[Tensor, "..."],
    offset: Float[Tensor, "..."] | None,
    bits: int,
    *,
    signed: bool = True,
    scale: float = 1.0,
) -> Float[Tensor, "..."]:
    """Values on a grid whose step and offset take gradients.

    Args:
        x: what is quantised.
        step: of the grid; its magnitude counts. It broadcasts against `x`.
        offset: where the grid's zero lies; None is zero.
        bits: of the format.
        signed: whether the format has negative numbers.
        scale: factor of the gradients of step and offset.

    Example:
        >>> elastic_quantize(torch.tensor([0.4, 2.6, 9.0]), torch.tensor(1.0), torch.tensor(0.5), 3).round(decimals=4)
        tensor([0.5000, 2.5000, 3.5000])
    """
    if problem := tensor_problem(x=x, step=step, offset=offset):
        raise TypeError(problem)
    smallest, largest = quant_range(bits, signed)
    step = grad_scale(step.abs() + _EPS, scale)
    if offset is None:
        return round_ste((x / step).clamp(smallest, largest)) * step
    offset = grad_scale(offset, scale)
    return round_ste(((x - offset) / step).clamp(smallest, largest)) * step + offset


@torch.no_grad()
def searched_range(
    x: Float[Tensor, "rows values"], bits: int, *, symmetric: bool, signed: bool = True
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """The step and the offset of each row with the least error, among 80 ranges that shrink by a hundredth each.

    The error is the mean of `|x - x^| ** 2.4`; the first range is the whole one.

    Args:
        x: rows that are quantised each by itself.
        bits: of the format.
        symmetric: the offset is zero.
        signed: whether the format has negative numbers.

    Example:
        >>> step, offset = searched_range(torch.tensor([[-3.0, 0.0, 3.0]]), 3, symmetric=True)
        >>> round(step.item(), 3), offset.item()
        (1.0, 0.0)
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    smallest, largest = quant_range(bits, signed)
    low, high = x.aminmax(dim=1)
    reach = torch.maximum(low.abs(), high.abs()) / largest if symmetric else (high - low) / (largest - smallest)
    best = torch.full_like(low, float("inf"))
    steps, offsets = torch.ones_like(low), torch.zeros_like(low)
    shrinks = (1 - 0.01 * torch.arange(_SHRINKS)).to(x)
    for part in shrinks.split(max(1, _AT_ONCE // max(1, x.numel()))):
        step = (part[:, None] * reach).clamp(min=_EPS)
        offset = torch.zeros_like(step) if symmetric else part[:, None] * low - smallest * step
        found = elastic_quantize(x, step[..., None], offset[..., None], bits, signed=signed)
        error, place = (x - found).abs().pow(_NORM).mean(2).min(0)
        better = error < best
        best = torch.where(better, error, best)
        steps = torch.where(better, step.gather(0, place[None])[0], steps)
        offsets = torch.where(better, offset.gather(0, place[None])[0], offsets)
    return steps, offsets


def _thinned(sample: Float[Tensor, "batch ..."]) -> Float[Tensor, "1 values"]:
    """Some thousand values, evenly taken, and both extremes: enough to find a range by."""
    flat = sample.flatten()
    return torch.cat([flat[:: max(1, len(flat) // _VALUES)], torch.stack(flat.aminmax())])[None]


class ElasticQuantizer(nn.Module):
    """Quantises with as many bits and in such a form as it is told: a parametrization of a weight, or for inputs.

    Args:
        sample: the weight, or a batch of inputs, of which some thousand values give the first ranges.
        bits: the numbers of bits that there are.
        inputs: whether it quantises a layer's inputs: per tensor alone, and without a sign where the sample has none.

    Attributes:
        step, offset: parameters (number of bits, 2), one column for the symmetric and one for the asymmetric form.
        channel_step, channel_offset: parameters (number of bits, 2, rows), of a weight alone.
        bits, per_channel, symmetric: the present form.
        enabled: whether it quantises; otherwise it gives back its input.

    Raises:
        TypeError: `sample` is not a floating-point tensor.
        ValueError: it is empty, or a number of bits is out of range or comes twice.

    Example:
        >>> weight = torch.linspace(-1, 1, 64).view(4, 16)
        >>> quantizer = ElasticQuantizer(weight, bits=(2, 8))
        >>> quantizer.configure(2, per_channel=True, symmetric=False)
        >>> [len(row.unique()) for row in quantizer(weight)]
        [4, 4, 4, 4]
    """

    def __init__(
        self, sample: Float[Tensor, "n ..."], bits: Sequence[int] = range(2, 9), *, inputs: bool = False
    ) -> None:
        super().__init__()
        sample = floating_tensor("sample", sample).detach()
        if not sample.numel():
            raise ValueError("sample must not be empty, got no values")
        self.choices = tuple(integer("bits", width, 2, 24) for width in bits)
        if not self.choices or len(set(self.choices)) < len(self.choices):
            raise ValueError(f"bits must be different numbers, at least one, got {self.choices}")
        self.inputs, self.enabled = inputs, True
        self.signed = not inputs or bool(sample.min() < 0)
        self.bits, self.per_channel, self.symmetric = max(self.choices), False, True
        # The scales of gradients: for all of a layer, and for a row of it.
        self.count = sample[0].numel() if inputs else sample.numel()
        self.row_count = sample.numel() / (sample.shape[1] if sample.dim() > 1 else 1)
        whole = self._searched(_thinned(sample))
        self.step, self.offset = (nn.Parameter(part[..., 0].clone()) for part in whole)
        if not inputs:
            rows = self._searched(sample.flatten(1))
            self.channel_step, self.channel_offset = (nn.Parameter(part) for part in rows)

    def _searched(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        found = [
            [searched_range(rows, width, symmetric=symmetric, signed=self.signed) for symmetric in (True, False)]
            for width in self.choices
        ]
        steps, offsets = (torch.stack([torch.stack([form[n] for form in width]) for width in found]) for n in (0, 1))
        return steps, offsets

    def configure(self, bits: int, *, per_channel: bool = False, symmetric: bool = True) -> None:
        """Choose the form in which it quantises from now on; no parameter changes.

        Raises:
            ValueError: the number of bits is none of its own, or inputs are to be quantised by channel.
        """
        if bits not in self.choices:
            raise ValueError(f"bits must be one of {', '.join(map(str, self.choices))}, got {bits}")
        if per_channel and self.inputs:
            raise ValueError("per_channel must be False for inputs, got True")
        self.bits, self.per_channel, self.symmetric = bits, per_channel, symmetric

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        if not self.enabled:
            return x
        place, form = self.choices.index(self.bits), int(not self.symmetric)
        _, largest = quant_range(self.bits, self.signed)
        if self.per_channel:
            shape = (x.shape[0],) + (1,) * (x.dim() - 1)
            step, offset = (held[place, form].view(shape) for held in (self.channel_step, self.channel_offset))
            scale = 2 / (largest * self.row_count) ** 0.5
        else:
            step, offset = self.step[place, form], self.offset[place, form]
            scale = (largest * self.count) ** -0.5
        moved = None if self.symmetric else offset.to(x)
        return elastic_quantize(x, step.to(x), moved, self.bits, signed=self.signed, scale=scale)

    def right_inverse(self, weight: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """A weight that is assigned is kept as it is, in full precision."""
        return weight
