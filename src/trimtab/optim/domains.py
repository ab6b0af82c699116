r"""Where an online learner plays, and the mirror step there: projections, and the entropy's softmax.

A domain goes with a mirror map $\psi$ and its Bregman divergence $B$. Its `step` solves, in mirror coordinates
$\nabla\psi(x)$,

$$
\operatorname*{argmin}_{x \in X}\ \eta \langle g, x \rangle + B_\psi(x, \hat x)
$$

Half the squared Euclidean norm is the map of `Unconstrained`, `Ball`, `Box` and `Simplex`, whose step is a projection;
negative entropy is that of `EntropicSimplex`, whose step is a multiplicative update. Both maps are 1-strongly convex,
in the 2-norm and in the 1-norm.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import positive, real_problem, tensor_problem
from trimtab.ops.simplex import project_simplex

Vector = Float[Tensor, "*batch n"]
Matrix = Float[Tensor, "*batch n n"]


class Domain:
    """A closed convex set with the Euclidean mirror map; a subclass says how to project onto it."""

    def project(self, x: Vector) -> Vector:
        """The nearest point of the domain."""
        raise NotImplementedError(f"{type(self).__name__} must define project(x)")

    def to_mirror(self, x: Vector) -> Vector:
        """Mirror coordinates of a point; the point itself for the Euclidean map."""
        return x

    def from_mirror(self, z: Vector) -> Vector:
        """The point of some mirror coordinates."""
        return z

    def step(self, z: Vector, gradient: Vector, lr: float | Tensor) -> Vector:
        """The mirror step from mirror coordinates `z`, in mirror coordinates. `lr` broadcasts against vectors.

        Raises:
            TypeError: `z` or `gradient` is no real tensor.
            ValueError: `lr`, given as a number, is negative or not finite.
        """
        if problem := tensor_problem(z=z, gradient=gradient):
            raise TypeError(problem)
        if not isinstance(lr, Tensor) and not 0 <= lr < math.inf:
            raise ValueError(f"lr must be at least 0 and finite, got {lr}")
        return self.project(z - lr * gradient)

    def divergence(self, x: Vector, y: Vector) -> Float[Tensor, "*batch"]:
        """The Bregman divergence of `x` from `y`."""
        return 0.5 * (x - y).square().sum(-1)

    def dual_norm(self, gradient: Vector) -> Float[Tensor, "*batch"]:
        """The norm for gradients: the dual of the one in which the mirror map is 1-strongly convex."""
        return _norm(gradient)[..., 0]

    def check(self, x: Vector) -> None:
        """Refuses a point outside the domain.

        Raises:
            ValueError: it is outside by more than rounding.
        """
        if not torch.allclose(self.project(x), x, rtol=0, atol=_slack(x)):
            raise ValueError(f"x0 must be in the domain {self!r}, got a point outside")

    def __repr__(self) -> str:
        held = ", ".join(f"{name}={value}" for name, value in vars(self).items() if not name.startswith("_"))
        return f"{type(self).__name__}({held})"


class MatrixNorm:
    r"""The norm $\sqrt{u^\top H u}$ of positive definite matrices H, which are factored at most once."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix

    @cached_property
    def _cholesky(self) -> Matrix:
        factor: Tensor = torch.linalg.cholesky(self.matrix)
        return factor

    @cached_property
    def eigen(self) -> tuple[Vector, Matrix]:
        """Eigenvalues, and eigenvectors as columns."""
        values, vectors = torch.linalg.eigh(self.matrix)
        return values, vectors

    def solve(self, x: Vector) -> Vector:
        r"""$H^{-1} x$."""
        return torch.cholesky_solve(x[..., None], self._cholesky)[..., 0]


class NewtonDomain(Domain):
    """A domain that also has a projection in the norm of a matrix."""

    def newton_step(self, x: Vector, gradient: Vector, norm: MatrixNorm) -> Vector:
        r"""The minimiser of $\langle g, u \rangle + \frac12 \lVert u - x \rVert_H^2$ over the domain."""
        raise NotImplementedError(f"{type(self).__name__} must define newton_step(x, gradient, norm)")


class Unconstrained(NewtonDomain):
    """The whole space."""

    def project(self, x: Vector) -> Vector:
        return x

    def newton_step(self, x: Vector, gradient: Vector, norm: MatrixNorm) -> Vector:
        return x - norm.solve(gradient)


class Ball(NewtonDomain):
    """A Euclidean ball.

    Args:
        radius: positive.
        center: the origin by default; a vector otherwise.

    Raises:
        ValueError: `radius` is not a positive number, or `center` not finite.

    Example:
        >>> Ball(radius=1.0).project(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """

    def __init__(self, radius: float, center: float | Tensor = 0.0) -> None:
        positive("radius", radius)
        if not torch.as_tensor(center).isfinite().all():
            raise ValueError(f"center must be finite, got {center}")
        self.radius, self.center = radius, center

    def project(self, x: Vector) -> Vector:
        if problem := tensor_problem(x=x):
            raise TypeError(problem)
        offset = x - self.center
        return self.center + offset * (self.radius / _norm(offset)).clamp_max(1.0)

    def newton_step(self, x: Vector, gradient: Vector, norm: MatrixNorm) -> Vector:
        free = x - norm.solve(gradient)
        offset = free - self.center
        if float(_norm(offset).max()) <= self.radius:
            return free
        values, vectors = norm.eigen
        rotated = (vectors.mT @ offset[..., None])[..., 0]
        return self.center + (vectors @ shrink_to_ball(rotated, values, self.radius)[..., None])[..., 0]


class Box(Domain):
    """All points between two bounds, entry by entry.

    Args:
        low: lower bound; a number or a vector.
        high: upper bound.

    Raises:
        ValueError: a lower bound is not below its upper one.
    """

    def __init__(self, low: float | Tensor, high: float | Tensor) -> None:
        if not bool((torch.as_tensor(low) < torch.as_tensor(high)).all()):
            raise ValueError(f"low must be below high, got {low} and {high}")
        self.low, self.high = low, high

    def project(self, x: Vector) -> Vector:
        return x.clamp(torch.as_tensor(self.low, dtype=x.dtype), torch.as_tensor(self.high, dtype=x.dtype))


class Simplex(Domain):
    """The probability simplex with the Euclidean mirror map."""

    def project(self, x: Vector) -> Vector:
        return project_simplex(x)


class EntropicSimplex(Domain):
    """The probability simplex with negative entropy: exponentiated gradient steps, in the logarithms of the weights.

    Example:
        >>> import math
        >>> domain = EntropicSimplex()
        >>> z = domain.step(domain.to_mirror(torch.tensor([0.5, 0.5])), torch.tensor([0.0, 1.0]), lr=math.log(3))
        >>> domain.from_mirror(z)
        tensor([0.7500, 0.2500])
    """

    def to_mirror(self, x: Vector) -> Vector:
        if problem := real_problem(x=x):
            raise TypeError(problem)
        return x.log()

    def from_mirror(self, z: Vector) -> Vector:
        if problem := real_problem(z=z):
            raise TypeError(problem)
        return z.softmax(-1)

    def step(self, z: Vector, gradient: Vector, lr: float | Tensor) -> Vector:
        if problem := tensor_problem(z=z, gradient=gradient):
            raise TypeError(problem)
        if not isinstance(lr, Tensor) and not 0 <= lr < math.inf:
            raise ValueError(f"lr must be at least 0 and finite, got {lr}")
        return (z - lr * gradient).log_softmax(-1)

    def divergence(self, x: Vector, y: Vector) -> Float[Tensor, "*batch"]:
        return (torch.xlogy(x, x) - torch.xlogy(x, y)).sum(-1)

    def dual_norm(self, gradient: Vector) -> Float[Tensor, "*batch"]:
        return gradient.abs().amax(-1)

    def check(self, x: Vector) -> None:
        if not bool((x > 0).all()) or not torch.allclose(x.sum(-1), x.new_ones(()), rtol=0, atol=_slack(x)):
            raise ValueError(f"x0 must have positive entries that sum to 1 for {self!r}")


def shrink_to_ball(x: Vector, weights: Vector, radius: float, max_iter: int = 50) -> Vector:
    r"""The nearest point to `x` of norm at most `radius`, in the norm $\sqrt{\sum_i w_i u_i^2}$.

    It is $w_i x_i / (w_i + \lambda)$; $\lambda$ is the root of $1/\text{norm} = 1/\text{radius}$, a concave function,
    so that Newton's method from 0 rises to it without overshooting.

    Args:
        x: (..., n).
        weights: (..., n), positive.
        radius: positive.
        max_iter: most Newton steps; a handful reach rounding.

    Example:
        >>> shrink_to_ball(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 5.0]), radius=1.0)
        tensor([1., 0.])
    """
    multiplier = torch.zeros_like(x[..., :1])
    rounding = 64 * torch.finfo(x.dtype).eps
    for _ in range(max_iter):
        shifted = weights + multiplier
        point = weights / shifted * x
        squares = point.square()
        norm = squares.sum(-1, keepdim=True).sqrt()
        over = norm / radius - 1
        if float(over.max()) <= rounding:
            break
        slope = (squares / shifted).sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        multiplier = multiplier + over.clamp_min(0) * norm.square() / slope
    return point * (radius / norm).clamp_max(1.0)


def _norm(x: Vector) -> Float[Tensor, "*batch 1"]:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm


def _slack(x: Tensor) -> float:
    """What rounding may add up to in a sum over a vector's entries."""
    return 10 * x.shape[-1] * torch.finfo(x.dtype).eps * max(1.0, float(x.detach().abs().max()))
