"""Plain image classification: accuracy, calibration, sharpness, and what a step costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.data import load
from trimtab.losses.calibration import area_under_risk_coverage, expected_calibration_error
from trimtab.losses.label_noise import symmetric_noise
from trimtab.optim.sharpness import sam_sharpness
from trimtab.studies.engine.study import Curve, Metric, Result, Task, Trial
from trimtab.studies.tools import baselines
from trimtab.studies.tools.images import Images, shown_epochs, tensor_bytes, worth_halving
from trimtab.studies.tools.peak_memory import peak_memory
from trimtab.studies.tools.training import Rule, Supervised, Training, Workbench, accuracy, fit, predict, sgd

_PROBED = 1000


@dataclass(frozen=True)
class ImageClassification(Task[Training]):
    """Train a small network on real images for a few epochs; at the laptop budget at half of their resolution.

    Each contestant chooses among eight settings by the accuracy on held-out images; the largest rates were added for
    everybody when most had chosen the largest of a first grid. Training loss and sharpness (the
    rise of the loss 0.05 up its gradient) are those of 1,000 training samples, with the labels that were trained on,
    in eval mode. Peak memory is that of a second such training's first two steps, the method's own memory of the
    training set included, network and images left out.

    Attributes:
        dataset: "fashion_mnist", "mnist", "cifar10", "digits", or a file `.npz` with `x_train`, `y_train`, `x_test`
            and `y_test`; at the smoke budget digits.
        net: "cnn", "mlp" or "vit"; for rows of numbers always an MLP.
        size: images at the laptop budget, of which four fifths are trained on.
        noise: share of training labels drawn anew, 0 for clean labels.
        epochs: length of the training at the laptop budget.
    """

    dataset: str = "fashion_mnist"
    net: Literal["cnn", "mlp", "vit"] = "cnn"
    size: int = 10_000
    noise: float = 0.0
    epochs: int = 8

    name: ClassVar[str] = "image-classification"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "test_accuracy": Metric("test accuracy (%)", percent=True),
        "test_loss": Metric("test loss (nats)", best="min"),
        "ece": Metric("calibration error (%)", best="min", percent=True),
        "aurc": Metric("area under the risk-coverage curve (%)", best="min", percent=True),
        "train_loss": Metric("training loss (nats)", best="min"),
        "first_epoch_loss": Metric("training loss after one epoch (nats)", best="min"),
        "sharpness": Metric("rise of the loss at distance 0.05 (nats)", best="min"),
        "seconds_per_step": Metric("time per step (s)", best="min"),
        "optimizer_state_bytes": Metric("optimizer state (bytes)", best="min"),
        "peak_memory_bytes": Metric("peak memory of training (bytes)", best="min"),
    }
    accepts: ClassVar[type[Training]] = Training
    tries: ClassVar[int] = 8
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (0.01, 0.03, 0.1, 0.3), "weight_decay": (5e-4, 5e-3)}
    cost: ClassVar[float] = 2.5

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {
            "ten thousand": ten_thousand,
            "few images": few_images,
            "long training": long_training,
            "wrong labels": wrong_labels,
            "transformer": transformer,
        }

    @classmethod
    def references(cls) -> Mapping[str, Training]:
        adaptive = {"lr": (3e-4, 1e-3, 3e-3, 1e-2), "weight_decay": (1e-2, 1e-1)}
        rates = {"lr": (0.01, 0.03, 0.1, 0.3), "weight_decay": (5e-4,)}
        return {
            "SGD": Training(optimizer=sgd),
            "AdamW": Training(optimizer=baselines.adamw, search=adaptive),
            "Adam": Training(optimizer=baselines.adam, search={"lr": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}),
            "SAM": Training(optimizer=baselines.sam, search={**rates, "rho": (0.05, 0.2)}),
            "label smoothing": Training(loss=baselines.label_smoothing),
            "dropout": Training(prepare=baselines.dropout, search={**rates, "rate": (0.2, 0.5)}),
            "MixUp": Training(rule=baselines.mixed_inputs, search={**rates, "alpha": (0.2, 1.0)}),
        }

    def images(self, trial: Trial) -> Images:
        """The images with their labels, as they are drawn for a run."""
        data = load(self.datasets(trial.budget)[0])
        train, test = trial.pick(
            smoke=(800, 200), laptop=(self.size, 2_000 if self.net == "vit" else 10_000), paper=(None, None)
        )
        data = data.subset(train, test, generator=trial.generator())
        targets = data.y_train
        if self.noise:
            targets = symmetric_noise(targets, self.noise, data.num_classes, generator=trial.generator(2)).targets
        return Images.of(data, targets, trial.device, halve=self.net != "vit" and worth_halving(data, trial))

    def run(self, trial: Trial, entrant: Training) -> Result:
        images = self.images(trial)
        epochs = trial.pick(smoke=3, laptop=self.epochs, paper=max(50, self.epochs))
        bench = images.bench(trial, entrant, self.net, epochs)
        rule = bench.rule()
        if trial.searching:
            fit(bench, rule)
            return Result(score=accuracy(rule, images.x_held, images.y_held))
        shown = sorted(shown_epochs(epochs))
        reached: list[float] = []
        losses: list[float] = []

        def measure(epoch: int) -> None:
            if epoch in shown:
                reached.append(accuracy(rule, images.x_test, images.y_test))
            if epoch in shown or epoch == 0:
                logits = predict(rule, images.x[:_PROBED])
                losses.append(F.cross_entropy(logits, images.y[:_PROBED]).item())

        done = fit(bench, rule, after_epoch=measure)
        logits = predict(rule, images.x_test)
        probs, steps = logits.softmax(1), [float(epoch + 1) for epoch in shown]
        metrics = {
            "test_accuracy": reached[-1],
            "test_loss": F.cross_entropy(logits, images.y_test).item(),
            "ece": float(expected_calibration_error(probs, images.y_test)),
            "aurc": float(area_under_risk_coverage(probs, images.y_test)),
            "train_loss": losses[-1],
            "first_epoch_loss": losses[0],
            "seconds_per_step": done.seconds / done.steps,
            "optimizer_state_bytes": tensor_bytes(rule.optimizers),
            **_of_one_network(bench, rule, images),
        }
        curve = losses[-len(shown) :]
        return Result(metrics, {"test_accuracy": Curve(steps, reached), "train_loss": Curve(steps, curve)})


def _of_one_network(bench: Workbench, rule: Rule, images: Images) -> dict[str, float]:
    """What is measured where one network is trained in the plain way."""
    if not isinstance(rule, Supervised):
        return {}
    network = rule.network.eval()
    probe = partial(_probe_loss, network, images.x[:_PROBED], images.y[:_PROBED])
    memory = peak_memory(partial(_two_steps, bench, bench.network()), bench.device)
    return {
        "sharpness": float(sam_sharpness(probe, network.parameters(), rho=0.05)),
        "peak_memory_bytes": float(memory),
    }


def _two_steps(bench: Workbench, network: nn.Module) -> None:
    rule = Supervised(bench, network)
    rule.set_epoch(0)
    for start in (0, bench.batch_size):
        index = torch.arange(start, start + bench.batch_size, device=bench.x.device) % len(bench.x)
        rule.step(bench.x[index], bench.y[index], index)


def _probe_loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(network(x), y)


ten_thousand = ImageClassification()
few_images = ImageClassification(size=1_250, epochs=40)
long_training = ImageClassification(epochs=20)
wrong_labels = ImageClassification(noise=0.2)
transformer = ImageClassification(net="vit", size=4_000, epochs=6)
