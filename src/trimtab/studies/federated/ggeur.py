"""Do embeddings drawn in the shape of the pooled classes make clients' data alike enough?

The paper draws CLIP embeddings of 512 numbers; here they are 64 principal components of images of 14 x 14 pixels, which
are much harder to separate. Classes are filled up to 200 samples (the authors: 5000 of CIFAR-10, the size of a class
over all clients), and the network is an MLP with one hidden layer of 64. Draws lengthen an epoch, so that the headline
and one control give FedAvg as many samples, the others being copies. Moments come with a client's first update and not
in a round of their own. Factors of the covariances are counted in every round's traffic, though a client could keep
them. Domains are copies of Fashion-MNIST, at one rate for all. Of incomes the paper says nothing: there the columns of
the table, most of them indicators, take the place of embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab import nets
from trimtab.data import load
from trimtab.federated import CCVR, GGEUR, SCAFFOLD, Algorithm, FedAvg, dirichlet_partition, simulate
from trimtab.studies.engine.study import Claim, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.fair_federated import by_sex_and_income
from trimtab.studies.tasks.federated_images import (
    BATCH,
    EPOCHS,
    MAX_NORM,
    Federated,
    FederatedImages,
    FederatedPlan,
    embedded_skew,
    principal_axes,
)
from trimtab.studies.tools.images import worth_halving
from trimtab.studies.tools.training import predict

PER_CLASS = 200
"""What each class of a client is filled up to; a client has 250 samples of all classes."""

embedded_mild = FederatedImages(alpha=0.5, embedded=True)


def fedavg(plan: FederatedPlan) -> FedAvg:
    """What trains the network."""
    return FedAvg(plan.lr, EPOCHS, BATCH, max_norm=MAX_NORM)


def ggeur(plan: FederatedPlan) -> Algorithm:
    """GGEUR on FedAvg."""
    return GGEUR(fedavg(plan), plan.num_classes, PER_CLASS)


def ggeur_scaffold(plan: FederatedPlan) -> Algorithm:
    """GGEUR on SCAFFOLD."""
    base = SCAFFOLD(plan.lr, EPOCHS, BATCH, max_norm=MAX_NORM)
    return GGEUR(base, plan.num_classes, PER_CLASS)


class BallDraws(GGEUR):
    """The same number of draws from a ball: of each class the covariance is a multiple of the identity.

    Args:
        base, num_classes, per_class: as those of GGEUR.
        keep: share of the mean variance; with 0 draws are copies.
    """

    def __init__(self, base: Algorithm, num_classes: int, per_class: int, keep: float) -> None:
        super().__init__(base, num_classes, per_class)
        self.keep = keep

    def expanded(
        self, data: tuple[Tensor, Tensor], shared: dict[str, Tensor], kept: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        factors = shared["ggeur.factors"]
        dim = factors.shape[-1]
        deviation = (factors.square().sum((1, 2)) * self.keep / dim).sqrt()
        ball = deviation[:, None, None] * torch.eye(dim, dtype=factors.dtype, device=factors.device)
        return super().expanded(data, {**shared, "ggeur.factors": ball}, kept)


def copies(plan: FederatedPlan) -> Algorithm:
    """Classes filled up with copies."""
    return BallDraws(fedavg(plan), plan.num_classes, PER_CLASS, keep=0.0)


def jitter(plan: FederatedPlan) -> Algorithm:
    """Classes filled up with draws from a ball of the same total variance."""
    return BallDraws(fedavg(plan), plan.num_classes, PER_CLASS, keep=1.0)


def ccvr(plan: FederatedPlan) -> Algorithm:
    """The same moments, used after training for the head alone."""
    return CCVR(fedavg(plan), lr=0.01, per_class=200, epochs=5)


# --- several domains ---


def blurred(x: Tensor) -> Tensor:
    """Each pixel the mean of its neighbourhood."""
    return F.avg_pool2d(x, 3, stride=1, padding=1)


DOMAINS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x,
    lambda x: x.rot90(1, (2, 3)),
    lambda x: 1 - x,
    blurred,
)
FEW = 60
"""What each class is filled up to where clients come from several domains."""


def plain(num_classes: int) -> Algorithm:
    """FedAvg on copies: as many gradients as with draws."""
    return BallDraws(FedAvg(0.1, 1, BATCH, max_norm=MAX_NORM), num_classes, FEW, keep=0.0)


def single(num_classes: int) -> Algorithm:
    """Draws around a client's own samples."""
    return GGEUR(FedAvg(0.1, 1, BATCH, max_norm=MAX_NORM), num_classes, FEW)


def multi(num_classes: int) -> Algorithm:
    """Draws around other clients' class means too."""
    return GGEUR(FedAvg(0.1, 1, BATCH, max_norm=MAX_NORM), num_classes, FEW, prototypes=True)


def across_domains(make: Callable[[int], Algorithm], trial: Trial) -> Result:
    """A federation of two clients a domain, tested on all domains."""
    data = load("digits" if trial.budget == "smoke" else "fashion_mnist")
    each, tested = trial.pick(smoke=60, laptop=250, paper=2000), trial.pick(smoke=100, laptop=1000, paper=10_000)
    data = data.subset(3 * len(DOMAINS) * each, tested, generator=trial.generator(1))
    halve = worth_halving(data, trial)
    x, x_test = (F.avg_pool2d(part, 2) if halve else part for part in (data.x_train, data.x_test))
    public, rest = x[: len(DOMAINS) * each], x[len(DOMAINS) * each :]
    labels = data.y_train[len(DOMAINS) * each :]
    views = [look(public[i :: len(DOMAINS)]) for i, look in enumerate(DOMAINS)]
    mean, axes = principal_axes(torch.cat(views), trial.pick(smoke=32, laptop=64, paper=64))
    clients = []
    for i, look in enumerate(DOMAINS):
        mine, y = rest[i :: len(DOMAINS)], labels[i :: len(DOMAINS)]
        embedded = (look(mine).flatten(1) - mean) @ axes
        for part in dirichlet_partition(y, 2, 0.5, balanced=True, generator=trial.generator(2 + i)):
            clients.append((embedded[part].to(trial.device), y[part].to(trial.device)))
    size = axes.shape[1]
    model = trial.seeded(lambda: nets.mlp(size, (64,), data.num_classes)).to(trial.device)
    rounds = trial.pick(smoke=3, laptop=15, paper=50)
    simulate(make(data.num_classes), model, clients, rounds=rounds, generator=trial.generator(9))
    said = [predict(model, ((look(x_test).flatten(1) - mean) @ axes).to(trial.device)) for look in DOMAINS]
    right = [(logits.argmax(1).cpu() == data.y_test).float().mean().item() for logits in said]
    return Result({"accuracy": sum(right) / len(right), "worst_domain": min(right)})


domains = Experiment(
    "upright, turned, inverted and blurred clients",
    {
        "FedAvg, as many gradients": partial(across_domains, plain),
        "GGEUR, own samples alone": partial(across_domains, single),
        "GGEUR, several domains": partial(across_domains, multi),
    },
    {
        "accuracy": Metric("accuracy over all domains (%)", percent=True),
        "worst_domain": Metric("accuracy on the hardest domain (%)", percent=True),
    },
    reads=("fashion_mnist",),
    cost=1.5,
)


def on_images(task: object) -> str:
    """Why it cannot enter a variant."""
    images = isinstance(task, FederatedImages) and not task.embedded
    return "it draws from Gaussians of embeddings, and of images there are none" if images else ""


study = Study(
    paper="ggeur",
    entrants={
        "GGEUR": Federated(algorithm=ggeur, unfit=on_images),
        "GGEUR on SCAFFOLD": {embedded_skew: Federated(algorithm=ggeur_scaffold, unfit=on_images)},
    },
    controls={
        "FedAvg, as many gradients": {embedded_skew: Federated(algorithm=copies)},
        "draws from a ball": {embedded_skew: Federated(algorithm=jitter)},
        "CCVR": {embedded_skew: Federated(algorithm=ccvr)},
    },
    on=[embedded_skew, embedded_mild, by_sex_and_income],
    experiments=[domains],
    headline=Claim("GGEUR", beats="FedAvg, as many gradients", on="accuracy", by=0.01, at=embedded_skew),
    claims=[
        Claim("GGEUR", beats="FedAvg", on="accuracy", by=0.01, at=embedded_skew),
        Claim("GGEUR on SCAFFOLD", beats="SCAFFOLD", on="accuracy", by=0.01, at=embedded_skew),
        Claim("GGEUR", beats="draws from a ball", on="accuracy", at=embedded_skew),
        Claim("GGEUR", beats="CCVR", on="accuracy", at=embedded_skew),
        Claim("GGEUR", beats="FedAvg", on="accuracy", by=-0.005, at=embedded_mild),
        Claim("GGEUR", beats="FedAvg", on="worst_group_accuracy", by=0.02, at=by_sex_and_income),
        Claim("GGEUR, several domains", beats="GGEUR, own samples alone", on="accuracy", by=0.01, at=domains),
        Claim("GGEUR, several domains", beats="FedAvg, as many gradients", on="worst_domain", by=0.01, at=domains),
    ],
)
