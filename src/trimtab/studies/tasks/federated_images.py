"""Image classification over clients whose class proportions differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab import nets
from trimtab.data import load
from trimtab.federated import Algorithm, SimulationState, dirichlet_partition, finish, simulate
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial
from trimtab.studies.training import predict

AlgorithmFactory = Callable[[int], Algorithm]
"""Maps the number of local epochs to an algorithm."""


@dataclass(frozen=True)
class FederatedImages(Task):
    """Train one small network on images that never leave their clients.

    Every client holds the same number of training images, with class proportions from a Dirichlet distribution. The
    global model is tested after each round on test images of all classes; a client's accuracy is that of the global
    model on test images in the client's class proportions.

    Attributes:
        dataset: "fashion_mnist", "mnist" or "digits"; at the smoke budget always digits.
        num_clients: clients in the federation.
        alpha: concentration of the Dirichlet distribution; the smaller, the more clients differ.
        fraction: share of the clients that take part in a round.
        local_epochs: passes over a participant's data in a round.
        rounds: length of the training at the laptop budget.
    """

    dataset: str = "fashion_mnist"
    num_clients: int = 20
    alpha: float = 0.1
    fraction: float = 0.5
    local_epochs: int = 5
    rounds: int = 30

    name: ClassVar[str] = "federated-images"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "final_accuracy": Metric("final test accuracy (%)", percent=True),
        "late_accuracy": Metric("test accuracy, mean of the last 5 rounds (%)", percent=True),
        "best_accuracy": Metric("best test accuracy (%)", percent=True),
        "worst_client_accuracy": Metric("accuracy for the worst client (%)", percent=True),
        "rounds_to_75": Metric("rounds to 75 % accuracy (one too many: never)", best="min"),
        "floats_sent": Metric("floats sent, both ways", best="min"),
        "gradients": Metric("mini-batch gradients", best="min"),
    }

    def train(self, algorithm: AlgorithmFactory, local_epochs: int | None = None) -> Arm:
        """A contestant.

        Args:
            algorithm: makes it from the number of local epochs.
            local_epochs: another number than the task's.
        """
        return self.arm(algorithm=algorithm, local_epochs=local_epochs)

    def run(self, trial: Trial, **options: Any) -> Result:
        return self.measure(trial, **options)

    def measure(
        self, trial: Trial, algorithm: AlgorithmFactory, local_epochs: int | None = None, validate: bool = False
    ) -> Result:
        """Run a contestant; with `validate`, on training images that no client holds in the place of the test images.

        Hyper-parameters are chosen with `validate`.
        """
        data = load("digits" if trial.budget == "smoke" else self.dataset)
        size = trial.pick(smoke=1200, laptop=10_000, paper=len(data.y_train))
        rounds = trial.pick(smoke=3, laptop=self.rounds, paper=200)
        clients = trial.pick(smoke=10, laptop=self.num_clients, paper=100)
        order = torch.randperm(len(data.y_train), generator=trial.generator(1))
        x, y = data.x_train[order[:size]], data.y_train[order[:size]]
        x_test, y_test = data.x_test.to(trial.device), data.y_test.to(trial.device)
        if validate:
            held_out = order[size : size + 10_000]
            x_test, y_test = data.x_train[held_out].to(trial.device), data.y_train[held_out].to(trial.device)
        parts = dirichlet_partition(y, clients, self.alpha, balanced=True, generator=trial.generator(2))
        held = [(x[part].to(trial.device), y[part].to(trial.device)) for part in parts]
        shares = torch.stack([torch.bincount(y[part], minlength=data.num_classes) / len(part) for part in parts])
        shares = shares.to(trial.device)
        with torch.random.fork_rng():
            torch.manual_seed(trial.seed)
            model = nets.mlp(x[0].numel(), (128, 64), data.num_classes).to(trial.device)

        def evaluate(model: nn.Module, state: SimulationState) -> dict[str, float]:
            trial.report(state.server.round / rounds)
            return accuracies(predict(model, x_test), y_test, shares)

        method = algorithm(local_epochs or trial.pick(smoke=1, laptop=self.local_epochs, paper=self.local_epochs))
        history = simulate(
            method,
            model,
            held,
            rounds=rounds,
            fraction=self.fraction,
            generator=trial.generator(3),
            evaluate=evaluate,
        )
        finish(method, model, held, history.state)
        accuracy = history.curve("accuracy")
        final = accuracies(predict(model, x_test), y_test, shares)
        steps = [float(i + 1) for i in range(rounds)]
        return Result(
            {
                "final_accuracy": final["accuracy"],
                "late_accuracy": sum(accuracy[-5:]) / len(accuracy[-5:]),
                "best_accuracy": max([*accuracy, final["accuracy"]]),
                "worst_client_accuracy": final["worst"],
                "rounds_to_75": next((t for t, a in zip(steps, accuracy, strict=True) if a >= 0.75), rounds + 1.0),
                "floats_sent": sum(entry.bytes_down + entry.bytes_up for entry in history.rounds) / 4,
                "gradients": sum(m.get("gradients", 0.0) for entry in history.rounds for m in entry.metrics),
            },
            {"test_accuracy": Curve(steps, accuracy), "worst_client": Curve(steps, history.curve("worst"))},
        )


def accuracies(logits: Tensor, y: Tensor, shares: Tensor) -> dict[str, float]:
    """Accuracy over all samples, and the lowest over clients with these class proportions."""
    right = (logits.argmax(1) == y).float()
    counts = torch.bincount(y, minlength=shares.shape[1])
    per_class = torch.zeros(shares.shape[1], device=y.device).index_add_(0, y, right) / counts.clamp_min(1)
    return {"accuracy": right.mean().item(), "worst": (shares @ per_class).min().item()}
