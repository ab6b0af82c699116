"""Fine-tuning a pre-trained network on images at one angle: what becomes of the other angles."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.data import load
from trimtab.nets import Classifier, small_cnn
from trimtab.optim.two_pass import frozen_norm_stats
from trimtab.studies.lr_search import best_learning_rate
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial
from trimtab.studies.tasks.finetune_transfer import rotate, warm_cosine
from trimtab.studies.training import fit, predict


class Stepper(Protocol):
    """A contestant at work: one optimizer step on a batch."""

    def __call__(self, x: Float[Tensor, "batch ..."], y: Int[Tensor, " batch"]) -> object: ...


# From the network, the base optimizer, the value of the knob, and a generator for what is drawn.
Method = Callable[[nn.Module, torch.optim.Optimizer, float, torch.Generator], Stepper]


@dataclass(frozen=True)
class _Images:
    """Disjoint training images for pre-training, fine-tuning and choosing, and the test images, all upright."""

    source: tuple[Tensor, Tensor]
    target: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    in_shape: tuple[int, ...]
    num_classes: int


@dataclass(frozen=True)
class RotatedFinetuning(Task):
    """Pre-train a small CNN on upright images, fine-tune it on few at one angle, and test it at others.

    The learning rate is the best of four for AdamW, and the same in every arm. Each arm then has one knob of its own,
    with as many values for every arm, of which it keeps the best. Both are judged by the accuracy on held-out images
    at the angle of fine-tuning; no other angle is looked at.

    Attributes:
        dataset: "mnist" or "fashion_mnist"; at the smoke budget always digits.
        angle: rotation of the fine-tuning images in degrees.
        others: angles of the out-of-domain tests.
        samples: number of fine-tuning images.
    """

    dataset: str = "mnist"
    angle: float = 30.0
    others: tuple[float, ...] = (0.0, 45.0, 60.0)
    samples: int = 1000

    name: ClassVar[str] = "rotated-finetuning"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "ood_accuracy": Metric("accuracy at other angles (%)", percent=True),
        "id_accuracy": Metric("accuracy at the angle of fine-tuning (%)", percent=True),
        "ms_per_step": Metric("time per step (ms)", best="min"),
        "knob": Metric("the arm's own setting", best=None),
        "learning_rate": Metric("learning rate", best=None),
    }
    RATES: ClassVar[tuple[float, ...]] = (3e-4, 1e-3, 3e-3, 1e-2)

    def tune(self, method: Method | None = None, knob: Sequence[float] | None = None) -> Arm:
        """A contestant.

        Args:
            method: from the network, AdamW, a value of the knob and a generator, makes what steps on a batch; plain
                AdamW, whose knob is the weight decay, if None.
            knob: three values to choose from.
        """
        return self.arm(method=method, knob=knob)

    def run(self, trial: Trial, **options: Any) -> Result:
        method: Method = options.get("method", adamw)
        knob: Sequence[float] = options.get("knob", WEIGHT_DECAYS)
        images = self._images(trial)
        base = self._pretrained(images, trial)
        x_held, y_held = rotate(images.validation[0], self.angle), images.validation[1]

        def score(rate: float) -> float:
            return _accuracy(self._tuned(base, images, trial, adamw, rate, WEIGHT_DECAYS[1])[0], x_held, y_held)

        def best_rate() -> Tensor:
            return torch.tensor(best_learning_rate(self.RATES, score), dtype=torch.float64)

        rate = trial.cached(best_rate, key=f"{self} learning rate seed {trial.seed}").item()
        runs = []
        for done, value in enumerate(knob):
            model, seconds = self._tuned(base, images, trial, method, rate, value)
            runs.append((_accuracy(model, x_held, y_held), model, seconds, value))
            trial.report((done + 1) / len(knob))
        _, model, seconds, value = max(runs, key=lambda run: run[0])
        x, y = images.test
        accuracies = {angle: _accuracy(model, rotate(x, angle), y) for angle in (self.angle, *self.others)}
        return Result(
            {
                "ood_accuracy": statistics.mean(accuracies[angle] for angle in self.others),
                "id_accuracy": accuracies[self.angle],
                "ms_per_step": 1e3 * seconds,
                "knob": value,
                "learning_rate": rate,
            },
            {"accuracy_by_angle": Curve(sorted(accuracies), [accuracies[angle] for angle in sorted(accuracies)])},
        )

    def _images(self, trial: Trial) -> _Images:
        data = load("digits" if trial.budget == "smoke" else self.dataset)
        sizes = trial.pick(
            smoke=(600, 200, 200), laptop=(10_000, self.samples, 2000), paper=(50_000, self.samples, 5000)
        )
        x, y = data.x_train.to(trial.device), data.y_train.to(trial.device)
        order = torch.randperm(len(y), generator=trial.generator())[: sum(sizes)].to(x.device)
        source, target, validation = ((x[part], y[part]) for part in order.split(sizes))
        test = (data.x_test.to(trial.device), data.y_test.to(trial.device))
        return _Images(source, target, validation, test, data.in_shape, data.num_classes)

    def _pretrained(self, images: _Images, trial: Trial) -> Classifier:
        x, y = images.source
        with torch.random.fork_rng():
            torch.manual_seed(trial.seed)
            model = small_cnn(images.in_shape, images.num_classes).to(trial.device)
        epochs = trial.pick(smoke=4, laptop=2, paper=5)

        def train() -> dict[str, Tensor]:
            quiet = Trial(seed=trial.seed, budget=trial.budget, device=trial.device)
            fit(model, x, y, num_classes=images.num_classes, epochs=epochs, trial=quiet, batch_size=64)
            return {name: tensor.cpu() for name, tensor in model.state_dict().items()}

        key = f"{self} cnn {len(y)} samples {epochs} epochs seed {trial.seed}"
        model.load_state_dict(trial.cached(train, key=key))
        return model

    def _tuned(
        self, base: Classifier, images: _Images, trial: Trial, method: Method, rate: float, value: float
    ) -> tuple[Classifier, float]:
        """A copy of the network, fine-tuned, and the processor seconds of a step."""
        model = copy.deepcopy(base).train()
        x, y = rotate(images.target[0], self.angle), images.target[1]
        epochs, batch_size = trial.pick(smoke=1, laptop=5, paper=10), 32
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        step = method(model, optimizer, value, trial.generator(2))
        steps = epochs * (len(y) // batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(warm_cosine, steps=steps))
        order = trial.generator(1)
        # A run has one thread: its processor time is what it would take alone, also where runs share the machine.
        clock = time.process_time if torch.device(trial.device).type == "cpu" else time.perf_counter
        started = clock()
        for _ in range(epochs):
            for index in _batches(len(y), batch_size, order):
                step(x[index], y[index])
                schedule.step()
        return model.eval(), (clock() - started) / steps


WEIGHT_DECAYS = (0.0, 0.01, 0.1)


def _batches(count: int, size: int, generator: torch.Generator) -> Iterable[Tensor]:
    return torch.randperm(count, generator=generator)[: count // size * size].view(-1, size)


def adamw(
    model: nn.Module, optimizer: torch.optim.Optimizer, weight_decay: float, generator: torch.Generator
) -> Stepper:
    """Baseline: AdamW and nothing else; the knob is its weight decay."""
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def consistency(
    model: nn.Module, optimizer: torch.optim.Optimizer, weight: float, generator: torch.Generator, std: float = 0.1
) -> Stepper:
    """Baseline: the trust region as a penalty, as in R3F; the knob is the weight of the symmetric divergence."""

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        noise = std * torch.randn(x.shape, generator=generator).to(x.device)
        clean = model(x).log_softmax(1)
        with frozen_norm_stats(model):
            noisy = model(x + noise).log_softmax(1)
        apart = sum(F.kl_div(a, b, reduction="batchmean", log_target=True) for a, b in ((clean, noisy), (noisy, clean)))
        (F.nll_loss(clean, y) + weight * apart).backward()
        optimizer.step()

    return step


def _accuracy(model: nn.Module, x: Float[Tensor, "n ..."], y: Int[Tensor, " n"]) -> float:
    return (predict(model, x).argmax(1) == y).float().mean().item()
