"""Three designs whose worst error counts: a layer with few bits, an image from few projections, a fixed-point filter.

Each states its problem as one of `minmax_violation` and returns what its user works with. The uses are those of Ahmed
et al. (arXiv 2508.13437); options of the search go through to `minmax_violation`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import finite_tensor, integer, number, positive, same_shape
from trimtab.solvers.minmax_violation.solver import minmax_violation


@dataclass(frozen=True)
class QuantizedLayer:
    """A linear layer's weights on a grid for each output.

    Attributes:
        weight: (out, in), values to use in place of the layer's.
        codes: (out, in), places in the grid, from 0 to `2**bits - 1`.
        scale: (out,), step of the grid; zero where all weights of an output are zero.
        zero: (out,), the code of the value zero: `weight = scale * (codes - zero)`.
        value: (out,), the largest absolute error of an output on the calibration inputs.
    """

    weight: Float[Tensor, "out in"]
    codes: Int[Tensor, "out in"]
    scale: Float[Tensor, " out"]
    zero: Int[Tensor, " out"]
    value: Float[Tensor, " out"]


def quantization_grid(weight: Float[Tensor, "out in"], bits: int) -> tuple[Float[Tensor, " out"], Int[Tensor, " out"]]:
    """Scale and zero point for each output, for codes from 0 to `2**bits - 1` that span its weights and zero.

    Raises:
        TypeError: the weights are no floating-point numbers.
        ValueError: the weights are no finite matrix, or `bits` is not from 1 to 16.

    Example:
        >>> scale, zero = quantization_grid(torch.tensor([[-1.0, 0.0, 2.0]]), bits=2)
        >>> scale * (torch.arange(4) - zero)
        tensor([-1.,  0.,  1.,  2.])
    """
    weight = finite_tensor("weight", weight, ndim=2, floating=True)
    if not weight.numel():
        raise ValueError(f"weight must be a matrix with entries, got shape {tuple(weight.shape)}")
    bits = integer("bits", bits, 1, 16)
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    return scale, (-low / scale.where(scale > 0, 1.0)).round().long()


def quantize_layer(
    weight: Float[Tensor, "out in"],
    inputs: Float[Tensor, "samples in"],
    bits: int,
    *,
    start: Float[Tensor, "out in"] | None = None,
    **search: Any,
) -> QuantizedLayer:
    """Quantises a linear layer after training, for the least worst error of each output on calibration inputs.

    Args:
        weight: (out, in), as of `torch.nn.Linear`.
        inputs: (samples, in) that the layer gets.
        bits: of a weight.
        start: (out, in) values near which to begin, such as another method's; the weights by default.
        search: options of `minmax_violation`; 4 restarts where `restarts` is not among them.

    Raises:
        ValueError: a shape or value does not fit.

    Example:
        >>> layer = torch.nn.Linear(8, 2)
        >>> inputs = torch.randn(32, 8)
        >>> found = quantize_layer(layer.weight.detach(), inputs, bits=3)
        >>> errors = (inputs @ (found.weight - layer.weight.detach()).T).abs().amax(0)
        >>> torch.allclose(errors, found.value, atol=1e-5)
        True
    """
    weight = finite_tensor("weight", weight, ndim=2, floating=True)
    inputs = finite_tensor("inputs", inputs, ndim=2, floating=True)
    scale, zero = quantization_grid(weight, bits)
    if inputs.shape[1] != weight.shape[1] or not len(inputs):
        raise ValueError(f"inputs must be of shape (samples, {weight.shape[1]}), got shape {tuple(inputs.shape)}")
    if start is not None:
        start = finite_tensor("start", start, floating=True)
        same_shape("start", start, "weight", weight)
    exact, rows = weight.detach().double(), inputs.detach().double()
    begin = exact if start is None else start.detach().double()
    codes = torch.zeros(weight.shape, dtype=torch.long, device=weight.device)
    value = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
    some = scale > 0  # an output of zeros has nothing to choose
    if some.any():
        levels = scale[some].double()[:, None] * (torch.arange(2**bits, device=weight.device) - zero[some, None])
        found = minmax_violation(
            rows,
            exact[some] @ rows.T,
            levels[:, None].expand(-1, weight.shape[1], -1),
            start=begin[some],
            **{"restarts": 4, **search},
        )
        codes[some] = torch.as_tensor(found.index)
        value[some] = torch.as_tensor(found.value).to(value)
    return QuantizedLayer(scale[:, None] * (codes - zero[:, None]), codes, scale, zero, value)


@dataclass(frozen=True)
class FixedPointFilter:
    """A linear-phase filter with fixed-point coefficients.

    Attributes:
        taps: (num_taps,), symmetric.
        codes: (num_taps,), the coefficients in units of `2 ** (1 - bits)`.
        value: the worst weighted deviation from the desired response, over the frequencies of the design.
        bound: what no coefficients of any precision can beat.
    """

    taps: Float[Tensor, " num_taps"]
    codes: Int[Tensor, " num_taps"]
    value: float
    bound: float


def filter_rows(
    num_taps: int, bands: Sequence[float], desired: Sequence[float], density: int = 16
) -> tuple[Float[Tensor, "frequencies half"], Float[Tensor, " frequencies"], Int[Tensor, " frequencies"]]:
    """The response at a grid of frequencies as a linear map of half the taps, and what it is to be.

    Args:
        num_taps: length of the filter, which is symmetric.
        bands: edges of the bands in rising pairs, where 1 is half the sampling rate.
        desired: gain in each band.
        density: frequencies for each tap, spread over the bands by their widths.

    Returns:
        The rows (frequencies, half), from the filter's middle outwards; the desired gains; the band of each frequency.
    """
    num_taps, density = integer("num_taps", num_taps), integer("density", density)
    edges = [number(f"bands[{place}]", edge) for place, edge in enumerate(bands)]
    gains = [number(f"desired[{place}]", gain) for place, gain in enumerate(desired)]
    if len(edges) != 2 * len(desired) or not edges or sorted(edges) != edges or edges[0] < 0 or edges[-1] > 1:
        raise ValueError(f"bands must be {2 * len(desired)} rising edges between 0 and 1, got {edges}")
    if edges[::2] == edges[1::2]:
        raise ValueError(f"bands must be wider than nothing, got {edges}")
    widths = [high - low for low, high in zip(edges[::2], edges[1::2], strict=True)]
    counts = [max(2, math.ceil(density * num_taps * width / sum(widths))) for width in widths]
    frequency = torch.cat(
        [
            torch.linspace(low, high, count, dtype=torch.float64)
            for low, high, count in zip(edges[::2], edges[1::2], counts, strict=True)
        ]
    )
    band = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    odd = num_taps % 2
    offset = torch.arange((num_taps + odd) // 2, dtype=torch.float64) + (0 if odd else 0.5)
    rows = 2 * torch.cos(math.pi * frequency[:, None] * offset)
    if odd:
        rows[:, 0] = 1
    return rows, torch.tensor(gains, dtype=torch.float64)[band], band


def fixed_point_filter(
    num_taps: int,
    bands: Sequence[float],
    desired: Sequence[float],
    bits: int,
    *,
    weight: Sequence[float] | None = None,
    density: int = 16,
    **search: Any,
) -> FixedPointFilter:
    """Designs a linear-phase FIR filter whose coefficients are signed fixed-point numbers in [-1, 1).

    Args:
        num_taps: length of the filter, which is symmetric.
        bands: edges of the bands in rising pairs, where 1 is half the sampling rate (`fs=2` of
            `scipy.signal.remez`).
        desired: gain in each band.
        bits: of a coefficient, the sign included.
        weight: importance of each band's error; one each by default.
        density: frequencies for each tap at which the response is looked at.
        search: options of `minmax_violation`.

    Raises:
        ValueError: bands do not rise, or a number is out of range.

    Example:
        >>> lowpass = fixed_point_filter(15, bands=[0, 0.3, 0.5, 1], desired=[1, 0], bits=8)
        >>> lowpass.codes.flip(0).equal(lowpass.codes), lowpass.bound <= lowpass.value < 0.06
        (True, True)
    """
    rows, gains, band = filter_rows(num_taps, bands, desired, density)
    bits = integer("bits", bits, 2, 16)
    given = [1.0] * len(desired) if weight is None else list(weight)
    if len(given) != len(desired):
        raise ValueError(f"weight must be one number for each of {len(desired)} bands, got {len(given)}")
    importance = [positive(f"weight[{place}]", value) for place, value in enumerate(given)]
    units = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    weights = torch.tensor(importance, dtype=torch.float64)[band]
    found = minmax_violation(rows, gains, units.double() * 2.0 ** (1 - bits), weights=weights, **search)
    half = units[torch.as_tensor(found.index)]
    codes = torch.cat([half.flip(0), half[num_taps % 2 :]])
    return FixedPointFilter(codes.double() * 2.0 ** (1 - bits), codes, float(found.value), float(found.bound))


def parallel_projections(side: int, angles: Float[Tensor, " angles"]) -> Float[Tensor, "angles bins pixels"]:
    """Parallel-beam projections of a square image as a linear map: each pixel's mass is split between two bins.

    Bins are one pixel wide and cover the image's diagonal. At angle zero columns are summed, and at half pi rows.

    Args:
        side: the image's, in pixels.
        angles: in radians.

    Raises:
        TypeError: the angles are no floating-point numbers.
        ValueError: there are none, one is not finite, or `side` is below 1.

    Example:
        >>> sums = parallel_projections(3, torch.tensor([0.0])) @ torch.arange(9.0)
        >>> sums.sum(), sums.max()
        (tensor(36.), tensor(15.))
    """
    side, angles = integer("side", side), finite_tensor("angles", angles, ndim=1, floating=True)
    if not len(angles):
        raise ValueError("angles must be one or more, got none")
    reach = math.ceil(side / math.sqrt(2))
    bins = 2 * reach + 1
    axis = torch.arange(side, dtype=angles.dtype, device=angles.device) - (side - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    place = x.flatten() * angles.cos()[:, None] + y.flatten() * angles.sin()[:, None] + reach
    centres = torch.arange(bins, dtype=angles.dtype, device=angles.device)
    return (1 - (place[:, None] - centres[:, None]).abs()).clamp(min=0)


def discrete_tomography(
    projections: Float[Tensor, "angles bins"],
    angles: Float[Tensor, " angles"],
    side: int,
    levels: Float[Tensor, " levels"],
    **search: Any,
) -> Float[Tensor, "side side"]:
    """An image of few grey levels whose projections are nowhere far from those measured.

    For measurements whose errors are bounded rather than Gaussian.

    Args:
        projections: (angles, bins), measured with the bins of `parallel_projections`.
        angles: in radians.
        side: the image's, in pixels.
        levels: the grey levels, increasing.
        search: options of `minmax_violation`.

    Raises:
        ValueError: a shape or value does not fit.

    Example:
        >>> image = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
        >>> angles = torch.arange(4) * torch.pi / 4
        >>> measured = parallel_projections(3, angles) @ image.flatten()
        >>> torch.equal(discrete_tomography(measured, angles, 3, torch.tensor([0.0, 1.0])), image)
        True
    """
    maps = parallel_projections(side, angles)
    projections = finite_tensor("projections", projections, ndim=2, floating=True)
    if projections.shape != maps.shape[:2]:
        raise ValueError(f"projections must be of shape {tuple(maps.shape[:2])}, got shape {tuple(projections.shape)}")
    found = minmax_violation(maps.flatten(0, 1).to(projections), projections.flatten(), levels, **search)
    return torch.as_tensor(found.x).view(side, side)
