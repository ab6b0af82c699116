"""Image classification over clients whose class proportions differ, whose data never leave them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab import nets
from trimtab.data import load
from trimtab.federated.fedavg import FedAvg
from trimtab.federated.feddyn import FedDyn
from trimtab.federated.partition import dirichlet_partition, long_tailed
from trimtab.federated.protocol import Algorithm, ServerState, Update
from trimtab.federated.scaffold import SCAFFOLD
from trimtab.federated.simulation import History, SimulationState, finish, num_bytes, simulate
from trimtab.studies.engine.study import Curve, Entrant, Metric, Result, Setting, Task, Trial
from trimtab.studies.tools.images import worth_halving
from trimtab.studies.tools.training import predict

EPOCHS, BATCH, MAX_NORM = 2, 50, 10.0
"""Local epochs, samples in a step and bound on a client's gradient: the same for every contestant."""

_LATE = 3  # final rounds whose models are tested, for from one to the next they swing
_RARE = 3  # classes that count as rare


@dataclass(frozen=True)
class FederatedPlan:
    """What a method may need to know before the federation starts.

    Attributes:
        num_clients: clients, of which half take part in a round.
        num_classes: number of classes.
        in_shape: of one sample.
        rounds: length of the training.
        setting: the values that the search chose, or tries.
        seed: of the run.
    """

    num_clients: int
    num_classes: int
    in_shape: tuple[int, ...]
    rounds: int
    setting: Setting
    seed: int = 0

    @property
    def lr(self) -> float:
        """The clients' learning rate of the setting."""
        return float(self.setting.get("lr", 0.1))

    def generator(self, stream: int = 100) -> torch.Generator:
        """A CPU generator fixed by the run's seed, for a method that draws."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + stream)


@dataclass(frozen=True, kw_only=True)
class Federated(Entrant):
    """What a contestant brings.

    Attributes:
        algorithm: makes it; one with a final exchange is judged after that.
        network: makes the model, if it must be another than the task's.
    """

    algorithm: Callable[[FederatedPlan], Algorithm]
    network: Callable[[FederatedPlan], nn.Module] | None = None


@dataclass(frozen=True)
class Federation:
    """The data of a run, no sample in two parts.

    Attributes:
        clients: `(x, y)` of each.
        shares: class proportions of each client.
        held: held-out samples of the training part, as many of each class; settings are chosen on them.
        test: test samples, as many of each class; never looked at while settings are tried.
        order: classes from the most frequent to the rarest, where that differs.
        num_classes: number of classes.
    """

    clients: list[tuple[Tensor, Tensor]]
    shares: Float[Tensor, "clients classes"]
    held: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    order: Int[Tensor, " classes"]
    num_classes: int


@dataclass(frozen=True)
class FederatedImages(Task[Federated]):
    """Train one small network on images that never leave their clients.

    20 clients hold 250 images of 14 x 14 pixels each, with class proportions from a Dirichlet distribution; half of
    them take part in each of 30 rounds, with two passes over their images in batches of 50 and gradients of a norm of
    at most 10. The network is an MLP with one hidden layer of 64. Every contestant chooses among four settings by the
    accuracy on 1,000 held-out images. What is judged is the mean over the models of the last three rounds, each after
    the final exchange that a method may have. A client's accuracy is that of the global model on test images in the
    client's class proportions.

    Attributes:
        alpha: concentration of the Dirichlet distribution; the smaller, the more clients differ.
        imbalance: size of the rarest class over that of the most frequent one, over all clients together.
        embedded: hand out embeddings in the place of images: 64 principal components of the held-out images.
        dataset: "fashion_mnist", "mnist" or a file `.npz`; at the smoke budget digits.
    """

    alpha: float = 0.05
    imbalance: float = 1.0
    embedded: bool = False
    dataset: str = "fashion_mnist"

    name: ClassVar[str] = "federated-images"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "accuracy": Metric("test accuracy, mean of the last 3 rounds (%)", percent=True),
        "worst_client_accuracy": Metric("accuracy for the worst client (%)", percent=True),
        "rare_accuracy": Metric("accuracy on the three rarest classes (%)", percent=True),
        "megabytes": Metric("data sent by and to clients (MB)", best="min"),
        "gradients": Metric("mini-batch gradients", best="min"),
    }
    accepts: ClassVar[type[Federated]] = Federated
    tries: ClassVar[int] = 4
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (0.03, 0.1, 0.3, 1.0)}
    cost: ClassVar[float] = 1.5

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        # These build on this module.
        from trimtab.studies.tasks.federated_clients.domain_skew import domain_skew
        from trimtab.studies.tasks.federated_clients.partly_labelled import few_labels

        return {
            "few classes a client": strong_skew,
            "mixed clients": mild_skew,
            "clients much alike": weak_skew,
            "long tail": long_tail,
            "embeddings, few classes a client": embedded_skew,
            "domain skew": domain_skew,
            "few labels": few_labels,
        }

    @classmethod
    def references(cls) -> Mapping[str, Federated]:
        return {
            "FedAvg": Federated(algorithm=fedavg),
            "FedProx": Federated(algorithm=fedprox, search={"lr": (0.1, 0.3), "prox": (0.01, 0.1)}),
            "SCAFFOLD": Federated(algorithm=scaffold),
            "FedDyn": Federated(algorithm=feddyn, search={"lr": (0.1, 0.3), "alpha": (0.01, 0.1)}),
        }

    def federation(self, trial: Trial) -> Federation:
        """All samples of a run."""
        data = load(self.datasets(trial.budget)[0])
        count = trial.pick(smoke=200, laptop=1000, paper=5000)
        size = trial.pick(smoke=600, laptop=5000, paper=50_000)
        drawn = torch.randperm(len(data.y_train), generator=trial.generator(1))
        kept, rest = drawn[:count], drawn[count:]
        # Which classes are rare is drawn anew for every seed.
        order = torch.randperm(data.num_classes, generator=trial.generator(4))
        if self.imbalance < 1:
            most, y = trial.pick(smoke=90, laptop=1780, paper=5000), data.y_train[rest]
            chosen = rest[long_tailed(y, self.imbalance, most=most, order=order, generator=trial.generator(5))]
        else:
            chosen = rest[:size]
        tested = trial.pick(smoke=200, laptop=4000, paper=len(data.y_test))
        halve = worth_halving(data, trial)
        x_held, x, x_test = (
            F.avg_pool2d(part, 2) if halve else part
            for part in (data.x_train[kept], data.x_train[chosen], data.x_test[:tested])
        )
        if self.embedded:
            mean, axes = principal_axes(x_held, trial.pick(smoke=32, laptop=64, paper=64))
            x_held, x, x_test = ((part.flatten(1) - mean) @ axes for part in (x_held, x, x_test))
        y, clients = data.y_train[chosen], trial.pick(smoke=6, laptop=20, paper=100)
        parts = dirichlet_partition(y, clients, self.alpha, balanced=True, generator=trial.generator(2))
        device = trial.device
        return Federation(
            [(x[part].to(device), y[part].to(device)) for part in parts],
            torch.stack([torch.bincount(y[part], minlength=data.num_classes) / len(part) for part in parts]),
            (x_held.to(device), data.y_train[kept].to(device)),
            (x_test.to(device), data.y_test[:tested].to(device)),
            order,
            data.num_classes,
        )

    def plan(self, trial: Trial, federation: Federation) -> FederatedPlan:
        """What an algorithm is made from."""
        x = federation.clients[0][0]
        rounds = trial.pick(smoke=4, laptop=30, paper=200)
        shape = tuple(x.shape[1:])
        return FederatedPlan(len(federation.clients), federation.num_classes, shape, rounds, trial.setting, trial.seed)

    def run(self, trial: Trial, entrant: Federated) -> Result:
        federation = self.federation(trial)
        plan = self.plan(trial, federation)
        network = entrant.network or perceptron
        model = trial.seeded(lambda: network(plan)).to(trial.device)
        return train(trial, entrant.algorithm(plan), model, plan, federation, rare=self.imbalance < 1)


def train(
    trial: Trial,
    algorithm: Algorithm,
    model: nn.Module,
    plan: FederatedPlan,
    federation: Federation,
    *,
    rare: bool = False,
) -> Result:
    """Run a federation and judge its last models; while settings are tried, only the score on held-out samples.

    Args:
        trial: budget and draws.
        algorithm: what server and clients do.
        model: the initial network; holds the last finished one in the end.
        plan: the length.
        federation: the data.
        rare: whether to tell the accuracy on the rarest classes.
    """
    watched = _Weighed(algorithm)
    shown = {round(plan.rounds * part / 8) for part in range(1, 9)}
    found: list[dict[str, float]] = []
    steps: list[float] = []
    reached: list[float] = []

    def evaluate(model: nn.Module, state: SimulationState) -> dict[str, float]:
        done = state.server.round
        trial.report(done / plan.rounds)
        if done in shown and not trial.searching:
            steps.append(float(done))
            reached.append(_share_right(model, *federation.test))
        if done > plan.rounds - _LATE:
            # The model is a scratch space: the next round loads what the server holds.
            finish(cast(Algorithm, watched), model, federation.clients, state)
            if trial.searching:
                found.append({"accuracy": _share_right(model, *federation.held)})
            else:
                found.append(_judged(model, federation, rare=rare))
        return {}

    history = simulate(
        algorithm,
        model,
        federation.clients,
        rounds=plan.rounds,
        fraction=0.5,
        generator=trial.generator(3),
        evaluate=evaluate,
    )
    means = {name: statistics.fmean(one[name] for one in found) for name in found[0]}
    if trial.searching:
        return Result(score=means["accuracy"])
    sent = _bytes(history) + watched.bytes / len(found)
    gradients = sum(metrics.get("gradients", 0.0) for entry in history.rounds for metrics in entry.metrics)
    return Result(
        {**means, "megabytes": sent / 1e6, "gradients": gradients}, {"test_accuracy": Curve(steps, reached, "round")}
    )


class _Weighed:
    """An algorithm whose final exchange is weighed."""

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm, self.bytes = algorithm, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.algorithm, name)

    def finalize(
        self, model: nn.Module, server: ServerState, reports: Sequence[Update], *, generator: torch.Generator
    ) -> ServerState:
        down = num_bytes(self.algorithm.configure(server)) * len(reports)
        self.bytes += down + sum(map(num_bytes, reports))
        return self.algorithm.finalize(model, server, reports, generator=generator)


def _bytes(history: History) -> int:
    return sum(entry.bytes_down + entry.bytes_up for entry in history.rounds)


def _share_right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (predict(model, x).argmax(1) == y).float().mean().item()


def _judged(model: nn.Module, federation: Federation, *, rare: bool) -> dict[str, float]:
    x, y = federation.test
    right = predict(model, x).argmax(1) == y
    per_class = class_accuracies(right, y, federation.num_classes).cpu()
    found = {
        "accuracy": right.float().mean().item(),
        "worst_client_accuracy": (federation.shares @ per_class).min().item(),
    }
    return found | ({"rare_accuracy": per_class[federation.order[-_RARE:]].mean().item()} if rare else {})


def class_accuracies(right: Tensor, y: Int[Tensor, " n"], num_classes: int) -> Float[Tensor, " classes"]:
    """The share of right answers in each class; 0 for a class without samples.

    Example:
        >>> class_accuracies(torch.tensor([True, False, True]), torch.tensor([0, 0, 1]), 3)
        tensor([0.5000, 1.0000, 0.0000])
    """
    counts = torch.bincount(y, minlength=num_classes)
    return torch.zeros(num_classes, device=y.device).index_add_(0, y, right.float()) / counts.clamp_min(1)


def principal_axes(x: Float[Tensor, "n ..."], count: int) -> tuple[Float[Tensor, " size"], Float[Tensor, "size count"]]:
    """Mean and leading principal axes, scaled so that the projections have a mean variance of 1."""
    flat = x.flatten(1)
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(flat.T.double()))
    axes = vectors[:, -count:].flip(1) / values[-count:].mean().sqrt()
    return mean, axes.to(x)


def perceptron(plan: FederatedPlan) -> nets.Classifier:
    """The task's network."""
    return nets.mlp(math.prod(plan.in_shape), (64,), plan.num_classes)


def fedavg(plan: FederatedPlan) -> FedAvg:
    """Plain averaging."""
    return FedAvg(plan.lr, EPOCHS, BATCH, max_norm=MAX_NORM)


def fedprox(plan: FederatedPlan) -> FedAvg:
    """Clients pulled towards what they received, as strongly as the setting says."""
    return FedAvg(plan.lr, EPOCHS, BATCH, max_norm=MAX_NORM, prox=float(plan.setting["prox"]))


def scaffold(plan: FederatedPlan) -> SCAFFOLD:
    """Control variates."""
    return SCAFFOLD(plan.lr, EPOCHS, BATCH, max_norm=MAX_NORM)


def feddyn(plan: FederatedPlan) -> FedDyn:
    """Dynamic regularisation, as strong as the setting says."""
    return FedDyn(plan.lr, EPOCHS, BATCH, max_norm=MAX_NORM, alpha=float(plan.setting["alpha"]))


strong_skew = FederatedImages()
mild_skew = FederatedImages(alpha=0.5)
weak_skew = FederatedImages(alpha=1.0)
long_tail = FederatedImages(alpha=0.5, imbalance=0.02)
embedded_skew = FederatedImages(embedded=True)
