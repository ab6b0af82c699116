"""Which of the many minima that fit every sample gradient descent ends in, and whether it could stay in others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.data import load
from trimtab.ops.per_sample_gradients import per_sample_gradients
from trimtab.optim.dynamical_stability import gauss_newton_eigenvalues
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial

Problem = Literal["sparse", "digits"]
# A learning rate, or what makes one from the per-sample gradients at the minimum that the run starts from.
Rate = float | Callable[[Float[Tensor, "n params"]], float]


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


@dataclass(frozen=True)
class _Instance:
    """Training data, a network at its initial weights, and its distance from the truth."""

    x: Tensor
    y: Tensor
    net: DiagonalNet | ReluNet
    error: Callable[[], float]


@dataclass(frozen=True)
class InterpolatingMinima(Task):
    """Fit every sample by gradient descent on half the mean squared error, and look at the minimum that it found.

    A run ends when the loss is below 1e-7, or at its budget of steps. These networks are small: they run on the CPU.

    Attributes:
        problem: "sparse": a linear model of 60 coefficients, 3 of them not zero, as products of two weights, from 30
            noiseless samples of signs. "digits": a two-layer ReLU network that tells the digits 0 and 1 apart.
    """

    problem: Problem = "sparse"

    name: ClassVar[str] = "interpolating-minima"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "error": Metric("squared error of the coefficients, or of the test outputs", best="min"),
        "trace": Metric("trace of the Hessian", best="min"),
        "norm": Metric("l1 norm of the coefficients, or path norm", best="min"),
        "trace_times_lr": Metric("trace times learning rate", best=None),
        "top_times_lr": Metric("top eigenvalue times learning rate", best=None),
        "departure": Metric("distance from the start, relative", best=None),
        "train_loss": Metric("training loss", best="min"),
        "learning_rate": Metric("learning rate", best=None),
    }
    TARGET: ClassVar[float] = 1e-7

    def __post_init__(self) -> None:
        if self.problem not in get_args(Problem):
            raise ValueError(f"problem must be one of {', '.join(get_args(Problem))}, got {self.problem!r}")

    def descend(self, lr: Rate, batch_size: int | None = None, settled: bool | None = None) -> Arm:
        """A contestant.

        Args:
            lr: the learning rate; with `settled`, it may be made from the gradients at the start.
            batch_size: samples of a step, drawn with replacement; all of them, if None.
            settled: start next to the minimum that full-batch descent with a small learning rate finds, a thousandth
                of its size away, and take all the steps of the budget.
        """
        return self.arm(lr=lr, batch_size=batch_size, settled=settled)

    def run(self, trial: Trial, **options: Any) -> Result:
        lr, batch_size = options["lr"], options.get("batch_size")
        instance = self._instance(trial)
        net, x, y = instance.net, instance.x, instance.y
        steps = trial.pick(smoke=1_000, laptop=100_000, paper=1_000_000)
        if settled := options.get("settled", False):
            self._settle(net, x, y, trial, steps)
        if callable(lr):
            lr = lr(per_sample_gradients(net, x))
        origin = _weights(net)
        if settled:
            generator = trial.generator(2)
            for p in net.parameters():
                p.data += 1e-3 * p.data.norm() / math.sqrt(p.numel()) * _normal(p.shape, generator)
        at, losses, traces = _descend(
            net, x, y, lr, batch_size, steps, trial.generator(1), trial.report, 0.0 if settled else self.TARGET
        )
        values = gauss_newton_eigenvalues(per_sample_gradients(net, x)) if math.isfinite(losses[-1]) else None
        trace = float(values.sum()) if values is not None else math.nan
        return Result(
            {
                "error": instance.error(),
                "trace": trace,
                "norm": net.norm(),
                "trace_times_lr": trace * lr,
                "top_times_lr": float(values[-1]) * lr if values is not None else math.nan,
                "departure": float((_weights(net) - origin).norm() / origin.norm()),
                "train_loss": losses[-1],
                "learning_rate": lr,
            },
            {"loss": Curve(at, losses), "trace": Curve(at, traces)},
        )

    def _settle(self, net: DiagonalNet | ReluNet, x: Tensor, y: Tensor, trial: Trial, steps: int) -> None:
        def train() -> dict[str, Tensor]:
            _descend(net, x, y, 0.02, None, steps, trial.generator(1), lambda fraction: None, self.TARGET)
            return net.state_dict()

        net.load_state_dict(trial.cached(train, key=f"{self} settled seed {trial.seed}"))

    def _instance(self, trial: Trial) -> _Instance:
        generator = trial.generator()
        if self.problem == "sparse":
            inputs, samples, nonzero = 60, 30, 3
            truth = torch.zeros(inputs, dtype=torch.float64)
            truth[torch.randperm(inputs, generator=generator)[:nonzero]] = 1.0
            x = _normal((samples, inputs), generator).sign()
            a, b = torch.full((inputs,), 0.5, dtype=torch.float64), 0.5 * _normal((inputs,), generator)
            net = DiagonalNet(a, b)
            return _Instance(x, x @ truth, net, lambda: float((net.a * net.b - truth).detach().square().sum()))
        data, width = load("digits").classes([0, 1]), 30
        x, x_test = data.x_train.flatten(1).double(), data.x_test.flatten(1).double()
        y, y_test = 2.0 * data.y_train - 1, 2.0 * data.y_test - 1
        inner = _normal((width, x.shape[1]), generator) / math.sqrt(x.shape[1])
        relu = ReluNet(inner, _normal((width,), generator) / math.sqrt(width))
        return _Instance(x, y.double(), relu, lambda: float((relu(x_test) - y_test).detach().square().mean()))


def _normal(shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def _descend(
    net: DiagonalNet | ReluNet,
    x: Tensor,
    y: Tensor,
    lr: float,
    batch_size: int | None,
    steps: int,
    generator: torch.Generator,
    report: Callable[[float], None],
    target: float,
) -> tuple[list[float], list[float], list[float]]:
    """Descend in place; the steps looked at, fifty at most, with the loss and the trace there."""
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
        report(done / steps)
        if losses[-1] < target or done == steps:
            break
        if batch_size is None:
            for _ in range(stretch):
                net.step(x, y, lr)
        elif batch_size == 1:
            for i in torch.randint(len(y), (stretch,), generator=generator).tolist():
                net.step(x[i : i + 1], y[i : i + 1], lr)
        else:
            for index in torch.randint(len(y), (stretch, batch_size), generator=generator):
                net.step(x[index], y[index], lr)
    return at, losses, traces
