"""Worst-case inputs within a small ball, by projected gradient ascent (PGD).

Reference: Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to Adversarial Attacks",
ICLR 2018, arXiv 1706.06083.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.arguments import integer, non_negative, out_of_reach, tensor_problem
from trimtab.ops.units import power_of_two_unit

Norm = Literal["inf", "l2"]


def random_in_ball(
    x: Float[Tensor, "batch ..."], eps: float, norm: Norm = "inf", *, generator: torch.Generator | None = None
) -> Float[Tensor, "batch ..."]:
    """Offsets of the shape of `x` inside the ball of radius `eps`: uniform (`inf`), or uniform in radius (`l2`).

    Args:
        x: inputs; only shape, dtype and device matter.
        eps: radius.
        norm: "inf" or "l2".
        generator: source of the draw, on the CPU; torch's global one on `x`'s device where it is None.

    Raises:
        TypeError: `x` is no real tensor, or `eps` no number.
        ValueError: `eps` is negative or not finite, or `norm` unknown.

    Example:
        >>> offset = random_in_ball(torch.zeros(4, 3), 0.1, generator=torch.Generator().manual_seed(0))
        >>> bool(offset.abs().max() <= 0.1)
        True
    """
    if problem := tensor_problem(x=x):
        raise TypeError(problem)
    if norm not in get_args(Norm) or non_negative("eps", eps) < 0:
        raise ValueError(f"norm must be one of {get_args(Norm)}, got {norm!r}")
    device = x.device if generator is None else generator.device
    if norm == "inf":
        return (2 * torch.rand(x.shape, generator=generator, device=device, dtype=x.dtype) - 1).to(x.device) * eps
    direction = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
    radius = eps * torch.rand(len(x), generator=generator, device=device, dtype=x.dtype)
    return (_per_sample(radius, x) * direction / _length(direction)).to(x.device)


def pgd(
    objective: Callable[[Float[Tensor, "batch ..."]], Tensor],
    x: Float[Tensor, "batch ..."],
    eps: float,
    *,
    norm: Norm = "inf",
    steps: int = 10,
    step_size: float | None = None,
    start: Float[Tensor, "batch ..."] | None = None,
    bounds: tuple[float, float] | None = None,
) -> Float[Tensor, "batch ..."]:
    r"""Inputs near `x` at which `objective` is large.

    $$
    x' \leftarrow \Pi_{\|x' - x\| \le \epsilon} \bigl( x' + \eta \, \mathrm{dir} \nabla f(x') \bigr)
    $$

    with the sign of the gradient for `inf` and the gradient over its length for `l2`. Gradients of the model's
    parameters are neither computed nor touched.

    Args:
        objective: one number per sample (or their sum) at perturbed inputs.
        x: inputs.
        eps: radius of the ball.
        norm: "inf" or "l2".
        steps: number of ascent steps.
        step_size: length of a step; `2.5 * eps / steps` where it is None.
        start: first offset, projected to the ball; zero where it is None.
        bounds: smallest and largest value an input may take.

    Returns:
        The perturbed inputs, detached.

    Raises:
        TypeError: `x` or `start` is no real tensor, `x` not floating point, or a number is none.
        ValueError: `eps` is negative or not finite, `norm` unknown, `steps` negative, `step_size` not finite,
            `bounds` not in order, `x` farther than `eps` outside of them, or `start` of another shape than `x`.

    Example:
        >>> pgd(lambda x: x[:, 0] - x[:, 1], torch.tensor([[0.5, 0.0]]), 0.25, bounds=(0.0, 1.0))
        tensor([[0.7500, 0.0000]])
    """
    if problem := tensor_problem(x=x, start=start):
        raise TypeError(problem)
    if norm not in get_args(Norm) or non_negative("eps", eps) < 0:
        raise ValueError(f"norm must be one of {get_args(Norm)}, got {norm!r}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if start is not None and start.shape != x.shape:
        raise ValueError(f"start must be of shape {tuple(x.shape)} as x, got shape {tuple(start.shape)}")
    if step_size is not None and (isinstance(step_size, bool) or not isinstance(step_size, Real)):
        raise TypeError(f"step_size must be a number, got {step_size!r}")
    if integer("steps", steps, 0) < 0 or (step_size is not None and not math.isfinite(step_size)):
        raise ValueError(f"step_size must be finite, got {step_size}")
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be two numbers, the smaller first, got {bounds}")
    if out_of_reach(x, eps, bounds):
        raise ValueError(f"x must be within bounds {bounds}, got values from {x.min():g} to {x.max():g}")
    step_size = 2.5 * eps / max(steps, 1) if step_size is None else step_size
    given = x.detach()
    # Offsets in half precision would be rounded by more than many a step is long.
    x = given.float() if given.dtype.itemsize < 4 else given
    offset = torch.zeros_like(x) if start is None else _project(start.detach().to(x.dtype), eps, norm)
    for _ in range(steps):
        moved = _bounded(x + offset, bounds).to(given.dtype).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(objective(moved).sum(), moved)
        gradient = gradient.to(x.dtype)
        step = gradient.sign() if norm == "inf" else gradient / _length(gradient)
        offset = _project(moved.detach() - x + step_size * step, eps, norm)
    return rounded_towards(given, _bounded(x + offset, bounds))


def rounded_towards(x: Float[Tensor, "batch ..."], moved: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
    """In the precision of `x`, no farther from it than `moved` is in its own: rounding leaves no ball.

    Raises:
        TypeError: an argument is no real tensor.

    Example:
        >>> x = torch.tensor([1.0], dtype=torch.float16)
        >>> moved = torch.tensor([1.03])  # the nearest one, 1.0303, is farther away
        >>> round(rounded_towards(x, moved).item(), 4)
        1.0293
    """
    if problem := tensor_problem(x=x, moved=moved):
        raise TypeError(problem)
    if moved.dtype == x.dtype:
        return moved
    rounded = moved.to(x.dtype)
    beyond = (rounded.to(moved.dtype) - x.to(moved.dtype)).abs() > (moved - x.to(moved.dtype)).abs()
    return torch.where(beyond, torch.nextafter(rounded, x), rounded)


def ball_ends(
    x: Float[Tensor, "batch ..."], eps: float, bounds: tuple[float, float] | None = None
) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch ..."]]:
    """The smallest and the largest inputs that differ from `x` by at most `eps` and lie within `bounds`.

    Raises:
        TypeError: `x` is no real tensor.
        ValueError: `eps` is negative or not finite.

    Example:
        >>> low, high = ball_ends(torch.tensor([0.5], dtype=torch.float16), 0.1)
        >>> round(low.item(), 5), round(high.item(), 5)  # 0.4 and 0.6 are no numbers of that precision
        (0.40015, 0.59961)
    """
    if problem := tensor_problem(x=x):
        raise TypeError(problem)
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be at least 0 and finite, got {eps}")
    wide = x.float() if x.dtype.itemsize < 4 else x
    return rounded_towards(x, _bounded(wide - eps, bounds)), rounded_towards(x, _bounded(wide + eps, bounds))


@contextmanager
def eval_mode(model: Callable[..., object]) -> Iterator[None]:
    """Puts a module into eval mode for a while, each submodule back as it was; does nothing to a plain function."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    was_training = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, training in zip(modules, was_training, strict=True):
            module.training = training


def _project(offset: Tensor, eps: float, norm: Norm) -> Tensor:
    if norm == "inf":
        return offset.clamp(-eps, eps)
    return offset * (eps / _length(offset)).clamp(max=1.0)


def _bounded(x: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    return x if bounds is None else x.clamp(*bounds)


def _length(v: Tensor) -> Tensor:
    # Gradients of a network that is sure of itself are so small that their squares would vanish.
    unit = power_of_two_unit(v)
    length = (v / unit).flatten(1).norm(dim=1) * unit.flatten()
    # The smallest normal number keeps a zero vector at zero instead of dividing it by zero.
    return _per_sample(length.clamp(min=torch.finfo(v.dtype).tiny), v)


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.ndim - 1))
