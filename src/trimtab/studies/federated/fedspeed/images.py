"""Image classification over clients whose class proportions differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab import nets
from trimtab.data import load
from trimtab.federated import Algorithm, SimulationState, dirichlet_partition, simulate
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tools.images import worth_halving
from trimtab.studies.tools.training import predict

METRICS = {
    "late_accuracy": Metric("test accuracy, mean of the last 5 rounds (%)", percent=True),
    "worst_client_accuracy": Metric("accuracy for the worst client, mean of the last 5 rounds (%)", percent=True),
    "rounds_to_70": Metric("rounds to 70 % accuracy (one too many: never)", best="min"),
    "gradients": Metric("mini-batch gradients", best="min"),
}
_LATE = 5


@dataclass(frozen=True)
class FederatedImages:
    """Train one small network on images that never leave their clients.

    Every client holds the same number of training images, with class proportions from a Dirichlet distribution. The
    global model is tested after each round on test images of all classes; a client's accuracy is that of the global
    model on test images in the client's class proportions. Images are Fashion-MNIST's, at the laptop budget at half of
    their resolution, and digits at the smoke budget.

    Attributes:
        num_clients: clients in the federation.
        alpha: concentration of the Dirichlet distribution; the smaller, the more clients differ.
        fraction: share of the clients that take part in a round.
        rounds: length of the training at the laptop budget.
    """

    num_clients: int = 20
    alpha: float = 0.1
    fraction: float = 0.2
    rounds: int = 30

    def train(self, trial: Trial, algorithm: Algorithm) -> Result:
        """How good the global model becomes."""
        data = load(trial.pick(smoke="digits", laptop="fashion_mnist", paper="fashion_mnist"))
        size = trial.pick(smoke=1200, laptop=10_000, paper=len(data.y_train))
        rounds = trial.pick(smoke=3, laptop=self.rounds, paper=200)
        clients = trial.pick(smoke=10, laptop=self.num_clients, paper=100)
        chosen = torch.randperm(len(data.y_train), generator=trial.generator(1))[:size]
        x, y, x_test, y_test = data.x_train[chosen], data.y_train[chosen], data.x_test, data.y_test
        if worth_halving(data, trial):
            x, x_test = F.avg_pool2d(x, 2), F.avg_pool2d(x_test, 2)
        x_test, y_test = x_test.to(trial.device), y_test.to(trial.device)
        parts = dirichlet_partition(y, clients, self.alpha, balanced=True, generator=trial.generator(2))
        held = [(x[part].to(trial.device), y[part].to(trial.device)) for part in parts]
        shares = torch.stack([torch.bincount(y[part], minlength=data.num_classes) / len(part) for part in parts])
        shares = shares.to(trial.device)
        model = trial.seeded(lambda: nets.mlp(x[0].numel(), (64,), data.num_classes)).to(trial.device)

        def evaluate(model: nn.Module, state: SimulationState) -> dict[str, float]:
            trial.report(state.server.round / rounds)
            return accuracies(predict(model, x_test), y_test, shares)

        history = simulate(
            algorithm,
            model,
            held,
            rounds=rounds,
            fraction=self.fraction,
            generator=trial.generator(3),
            evaluate=evaluate,
        )
        accuracy, worst = history.curve("accuracy"), history.curve("worst")
        steps = [float(i + 1) for i in range(rounds)]
        return Result(
            {
                "late_accuracy": sum(accuracy[-_LATE:]) / len(accuracy[-_LATE:]),
                "worst_client_accuracy": sum(worst[-_LATE:]) / len(worst[-_LATE:]),
                "rounds_to_70": next((t for t, a in zip(steps, accuracy, strict=True) if a >= 0.7), rounds + 1.0),
                "gradients": sum(m["gradients"] for entry in history.rounds for m in entry.metrics),
            },
            {
                "test_accuracy": Curve(steps, accuracy, x_label="round"),
                "worst_client": Curve(steps, worst, x_label="round"),
            },
        )


def accuracies(logits: Tensor, y: Tensor, shares: Tensor) -> dict[str, float]:
    """Accuracy over all samples, and the lowest over clients with these class proportions."""
    right = (logits.argmax(1) == y).float()
    counts = torch.bincount(y, minlength=shares.shape[1])
    per_class = torch.zeros(shares.shape[1], device=y.device).index_add_(0, y, right) / counts.clamp_min(1)
    return {"accuracy": right.mean().item(), "worst": (shares @ per_class).min().item()}
