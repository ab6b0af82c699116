"""Do rare classes of a long-tailed federation gain from a fixed sparse head and from heads of equal norms?

20 clients of Fashion-MNIST, whose rarest class has a fiftieth of the most frequent one's images, and an MLP with one
hidden layer of 64; the paper has ResNets on CIFAR-10 and CIFAR-100, ImageNet and iNaturalist, batches of 8 and 5 local
epochs. Here batches of 50 and 2 epochs are the same for all methods, and momentum is the authors' 0.5. The fixed head
is made in 600 steps of Adam at rate 0.0015 (the authors: 10,000 at 0.0001), which leaves norms a few per cent above the
one asked for. Here are 30 rounds of 10 local steps, there 500 rounds of about 200; under a head of norm 0.1 the
backbone learns little in so few (the fixed head itself had 28 % in a trial). All forms of FedLoGe therefore choose
between norms of 0.1 and 1 at two rates each, as many settings as the other methods have. Personal models are judged
with absent classes masked, at a rate of 0.3 and a norm of 1 for all, and their heads are not tuned further, as in the
release. Its script hands `g_head` to a function whose argument is `g_aux`; here the auxiliary head is realigned, as the
paper has it.

The headline was at first accuracy on rare classes. After a trial on a seed that is in no result (38 % over all classes
and 57 % on the rare ones, at rate 0.3 and norm 0.1) it became that over all classes, for the paper claims a better
generic model. Then FedLoGe was tried on that seed's test images at norms of 0.1 and 1 and four rates each, and the
norms and the upper two rates were kept; settings of the others stayed as they were. There its last model had 55 % at
norm 1 and rate 0.3, FedAvg at its best rate 54 % and FedAvg's head of equal norms 59 %. The rate of personal models was
raised from 0.1 to 0.3 after a trial of both, in which FedAvg with tuned heads was ahead at either. The paper says
nothing of people's incomes, of which a quarter are of the rarer class.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from trimtab.federated import CCVR, Algorithm, FedAvg, FedLoGe, ServerState, Update, realign_global, simplex_etf
from trimtab.federated.heads import features_of, head_of
from trimtab.federated.local_training import LocalSGD
from trimtab.federated.simulation import SimulationState, simulate
from trimtab.federated.state_dicts import model_state
from trimtab.studies.engine.study import Claim, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.fair_federated import by_sex_and_income
from trimtab.studies.tasks.federated_images import (
    BATCH,
    EPOCHS,
    MAX_NORM,
    Federated,
    FederatedPlan,
    Federation,
    class_accuracies,
    long_tail,
    perceptron,
)
from trimtab.studies.tools.training import predict

_HIDDEN = 64  # of the task's network


SEARCH = {"lr": (0.3, 1.0), "norm": (0.1, 1.0)}
"""Of all forms of FedLoGe: the norm of the fixed head is the authors', or a simplex frame's own."""


def norm(plan: FederatedPlan) -> float:
    """Of the fixed head's rows; without a search the larger one, for trainings are short."""
    return float(plan.setting.get("norm", 1.0))


def settings(plan: FederatedPlan) -> dict[str, object]:
    """What all forms of FedLoGe share; the fixed head is made in fewer and longer steps than the authors'."""
    steps = 600 if plan.rounds > 4 else 30
    made = {"norm": norm(plan), "etf_steps": steps, "etf_lr": 1.5e-3, "generator": plan.generator()}
    return made | {"max_norm": MAX_NORM}


def fedloge(plan: FederatedPlan) -> FedLoGe:
    """FedLoGe."""
    return FedLoGe(plan.lr, EPOCHS, BATCH, **settings(plan))  # type: ignore[arg-type]


def dense(plan: FederatedPlan) -> FedLoGe:
    """FedLoGe under a simplex frame without zeros, of the same norms."""
    etf = norm(plan) * simplex_etf(_HIDDEN, plan.num_classes, generator=plan.generator())
    return FedLoGe(plan.lr, EPOCHS, BATCH, etf=etf, max_norm=MAX_NORM)


class Unaligned(FedLoGe):
    """Without the realignment in the end."""

    def finalize(
        self, model: nn.Module, server: ServerState, reports: Sequence[Update], *, generator: torch.Generator
    ) -> ServerState:
        return server


def unaligned(plan: FederatedPlan) -> FedLoGe:
    """FedLoGe without the realignment."""
    return Unaligned(plan.lr, EPOCHS, BATCH, **settings(plan))  # type: ignore[arg-type]


class EqualNorms(FedAvg):
    """FedAvg with the realignment in the end, and nothing else."""

    has_final_exchange = True

    def client_report(self, *arguments: object, **options: object) -> Update:
        return Update({}, 1)

    def finalize(
        self, model: nn.Module, server: ServerState, reports: Sequence[Update], *, generator: torch.Generator
    ) -> ServerState:
        aligned = realign_global(server.params["head.weight"])
        return ServerState({**server.params, "head.weight": aligned}, server.memory, server.round)


def equal_norms(plan: FederatedPlan) -> EqualNorms:
    """FedAvg's head with rows of equal norm."""
    return EqualNorms(plan.lr, EPOCHS, BATCH, max_norm=MAX_NORM, momentum=0.5)


def ccvr(plan: FederatedPlan) -> Algorithm:
    """FedAvg with a head refitted on virtual features, as many of each class."""
    return CCVR(FedAvg(plan.lr, EPOCHS, BATCH, max_norm=MAX_NORM), lr=0.01, per_class=200, epochs=5)


# --- personal models ---

Personal = Callable[[SimulationState, nn.Module, int, tuple[Tensor, Tensor]], dict[str, Tensor]]
"""The state dict of one client's model."""


def shared(state: SimulationState, model: nn.Module, client: int, data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The global model."""
    return dict(state.server.params)


def tuned(state: SimulationState, model: nn.Module, client: int, data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The global model with its head trained on the client's data."""
    model.load_state_dict(state.server.params)
    head, features = head_of(model, "head"), features_of(model, data[0], "head")
    own = torch.Generator().manual_seed(client)
    LocalSGD(lr=0.1, epochs=5, batch_size=BATCH).train(head, (features, data[1]), generator=own)
    return model_state(model)


def realigned(state: SimulationState, model: nn.Module, client: int, data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """FedLoGe's own."""
    if client not in state.clients:
        return dict(state.server.params)
    return FedLoGe().personal(state.server, state.clients[client])


def local_head(state: SimulationState, model: nn.Module, client: int, data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """FedLoGe's shared backbone under the client's local head as it is."""
    held = state.clients.get(client, {})
    return {**state.server.params, **{f"head.{name}": value for name, value in held.items()}}


def personal_models(make: Callable[[FederatedPlan], Algorithm], personal: Personal, trial: Trial) -> Result:
    """A federation, and how good each client's own model is on test images in the client's class proportions."""
    federation = long_tail.federation(trial)
    plan = replace(long_tail.plan(trial, federation), setting={"lr": 0.3})
    model = trial.seeded(lambda: perceptron(plan)).to(trial.device)
    state = simulate(
        make(plan), model, federation.clients, rounds=plan.rounds, fraction=0.5, generator=trial.generator(3)
    ).state
    reached = []
    for client, data in enumerate(federation.clients):
        model.load_state_dict(personal(state, model, client, data))
        reached.append(_local_accuracy(model, federation, client))
    return Result({"local_accuracy": statistics.fmean(reached), "worst_local_accuracy": min(reached)})


def _local_accuracy(model: nn.Module, federation: Federation, client: int) -> float:
    x, y = federation.test
    shares = federation.shares[client]
    absent = (shares == 0).to(y.device)
    right = predict(model, x).masked_fill(absent, -torch.inf).argmax(1) == y
    return float(shares @ class_accuracies(right, y, federation.num_classes).cpu())


def plain_fedavg(plan: FederatedPlan) -> Algorithm:
    """FedAvg with FedLoGe's momentum."""
    return FedAvg(plan.lr, EPOCHS, BATCH, max_norm=MAX_NORM, momentum=0.5)


personal = Experiment(
    "personal models",
    {
        "FedAvg": partial(personal_models, plain_fedavg, shared),
        "FedAvg, heads tuned": partial(personal_models, plain_fedavg, tuned),
        "FedLoGe, generic head": partial(personal_models, fedloge, shared),
        "FedLoGe, local heads": partial(personal_models, fedloge, local_head),
        "FedLoGe, personal": partial(personal_models, fedloge, realigned),
    },
    {
        "local_accuracy": Metric("accuracy of clients' own models (%)", percent=True),
        "worst_local_accuracy": Metric("accuracy of the worst client's own model (%)", percent=True),
    },
    reads=("fashion_mnist",),
    cost=5.0,
)

study = Study(
    paper="fedloge",
    entrants={"FedLoGe": Federated(algorithm=fedloge, search=SEARCH)},
    controls={
        "FedLoGe without realignment": {long_tail: Federated(algorithm=unaligned, search=SEARCH)},
        "FedLoGe, dense frame": {long_tail: Federated(algorithm=dense, search=SEARCH)},
        "FedAvg, head of equal norms": {long_tail: Federated(algorithm=equal_norms)},
        "CCVR": {long_tail: Federated(algorithm=ccvr)},
    },
    on=[long_tail, by_sex_and_income],
    experiments=[personal],
    headline=Claim("FedLoGe", beats="FedAvg", on="accuracy", by=0.01, at=long_tail),
    claims=[
        Claim("FedLoGe", beats="FedAvg", on="rare_accuracy", by=0.05, at=long_tail),
        Claim("FedLoGe", beats="FedProx", on="accuracy", at=long_tail),
        Claim("FedLoGe", beats="FedLoGe without realignment", on="rare_accuracy", by=0.02, at=long_tail),
        Claim("FedLoGe", beats="FedLoGe, dense frame", on="accuracy", at=long_tail),
        Claim("FedLoGe", beats="FedAvg, head of equal norms", on="rare_accuracy", by=0.02, at=long_tail),
        Claim("FedLoGe", beats="CCVR", on="rare_accuracy", at=long_tail),
        Claim("FedLoGe", beats="FedAvg", on="worst_group_accuracy", by=0.02, at=by_sex_and_income),
        Claim("FedLoGe, personal", beats="FedAvg, heads tuned", on="local_accuracy", at=personal),
        Claim("FedLoGe, personal", beats="FedLoGe, generic head", on="local_accuracy", by=0.01, at=personal),
    ],
)
