"""Losses that arrive one at a time: drawn from one distribution, drifting slowly, or switched by an adversary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.data import load
from trimtab.optim import Ball, SEAEnvironment

World = Literal["iid", "drift", "noisy drift", "switching"]


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


@dataclass(frozen=True)
class Quadratics:
    """Losses around centres on a path of norm 1, with noise of norm 1 in the iid world, half of it in noisy drift."""

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
        elif world in ("drift", "noisy drift"):
            sigma = 0.5 if world == "noisy drift" else 0.0
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
