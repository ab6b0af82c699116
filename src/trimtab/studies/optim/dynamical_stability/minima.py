"""Which of the many minima that fit every sample gradient descent ends in, and whether it could stay in others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab import optim
from trimtab.data import load
from trimtab.ops.per_sample_gradients import per_sample_gradients
from trimtab.studies.engine.study import Curve, Result, Trial

TARGET = 1e-7


class DiagonalNet(nn.Module):
    """The linear model whose coefficients are products of two weights each."""

    def __init__(self, a: Float[Tensor, " inputs"], b: Float[Tensor, " inputs"]) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Float[Tensor, "batch inputs"]) -> Float[Tensor, " batch"]:
        return x @ (self.a * self.b)

    @torch.no_grad()
    def step(self, x: Float[Tensor, "batch inputs"], y: Float[Tensor, " batch"], lr: float) -> None:
        """One step on half the mean squared error."""
        slope = (self(x) - y) @ x * (lr / len(y))
        a, b = self.a.data, self.b.data
        self.a.data, self.b.data = a - slope * b, b - slope * a

    def norm(self) -> float:
        """The l1 norm of the coefficients."""
        return float((self.a * self.b).detach().abs().sum())


class ReluNet(nn.Module):
    """Two layers without biases."""

    def __init__(self, inner: Float[Tensor, "width inputs"], outer: Float[Tensor, " width"]) -> None:
        super().__init__()
        self.inner, self.outer = nn.Parameter(inner), nn.Parameter(outer)

    def forward(self, x: Float[Tensor, "batch inputs"]) -> Float[Tensor, " batch"]:
        return (x @ self.inner.T).relu() @ self.outer

    @torch.no_grad()
    def step(self, x: Float[Tensor, "batch inputs"], y: Float[Tensor, " batch"], lr: float) -> None:
        """One step on half the mean squared error."""
        hidden = (x @ self.inner.T).relu_()
        residual = (hidden @ self.outer - y) * (lr / len(y))
        back = (hidden > 0) * torch.outer(residual, self.outer)
        self.outer.data -= residual @ hidden
        self.inner.data -= back.T @ x

    def norm(self) -> float:
        """The path norm."""
        return float((self.inner.detach().norm(dim=1) * self.outer.detach().abs()).sum())


Net = DiagonalNet | ReluNet


@dataclass(frozen=True)
class Instance:
    """Training data, a network at its initial weights, and its distance from the truth."""

    x: Tensor
    y: Tensor
    net: Net
    error: Callable[[], float]


def sparse(trial: Trial) -> Instance:
    """A linear model of 60 coefficients, 3 of them not zero, as products of two weights, from 30 samples of signs."""
    inputs, samples, nonzero, generator = 60, 30, 3, trial.generator()
    truth = torch.zeros(inputs, dtype=torch.float64)
    truth[torch.randperm(inputs, generator=generator)[:nonzero]] = 1.0
    x = _normal((samples, inputs), generator).sign()
    a, b = torch.full((inputs,), 0.5, dtype=torch.float64), 0.5 * _normal((inputs,), generator)
    net = DiagonalNet(a, b)
    return Instance(x, x @ truth, net, lambda: float((net.a * net.b - truth).detach().square().sum()))


def digits(trial: Trial) -> Instance:
    """A two-layer ReLU network that tells 120 of the digits 0 and 1 apart."""
    generator, width = trial.generator(), 30
    data = load("digits").classes([0, 1]).subset(120, None, generator=generator)
    x, x_test = data.x_train.flatten(1).double(), data.x_test.flatten(1).double()
    y, y_test = 2.0 * data.y_train - 1, 2.0 * data.y_test - 1
    inner = _normal((width, x.shape[1]), generator) / math.sqrt(x.shape[1])
    net = ReluNet(inner, _normal((width,), generator) / math.sqrt(width))
    return Instance(x, y.double(), net, lambda: float((net(x_test) - y_test).detach().square().mean()))


def descend(problem: Callable[[Trial], Instance], lr: float, batch_size: int | None, trial: Trial) -> Result:
    """Fit every sample, and look at the minimum that was found, at a loss of 1e-7 or where the steps are spent.

    Args:
        problem: data and network.
        lr: the learning rate, on half the mean squared error.
        batch_size: samples of a step, drawn with replacement; None takes all.
        trial: the run.
    """
    instance, steps = problem(trial), trial.pick(smoke=1_000, laptop=100_000, paper=1_000_000)
    at, losses, traces = _descend(instance, lr, batch_size, steps, trial)
    return _described(instance, lr, at, losses, traces)


def leave(share: float, batch_size: int | None, trial: Trial) -> Result:
    """Start next to the minimum that full-batch descent finds, a thousandth of its size away, and take all steps.

    Args:
        share: the learning rate, in units of the critical one of SGD at one sample a step.
        batch_size: as in `descend`.
        trial: the run.
    """
    instance, steps = sparse(trial), trial.pick(smoke=1_000, laptop=100_000, paper=1_000_000)
    net = instance.net
    _descend(instance, 0.02, None, steps, trial)
    lr, generator = share * optim.critical_lr(per_sample_gradients(net, instance.x), 1), trial.generator(2)
    origin = _weights(net)
    for p in net.parameters():
        p.data += 1e-3 * p.data.norm() / math.sqrt(p.numel()) * _normal(p.shape, generator)
    at, losses, traces = _descend(instance, lr, batch_size, steps, trial, target=0.0)
    found = _described(instance, lr, at, losses, traces)
    departure = float((_weights(net) - origin).norm() / origin.norm())
    return Result({"departure": departure, **found.metrics}, found.curves)


def _described(instance: Instance, lr: float, at: list[float], losses: list[float], traces: list[float]) -> Result:
    finite = math.isfinite(losses[-1])
    values = optim.gauss_newton_eigenvalues(per_sample_gradients(instance.net, instance.x)) if finite else None
    return Result(
        {
            "error": instance.error(),
            "trace": float(values.sum()) if values is not None else math.nan,
            "norm": instance.net.norm(),
            "trace_times_lr": float(values.sum()) * lr if values is not None else math.nan,
            "top_times_lr": float(values[-1]) * lr if values is not None else math.nan,
            "train_loss": losses[-1],
        },
        {"loss": Curve(at, losses, x_label="step"), "trace": Curve(at, traces, x_label="step")},
    )


def _normal(shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def _descend(
    instance: Instance, lr: float, batch_size: int | None, steps: int, trial: Trial, target: float = TARGET
) -> tuple[list[float], list[float], list[float]]:
    """Descend in place; the steps looked at, fifty at most, with the loss and the trace there."""
    net, x, y, generator = instance.net, instance.x, instance.y, trial.generator(1)
    at: list[float] = []
    losses: list[float] = []
    traces: list[float] = []
    stretch = steps // 50
    for done in range(0, steps + 1, stretch):
        at.append(float(done))
        losses.append(float(0.5 * (net(x) - y).detach().square().mean()))
        if not losses[-1] < 1e6:
            losses[-1] = math.nan
            traces.append(math.nan)
            break
        traces.append(float(per_sample_gradients(net, x).square().sum(1).mean()))
        trial.report(done / steps)
        if losses[-1] < target or done == steps:
            break
        if batch_size is None:
            for _ in range(stretch):
                net.step(x, y, lr)
        else:
            for index in torch.randint(len(y), (stretch, batch_size), generator=generator):
                net.step(x[index], y[index], lr)
    return at, losses, traces
