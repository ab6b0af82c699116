r"""Newton's method with a regulariser that follows the gradient's norm, for exact and approximate Hessians alike.

For smooth functions of up to some thousand variables, convex or not, far from the solution too: there is nothing to
tune, and the method finds out by itself how far the Hessian, or what stands for it, can be trusted.

The gradient-normalized smoothness is about the largest radius within which $H$ predicts the change of the gradient up
to a share of it; the step is regularised by the gradient's norm over that radius, found by doubling and halving:

$$
\gamma(x) = \sup \Bigl\{ r : \lVert \nabla f(x + h) - \nabla f(x) - H h \rVert_*
\le \frac{\lVert \nabla f(x) \rVert_*}{r} \lVert h \rVert \ \ \forall\, \lVert h \rVert \le r \Bigr\}, \qquad
x^+ = x - \bigl(H + \lambda B\bigr)^{-1} \nabla f(x), \quad \lambda = \frac{\lVert \nabla f(x) \rVert_*}{\gamma}
$$

A step is accepted where $f(x) - f(x^+) \ge \lVert \nabla f(x^+) \rVert_*^2 / (8 \lambda)$; then $\gamma$ doubles for
the next one, and otherwise it halves for another try. Norms are $\lVert h \rVert^2 = h^\top B h$ and its dual.

Reference: Andrei Semenov, Martin Jaggi, Nikita Doikov, "Gradient-Normalized Smoothness for Optimization with
Approximate Hessians", ICLR 2026, arXiv 2506.13710 (Algorithm 1 for the step, Algorithm 3 for the search).

The paper asks for the inequality only for those $h$ that also lie in a set $O_{x,g}$, an ellipsoid of directions that
holds the method's steps. Over the whole ball, as here, the radius is smaller or equal: a lower bound of the paper's.

Where this differs from the authors' release: near the solution, where the decrease drowns in rounding, a step may fall
short of the inequality by as much as rounding explains (there the release tries forty shorter steps and takes the
last); and if no try is accepted, the search ends instead of taking one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.arguments import integer, non_negative, positive

Function = Callable[[Float[Tensor, " d"]], Float[Tensor, ""]]
Gradient = Callable[[Float[Tensor, " d"]], Float[Tensor, " d"]]
Curvature = Callable[[Float[Tensor, " d"]], Float[Tensor, "d d"]]
HessianName = Literal["exact", "gauss_newton", "fisher", "zero"]

_ROUNDING = 4.5  # units of rounding of f that an accepted decrease may fall short by: 1e-15 in double precision
MAX_PARAMETERS = 10_000


class Metric:
    """The norm of a symmetric positive definite matrix B, and Newton systems regularised by it.

    Args:
        matrix: (d, d); None is the identity.

    Raises:
        ValueError: the matrix is not square, or not positive definite.
    """

    def __init__(self, matrix: Float[Tensor, "d d"] | None = None) -> None:
        self.matrix = matrix
        if matrix is not None:
            if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
                raise ValueError(f"metric must be a square matrix, got shape {tuple(matrix.shape)}")
            self.factor, failed = torch.linalg.cholesky_ex(matrix)
            if failed or not matrix.isfinite().all():
                raise ValueError("metric must be positive definite, got a matrix that is not")

    def norm(self, h: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
        """The norm of steps."""
        length: Tensor = torch.linalg.vector_norm(h if self.matrix is None else h @ self.factor, dim=-1)
        return length

    def dual_norm(self, g: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
        """The norm of gradients."""
        if self.matrix is not None:
            g = torch.linalg.solve_triangular(self.factor, g.unsqueeze(-1), upper=False).squeeze(-1)
        length: Tensor = torch.linalg.vector_norm(g, dim=-1)
        return length

    def newton_direction(
        self, gradient: Float[Tensor, " d"], hessian: Float[Tensor, "d d"] | None, regularizer: float
    ) -> Float[Tensor, " d"] | None:
        """Minus the inverse of `hessian + regularizer * B` times the gradient, by Cholesky's factors.

        None where the sum is not positive definite; a Hessian of None is zero.
        """
        if hessian is None:
            if self.matrix is None:
                return gradient / -regularizer
            return torch.cholesky_solve(gradient[:, None], self.factor)[:, 0] / -regularizer
        if self.matrix is None:
            system = hessian.clone()
            system.diagonal().add_(regularizer)
        else:
            system = hessian.add(self.matrix, alpha=regularizer)
        factor, failed = torch.linalg.cholesky_ex(system)
        return None if failed else torch.cholesky_solve(gradient[:, None], factor)[:, 0].neg()


@dataclass(frozen=True)
class GradientNormalizedStep:
    """An accepted step.

    Attributes:
        direction: (d,), what to add to the point.
        value: the function's value there.
        gradient: (d,), and its gradient.
        gamma: the radius for the next step.
        regularizer: the $\\lambda$ of this step.
        n_solves: systems solved, those of refused tries included.
    """

    direction: Float[Tensor, " d"]
    value: Float[Tensor, ""]
    gradient: Float[Tensor, " d"]
    gamma: float
    regularizer: float
    n_solves: int


def gradient_normalized_step(
    evaluate: Callable[[Float[Tensor, " d"]], tuple[Tensor, Tensor]],
    value: Float[Tensor, ""],
    gradient: Float[Tensor, " d"],
    hessian: Float[Tensor, "d d"] | None,
    gamma: float,
    *,
    metric: Metric | None = None,
    gamma_min: float = 1e-9,
    max_halvings: int = 40,
) -> GradientNormalizedStep | None:
    """One iteration of Algorithm 3: tries radii from `gamma` downwards until a step is accepted.

    Args:
        evaluate: maps a direction (d,) to the value and the gradient at the point moved by it.
        value: the function's value at the point.
        gradient: (d,), its gradient there, not zero.
        hessian: (d, d), exact or approximate; None is zero, and gives normalised gradient steps.
        gamma: the radius to try first, positive.
        metric: the norm; by default the Euclidean one.
        gamma_min: least radius for the next step.
        max_halvings: most tries.

    Returns:
        The step; None where no try was accepted.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> evaluate = lambda step: (0.5 * (x + step).square().sum(), x + step)
        >>> gradient_normalized_step(evaluate, torch.tensor(2.5), x, torch.eye(2), gamma=5**0.5).direction
        tensor([-0.5000, -1.0000])
    """
    metric = metric or Metric()
    length = float(metric.dual_norm(gradient))
    slack = _ROUNDING * torch.finfo(gradient.dtype).eps * max(1.0, abs(float(value)))
    for halvings in range(max_halvings):
        regularizer = length / gamma
        direction = metric.newton_direction(gradient, hessian, regularizer)
        if direction is not None:
            new_value, new_gradient = evaluate(direction)
            decrease = float(value) - float(new_value) + slack
            # As a product, so that a regulariser that has run out of digits is not divided by; a NaN is refused.
            if 8 * regularizer * decrease >= float(metric.dual_norm(new_gradient)) ** 2:
                ahead = max(2 * gamma, gamma_min)
                return GradientNormalizedStep(
                    direction, new_value, new_gradient, ahead, regularizer, n_solves=halvings + 1
                )
        gamma /= 2
    return None


@dataclass(frozen=True)
class NewtonResult:
    """Where a minimisation ended, named like SciPy's results.

    Attributes:
        x: (d,), the point.
        fun: its value.
        jac: (d,), its gradient.
        nit: accepted steps.
        n_solves: linear systems solved, those of refused tries included.
        grad_norms: dual norm of the gradient at the start and after every step.
        gammas: radius of every accepted step.
        success: whether the gradient's norm fell to `grad_tol`.
        message: why it ended.
    """

    x: Float[Tensor, " d"]
    fun: float
    jac: Float[Tensor, " d"]
    nit: int
    n_solves: int
    grad_norms: tuple[float, ...]
    gammas: tuple[float, ...]
    success: bool
    message: str


@torch.no_grad()
def gradient_normalized_newton(
    fun: Function,
    x0: Float[Tensor, " d"],
    *,
    gradient: Gradient | None = None,
    hessian: HessianName | Curvature = "exact",
    metric: Float[Tensor, "d d"] | None = None,
    gamma: float = 1.0,
    grad_tol: float = 1e-8,
    max_iter: int = 1000,
    max_halvings: int = 40,
    callback: Callable[[Float[Tensor, " d"]], object] | None = None,
) -> NewtonResult:
    """Minimises a smooth function by Newton steps regularised by gradient-normalized smoothness.

    Derivatives are the function's own, if it has methods `gradient(x)` and `hessian(x)` as those of
    `trimtab.optim.objectives` have, and else found by `torch.func`. Use double precision: in single precision
    gradients seldom fall below 1e-4.

    Args:
        fun: maps (d,) to a scalar.
        x0: (d,), the start.
        gradient: maps (d,) to (d,); replaces the function's own.
        hessian: "exact"; "gauss_newton" or "fisher", for a function with methods of these names; "zero", for normalised
            gradient steps; or a function that maps (d,) to (d, d), symmetric and best positive semi-definite.
        metric: (d, d), the matrix B of the norm; the identity if not given.
        gamma: radius of the first try, positive.
        grad_tol: dual norm of the gradient at which to stop, at least 0.
        max_iter: most steps.
        max_halvings: most tries for a step, at least 1.
        callback: called with the start and the point after every step.

    Raises:
        TypeError: `x0` is not of floating point numbers of single or double precision.
        ValueError: an argument is out of its range, the function has no such Hessian, or its value, gradient or Hessian
            at an iterate is not finite or has the wrong shape.

    Example:
        >>> rosenbrock = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        >>> result = gradient_normalized_newton(rosenbrock, torch.tensor([-2.0, 2.0], dtype=torch.float64))
        >>> result.success, result.nit < 100
        (True, True)
        >>> torch.allclose(result.x, torch.ones(2, dtype=torch.float64))
        True
    """
    _check_start(x0)
    positive("gamma", gamma)
    non_negative("grad_tol", grad_tol)
    integer("max_iter", max_iter, 0)
    integer("max_halvings", max_halvings)
    evaluate, curvature = _derivatives(fun, gradient, hessian)
    norm = Metric(metric)
    x = x0.detach().clone()
    value, slope = _checked(x, *evaluate(x))
    grad_norms, gammas, n_solves, message = [float(norm.dual_norm(slope))], [], 0, "the iterations are used up"
    if callback is not None:
        callback(x)
    for _ in range(max_iter):
        if grad_norms[-1] <= grad_tol:
            break
        step = gradient_normalized_step(
            lambda direction, x=x: evaluate(x + direction),  # type: ignore[misc]
            value,
            slope,
            _checked_hessian(x, curvature(x)),
            gamma,
            metric=norm,
            max_halvings=max_halvings,
        )
        if step is None:
            n_solves += max_halvings
            message = "no step was accepted: the gradient is as small as rounding allows, or wrong"
            break
        x, value, slope, gamma = x + step.direction, step.value, step.gradient, step.gamma
        n_solves += step.n_solves
        grad_norms.append(float(norm.dual_norm(slope)))
        gammas.append(grad_norms[-2] / step.regularizer)
        if callback is not None:
            callback(x)
    success = grad_norms[-1] <= grad_tol
    return NewtonResult(
        x=x,
        fun=float(value),
        jac=slope,
        nit=len(gammas),
        n_solves=n_solves,
        grad_norms=tuple(grad_norms),
        gammas=tuple(gammas),
        success=success,
        message="the gradient's norm is within grad_tol" if success else message,
    )


@torch.no_grad()
def gradient_normalized_smoothness(
    fun: Function,
    x: Float[Tensor, " d"],
    *,
    gradient: Gradient | None = None,
    hessian: HessianName | Curvature = "exact",
    metric: Float[Tensor, "d d"] | None = None,
    n_directions: int = 64,
    max_radius: float = 1e6,
    generator: torch.Generator | None = None,
    directions: Float[Tensor, "n d"] | None = None,
) -> float:
    """Estimates the radius that the method is named after, from its definition, along random directions.

    As it looks only at some steps, of lengths that double, the estimate is never below the radius but for rounding, and
    comes down to it with more directions.

    Args:
        fun: maps (d,) to a scalar.
        x: (d,), a point where the gradient is not zero.
        gradient: as in `gradient_normalized_newton`.
        hessian: as in `gradient_normalized_newton`.
        metric: (d, d), the matrix B of the norm.
        n_directions: number of directions; each is looked at both ways.
        max_radius: where to stop looking.
        generator: where the directions are drawn from.
        directions: (n, d), the directions themselves, instead of drawn ones.

    Returns:
        The radius, within a thousandth; infinity if it is beyond `max_radius`.

    Raises:
        ValueError: the gradient is zero, or an argument is out of its range.

    Example:
        >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> gradient_normalized_smoothness(lambda x: x.square().sum(), x)
        inf
        >>> radius = gradient_normalized_smoothness(lambda x: x.square().sum(), x, hessian="zero")  # |gradient| / 2
        >>> round(radius / 5**0.5, 2)
        1.0
    """
    _check_start(x)
    positive("max_radius", max_radius)
    evaluate, curvature = _derivatives(fun, gradient, hessian)
    norm = Metric(metric)
    _, slope = _checked(x, *evaluate(x))
    length = float(norm.dual_norm(slope))
    if length == 0:
        raise ValueError("x must not be stationary, got a point with gradient zero")
    if directions is None:
        integer("n_directions", n_directions)
        directions = torch.randn(n_directions, len(x), generator=generator, dtype=x.dtype, device=x.device)
    directions = directions / norm.norm(directions)[:, None]
    directions = torch.cat([directions, -directions])
    matrix = _checked_hessian(x, curvature(x))
    bent = torch.zeros_like(directions) if matrix is None else directions @ matrix.mT

    def error(radius: float) -> float:
        """Largest error of the prediction at steps of this length, per unit of length."""
        moved = torch.stack([evaluate(x + radius * direction)[1] for direction in directions])
        return float(norm.dual_norm((moved - slope) / radius - bent).nan_to_num(nan=math.inf).max())

    # radius * (largest error up to radius) grows with the radius: walk up to where it passes the gradient's norm.
    radius, worst, below = 1e-6, 0.0, 0.0
    while radius <= max_radius:
        here = max(worst, error(radius))
        if radius * here > length:
            break
        radius, worst, below = 2 * radius, here, radius
    else:
        return math.inf
    while radius - below > 1e-3 * radius:
        middle = (below + radius) / 2
        here = max(worst, error(middle))
        if middle * here > length:
            radius = middle
        else:
            below, worst = middle, here
    return (below + radius) / 2


class GradientNormalizedNewton(torch.optim.Optimizer):
    """The same method for the parameters of a small model, on a loss that is the same at every call (no minibatches).

    A step is one iteration of Algorithm 3, with the exact Hessian. It needs a closure that returns the loss and does
    not call `backward`; it is called once more for every try. Time grows like the third power of the number of
    parameters, memory like the second.

    Args:
        params: parameters of one group, of one precision and device; at most ten thousand numbers.
        gamma: radius of the first try, positive.
        max_halvings: most tries for a step, at least 1.

    Raises:
        ValueError: an argument is out of its range, there are several groups, or too many parameters.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float64))
        >>> optimizer = GradientNormalizedNewton([weight])
        >>> loss = optimizer.step(lambda: 0.5 * weight.square().sum())
        >>> weight.data
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """

    def __init__(self, params: Iterable[nn.Parameter], *, gamma: float = 1.0, max_halvings: int = 40) -> None:
        positive("gamma", gamma)
        integer("max_halvings", max_halvings)
        super().__init__(params, {"gamma": gamma, "max_halvings": max_halvings})
        if len(self.param_groups) != 1:
            raise ValueError(f"params must be one group (the step is one for all), got {len(self.param_groups)}")
        held: list[nn.Parameter] = self.param_groups[0]["params"]
        count = sum(p.numel() for p in held)
        if count > MAX_PARAMETERS:
            raise ValueError(f"params must be at most {MAX_PARAMETERS} numbers (the Hessian is dense), got {count}")
        if len({(p.dtype, p.device) for p in held}) != 1:
            raise ValueError("params must be of one dtype on one device, got several")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """One accepted step; none where the gradient is zero or no try is accepted.

        Args:
            closure: returns the loss, with its graph.

        Returns:
            The loss before the step.
        """
        group = self.param_groups[0]
        params: list[nn.Parameter] = group["params"]
        start = nn.utils.parameters_to_vector(params)
        with torch.enable_grad():
            loss = closure()
            if not loss.requires_grad:
                raise ValueError(
                    "closure must return the loss with its graph, without calling backward, got none"
                )
            gradient = _flat(torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True))
            hessian = _rows(gradient, params)
        if not gradient.any():
            return loss.detach()

        def evaluate(direction: Tensor) -> tuple[Tensor, Tensor]:
            nn.utils.vector_to_parameters(start + direction, params)
            with torch.enable_grad():
                value = closure()
                return value.detach(), _flat(torch.autograd.grad(value, params, materialize_grads=True))

        step = None
        try:
            step = gradient_normalized_step(
                evaluate, loss.detach(), gradient.detach(), hessian, group["gamma"], max_halvings=group["max_halvings"]
            )
        finally:
            if step is None:  # refused, or the closure failed
                nn.utils.vector_to_parameters(start, params)
        if step is not None:
            group["gamma"] = step.gamma
        return loss.detach()


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _rows(gradient: Tensor, params: list[nn.Parameter]) -> Tensor:
    """The Hessian, from a gradient that has its graph."""
    if not gradient.requires_grad:  # the loss is linear
        return gradient.new_zeros(len(gradient), len(gradient))
    unit = torch.eye(len(gradient), dtype=gradient.dtype, device=gradient.device)
    rows = torch.autograd.grad(gradient, params, unit, is_grads_batched=True, materialize_grads=True)
    return torch.cat([row.reshape(len(gradient), -1) for row in rows], dim=1)


def _derivatives(
    fun: Function, gradient: Gradient | None, hessian: HessianName | Curvature
) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Callable[[Tensor], Tensor | None]]:
    """The value with the gradient, and the Hessian, as functions of the point."""
    slope = gradient or getattr(fun, "gradient", None)
    if slope is not None:
        evaluate = lambda x: (fun(x), slope(x))  # noqa: E731
    else:
        both = torch.func.grad_and_value(fun)
        evaluate = lambda x: both(x)[::-1]  # noqa: E731
    if callable(hessian):
        return evaluate, hessian
    if hessian not in get_args(HessianName):
        raise ValueError(f"hessian must be a function or one of {', '.join(get_args(HessianName))}, got {hessian!r}")
    if hessian == "zero":
        return evaluate, lambda x: None
    own: Any = getattr(fun, "hessian" if hessian == "exact" else hessian, None)
    if own is None and hessian != "exact":
        raise ValueError(f"hessian must be a method of the function, or a function, got {hessian!r}, which fun has not")
    return evaluate, cast(Curvature, own or torch.func.hessian(fun))


def _checked(x: Tensor, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    if value.shape != () or gradient.shape != x.shape:
        raise ValueError(
            f"fun must give a scalar and a gradient of shape {tuple(x.shape)}, got shapes {tuple(value.shape)} and "
            f"{tuple(gradient.shape)}"
        )
    if not (value.isfinite() and gradient.isfinite().all()):
        raise ValueError("fun and its gradient must be finite at the start, got NaN or infinity")
    return value, gradient


def _checked_hessian(x: Tensor, hessian: Tensor | None) -> Tensor | None:
    if hessian is None:
        return None
    if hessian.shape != (len(x), len(x)):
        raise ValueError(f"hessian must give a matrix of shape {(len(x), len(x))}, got {tuple(hessian.shape)}")
    if not hessian.isfinite().all():
        raise ValueError("hessian must be finite, got NaN or infinity at an iterate")
    return hessian


def _check_start(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"the start must be of float32 or float64, got {x.dtype}")
    if x.dim() != 1 or x.numel() == 0:
        raise ValueError(f"the start must be a vector with entries, got shape {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("the start must be finite, got NaN or infinity")
