"""Clients of whose images only a few have labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.federated import Broadcast, FedAvg, Update
from trimtab.federated.local_training import batches, loss_gradient
from trimtab.federated.protocol import Algorithm, ClientState
from trimtab.federated.state_dicts import model_state
from trimtab.semisup.views import strong_view
from trimtab.studies.engine.study import Result, Trial
from trimtab.studies.tasks.federated_images import (
    BATCH,
    MAX_NORM,
    Federated,
    FederatedImages,
    FederatedPlan,
    Federation,
    perceptron,
    train,
)

PASSES = 10
"""Over the labelled images of a client in a round, which are one batch; over the others two, which are ten batches."""

ROUNDS = 24
"""At the laptop budget."""


@dataclass(frozen=True, kw_only=True)
class PartlyLabelled(Federated):
    """What a contestant brings whose clients look at images without a label too: their label is -1."""


@dataclass(frozen=True)
class FewLabels(FederatedImages):
    """The same federation, in which a client has a label for 5 % of its images, and for one of each class it holds.

    Methods that know nothing of images without a label are given those with one, over and over until they are as many
    as all are together: as many steps as where every image has its label. There are 24 rounds.

    Attributes:
        share: of a client's images that have a label.
    """

    alpha: float = 0.1
    share: float = 0.05

    @classmethod
    def references(cls) -> Mapping[str, Federated]:
        grid = {"lr": (0.1, 0.3), "threshold": (0.5, 0.95)}
        return {**super().references(), "FedAvg with FixMatch": PartlyLabelled(algorithm=fixmatch, search=grid)}

    def federation(self, trial: Trial) -> Federation:
        """All samples of a run, with -1 for a label that clients do not have."""
        whole, draw = super().federation(trial), trial.generator(11)
        return replace(whole, clients=[(x, hide_labels(y, self.share, draw)) for x, y in whole.clients])

    def plan(self, trial: Trial, federation: Federation) -> FederatedPlan:
        plan = super().plan(trial, federation)
        return replace(plan, rounds=trial.pick(smoke=plan.rounds, laptop=ROUNDS, paper=plan.rounds))

    def run(self, trial: Trial, entrant: Federated) -> Result:
        federation = self.federation(trial)
        plan = self.plan(trial, federation)
        if not isinstance(entrant, PartlyLabelled):
            federation = replace(federation, clients=[labelled(x, y) for x, y in federation.clients])
        network = entrant.network or perceptron
        model = trial.seeded(lambda: network(plan)).to(trial.device)
        return train(trial, entrant.algorithm(plan), model, plan, federation)


def hide_labels(y: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """The labels with -1 for all but a share of them, and but one of each class.

    Example:
        >>> y = torch.arange(4).repeat(25)
        >>> hidden = hide_labels(y, 0.05, torch.Generator().manual_seed(0))
        >>> (hidden >= 0).sum(), hidden.unique()
        (tensor(5), tensor([-1,  0,  1,  2,  3]))
    """
    order = torch.randperm(len(y), generator=generator)
    drawn = y[order]
    first = [int((drawn == label).nonzero()[0]) for label in drawn.unique()]
    rest = [i for i in range(len(y)) if i not in set(first)]
    kept = order[(first + rest)[: max(round(share * len(y)), len(first))]]
    return torch.full_like(y, -1).index_copy(0, kept, y[kept])


def labelled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The samples with a label, over and over until they are as many as all are together.

    Example:
        >>> labelled(torch.arange(5.0), torch.tensor([-1, 3, -1, 7, -1]))
        (tensor([1., 3., 1., 3., 1.]), tensor([3, 7, 3, 7, 3]))
    """
    known = (y >= 0).nonzero()[:, 0]
    rows = known.repeat(-(-len(y) // len(known)))[: len(y)]
    return x[rows], y[rows]


def distort(x: Tensor, generator: torch.Generator) -> Tensor:
    """A strong view, in the place of RandAugment."""
    return strong_view(x, count=1, shift=0.0, generator=generator)


class FixMatch(FedAvg):
    """FedAvg with FixMatch at the clients: pseudo-labels are those of the model in training, on the same samples.

    Each step takes a batch with labels and one without.
    """

    threshold = 0.5

    def client_update(
        self,
        model: nn.Module,
        broadcast: Broadcast,
        client: ClientState,
        data: tuple[Tensor, Tensor],
        *,
        generator: torch.Generator,
    ) -> tuple[Update, ClientState]:
        x, y = data
        known = y >= 0
        unlabeled = x[~known]
        model.load_state_dict(broadcast.params)
        rest = batches(len(unlabeled), self.local.batch_size, self.local.epochs, generator)

        def both(loss: Callable[[], Tensor], params: Sequence[Tensor]) -> Sequence[Tensor]:
            some = unlabeled[next(rest)]
            with torch.no_grad():
                sure, labels = model(some).softmax(1).max(1)
            views = distort(some, generator)

            def total() -> Tensor:
                apart = F.cross_entropy(model(views), labels, reduction="none")
                return loss() + (apart * (sure > self.threshold)).mean()  # type: ignore[no-any-return]

            return loss_gradient(total, params)

        steps = self.local.train(model, (x[known], y[known]), generator=generator, round=broadcast.round, gradient=both)
        return Update(model_state(model), len(x), metrics={"gradients": 2.0 * steps}), client


def fixmatch(plan: FederatedPlan) -> Algorithm:
    """FixMatch at the clients, with the setting's rate and threshold."""
    algorithm = FixMatch(plan.lr, PASSES, BATCH, max_norm=MAX_NORM)
    algorithm.threshold = float(plan.setting.get("threshold", FixMatch.threshold))
    return algorithm


few_labels = FewLabels()
