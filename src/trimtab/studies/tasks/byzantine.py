"""Training on many workers of which some send wrong gradients: what a rule that combines them is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from trimtab import nets
from trimtab.data import load
from trimtab.federated.robust_means import (
    RobustMean,
    bulyan,
    coordinate_median,
    krum,
    multi_krum,
    plain_mean,
    trimmed_mean,
)
from trimtab.studies.engine.study import Curve, Entrant, Metric, Result, Setting, Task, Trial
from trimtab.studies.tools.images import worth_halving
from trimtab.studies.tools.training import accuracy

Attack = Literal["sign flip", "random", "little is enough", "dropped"]

STRENGTH: Mapping[Attack, float] = {"sign flip": 5.0, "random": 1000.0, "little is enough": 1.5, "dropped": 0.1}
"""Length of the flipped mean, size of the noise in units of the mean, standard deviations, share of coordinates."""


@dataclass(frozen=True)
class WorkersPlan:
    """What a rule may need to know before the training starts.

    Attributes:
        workers: how many send a gradient in each step.
        byzantine: how many of them are wrong; what no one is told is which.
        steps: length of the training.
        setting: the values that the search chose, or tries.
    """

    workers: int
    byzantine: int
    steps: int
    setting: Setting

    @property
    def lr(self) -> float:
        """The learning rate of the setting."""
        return float(self.setting.get("lr", 0.3))


@dataclass(frozen=True, kw_only=True)
class Aggregation(Entrant):
    """What a contestant brings.

    Attributes:
        mean: makes the rule that combines the workers' gradients.
    """

    mean: Callable[[WorkersPlan], RobustMean]


@dataclass(frozen=True)
class Byzantine(Task[Aggregation]):
    """Train one small network by gradients of 15 workers, of which the same few are wrong in each step.

    Each step every worker takes the gradient of its own 32 images, drawn anew from the same 5,000 of 14 x 14 pixels;
    the network is an MLP with one hidden layer of 64, trained by plain SGD along what the rule makes of the gradients.
    The attackers know all honest gradients and send the same, or noise: "sign flip" is five times the honest mean
    turned round, "random" uniform noise a thousand times as large as it, "little is enough" the honest mean less one
    and a half standard deviations in each coordinate, "dropped" their own gradient with a tenth of it lost. Every
    contestant chooses its learning rate among four by the accuracy on 1,000 held-out images, under attack.

    Attributes:
        attack: what the wrong workers send.
        byzantine: how many they are.
        workers: how many workers there are.
        dataset: "fashion_mnist", "mnist" or a file `.npz`; at the smoke budget digits.
    """

    attack: Attack = "sign flip"
    byzantine: int = 3
    workers: int = 15
    dataset: str = "fashion_mnist"

    name: ClassVar[str] = "byzantine"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "accuracy": Metric("test accuracy (%)", percent=True),
        "alignment": Metric("cosine of the step with the honest mean"),
        "test_loss": Metric("test loss, at most 100 (nats)", best="min"),
    }
    accepts: ClassVar[type[Aggregation]] = Aggregation
    tries: ClassVar[int] = 4
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (0.1, 0.3, 1.0, 3.0)}
    cost: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if self.attack not in STRENGTH:
            raise ValueError(f"attack must be one of {', '.join(map(repr, STRENGTH))}, got {self.attack!r}")
        if not 0 <= self.byzantine < self.workers / 2:
            raise ValueError(f"byzantine must be less than half of {self.workers} workers, got {self.byzantine}")

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {
            "sign flip": sign_flip,
            "sign flip, one worker": one_sign_flip,
            "sign flip, six workers": many_sign_flips,
            "random gradients": random_gradients,
            "a little is enough": little_is_enough,
            "lost coordinates": lost_coordinates,
        }

    @classmethod
    def references(cls) -> Mapping[str, Aggregation]:
        return {
            "mean": Aggregation(mean=lambda plan: plain_mean),
            "coordinate median": Aggregation(mean=lambda plan: coordinate_median),
            "trimmed mean": Aggregation(mean=lambda plan: partial(trimmed_mean, trim=plan.byzantine)),
            "Krum": Aggregation(mean=lambda plan: partial(krum, byzantine=plan.byzantine)),
            "Multi-Krum": Aggregation(mean=lambda plan: partial(multi_krum, byzantine=plan.byzantine)),
            "Bulyan": Aggregation(mean=lambda plan: partial(bulyan, byzantine=plan.byzantine), unfit=too_few_honest),
        }

    def images(self, trial: Trial) -> WorkersImages:
        """The images of a run."""
        data = load(self.datasets(trial.budget)[0])
        held, size, tested = trial.pick(
            smoke=(200, 600, 200), laptop=(1000, 5000, 4000), paper=(5000, len(data.y_train) - 5000, len(data.y_test))
        )
        order = torch.randperm(len(data.y_train), generator=trial.generator(1))[: held + size]
        halve = worth_halving(data, trial)
        x, x_test = (
            (F.avg_pool2d(part, 2) if halve else part).flatten(1).to(trial.device)
            for part in (data.x_train[order], data.x_test[:tested])
        )
        y = data.y_train[order].to(trial.device)
        y_test = data.y_test[:tested].to(trial.device)
        return WorkersImages(x[held:], y[held:], x[:held], y[:held], x_test, y_test, data.num_classes)

    def run(self, trial: Trial, entrant: Aggregation) -> Result:
        images = self.images(trial)
        plan = WorkersPlan(self.workers, self.byzantine, trial.pick(smoke=30, laptop=200, paper=2000), trial.setting)
        model = trial.seeded(lambda: nets.mlp(images.x.shape[1], (64,), images.num_classes)).to(trial.device)
        rule, gradients = entrant.mean(plan), per_worker_gradients(model)
        draws, lies = trial.generator(2), trial.generator(3)
        wrong = torch.zeros(self.workers, dtype=torch.bool)
        wrong[torch.randperm(self.workers, generator=lies)[: self.byzantine]] = True
        batch = trial.pick(smoke=8, laptop=32, paper=32)
        shown = {round(plan.steps * part / 8) for part in range(1, 9)}
        alignment, steps, reached = 0.0, list[float](), list[float]()
        for step in range(1, plan.steps + 1):
            index = torch.randint(len(images.x), (self.workers, batch), generator=draws).to(trial.device)
            sent = gradients(images.x[index], images.y[index])
            honest = sent[~wrong]
            if self.byzantine:
                sent[wrong] = attacked(self.attack, sent[wrong], honest, generator=lies)
            if not bool(sent.isfinite().all()):
                break  # led astray beyond all numbers
            move = rule(sent)
            descend(model, move, plan.lr)
            alignment += F.cosine_similarity(move, honest.mean(0), dim=0).item() / plan.steps
            if step in shown and not trial.searching:
                steps.append(float(step))
                reached.append(accuracy(model, images.x_test, images.y_test))
                trial.report(step / plan.steps)
        if trial.searching:
            return Result(score=accuracy(model, images.x_held, images.y_held))
        with torch.no_grad():
            loss = F.cross_entropy(model(images.x_test), images.y_test).item()
        # A run that was led astray may have no finite loss; 100 stands for all of these.
        found = {
            "accuracy": accuracy(model, images.x_test, images.y_test),
            "alignment": alignment,
            "test_loss": min(loss, 100.0) if loss == loss else 100.0,
        }
        return Result(found, {"test_accuracy": Curve(steps, reached, "step")})


def too_few_honest(task: Byzantine) -> str:
    """Why Bulyan cannot enter a variant."""
    wanted = 4 * task.byzantine + 3
    return "" if task.workers >= wanted else f"against {task.byzantine} wrong workers it needs {wanted} in all"


@dataclass(frozen=True)
class WorkersImages:
    """The images of a run, flat; no image in two parts.

    Attributes:
        x, y: what all workers draw from.
        x_held, y_held: held-out images, on which settings are chosen.
        x_test, y_test: for testing; never looked at while settings are tried.
        num_classes: number of classes.
    """

    x: Float[Tensor, "n pixels"]
    y: Int[Tensor, " n"]
    x_held: Float[Tensor, "held pixels"]
    y_held: Int[Tensor, " held"]
    x_test: Float[Tensor, "test pixels"]
    y_test: Int[Tensor, " test"]
    num_classes: int


def attacked(
    attack: Attack,
    own: Float[Tensor, "wrong size"],
    honest: Float[Tensor, "honest size"],
    *,
    generator: torch.Generator,
) -> Float[Tensor, "wrong size"]:
    """What the wrong workers send.

    Args:
        attack: its kind.
        own: their own true gradients.
        honest: those of all others.
        generator: decides noise and losses; on the CPU.

    Example:
        >>> honest = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
        >>> attacked("sign flip", torch.zeros(1, 2), honest, generator=torch.Generator())
        tensor([[-10.,  -0.]])
    """
    mean, strength = honest.mean(0), STRENGTH[attack]
    if attack == "sign flip":
        return (-strength * mean).expand_as(own)
    if attack == "little is enough":
        return (mean - strength * honest.std(0)).expand_as(own)
    noise = torch.rand(own.shape, generator=generator).to(own)
    if attack == "random":
        # Uniform noise has a root mean square of its half width over the root of 3.
        return (2 * noise - 1) * math.sqrt(3) * strength * mean.square().mean().sqrt()
    return own * (noise >= strength)


def per_worker_gradients(model: nn.Module) -> Callable[[Tensor, Tensor], Float[Tensor, "workers size"]]:
    """A function of the workers' images and labels that gives the gradient of each, one a row."""

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (x,)), y)

    each = vmap(grad(loss), in_dims=(None, 0, 0))

    def gradients(x: Tensor, y: Tensor) -> Tensor:
        found = each({name: p.detach() for name, p in model.named_parameters()}, x, y)
        return torch.cat([value.flatten(1) for value in found.values()], dim=1)

    return gradients


@torch.no_grad()
def descend(model: nn.Module, direction: Float[Tensor, " size"], lr: float) -> None:
    """A step against a direction that is laid out as the gradients are."""
    params = list(model.parameters())
    for p, part in zip(params, direction.split([p.numel() for p in params]), strict=True):
        p.sub_(part.view_as(p), alpha=lr)


sign_flip = Byzantine()
one_sign_flip = Byzantine(byzantine=1)
many_sign_flips = Byzantine(byzantine=6)
random_gradients = Byzantine(attack="random")
little_is_enough = Byzantine(attack="little is enough")
lost_coordinates = Byzantine(attack="dropped")
