"""Gradient ascent in a ball whose step adapts itself, and the loss that no scale of the logits flattens."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.ops.arguments import integer, out_of_reach, positive
from trimtab.ops.attack import ball_ends
from trimtab.robust.bounds import in_order

_MOMENTUM, _RISING = 0.75, 0.75

Height = Callable[[Float[Tensor, "batch ..."]], tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"]]]
"""What is to be made large at moved inputs, and which of them are misclassified."""


def auto_pgd(
    height: Height,
    x: Float[Tensor, "batch ..."],
    eps: float,
    *,
    steps: int = 100,
    start: Float[Tensor, "batch ..."] | None = None,
    bounds: tuple[float, float] | None = None,
) -> Float[Tensor, "batch ..."]:
    r"""Inputs near `x` that are misclassified, or at which a height is large: signed ascent with momentum.

    $$
    z = P(x_k + \eta \, \mathrm{sign} \nabla f(x_k)), \qquad
    x_{k+1} = P(x_k + \tfrac34 (z - x_k) + \tfrac14 (x_k - x_{k-1}))
    $$

    The step $\eta$ begins at $2 \epsilon$. At checkpoints it is halved, and ascent goes on from the highest point so
    far, for each sample of its own that rose in less than three quarters of the steps since the last one, or whose
    step was kept there and whose maximum has not risen since.

    Args:
        height: what is climbed, and who is misclassified.
        x: inputs.
        eps: largest change of an entry.
        steps: number of steps, and of gradients less one.
        start: first offset; zero where it is None.
        bounds: smallest and largest value of an input.

    Returns:
        For each sample the last misclassified point that was met, or else the highest.

    Raises:
        TypeError: `x` or `start` is no floating-point tensor.
        ValueError: `eps` or `steps` is not positive, `start` has not the shape of `x`, `bounds` are not two numbers in
            order, or an input is outside of them by more than `eps`.

    Example:
        >>> def height(z):
        ...     return z[:, 0] - z[:, 1], z[:, 0] > z[:, 1]
        >>> auto_pgd(height, torch.tensor([[0.4, 0.5]]), 0.1, steps=10)
        tensor([[0.5000, 0.4000]])
    """
    eps, steps = positive("eps", eps), integer("steps", steps)
    if not all(isinstance(held, Tensor) and held.is_floating_point() for held in (x, x if start is None else start)):
        raise TypeError("x and start must be floating-point tensors, got others")
    if start is not None and start.shape != x.shape:
        raise ValueError(f"start must be of shape {tuple(x.shape)} as x, got {tuple(start.shape)}")
    if bounds is not None and not in_order(bounds):
        raise ValueError(f"bounds must be two finite numbers in order, got {bounds}")
    if out_of_reach(x, eps, bounds):
        raise ValueError(f"x must be within bounds {bounds}, got values from {x.min():g} to {x.max():g}")
    x = x.detach()
    low, high = ball_ends(x, eps, bounds)
    now = torch.maximum(torch.minimum(x if start is None else x + start.detach(), high), low)
    before, best, kept = now, now, now
    value, slope, wrong = _climbed(height, now)
    top, top_slope, top_then = value, slope, value
    step = torch.full_like(value, 2 * eps)
    halved = torch.ones_like(value, dtype=torch.bool)
    fooled, rises, since = wrong, torch.zeros_like(value), 0
    stops = checkpoints(steps)
    for count in range(1, steps + 1):
        z = torch.maximum(torch.minimum(now + _each(step, now) * slope.sign(), high), low)
        share = _MOMENTUM if count > 1 else 1.0
        after = torch.maximum(torch.minimum(now + share * (z - now) + (1 - share) * (now - before), high), low)
        before, now = now, after
        last = value
        value, slope, wrong = _climbed(height, now)
        kept = torch.where(_each(wrong, now), now, kept)
        fooled = fooled | wrong
        higher = value > top
        best, top_slope = torch.where(_each(higher, now), now, best), torch.where(_each(higher, now), slope, top_slope)
        top = torch.maximum(top, value)
        rises, since = rises + (value > last), since + 1
        if count in stops:
            stuck = (rises < _RISING * since) | (~halved & (top <= top_then))
            step = torch.where(stuck, step / 2, step)
            now, slope = torch.where(_each(stuck, now), best, now), torch.where(_each(stuck, now), top_slope, slope)
            value = torch.where(stuck, top, value)
            halved, top_then, rises, since = stuck, top, torch.zeros_like(rises), 0
    return torch.where(_each(fooled, now), kept, best)


def checkpoints(steps: int) -> list[int]:
    """After which steps the length of the next ones is looked at: first after 22 %, then ever sooner.

    Example:
        >>> checkpoints(100)
        [22, 41, 57, 70, 80, 87, 93, 99]
    """
    found, last, at = [], 0.0, 0.22
    while (step := math.ceil(round(at * steps, 9))) <= steps:
        found.append(step)
        last, at = at, at + max(at - last - 0.03, 0.06)
    return found


def logit_difference_ratio(
    logits: Float[Tensor, "batch classes"], y: Int[Tensor, " batch"], target: Int[Tensor, " batch"] | None = None
) -> Float[Tensor, " batch"]:
    r"""How far a wrong class is ahead of the right one, in units of the spread of the largest logits.

    $$
    - \frac{z_y - \max_{i \ne y} z_i}{z_{\pi_1} - z_{\pi_3}}, \qquad
    - \frac{z_y - z_t}{z_{\pi_1} - (z_{\pi_3} + z_{\pi_4}) / 2} \text{ towards a class } t
    $$

    with the logits in falling order $\pi$; with fewer classes, the smallest logit stands for those that are missing.

    Args:
        logits: of at least two classes.
        y: right classes.
        target: wrong ones to aim at; whichever is ahead where it is None.

    Example:
        >>> logit_difference_ratio(torch.tensor([[4.0, 3.0, 2.0]]), torch.tensor([0]))
        tensor([-0.5000])
    """
    order = logits.topk(min(4, logits.shape[1])).values
    third, fourth = (order[:, min(place, order.shape[1] - 1)] for place in (2, 3))
    own = logits.gather(1, y[:, None])[:, 0]
    if target is None:
        ahead = logits.scatter(1, y[:, None], -torch.inf).amax(1)
        return (ahead - own) / (order[:, 0] - third + 1e-12)
    ahead = logits.gather(1, target[:, None])[:, 0]
    return (ahead - own) / (order[:, 0] - (third + fourth) / 2 + 1e-12)


def _climbed(height: Height, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Height and slope at inputs, and who is misclassified."""
    at = at.detach().requires_grad_()
    with torch.enable_grad():
        value, wrong = height(at)
        (slope,) = torch.autograd.grad(value.sum(), at)
    return value.detach(), slope, wrong


def _each(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.ndim - 1))
