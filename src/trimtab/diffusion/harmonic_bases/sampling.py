"""Samples of a blind denoiser, and what they tell of its memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trimtab.diffusion.denoiser import StepCallback, after_step
from trimtab.diffusion.jacobian import Map
from trimtab.ops.arguments import in_range, integer, positive, same_shape, tensor


class Samples(NamedTuple):
    """What `universal_sampler` made.

    Attributes:
        images: denoised samples.
        sigmas: (steps, batch) the noise that the denoiser saw in each at each step.
    """

    images: Float[Tensor, "batch ..."]
    sigmas: Float[Tensor, "steps batch"]


@torch.no_grad()
def universal_sampler(
    denoiser: Map,
    y: Float[Tensor, "batch ..."],
    *,
    step: float = 0.01,
    beta: float = 0.5,
    sigma_end: float = 0.01,
    max_steps: int = 2000,
    generator: torch.Generator | None = None,
    callback: StepCallback | None = None,
) -> Samples:
    """Samples with a denoiser that is not told the noise level: it measures it by what it removes.

    Each step moves the share h towards the denoised image and puts back less noise than that took away; h grows from
    `step` as t h0 / (1 + h0 (t - 1)). An image that is done waits for the others.

    Args:
        denoiser: of a batch; it returns clean images.
        y: noise to start from, of unit standard deviation for images in [0, 1].
        step: h0, in (0, 1].
        beta: 1 adds no noise, smaller values more; in (0, 1]. The authors take 0.01 to 0.5.
        sigma_end: noise level at which an image is done.
        max_steps: at most so many.
        generator: of the noise.
        callback: called after every step as `callback(step, sigma, y)`, with the largest noise that the denoiser saw
            before it; a tensor that it returns replaces y.

    Raises:
        TypeError: `denoiser` cannot be called, or `y` is no floating-point tensor.
        ValueError: an argument is out of its range.

    Example:
        >>> centre = torch.tensor([1.0, -1.0])
        >>> made = universal_sampler(lambda y: y + 0.99 * (centre - y), torch.randn(4, 2), step=0.1)
        >>> bool(torch.allclose(made.images, centre.expand(4, 2), atol=0.01))
        True
    """
    in_range("step", step, 0, 1, "right")
    in_range("beta", beta, 0, 1, "right")
    positive("sigma_end", sigma_end)
    y = tensor("y", y, floating=True)
    if not callable(denoiser):
        raise TypeError(f"denoiser must be callable as denoiser(y), got {type(denoiser).__name__}")
    if y.ndim < 2 or y.numel() == 0:
        raise ValueError(f"y must have shape (batch, ...) and hold something, got {tuple(y.shape)}")
    sigmas = []
    for t in range(1, integer("max_steps", max_steps) + 1):
        towards = denoiser(y) - y
        sigma = towards.flatten(1).norm(dim=1) / math.sqrt(y[0].numel())
        sigmas.append(sigma)
        going = (sigma > sigma_end).reshape(-1, *(1,) * (y.ndim - 1))
        if not going.any():
            break
        h = step * t / (1 + step * (t - 1))
        gamma = sigma.reshape(going.shape) * math.sqrt((1 - beta * h) ** 2 - (1 - h) ** 2)
        noise = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device)
        y = torch.where(going, y + h * towards + gamma * noise, y)
        if callback is not None:
            y = after_step(callback, t - 1, float(sigma.amax()), y)
    return Samples(denoiser(y), torch.stack(sigmas))


@dataclass(frozen=True)
class Transition:
    """Where two denoisers stand between memory and knowledge.

    Attributes:
        agreement: mean cosine between the two denoisers' samples from the same noise.
        memory: mean cosine between samples and the nearest image of their own training set.
    """

    agreement: float
    memory: float

    @property
    def generalises(self) -> bool:
        """Whether samples are nearer to the other denoiser's than to what was trained on."""
        return self.agreement > self.memory


def memory_or_knowledge(
    samples: tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch ..."]],
    trained_on: tuple[Float[Tensor, "n ..."], Float[Tensor, "m ..."]],
) -> Transition:
    """Compares samples of two denoisers, from the same noise, with each other and with their training sets.

    Cosines are those of images less the mean of all training images, so that what all images share counts for nothing.

    Args:
        samples: of the first and of the second denoiser, as many.
        trained_on: the images each was trained on.

    Raises:
        ValueError: the shapes do not agree.

    Example:
        >>> train = torch.eye(4)
        >>> memory_or_knowledge((train[:1], train[2:3]), (train[:2], train[2:])).generalises
        False
    """
    same_shape("samples[1]", samples[1], "samples[0]", samples[0])
    mean = torch.cat([part.flatten(1) for part in trained_on]).mean(0)
    first, second = (F.normalize(part.flatten(1) - mean, dim=1) for part in samples)
    known = [F.normalize(part.flatten(1) - mean, dim=1) for part in trained_on]
    nearest = [(made @ train.T).amax(1).mean() for made, train in zip((first, second), known, strict=True)]
    return Transition(float((first * second).sum(1).mean()), float(sum(nearest)) / 2)
