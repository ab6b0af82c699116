r"""What training a diffusion model needs: the loss of a denoiser, noise levels to train at, and labels left out.

$$
\mathcal{L} = \mathbb{E}_{x_0, t, \varepsilon}\ w(t)\, \frac{1}{d}
\bigl\| D(\alpha_t x_0 + \sigma_t \varepsilon,\ t) - y \bigr\|^2,
$$

where $y$ is the kind of prediction that the denoiser makes: clean sample, noise, velocity …
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.diffusion.denoiser import DenoiserLike, Split, form_problem
from trimtab.diffusion.prediction import target
from trimtab.ops.arguments import in_range, integer, number, positive, real_problem, same_shape


def denoising_loss(
    denoiser: DenoiserLike,
    x0: Float[Tensor, "batch ..."],
    t: Float[Tensor, " batch"],
    noise: Float[Tensor, "batch ..."],
    *further: Any,
    weight: Float[Tensor, " batch"] | None = None,
) -> Tensor:
    """The weighted squared error of a denoiser's own prediction, a mean over numbers and samples.

    Args:
        denoiser: the model with its schedule.
        x0: clean samples.
        t: the times to train at.
        noise: standard normal, of the shape of `x0`.
        *further: what the denoiser takes beside x and t, such as a class.
        weight: per sample; one where None. EDM's is `EDMPreconditioned.weight(t)`.

    Returns:
        A scalar.

    Raises:
        TypeError: a tensor is complex or a NumPy array, or the denoiser lacks the form of one or returns a `Split`.
        ValueError: `noise` has not the shape of `x0`, or `t` or `weight` are not one per sample.

    Example:
        >>> from trimtab.diffusion import Denoiser, Flow
        >>> x0, noise, t = torch.zeros(8, 2), torch.ones(8, 2), torch.full((8,), 0.5)
        >>> still = Denoiser(lambda x, t: torch.zeros_like(x), Flow(), "flow")
        >>> denoising_loss(still, x0, t, noise)  # the velocity is noise - x0
        tensor(1.)
    """
    if problem := real_problem(x0=x0, t=t, noise=noise, weight=weight):
        raise TypeError(problem)
    same_shape("noise", noise, "x0", x0)
    for name, value in (("t", t), ("weight", weight)):
        if value is not None and value.shape != x0.shape[:1]:
            raise ValueError(f"{name} must have shape ({len(x0)},), one per sample, got {tuple(value.shape)}")
    if problem := form_problem(denoiser=denoiser):
        raise TypeError(problem)
    schedule = denoiser.schedule
    found = denoiser(schedule.add_noise(x0, noise, t), t, *further)
    if isinstance(found, Split):
        raise TypeError("denoiser must return one prediction, got a Split")
    wanted = target(x0, noise, schedule.alpha(t), schedule.sigma(t), denoiser.prediction)
    error = (found - wanted).square().flatten(1).mean(1)
    return (error if weight is None else weight * error).mean()


def lognormal_levels(
    count: int,
    mean: float = -1.2,
    std: float = 1.2,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, " count"]:
    """Noise levels whose logarithm is normal: where EDM trains (Karras et al., 2022, Table 1).

    Args:
        count: how many.
        mean: of log sigma.
        std: of log sigma.
        generator: decides the draws.
        device: of the generator and the levels.

    Example:
        >>> lognormal_levels(100_000, generator=torch.Generator().manual_seed(0)).log().mean().round(decimals=2)
        tensor(-1.2000)
    """
    integer("count", count)
    mean, std = number("mean", mean), positive("std", std)
    return (mean + std * torch.randn(count, generator=generator, device=device)).exp()


def drop_labels(
    labels: Int[Tensor, " batch"], null: int, share: float = 0.1, *, generator: torch.Generator | None = None
) -> Int[Tensor, " batch"]:
    """Labels, a share of which became the null class: what lets one network learn both models that guidance needs.

    Args:
        labels: classes.
        null: the label that stands for no condition.
        share: expected share that is dropped, in [0, 1].
        generator: decides which; on the device of the labels.

    Raises:
        TypeError: `labels` are no tensor of integers, or `null` is no integer.
        ValueError: `share` is outside [0, 1].

    Example:
        >>> drop_labels(torch.tensor([0, 1]), null=10, share=1.0)
        tensor([10, 10])
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if not isinstance(null, numbers.Integral) or isinstance(null, bool):
        raise TypeError(f"null must be an integer, got {null!r}")
    in_range("share", share, 0, 1)
    dropped = torch.rand(len(labels), generator=generator, device=labels.device) < share
    return labels.masked_fill(dropped, null)
