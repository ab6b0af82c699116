r"""Generalised Gaussian priors for weights: start from that law, shrink towards it, reshape to it, store in 8 bits.

The weights of trained networks follow a law with a sharper peak and heavier tails than a Gaussian:

$$
f(w) = \frac{\nu}{2 a\, \Gamma(1/\nu)} \exp\bigl( -(|w| / a)^{\nu} \bigr), \qquad
\operatorname{Var} w = a^2\, \frac{\Gamma(3/\nu)}{\Gamma(1/\nu)}
$$

with $\nu = 2$ a Gaussian, $\nu = 1$ a Laplace law, $\nu \to \infty$ a uniform one. Four uses of it, each on its own:

- `gg_init_` draws the weights of a new network from it, with the variance that keeps signals at their size.
- `BackSlash` shrinks weights after every optimizer step by the slope of their code length under the law, in which
  $N$ counts the weights and the shape is the one that they have:

$$
w \leftarrow w - \frac{\lambda \nu}{N} \operatorname{sign}(w)\, (|w| + 1)^{\nu - 1}
$$

- `deep_shape` moves the weights of a trained network, in their order, to a law of smaller shape and spread.
- `RF8` keeps of every weight its two leading signed binary digits, in 8 bits: a product is two shifts and an addition.

The estimated shape solves $\rho(\nu) = \Gamma(1/\nu)\,\Gamma(3/\nu) / \Gamma(2/\nu)^2$ for the measured
$\rho = n \sum w^2 / (\sum |w|)^2$. How long weights are in a code is measured by exponential Golomb codes.
A shrinking step ends at zero, where the release lets the sign flip; the release rounds to RF8's values and packs no
bits, so that the window of exponents and the order of the bits are ours.

Reference: Jun Wu, Yirong Xiong, Jiangtao Wen and Yuxing Han, "It Takes a Good Model to Train a Good Model: Generalized
Gaussian Priors for Optimized LLMs", 2025, arXiv 2506.00486.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from trimtab.compress.generalized_gaussian import GeneralizedGaussian, estimate_shape, float_parts
from trimtab.ops.arguments import (
    all_finite,
    finite_tensor,
    integer,
    non_negative,
    one_of,
    positive,
    real_problem,
    tensor,
    tensor_problem,
)


@torch.no_grad()
def gg_init_(
    model: nn.Module,
    shape: float = 1.0,
    xi: float = 2.0,
    mode: Literal["fan_out", "fan_in"] = "fan_out",
    *,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Draws the weights of a model from the law with variance xi / fan, in place; norms' weights are 1, biases 0.

    Parameters of fewer than two dimensions are set by their names: those that end in "weight" to 1, in "bias" to 0.

    Args:
        model: whatever has weights of two or more dimensions.
        shape: of the law; at least about 0.07.
        xi: 2 in front of ReLU, 1 in front of a sigmoid or nothing, 2 / (1 + slope^2) in front of a leaky ReLU.
        mode: the release divides by the number of outputs; He's rule by the number of inputs.
        generator: decides the draws.

    Raises:
        ValueError: `shape` is too small, `xi` not positive, or `mode` unknown.

    Example:
        >>> layer = gg_init_(nn.Linear(500, 200), shape=0.5, generator=torch.Generator().manual_seed(0))
        >>> round(layer.weight.var().item() * 200, 1)
        2.0
    """
    positive("shape", shape)
    positive("xi", xi)
    one_of("mode", mode, ("fan_out", "fan_in"))
    if math.lgamma(3 / shape) - math.lgamma(1 / shape) > 88:
        raise ValueError(f"shape must be at least about 0.07, what single precision can hold, got {shape}")
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            fans = nn.init._calculate_fan_in_and_fan_out(parameter)
            variance = xi / fans[0 if mode == "fan_in" else 1]
            unit = GeneralizedGaussian(*torch.tensor([shape, 1.0], device=parameter.device))
            law = GeneralizedGaussian(unit.shape, (variance / unit.variance).sqrt())
            parameter.copy_(law.sample(parameter.shape, generator))
        elif name.endswith(("weight", "bias")):
            parameter.fill_(float(name.endswith("weight")))
    return model


def rate_slope(weight: Float[Tensor, "..."], shape: float, offset: float = 1.0) -> Float[Tensor, "..."]:
    """What a weight's code length grows by, up to a factor: shape sign(w) (|w| + offset)^(shape - 1).

    Example:
        >>> rate_slope(torch.tensor([-1.0, 0.0, 3.0]), shape=1.0)
        tensor([-1.,  0.,  1.])
    """
    if problem := tensor_problem(weight=weight):
        raise TypeError(problem)
    if not 0 < shape < float("inf"):
        raise ValueError(f"shape must be finite and positive, got {shape!r}")
    if not 0 <= offset < float("inf"):
        raise ValueError(f"offset must be finite and not negative, got {offset!r}")
    return shape * weight.sign() * (weight.abs() + offset) ** (shape - 1)


class BackSlash:
    """Shrinks weights after every optimizer step by the slope of their code length.

    Train some last epochs without it. With `shape=1` it is the soft threshold of L1, by rdo / N.

    Args:
        params: the weights; N is their number.
        rdo: strength, of rate against distortion; the authors' 2000 is for billions of weights, so that a step of
            them is of 1e-6: choose it with the number of weights.
        shape: of the law; None estimates it, at the first step and then every `every` steps.
        offset: in the slope, which keeps it finite at zero.
        every: steps between two estimates; each makes an accelerator wait.

    Raises:
        ValueError: there is no parameter, `rdo` is negative, or `shape`, `offset` or `every` is not positive.

    Example:
        >>> weight = nn.Parameter(torch.tensor([0.5, -0.2, 0.01, 0.0]))
        >>> BackSlash([weight], rdo=0.4, shape=1.0).post_step()
        >>> weight.data
        tensor([ 0.4000, -0.1000,  0.0000,  0.0000])
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        rdo: float = 2000.0,
        shape: float | None = None,
        offset: float = 1.0,
        every: int = 100,
    ) -> None:
        self.params = list(params)
        if not sum(p.numel() for p in self.params):
            raise ValueError("params must be at least one weight, got none")
        self.rdo, self.offset = non_negative("rdo", rdo), positive("offset", offset)
        self.every = integer("every", every)
        self.fixed = shape is not None
        self.shape = 0.0 if shape is None else positive("shape", shape)
        self.steps = 0

    @torch.no_grad()
    def post_step(self) -> None:
        """Call after `optimizer.step()`. No weight passes zero."""
        if not self.fixed and self.steps % self.every == 0:
            self.shape = estimate_shape(self.params)
        self.steps += 1
        strength = self.rdo / sum(p.numel() for p in self.params)
        for weight in self.params:
            by = strength * rate_slope(weight, self.shape, self.offset)
            weight.copy_(torch.where(by.abs() < weight.abs(), weight - by, torch.zeros_like(weight)))

    def state_dict(self) -> dict[str, Any]:
        """The shape, and the steps done."""
        return {"shape": self.shape, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another left off.

        Raises:
            ValueError: the state is of something else.
        """
        if set(state) != {"shape", "steps"}:
            raise ValueError(f"state must have shape and steps, got {', '.join(map(str, state)) or 'nothing'}")
        shape, steps = non_negative("shape", state["shape"]), integer("steps", state["steps"], 0)
        self.shape, self.steps = shape, steps


@torch.no_grad()
def deep_shape(
    tensors: Iterable[Tensor],
    shape_scale: float = 0.8,
    std_scale: float = 0.6,
    step: float = 2.0**-13,
    tail_count: int = 1000,
    ties: Literal["split", "together"] = "split",
) -> list[Tensor]:
    """Moves the weights of a trained network, in their order, to a sharper law of smaller spread.

    The bulk of all weights together is dealt, from the smallest to the largest, to levels `step` apart, as many to each
    as the new law wants; the few that rounding leaves over at the top go to their own nearest level, as the tails do.
    Train some ordinary epochs afterwards. Leave norms and biases out of it.

    Args:
        tensors: weights.
        shape_scale, std_scale: factors of the bulk's shape and of its scale.
        step: between two levels; so wide that a level holds several weights, or nothing can be dealt.
        tail_count: the tails begin beyond the first positive level that holds at most so many weights, on both sides;
            0 is no tails. A thousand is for models of billions of weights: scale it with their number.
        ties: "together" keeps equal weights equal, where the middle one of them goes.

    Returns:
        New tensors.

    Raises:
        ValueError: there is no weight that is not zero, one is not finite, an argument is out of range.

    Example:
        >>> weights = 0.05 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))
        >>> reshaped, = deep_shape([weights], step=2.0**-9, tail_count=0)
        >>> round((reshaped.std() / weights.std()).item(), 1)
        0.7
    """
    positive("shape_scale", shape_scale)
    positive("std_scale", std_scale)
    positive("step", step)
    integer("tail_count", tail_count, 0)
    one_of("ties", ties, ("split", "together"))
    parts = float_parts("tensors", tensors)
    pool = torch.cat([part.detach().double().flatten() for part in parts])
    estimate_shape(pool)  # refuses what is not finite, or nothing
    levels = (pool / step).round()
    result = levels * step
    inside = torch.ones_like(levels, dtype=torch.bool)
    if tail_count:
        positions, counts = levels[levels > 0].unique(return_counts=True)
        rare = positions[counts <= tail_count]
        if len(rare):
            inside = levels.abs() <= rare[0]
    bulk, where = pool[inside].sort(stable=True)
    where = inside.nonzero()[:, 0][where]
    shape = estimate_shape(bulk)
    spread = (math.lgamma(1 / shape) - math.lgamma(3 / shape)) / 2
    scale = std_scale * float(bulk.square().mean().sqrt()) * math.exp(spread)
    low, high = (int(value) for value in levels[inside].aminmax())
    places = torch.arange(low, high + 1, dtype=torch.float64, device=pool.device) * step
    share = (-(((places - bulk.mean()).abs() / scale) ** (shape_scale * shape))).softmax(0)
    new = places.repeat_interleave((share * len(bulk)).floor().long())
    new = torch.cat([new, result[where[len(new) :]]])
    if ties == "together":
        _, group, sizes = bulk.unique_consecutive(return_inverse=True, return_counts=True)
        new = new[(sizes.cumsum(0) - 1 - sizes // 2)[group]]
    result[where] = new
    pieces = result.split([part.numel() for part in parts])
    return [piece.view(part.shape).to(part.dtype) for piece, part in zip(pieces, parts, strict=True)]


def exp_golomb_bits(levels: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """Bits of integers in the exponential Golomb code of order 0: 1 of 0, 3 of 1 and -1, 5 from 2 and -2 on.

    Raises:
        TypeError: `levels` are not integers.

    Example:
        >>> exp_golomb_bits(torch.tensor([0, 1, -1, 2, -3, 4]))
        tensor([1, 3, 3, 5, 5, 7])
    """
    levels = tensor("levels", levels)
    if levels.is_floating_point() or levels.is_complex() or levels.dtype == torch.bool:
        raise TypeError(f"levels must be integers, got {levels.dtype}")
    positive_part = torch.where(levels > 0, 2 * levels.long() - 1, -2 * levels.long())
    return 2 * torch.frexp((positive_part + 1).double()).exponent.long() - 1


@torch.no_grad()
def code_length(tensors: Tensor | Iterable[Tensor], step: float) -> float:
    """Bits of all weights, rounded to multiples of `step`, in the exponential Golomb code.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: `step` is not positive, or a weight is not finite or out of the code's reach.

    Example:
        >>> code_length(torch.tensor([0.0, 0.1, -0.26]), step=0.1)
        9.0
    """
    positive("step", step)
    tensors = float_parts("tensors", tensors)
    if not all(all_finite(t) and float(t.detach().double().abs().amax()) / step < 2**61 for t in tensors if t.numel()):
        raise ValueError("tensors must be finite and less than 2 ** 61 steps, got others")
    return float(sum(exp_golomb_bits((t.double() / step).round().long()).sum() for t in tensors))


@dataclass(frozen=True)
class RF8:
    """Residual floats of 8 bits: the two leading signed binary digits of a number, at most four places apart.

    A sign, four bits of exponent and three of residual; in an octave lie 0.75, 0.875, 0.9375, 1, 1.0625, 1.125 and
    1.25 times its power of two. Rounding is in the logarithm, hence not to the nearest; the relative error stays below
    0.1083. Zero takes a code that says the same number as another.

    Attributes:
        exponent_max: of the largest power of two; the smallest is 15 below. What is larger is saturated, and what is
            smaller becomes 0, in `encode`.

    Example:
        >>> RF8().quantize(torch.tensor([1.3, 1.4, -0.8, 0.1, 3.0, 0.0]))
        tensor([ 1.2500,  1.5000, -0.7500,  0.0938,  3.0000,  0.0000])
        >>> form = RF8(exponent_max=1)
        >>> form.decode(form.encode(torch.tensor([1.3, -0.8, 0.0])))
        tensor([ 1.2500, -0.7500,  0.0000])
    """

    exponent_max: int = 0

    _zero: ClassVar[int] = 15 << 3 | 1

    def __post_init__(self) -> None:
        integer("exponent_max", self.exponent_max, -100, 100)

    def quantize(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The nearest in the logarithm, of any exponent.

        Raises:
            TypeError: `value` is not floating point.
            ValueError: a number is not finite.
        """
        if problem := real_problem(value=value):
            raise TypeError(problem)
        exponent, residual = _digits(finite_tensor("value", value, floating=True))
        return _number(value.double().sign(), exponent, residual).to(value.dtype)

    def encode(self, value: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
        """Codes: sign, `exponent_max` minus the exponent, and the residual's place (1 to 4, or 5 to 7 for -2 to -4).

        Errors are those of `quantize`.
        """
        if problem := real_problem(value=value):
            raise TypeError(problem)
        exponent, residual = _digits(finite_tensor("value", value, floating=True))
        # 2^e + 2^(e-1) is written as 2^(e+1) - 2^(e-1): the lowest code of the first kind is free for zero.
        above = residual == 1
        exponent, residual = exponent + above, torch.where(above, -2, residual)
        place = self.exponent_max - exponent
        saturated = place < 0
        place, residual = place.clamp(min=0), torch.where(saturated, 1, residual)
        code = (
            (value < 0).long() << 7
            | place.clamp(max=15).long() << 3
            | torch.where(residual < 0, 3 - residual, residual)
        )
        zero = (value == 0) | (place > 15)
        return torch.where(zero, self._zero, code).to(torch.uint8)

    def decode(self, code: UInt8[Tensor, "..."], dtype: torch.dtype = torch.float32) -> Float[Tensor, "..."]:
        """The numbers.

        Raises:
            TypeError: codes are not uint8.
        """
        if code.dtype != torch.uint8:
            raise TypeError(f"code must be uint8, got {code.dtype}")
        bits = code.long()
        exponent, residual = self.exponent_max - (bits >> 3 & 15), bits & 7
        number = _number(1.0 - 2.0 * (bits >> 7), exponent, torch.where(residual > 4, 3 - residual, residual))
        return torch.where(code == self._zero, 0.0, number).to(dtype)


def _digits(value: Tensor) -> tuple[Tensor, Tensor]:
    """Exponent of the leading digit, and the signed distance to the second (0 is none); for 0 anything."""
    size = value.double().abs()
    first = size.log2().round().nan_to_num(neginf=0.0)
    rest = size - torch.exp2(first)
    apart = first - rest.abs().log2().round()
    residual = torch.where(apart <= 4, apart * rest.sign(), 0.0)
    return first.long(), residual.long()


def _number(sign: Tensor, exponent: Tensor, residual: Tensor) -> Tensor:
    second = residual.sign() * torch.exp2((exponent - residual.abs()).double())
    return sign * (torch.exp2(exponent.double()) + second)
