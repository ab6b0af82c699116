"""A walk to the nearest point of another class, by projections onto where two logits are taken to be equal."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import integer, out_of_reach, positive
from trimtab.robust.bounds import in_order

_OVERSHOOT, _LARGEST_PULL, _BACK = 1.05, 0.1, 0.9


def boundary_attack(
    model: nn.Module,
    x: Float[Tensor, "batch ..."],
    y: Int[Tensor, " batch"],
    target: Int[Tensor, " batch"],
    eps: float,
    *,
    steps: int = 100,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Float[Tensor, "batch ..."]:
    r"""The nearest misclassified inputs that a walk towards a class finds, where they are within `eps`.

    Each step takes the difference of two logits to be linear, projects both the point and `x` onto where it is zero,
    and goes a little beyond, to a mixture of the two projections that leans to `x` the nearer that one is. From a
    misclassified point it goes back a tenth of the way to nothing: $x + 0.9 (x_k - x)$.

    Args:
        model: takes inputs to logits.
        x: inputs within `bounds`.
        y: their classes.
        target: the classes to walk to.
        eps: largest change of an entry.
        steps: number of steps.
        bounds: smallest and largest value of an input.

    Returns:
        The nearest misclassified points; `x` itself where none is within `eps`.

    Raises:
        TypeError: `x` is no floating-point tensor, or `y` or `target` not int64.
        ValueError: `eps` or `steps` is not positive, shapes do not fit, `bounds` are not two numbers in order, or
            an input is outside of them by more than `eps`.

    Example:
        >>> net = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.eye_(net.weight)
        >>> at = boundary_attack(net, torch.tensor([[0.6, 0.5]]), torch.tensor([0]), torch.tensor([1]), 0.1)
        >>> bool((at[:, 1] > at[:, 0]).all() and (at - torch.tensor([[0.6, 0.5]])).abs().max() < 0.06)
        True
    """
    eps, steps = positive("eps", eps), integer("steps", steps)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {type(x).__name__}")
    if not all(isinstance(held, Tensor) and held.dtype == torch.int64 for held in (y, target)):
        raise TypeError("y and target must be int64 tensors, got others")
    if x.ndim < 2 or not y.shape == target.shape == x.shape[:1]:
        raise ValueError(
            "x, y and target must be (batch, ...) and twice (batch,), got "
            f"{tuple(x.shape)}, {tuple(y.shape)} and {tuple(target.shape)}"
        )
    if not in_order(bounds):
        raise ValueError(f"bounds must be two finite numbers in order, got {bounds}")
    if out_of_reach(x, eps, bounds):
        raise ValueError(f"x must be within bounds {bounds}, got values from {x.min():g} to {x.max():g}")
    x = x.detach()
    home = x.flatten(1)
    now, nearest = home, home
    least = torch.full((len(x),), eps, dtype=x.dtype, device=x.device).nextafter(x.new_tensor(torch.inf))
    for _ in range(steps):
        at = now.view_as(x).requires_grad_()
        with torch.enable_grad():
            logits = model(at)
            gap = (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]
            (slope,) = torch.autograd.grad(gap.sum(), at)
        slope, gap = slope.flatten(1), gap.detach()
        there = nearest_on_plane(now, slope, gap, bounds)
        here = nearest_on_plane(home, slope, gap + (slope * (home - now)).sum(1), bounds)
        lengths = [move.abs().amax(1, keepdim=True).clamp_min(1e-8) for move in (there, here)]
        pull = (lengths[0] / (lengths[0] + lengths[1])).clamp(0, _LARGEST_PULL)
        now = ((1 - pull) * (now + _OVERSHOOT * there) + pull * (home + _OVERSHOOT * here)).clamp(*bounds)
        with torch.no_grad():
            wrong = model(now.view_as(x)).argmax(1) != y
        away = (now - home).abs().amax(1)
        nearer = wrong & (away < least)
        nearest, least = torch.where(nearer[:, None], now, nearest), torch.where(nearer, away, least)
        now = torch.where(wrong[:, None], home + _BACK * (now - home), now)
    return nearest.view_as(x)


def nearest_on_plane(
    x: Float[Tensor, "batch dim"],
    normal: Float[Tensor, "batch dim"],
    height: Float[Tensor, " batch"],
    bounds: tuple[float, float],
) -> Float[Tensor, "batch dim"]:
    r"""The moves of smallest largest entry that bring points onto a plane and keep them within bounds.

    $$
    \min_d \|d\|_\infty \quad \text{with} \quad h + \langle w, d \rangle = 0, \; l \le x + d \le u
    $$

    All entries move equally far, in their own directions, until they meet a bound. Where no point within the bounds
    is on the plane, the nearest corner to it is taken.

    Args:
        x: points.
        normal: the gradients $w$.
        height: $h$, at `x`.
        bounds: $l$ and $u$.

    Example:
        >>> nearest_on_plane(torch.tensor([[0.5, 0.9]]), torch.ones(1, 2), torch.tensor([-0.4]), (0.0, 1.0))
        tensor([[0.3000, 0.1000]])
    """
    direction = -height.sign()[:, None] * normal.sign()
    room = torch.where(direction > 0, bounds[1] - x, x - bounds[0]).clamp_min(0) * direction.abs()
    order = room.argsort(1)
    sorted_room, weight = room.gather(1, order), normal.abs().gather(1, order)
    spent = (weight * sorted_room).cumsum(1)
    left = weight.flip(1).cumsum(1).flip(1)  # the weight of those that are not yet at their bound
    before = spent - weight * sorted_room
    # Reach when the first entries are at their bounds; the wanted length lies in the first interval that suffices.
    reach = before + left * sorted_room
    wanted = height.abs()[:, None]
    place = (reach < wanted).sum(1, keepdim=True)
    inside = place < x.shape[1]
    place = place.clamp(max=x.shape[1] - 1)
    length = (wanted - before.gather(1, place)) / left.gather(1, place).clamp_min(torch.finfo(x.dtype).tiny)
    length = torch.where(inside, length, sorted_room[:, -1:])
    return direction * torch.minimum(length, room)
