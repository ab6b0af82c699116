"""Regression of a target of which most of the range is rare in training: by how much an image was turned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.data import load
from trimtab.nets import small_cnn
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tools.descent import descent_step
from trimtab.studies.tools.stopwatch import Stopwatch
from trimtab.studies.tools.training import predict

RANGE, BIN = 90.0, 5.0  # degrees
SCALE = 20.0  # mean of the exponential distribution before it is cut off, in degrees
UNIT = 20.0  # degrees to one of the network's output, so that weights need not grow to degrees first
MANY, FEW = 100, 20  # training samples in a bin, the bounds of AgeDB-DIR and its kin


class Objective(Protocol):
    """A contestant at work: the loss of a batch of two augmented views.

    Args:
        features: of the layer before the head.
        preds: predicted degrees.
        targets: degrees.
        density: of the targets' bins in training, relative to a uniform one.
    """

    def __call__(
        self,
        features: Float[Tensor, "batch dim"],
        preds: Float[Tensor, " batch"],
        targets: Float[Tensor, " batch"],
        density: Float[Tensor, " batch"],
    ) -> Tensor: ...


# From the optimizer and the value of the knob.
Method = Callable[[torch.optim.Optimizer, float], Objective]
Part = tuple[Float[Tensor, "n 1 height width"], Float[Tensor, " n"]]


@dataclass(frozen=True)
class _Data:
    """Turned images and their angles; only the training part is imbalanced."""

    train: Part
    validation: Part
    test: Part


METRICS: Mapping[str, Metric] = {
    "mae": Metric("mean absolute error (degrees)", best="min"),
    "many_mae": Metric("error where samples are many (degrees)", best="min"),
    "medium_mae": Metric("error at medium counts (degrees)", best="min"),
    "few_mae": Metric("error where samples are few (degrees)", best="min"),
    "knob": Metric("the arm's own setting", best=None),
    "learning_rate": Metric("learning rate", best=None),
    "ms_per_step": Metric("time per step (ms)", best="min"),
}
RATES = (1e-3, 3e-3, 1e-2)


def train(trial: Trial, *, method: Method, knob: Sequence[float]) -> Result:
    """Predict the angle, 0 to 90 degrees, of turned images, when large angles are rare in training.

    Training angles are exponentially distributed, validation and test angles evenly. As in the benchmarks of the
    field, errors are also given for the bins (of 5 degrees) with more than 100 training samples (many), fewer than 20
    (few), and the rest (medium). Each training image is seen in two views, shifted and noisy, by every arm. The
    learning rate is the best of three for the plain L1 loss, and the same for all arms; each arm then has one knob of
    its own, with three values. Both are judged by the mean absolute error on the validation images.

    Args:
        trial: seed and budget.
        method: from AdamW and a value of the knob, makes the loss.
        knob: three values to choose from.
    """
    data = _data(trial)

    key = f"turned images, learning rate seed {trial.seed}"
    rate = trial.cached(partial(_best_rate, trial, data), key=key).item()
    runs = []
    for done, value in enumerate(knob):
        model, seconds = _trained(data, trial, method, rate, value)
        runs.append((_errors(model, data.validation).mean().item(), model, seconds, value))
        trial.report((done + 1) / len(knob))
    _, model, seconds, value = min(runs, key=lambda run: run[0])
    errors, counts = _errors(model, data.test), _counts(data.train[1])
    bins = _bins(data.test[1])
    seen = counts[bins]
    parts = {"many": seen > MANY, "medium": (seen >= FEW) & (seen <= MANY), "few": seen < FEW}
    centres = [BIN * (each + 0.5) for each in range(len(counts))]
    by_bin = [errors[bins == each].mean().item() for each in range(len(counts))]
    return Result(
        {
            "mae": errors.mean().item(),
            **{f"{name}_mae": errors[part].mean().item() for name, part in parts.items()},
            "knob": value,
            "learning_rate": rate,
            "ms_per_step": 1e3 * seconds,
        },
        {"error_by_angle": Curve(centres, by_bin, "angle (degrees)")},
    )


def _best_rate(trial: Trial, data: _Data) -> Tensor:
    """The learning rate that suits L1 best."""
    of_rate = {
        rate: _errors(_trained(data, trial, l1, rate, WEIGHT_DECAYS[0])[0], data.validation).mean().item()
        for rate in RATES
    }
    return torch.tensor(min(RATES, key=of_rate.__getitem__), dtype=torch.float64)


def _data(trial: Trial) -> _Data:
    whole = load("digits" if trial.budget == "smoke" else "fashion_mnist")
    train, held = trial.pick(smoke=(500, 200), laptop=(2000, 1000), paper=(12_000, 2000))
    some = whole.subset(train + held, trial.pick(smoke=200, laptop=2000, paper=None), generator=trial.generator())
    draws = trial.generator(2)
    # The inverse of the cut-off exponential's distribution function.
    mass = torch.rand(train, generator=draws) * -math.expm1(-RANGE / SCALE)
    angles = (-SCALE * torch.log1p(-mass)).clamp(max=RANGE)
    even, even_test = (RANGE * (torch.arange(count) + 0.5) / count for count in (held, len(some.y_test)))
    parts = (
        (some.x_train[:train], angles),
        (some.x_train[train:], even),
        (some.x_test, even_test[torch.randperm(len(even_test), generator=draws)]),
    )
    # Half the resolution shows the angle as well, in a quarter of the time.
    reduce = 2 if whole.in_shape[-1] >= 28 else 1
    return _Data(*((F.avg_pool2d(turned(x, y), reduce).to(trial.device), y.to(trial.device)) for x, y in parts))


WEIGHT_DECAYS = (0.0, 1e-2, 1e-1)


def l1(optimizer: torch.optim.Optimizer, weight_decay: float) -> Objective:
    """Baseline: the mean absolute error; the knob is the weight decay."""
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay

    def objective(features: Tensor, preds: Tensor, targets: Tensor, density: Tensor) -> Tensor:
        return F.l1_loss(preds, targets)

    return objective


def inverse_frequency(optimizer: torch.optim.Optimizer, power: float) -> Objective:
    """Baseline: errors weighted by the inverse density of the target; the knob is the power, 0.5 its square root."""

    def objective(features: Tensor, preds: Tensor, targets: Tensor, density: Tensor) -> Tensor:
        return (inverse_weights(density, power) * (preds - targets).abs()).mean()

    return objective


def inverse_weights(density: Float[Tensor, " batch"], power: float) -> Float[Tensor, " batch"]:
    """Weights of samples by the inverse density of their targets, of mean one in the batch."""
    weights = density**-power
    return weights / weights.mean()


def turned(x: Float[Tensor, "n 1 height width"], degrees: Float[Tensor, " n"]) -> Float[Tensor, "n 1 height width"]:
    """Images turned about their centre, each by its own angle, made so small that no corner leaves the frame."""
    angle = degrees.deg2rad()
    cos, sin, nought = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turn = torch.stack([torch.stack([cos, -sin, nought], 1), torch.stack([sin, cos, nought], 1)], 1)
    return F.grid_sample(x, F.affine_grid(math.sqrt(2) * turn, list(x.shape), align_corners=False), align_corners=False)


def augmented(
    x: Float[Tensor, "n 1 height width"], generator: torch.Generator, std: float = 0.1
) -> Float[Tensor, "n 1 height width"]:
    """Images shifted by up to a fourteenth of their side, a whole number of pixels, with noise."""
    side = x.shape[-1]
    reach = side // 14 or 1
    rows, columns = (
        (torch.arange(side) + torch.randint(-reach, reach + 1, (len(x), 1), generator=generator)).to(x.device) + reach
        for _ in range(2)
    )
    padded = F.pad(x[:, 0], (reach,) * 4)
    shifted = padded[torch.arange(len(x), device=x.device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    noise = std * torch.randn(shifted.shape, generator=generator).to(x.device)
    return (shifted + noise)[:, None]


def _bins(targets: Float[Tensor, " n"]) -> Tensor:
    return (targets / BIN).long().clamp(max=int(RANGE / BIN) - 1)


def _counts(targets: Float[Tensor, " n"]) -> Tensor:
    return torch.bincount(_bins(targets), minlength=int(RANGE / BIN))


def _errors(model: nn.Module, part: Part) -> Float[Tensor, " n"]:
    return (predict(model, part[0])[:, 0] * UNIT - part[1]).abs()


def _trained(data: _Data, trial: Trial, method: Method, rate: float, value: float) -> tuple[nn.Module, float]:
    """A network after training, and the processor seconds of a step."""
    x, y = data.train
    counts = _counts(y)
    density = (counts / counts.float().mean())[_bins(y)]
    with torch.random.fork_rng():
        torch.manual_seed(trial.seed)
        model = small_cnn(tuple(x.shape[1:]), 1, width=16).to(trial.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=WEIGHT_DECAYS[0])
    objective = method(optimizer, value)
    epochs, batch_size = trial.pick(smoke=3, laptop=24, paper=100), 64
    steps = len(y) // batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    order, draws = trial.generator(1), trial.generator(3)
    with Stopwatch(trial.device) as watch:
        for _ in range(epochs):
            for index in torch.randperm(len(y), generator=order)[: steps * batch_size].view(steps, -1):
                twice = index.repeat(2)
                features = model.features(augmented(x[twice], draws))
                preds = model.head(features)[:, 0] * UNIT
                descent_step(optimizer, objective(features, preds, y[twice], density[twice]))
                schedule.step()
    return model.eval(), watch.seconds / (epochs * steps)
