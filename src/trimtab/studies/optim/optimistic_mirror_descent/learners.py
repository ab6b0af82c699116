"""Who plays online: gradient descent, AdaGrad and optimistic FTRL with the step sizes of their theory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from trimtab import optim
from trimtab.optim.domains import shrink_to_ball
from trimtab.studies.optim.optimistic_mirror_descent.streams import Knowledge


class Learner(Protocol):
    """What plays: a point of shape (streams, n) for every round, and afterwards the gradient there."""

    def predict(self) -> Tensor: ...

    def update(self, grad: Tensor) -> None: ...


MakeLearner = Callable[[Knowledge], Learner]


class OnlineGradient:
    """Projected online gradient descent with step sizes given by the round."""

    def __init__(self, known: Knowledge, rate: Callable[[int], float]) -> None:
        self.domain, self.rate, self.point, self.t = known.domain, rate, known.start, 0

    def predict(self) -> Tensor:
        return self.point

    def update(self, grad: Tensor) -> None:
        self.t += 1
        self.point = self.domain.project(self.point - self.rate(self.t) * grad)


def online_gradient(known: Knowledge) -> OnlineGradient:
    """Step sizes D / (G sqrt t), for convex losses (Zinkevich 2003)."""
    return OnlineGradient(known, lambda t: known.diameter / (known.gradient_bound * math.sqrt(t)))


def strongly_convex_gradient(known: Knowledge) -> OnlineGradient:
    """Step sizes 1 / (lambda t), for strongly convex losses (Hazan, Agarwal and Kale 2007)."""
    return OnlineGradient(known, lambda t: 1 / (known.strong_convexity * t))


class AdaGrad:
    """Diagonal AdaGrad with its projection in the diagonal norm and the step size of its theory, D / sqrt 2."""

    def __init__(self, known: Knowledge) -> None:
        self.domain, self.point = known.domain, known.start
        self.lr = known.diameter / math.sqrt(2)
        self.squares = torch.zeros_like(known.start)

    def predict(self) -> Tensor:
        return self.point

    def update(self, grad: Tensor) -> None:
        self.squares = self.squares + grad.square()
        scale = self.squares.sqrt().clamp_min(1e-12)
        self.point = shrink_to_ball(self.point - self.lr * grad / scale, scale, self.domain.radius)


class OptimisticFTRL:
    """Optimistic follow-the-regularised-leader with the step sizes of Sachs et al. (2022, Theorem 5)."""

    def __init__(self, known: Knowledge) -> None:
        self.domain, self.diameter = known.domain, known.diameter
        start = known.start[:, :1]
        nu = known.smoothness * known.diameter**2 + known.diameter * known.gradient_bound
        self.penalty = torch.full_like(start, nu)
        self.total, self.hint = torch.zeros_like(known.start), torch.zeros_like(known.start)

    def predict(self) -> Tensor:
        lr = self.diameter**2 / self.penalty
        return self.domain.project(-0.5 * lr * (self.total + self.hint))

    def update(self, grad: Tensor) -> None:
        lr = self.diameter**2 / self.penalty
        self.penalty = self.penalty + lr * (grad - self.hint).square().sum(-1, keepdim=True)
        self.total, self.hint = self.total + grad, grad


class CurvedOptimisticFTRL:
    """Optimistic follow-the-regularised-leader for strongly convex losses, each replaced by its quadratic lower bound.

    The leader of the bounds seen so far and of the last gradient as a hint, as the analysis of Sachs et al. (2022) for
    strongly convex losses has it, in our reading.
    """

    def __init__(self, known: Knowledge) -> None:
        self.domain, self.curvature, self.point, self.rounds = known.domain, known.strong_convexity, known.start, 0
        self.total, self.hint = torch.zeros_like(known.start), torch.zeros_like(known.start)

    def predict(self) -> Tensor:
        if self.rounds:
            self.point = self.domain.project((self.total - self.hint) / (self.curvature * self.rounds))
        return self.point

    def update(self, grad: Tensor) -> None:
        self.rounds += 1
        self.total = self.total + self.curvature * self.point - grad
        self.hint = grad


def mirror(known: Knowledge) -> Learner:
    """Optimistic mirror descent with the step sizes for convex losses (Theorem 1)."""
    rate = optim.ConvexRate(known.diameter, known.gradient_bound, known.smoothness)
    return optim.OptimisticOMD(known.start, known.domain, rate)


def strongly_convex_mirror(known: Knowledge) -> Learner:
    """The step sizes for strongly convex losses."""
    rate = optim.StronglyConvexRate(known.strong_convexity)
    return optim.OptimisticOMD(known.start, known.domain, rate)


def exp_concave_mirror(known: Knowledge) -> Learner:
    """The norms for exp-concave losses."""
    return optim.OptimisticNewton(
        known.start,
        known.domain,
        exp_concavity=known.exp_concavity,
        diameter=known.diameter,
        gradient_bound=known.gradient_bound,
    )


def two_layers(known: Knowledge) -> Learner:
    """The two layers for dynamic regret."""
    return optim.DynamicOMD(
        known.start,
        known.domain,
        horizon=known.horizon,
        diameter=known.diameter,
        gradient_bound=known.gradient_bound,
        smoothness=known.smoothness,
    )
