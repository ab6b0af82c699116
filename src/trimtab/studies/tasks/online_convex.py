"""Losses that arrive one at a time: drawn from one distribution, drifting slowly, or switched by an adversary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.data import load
from trimtab.optim.domains import Ball, shrink_to_ball
from trimtab.optim.sea import SEAEnvironment
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial

World = Literal["iid", "drift", "switching"]


class Learner(Protocol):
    """What plays: a point of shape (streams, n) for every round, and afterwards the gradient there."""

    def predict(self) -> Tensor: ...

    def update(self, grad: Tensor) -> None: ...


@dataclass(frozen=True)
class Knowledge:
    """What every contestant is told before the first round.

    Attributes:
        start: (streams, n) the ball's centre.
        domain: the ball.
        diameter: its diameter D.
        gradient_bound: largest norm G of a gradient.
        smoothness: Lipschitz constant L of the gradients.
        strong_convexity: of every loss; 0 where there is none.
        exp_concavity: of every loss.
        horizon: number of rounds.
    """

    start: Tensor
    domain: Ball
    diameter: float
    gradient_bound: float
    smoothness: float
    strong_convexity: float
    exp_concavity: float
    horizon: int


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


@dataclass(frozen=True)
class Quadratics:
    """Losses around centres on a path of norm 1, with noise of norm 1 in the iid world and none in the others."""

    environment: SEAEnvironment
    domain: Ball
    known: Mapping[str, float]

    @classmethod
    def draw(cls, world: World, horizon: int, streams: int, generator: torch.Generator, dim: int = 20) -> Quadratics:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        direction = F.normalize(normal(streams, dim), dim=-1)
        sigma = 0.0
        if world == "iid":
            means, sigma = 0.5 * direction.expand(horizon, -1, -1), 1.0
        elif world == "drift":
            # Every coordinate swings at a pace of its own, once in 20 to 40 rounds: slowly beside a round, and too fast
            # for the step sizes that online gradient descent has after some hundred rounds.
            pace = 2 * math.pi * (1 + torch.rand(streams, dim, generator=generator, dtype=torch.float64)) / 40
            phase = 2 * math.pi * torch.rand(streams, dim, generator=generator, dtype=torch.float64)
            rounds = torch.arange(horizon, dtype=torch.float64)[:, None, None]
            means = math.sqrt(2 / dim) * torch.cos(pace * rounds + phase)
        else:
            means = _signs(horizon, streams, generator)[..., None] * direction
        bound = float(means.norm(dim=-1).max()) + sigma
        domain = Ball(radius=1.5)
        known = {
            "gradient_bound": domain.radius + bound,
            "smoothness": 1.0,
            "strong_convexity": 1.0,
            # exp(-a f) is concave as long as a |x - c|^2 is at most 1.
            "exp_concavity": (domain.radius + bound) ** -2,
        }
        return cls(SEAEnvironment(means, sigma, generator=generator), domain, known)

    def loss_and_gradient(self, t: int, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.environment.loss(t, x), self.environment.gradient(t, x)

    def best_losses(self, rounds: list[int], iterations: int) -> Tensor:
        """(len(rounds), streams) total loss of the best fixed point of each prefix; no iterations are needed."""
        centers = self.environment.centers
        found = [self.environment.best_fixed(self.domain, t) for t in rounds]
        return torch.stack([0.5 * (x - centers[:t]).square().sum((0, -1)) for t, x in zip(rounds, found, strict=True)])

    def variation(self) -> Tensor:
        """(streams,) sigma^2 + Sigma^2 over all rounds."""
        return self.environment.stochastic_variance + self.environment.adversarial_variation


@dataclass(frozen=True)
class LogisticStream:
    """Logistic losses of real samples: one at random; the mean over a sliding window; one, its label switched.

    Attributes:
        samples: (m, n) samples times labels, of norm at most 1.
        index: (T, streams, window) which samples a round's loss is the mean over.
        signs: (T, streams) what the adversary multiplies labels by.
    """

    samples: Tensor
    index: Tensor
    signs: Tensor
    domain: Ball
    known: Mapping[str, float]

    @classmethod
    def draw(
        cls, dataset: str, world: World, horizon: int, streams: int, generator: torch.Generator, dim: int = 20
    ) -> LogisticStream:
        data = load(dataset)
        features = data.x_train.flatten(1).double()
        labels = (2 * (data.y_train >= data.num_classes / 2) - 1).double()
        features = features - features.mean(0)
        components = torch.linalg.svd(features, full_matrices=False).Vh[:dim]
        features = features @ components.T
        features = features / features.norm(dim=-1).max()
        samples = (features * labels[:, None])[features[:, 0].argsort()]
        signs = torch.ones(horizon, streams, dtype=torch.float64)
        if world == "drift":
            # A window of 32 neighbours along the first principal component, one sample further each round.
            first = torch.randint(len(samples), (streams, 1), generator=generator)
            index = (torch.arange(horizon)[:, None, None] + first + torch.arange(32)) % len(samples)
        else:
            index = torch.randint(len(samples), (horizon, streams, 1), generator=generator)
            if world == "switching":
                signs = _signs(horizon, streams, generator)
        domain = Ball(radius=3.0)
        known = {
            "gradient_bound": 1.0,
            "smoothness": 0.25,
            "strong_convexity": 0.0,
            # The least ratio of second derivative to squared first, at the margin -radius.
            "exp_concavity": math.exp(-domain.radius),
        }
        return cls(samples, index, signs, domain, known)

    def loss_and_gradient(self, t: int, x: Tensor) -> tuple[Tensor, Tensor]:
        batch = self.signs[t, :, None, None] * self.samples[self.index[t]]
        margins = (batch @ x[..., None])[..., 0]
        gradient = -(torch.sigmoid(-margins)[..., None] * batch).mean(1)
        return F.softplus(-margins).mean(1), gradient

    def best_losses(self, rounds: list[int], iterations: int) -> Tensor:
        """(len(rounds), streams) total loss of the best fixed point of each prefix, by accelerated projected steps."""
        count, streams = len(self.samples), self.index.shape[1]
        weights = torch.zeros(len(rounds), 2 * count, streams, dtype=torch.float64)
        share = 1 / self.index.shape[2]
        for row, t in enumerate(rounds):
            side = torch.where(self.signs[:t] > 0, 0, count)[..., None]
            places = (self.index[:t] + side).movedim(1, -1).reshape(-1, streams)
            weights[row].scatter_add_(0, places, torch.full(places.shape, share, dtype=torch.float64))
        both = torch.cat([self.samples, -self.samples])
        flat = weights.movedim(-1, 1).reshape(-1, 2 * count)
        total = flat.sum(1, keepdim=True)
        point = torch.zeros(len(flat), both.shape[1], dtype=torch.float64)
        ahead, pace = point, torch.ones_like(total)
        for _ in range(iterations):
            gradient = -((flat * torch.sigmoid(-ahead @ both.T)) @ both) / total
            previous, point = point, self.domain.project(ahead - 4 * gradient)
            uphill = ((ahead - point) * (point - previous)).sum(1, keepdim=True) > 0
            last = torch.where(uphill, 1.0, pace)
            pace = (1 + (1 + 4 * last**2).sqrt()) / 2
            ahead = point + (last - 1) / pace * (point - previous)
        return (flat * F.softplus(-point @ both.T)).sum(1).view(len(rounds), streams)


def _signs(horizon: int, streams: int, generator: torch.Generator) -> Tensor:
    """(T, streams) of 1 and -1 that flip after one or two rounds."""
    holds = torch.rand(horizon, streams, generator=generator) < 0.5
    flips = torch.ones(horizon, streams, dtype=torch.bool)
    for t in range(1, horizon):
        flips[t] = ~(holds[t] & flips[t - 1])
    return 1 - 2.0 * (flips.cumsum(0) % 2).double()


@dataclass(frozen=True)
class OnlineConvex(Task):
    """Play against a stream of convex losses in a ball, in 20 dimensions.

    A run is the mean over independent streams, which estimates the expected regret that theory speaks of.

    Attributes:
        losses: "quadratic", with centres chosen by the world; or a data set ("digits", "breast_cancer") for logistic
            losses on its first 20 principal components, the classes split into a lower and an upper half.
        world: "iid", every loss drawn from one distribution; "drift", slow and without noise (quadratic) or sliding
            along the first principal component (logistic); "switching", signs flipped after one or two rounds.
    """

    losses: str = "quadratic"
    world: World = "iid"

    name: ClassVar[str] = "online-convex"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "regret": Metric("regret against the best fixed point", best="min"),
        "growth": Metric("log-log slope of the regret, no less than one round's worth", best="min"),
        "scaled_regret": Metric("regret over D (sqrt of gradient changes at the plays)", best="min"),
        "sea_regret": Metric("regret over D sqrt(sigma^2 + Sigma^2)", best="min"),
        "dynamic_regret": Metric("regret against the best point of every round", best="min"),
        "seconds": Metric("time of the learner (s)", best="min"),
    }

    def play(self, learner: MakeLearner) -> Arm:
        """A contestant, made from what all are told."""
        return self.arm(learner=learner)

    def run(self, trial: Trial, **options: Any) -> Result:
        horizon = trial.pick(smoke=100, laptop=5_000, paper=50_000)
        streams = trial.pick(smoke=2, laptop=8, paper=20)
        stream: Quadratics | LogisticStream
        if self.losses == "quadratic":
            stream = Quadratics.draw(self.world, horizon, streams, trial.generator())
        else:
            stream = LogisticStream.draw(self.losses, self.world, horizon, streams, trial.generator())
        known = Knowledge(
            start=torch.zeros(streams, 20, dtype=torch.float64),
            domain=stream.domain,
            diameter=2 * stream.domain.radius,
            horizon=horizon,
            **stream.known,
        )
        make: MakeLearner = options["learner"]
        learner = make(known)
        total = torch.zeros(streams, dtype=torch.float64)
        suffered, changes, previous, seconds = [], torch.zeros_like(total), torch.zeros_like(known.start), 0.0
        for t in range(horizon):
            started = time.perf_counter()
            point = learner.predict()
            seconds += time.perf_counter() - started
            loss, gradient = stream.loss_and_gradient(t, point)
            total = total + loss
            suffered.append(total)
            changes = changes + (gradient - previous).square().sum(-1)
            previous = gradient
            started = time.perf_counter()
            learner.update(gradient)
            seconds += time.perf_counter() - started
            if t % 500 == 0:
                trial.report(t / horizon)

        rounds = [int(t) for t in np.unique(np.geomspace(horizon / 50, horizon, 12).astype(int))]
        best = stream.best_losses(rounds, trial.pick(smoke=50, laptop=300, paper=300))
        regret = torch.stack([suffered[t - 1] for t in rounds]) - best
        mean = regret.mean(1)
        # Negative or vanishing regret has no logarithm: below what one round can cost, all regret counts as that.
        floor = known.diameter * known.gradient_bound
        late = [i for i, t in enumerate(rounds) if t >= horizon / 10]
        growth = np.polyfit(np.log([rounds[i] for i in late]), np.log([max(float(mean[i]), floor) for i in late]), 1)
        metrics = {
            "regret": float(mean[-1]),
            "growth": float(growth[0]),
            "scaled_regret": float((regret[-1] / (known.diameter * changes.sqrt())).mean()),
            "seconds": seconds,
        }
        if isinstance(stream, Quadratics):
            metrics["sea_regret"] = float((regret[-1] / (known.diameter * stream.variation().sqrt())).mean())
            if stream.environment.stochastic_variance == 0:  # the least loss of a round is 0, at its centre
                metrics["dynamic_regret"] = float(total.mean())
        return Result(metrics, {"regret": Curve([float(t) for t in rounds], mean.tolist())})
