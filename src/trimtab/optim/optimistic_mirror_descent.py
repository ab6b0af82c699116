r"""Optimistic online mirror descent: play as if the last gradient came again, then correct with the one that came.

For losses that arrive one at a time and are alike from round to round, drawn from one distribution or drifting slowly:
regret grows with how much gradients vary instead of how large they are. `OptimisticGD` is the same idea as a PyTorch
optimizer, for games and other problems in which plain gradient descent circles.

$$
x_t = \operatorname*{argmin}_{x \in X}\ \langle M_t, x \rangle + B_{\psi_t}(x, \hat x_t), \qquad
\hat x_{t+1} = \operatorname*{argmin}_{x \in X}\ \langle g_t, x \rangle + B_{\psi_t}(x, \hat x_t), \qquad
M_{t+1} = g_t = \nabla f_t(x_t)
$$

Reference: Sijia Chen, Yu-Jie Zhang, Wei-Wei Tu, Peng Zhao, Lijun Zhang, "Optimistic Online Mirror Descent for Bridging
Stochastic and Adversarial Online Convex Optimization", ICML 2023 and JMLR 2024, arXiv 2302.04552. The two layers for
dynamic regret are those of Peng Zhao, Yu-Jie Zhang, Lijun Zhang, Zhi-Hua Zhou, "Adaptivity and Non-stationarity",
JMLR 2024, arXiv 2112.14368.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import non_negative, positive, real_problem, tensor_problem
from trimtab.optim.domains import Domain, MatrixNorm, NewtonDomain, Vector
from trimtab.optim.rule import Hyper, Params, RuleOptimizer, State

# The step size of round t = 1, 2, ... from t and the squared gradient changes before it, a tensor (*batch, 1).
Rate: TypeAlias = Callable[[int, Tensor], float | Tensor]


@dataclass(frozen=True)
class ConvexRate:
    r"""$\eta_t = D / \sqrt{\delta + 4 G^2 + V_{t-1}}$ with $V_{t-1} = \sum_{s<t} \lVert g_s - M_s \rVert^2$.

    For convex losses and bounded divergences, which those of `EntropicSimplex` are not: take a constant step there.

    Args:
        diameter: largest distance between two points of the domain.
        gradient_bound: largest norm of a gradient.
        smoothness: Lipschitz constant L of the expected losses' gradients, which gives $\delta = 10 D^2 L^2$; with 0,
            the regret is bounded by the gradients' changes alone, as for any optimistic method.

    Raises:
        ValueError: a number is not positive (`smoothness`: negative) or not finite; at a call, on the CPU, where the
            variation is negative or not finite.

    Example:
        >>> ConvexRate(diameter=2.0, gradient_bound=1.0)(3, torch.tensor(12.0))
        tensor(0.5000)
    """

    diameter: float
    gradient_bound: float
    smoothness: float = 0.0

    def __post_init__(self) -> None:
        positive("diameter", self.diameter)
        positive("gradient_bound", self.gradient_bound)
        non_negative("smoothness", self.smoothness)

    def __call__(self, t: int, variation: Tensor) -> Tensor:
        if problem := real_problem(variation=variation):
            raise TypeError(problem)
        if variation.device.type == "cpu" and not bool(((variation >= 0) & variation.isfinite()).all()):
            raise ValueError(f"variation must be at least 0 and finite, got {variation.min().item():g}")
        delta = 10 * (self.diameter * self.smoothness) ** 2
        return self.diameter * (delta + 4 * self.gradient_bound**2 + variation).rsqrt()


@dataclass(frozen=True)
class StronglyConvexRate:
    r"""$\eta_t = 2 / (\lambda t)$, for losses that are $\lambda$-strongly convex in expectation.

    Raises:
        ValueError: `strong_convexity` is not a positive number.
    """

    strong_convexity: float

    def __post_init__(self) -> None:
        positive("strong_convexity", self.strong_convexity)

    def __call__(self, t: int, variation: Tensor) -> float:
        return 2 / (self.strong_convexity * t)


class OptimisticOMD:
    """Optimistic online mirror descent with scalar step sizes.

    Leading dimensions are independent learners: `x0` of shape (8, 20) plays eight games in 20 dimensions at once.

    Args:
        x0: (*batch, n) first anchor, in the domain; with no first hint also the first play.
        domain: where to play, with its mirror map: `Ball`, `Box`, `Simplex`, `Unconstrained` or `EntropicSimplex`.
        lr: a constant step size (a number, or a tensor that broadcasts against `x0`), or a `Rate`, as `ConvexRate` is.
        hint: (*batch, n) guess of the first gradient; zero by default.

    Raises:
        ValueError: `x0` is outside the domain or not finite, `lr` is not positive, or `hint` has another shape.

    Example:
        >>> from trimtab.optim.domains import Ball
        >>> learner = OptimisticOMD(torch.zeros(2), Ball(radius=1.0), lr=0.1)
        >>> for _ in range(3):
        ...     x = learner.predict()
        ...     learner.update(grad=torch.tensor([1.0, 0.0]))
        >>> learner.predict()
        tensor([-0.4000,  0.0000])
    """

    def __init__(self, x0: Vector, domain: Domain, lr: float | Tensor | Rate, *, hint: Vector | None = None) -> None:
        _check_vector("x0", x0, None)
        domain.check(x0)
        if not callable(lr):
            held = torch.as_tensor(lr)
            if not bool(((held > 0) & held.isfinite()).all()):
                raise ValueError(f"lr must be positive and finite, got {lr}")
        self.domain, self.lr = domain, lr
        hint = torch.zeros_like(x0) if hint is None else _check_vector("hint", hint, x0)
        self._play(1, domain.to_mirror(x0), torch.zeros_like(x0[..., :1]), hint)

    @property
    def anchor(self) -> Vector:
        r"""The point $\hat x_t$ that is carried from round to round."""
        return self.domain.from_mirror(self._anchor)

    def predict(self) -> Vector:
        """The play of this round; the gradient that `update` takes is the loss's at this point."""
        return self._point

    @torch.no_grad()
    def update(self, grad: Vector, hint: Vector | None = None) -> None:
        """Ends the round.

        Args:
            grad: (*batch, n) gradient of the round's loss at the play.
            hint: (*batch, n) guess of the next gradient; the last one by default. With zeros, this is projected
                online gradient descent (on `EntropicSimplex`, exponential weights).

        Raises:
            ValueError: an argument has another shape than the play, or is not finite.
        """
        grad = _check_vector("grad", grad, self._point)
        hint = grad if hint is None else _check_vector("hint", hint, self._point)
        anchor = self.domain.step(self._anchor, grad, self._rate)
        variation = self.variation + self.domain.dual_norm(grad - self._hint)[..., None].square()
        self._play(self.t + 1, anchor, variation, hint)

    def _play(self, t: int, anchor: Vector, variation: Tensor, hint: Vector) -> None:
        """Begin round t. Nothing is kept before all of it is known: a rate may refuse what it is given."""
        rate = self.lr(t, variation) if callable(self.lr) else self.lr
        self._point = self.domain.from_mirror(self.domain.step(anchor, hint, rate))
        self.t, self._anchor, self.variation, self._hint, self._rate = t, anchor, variation, hint, rate


class OptimisticNewton:
    r"""Optimistic online mirror descent in a norm that the gradients shape, for exp-concave losses.

    $\psi_t(x) = \frac12 \lVert x \rVert_{H_t}^2$ with
    $H_t = I + \frac{\beta}{2} G^2 I + \frac{\beta}{2} \sum_{s<t} g_s g_s^\top$ and
    $\beta = \frac12 \min\{1 / (4GD), \alpha\}$. Leading dimensions are independent learners.

    Args:
        x0: (*batch, n) first anchor, in the domain.
        domain: `Ball` or `Unconstrained`; on other domains the step is a quadratic program of its own.
        exp_concavity: $\alpha$ for which every $\exp(-\alpha f_t)$ is concave.
        diameter: largest distance between two points of the domain.
        gradient_bound: largest norm of a gradient.
        hint: (*batch, n) guess of the first gradient; zero by default.

    Raises:
        TypeError: the domain has no projection in the norm of a matrix.
        ValueError: `x0` is outside the domain or not finite, a number is not positive, or `hint` has another shape.

    Example:
        >>> from trimtab.optim.domains import Ball
        >>> learner = OptimisticNewton(torch.zeros(2), Ball(1.0), exp_concavity=0.1, diameter=2.0, gradient_bound=2.0)
        >>> learner.update(grad=torch.tensor([1.0, 0.0]))
        >>> bool(learner.predict()[0] < learner.anchor[0] < 0)
        True
    """

    def __init__(
        self,
        x0: Vector,
        domain: NewtonDomain,
        *,
        exp_concavity: float,
        diameter: float,
        gradient_bound: float,
        hint: Vector | None = None,
    ) -> None:
        _check_vector("x0", x0, None)
        if not isinstance(domain, NewtonDomain):
            raise TypeError(f"domain must be a Ball or Unconstrained for OptimisticNewton, got {domain!r}")
        domain.check(x0)
        positive("exp_concavity", exp_concavity)
        positive("diameter", diameter)
        positive("gradient_bound", gradient_bound)
        self.domain = domain
        self.beta = 0.5 * min(1 / (4 * gradient_bound * diameter), exp_concavity)
        identity = torch.eye(x0.shape[-1], dtype=x0.dtype, device=x0.device)
        start = ((1 + self.beta / 2 * gradient_bound**2) * identity).expand(*x0.shape, -1)
        self.norm = MatrixNorm(start.contiguous())
        self._hint = torch.zeros_like(x0) if hint is None else _check_vector("hint", hint, x0)
        self._anchor = x0
        self._point = domain.newton_step(x0, self._hint, self.norm)

    @property
    def anchor(self) -> Vector:
        r"""The point $\hat x_t$ that is carried from round to round."""
        return self._anchor

    def predict(self) -> Vector:
        """The play of this round."""
        return self._point

    @torch.no_grad()
    def update(self, grad: Vector, hint: Vector | None = None) -> None:
        """Ends the round; see `OptimisticOMD.update`. With hints of zero, this is the online Newton step.

        Raises:
            TypeError: an argument is no tensor of the play's dtype.
            ValueError: an argument has another shape than the play, is not finite, or far beyond `gradient_bound`.
        """
        grad = _check_vector("grad", grad, self._point)
        hint = grad if hint is None else _check_vector("hint", hint, self._point)
        if not (self.beta / 2 * grad.square().sum(-1) * torch.finfo(grad.dtype).eps < 1).all():
            raise ValueError(f"grad must be within gradient_bound, got a length of {float(grad.norm()):g}")
        self._hint = hint
        self._anchor = self.domain.newton_step(self._anchor, grad, self.norm)
        self.norm = MatrixNorm(self.norm.matrix + self.beta / 2 * grad[..., :, None] * grad[..., None, :])
        self._point = self.domain.newton_step(self._anchor, self._hint, self.norm)


class DynamicOMD:
    r"""Two layers that follow a moving comparator without knowing how fast it moves.

    Base learners are `OptimisticOMD` with step sizes $\eta_i = \min\{1/(8L),\ 2^{i-1} \sqrt{D^2 / (8 G^2 T)}\}$. All
    take the gradient at the weighted play, and optimistic Hedge sets the weights from corrected losses and hints,

    $$
    \ell_{t,i} = \langle g_t, x_{t,i} \rangle + 2L \lVert x_{t,i} - x_{t-1,i} \rVert^2, \qquad
    p_{t+1,i} \propto \exp\Bigl(-\varepsilon_t \bigl(\textstyle\sum_{s \le t} \ell_{s,i} + \langle g_t, x_{t+1,i}
    \rangle + 2L \lVert x_{t+1,i} - x_{t,i} \rVert^2\bigr)\Bigr),
    $$

    with $\varepsilon_t = \min\{1/(8 D^2 L),\ \sqrt{\ln N / (D^2 V_t)}\}$. Leading dimensions are independent learners.

    Args:
        x0: (*batch, n) where all base learners start.
        domain: a convex domain with the Euclidean mirror map.
        horizon: number of rounds T.
        diameter: largest distance between two points of the domain.
        gradient_bound: largest norm of a gradient.
        smoothness: Lipschitz constant L of the expected losses' gradients.

    Raises:
        ValueError: `x0` is outside the domain or not finite, or a number is not positive.

    Example:
        >>> from trimtab.optim.domains import Ball
        >>> learner = DynamicOMD(
        ...     torch.zeros(2), Ball(1.0), horizon=1000, diameter=2.0, gradient_bound=2.0, smoothness=1.0
        ... )
        >>> learner.rates
        tensor([0.0112, 0.0224, 0.0447, 0.0894, 0.1250])
    """

    def __init__(
        self,
        x0: Vector,
        domain: Domain,
        *,
        horizon: int,
        diameter: float,
        gradient_bound: float,
        smoothness: float,
    ) -> None:
        if problem := tensor_problem(x0=x0):
            raise TypeError(problem)
        positive("horizon", horizon)
        positive("diameter", diameter)
        positive("gradient_bound", gradient_bound)
        positive("smoothness", smoothness)
        smallest = diameter / (gradient_bound * math.sqrt(8 * horizon))
        largest = 1 / (8 * smoothness)
        count = max(1, math.ceil(math.log2(largest / smallest)) + 1)
        self.rates = x0.new_tensor([min(largest, smallest * 2**i) for i in range(count)])
        columns = self.rates.view(-1, *[1] * x0.dim())
        self.base = OptimisticOMD(x0.expand(count, *x0.shape), domain, lr=columns)
        self._diameter, self._smoothness = diameter, smoothness
        self._losses = x0.new_zeros(count, *x0.shape[:-1])
        self._moved = torch.zeros_like(self._losses)
        self.weights = torch.full_like(self._losses, 1 / count)

    def predict(self) -> Vector:
        """The play of this round: the base learners' plays, weighted."""
        return (self.weights[..., None] * self.base.predict()).sum(0)

    @torch.no_grad()
    def update(self, grad: Vector) -> None:
        """Ends the round with the gradient at the weighted play.

        Raises:
            ValueError: `grad` has another shape than the play, or is not finite.
        """
        points = self.base.predict()
        grad = _check_vector("grad", grad, points[0])
        correction = 2 * self._smoothness
        self._losses = self._losses + (grad * points).sum(-1) + correction * self._moved
        self.base.update(grad.expand_as(points))
        ahead = self.base.predict()
        self._moved = (ahead - points).square().sum(-1)
        guess = (grad * ahead).sum(-1) + correction * self._moved
        variation = self.base.variation[0, ..., 0].clamp_min(torch.finfo(grad.dtype).tiny)
        rate = (math.log(len(self.rates)) / (self._diameter**2 * variation)).sqrt()
        rate = rate.clamp_max(1 / (8 * self._diameter**2 * self._smoothness))
        self.weights = (-rate * (self._losses + guess)).softmax(0)


class OptimisticGD(RuleOptimizer):
    r"""Optimistic gradient descent: $p \leftarrow p - 2\,\mathrm{lr}\,g_t + \mathrm{lr}\,g_{t-1}$, with $g_0 = 0$.

    `OptimisticOMD` on the whole space with a constant step size, in terms of the plays alone. In two-player games,
    where gradient descent spirals outwards, it converges. State: one buffer per parameter.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: learning rate, at least 0.
        weight_decay: strength of the L2 penalty, whose gradient is part of $g_t$, at least 0.
        fused: compile the update; see `RuleOptimizer`.
        maximize: ascend instead of descend; give one player's parameters to a maximising optimizer in a zero-sum game.

    Raises:
        ValueError: a hyper-parameter is out of its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = OptimisticGD([weight], lr=0.1)
        >>> for gradient in (1.0, 3.0):
        ...     weight.grad = torch.tensor([gradient])
        ...     optimizer.step()
        >>> weight.data
        tensor([-0.7000])
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        weight_decay: float = 0.0,
        *,
        fused: bool = False,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, fused=fused, maximize=maximize)

    @staticmethod
    def init_state(p: Tensor, grad: Tensor, group: Mapping[str, Any]) -> State:
        return {"previous_grad": torch.zeros_like(grad)}

    @staticmethod
    def coefficients(group: Mapping[str, Any], step: int) -> dict[str, float | bool]:
        return {"lr": float(group["lr"]), "weight_decay": float(group["weight_decay"])}

    @staticmethod
    def update(p: Tensor, grad: Tensor, state: State, hyper: Hyper) -> None:
        grad = grad + p * hyper["weight_decay"]
        p.sub_((2 * grad - state["previous_grad"]) * hyper["lr"])
        state["previous_grad"].copy_(grad)


def _check_vector(name: str, value: Vector, like: Vector | None) -> Float[Tensor, "*batch n"]:
    if problem := tensor_problem(**{name: value}):
        raise TypeError(problem)
    if value.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(value.shape)}")
    if like is not None and value.dtype != like.dtype:
        raise TypeError(f"{name} must be {like.dtype} as the points are, got {value.dtype}")
    if not value.is_floating_point() or value.dim() < 1:
        raise ValueError(
            f"{name} must be a vector of floating point numbers, got {value.dtype} of {tuple(value.shape)}"
        )
    if like is not None and value.shape != like.shape:
        raise ValueError(f"{name} must have shape {tuple(like.shape)}, got {tuple(value.shape)}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return value
