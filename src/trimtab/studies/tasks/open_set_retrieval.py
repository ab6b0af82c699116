"""Finding and verifying what training has never seen: retrieval and verification of new identities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab import nets
from trimtab.data import load
from trimtab.losses.label_noise import symmetric_noise
from trimtab.metric.binomial_deviance import BinomialDevianceLoss
from trimtab.metric.clustering import nmi
from trimtab.metric.magface import MagFaceLoss
from trimtab.metric.margin_softmax import MarginSoftmaxLoss
from trimtab.metric.retrieval import map_at_r, recall_at_k
from trimtab.metric.tcm import opis
from trimtab.metric.verification import auroc, equal_error_rate, pair_scores, tpr_at_far
from trimtab.studies.engine.study import Budget, Curve, Entrant, Metric, Result, Task, Trial
from trimtab.studies.tools.descent import descent_step
from trimtab.studies.tools.images import shown_epochs
from trimtab.studies.tools.training import Plan, Supervised, Training, Workbench, fit, predict

EMBEDDING_SIZE = 64

# By these no digit turns into itself or another: 0, 1 and 8 look the same after half a turn, and a 6 becomes a 9.
_ANGLES = (0.0, 60.0, 120.0)
# Of half the image's side. Without it the pixels themselves verify as well as what is learned.
_SHIFT = 0.2

MetricLoss = Callable[[Plan], nn.Module]
"""Makes a loss of embeddings (of `EMBEDDING_SIZE` numbers) and labels; its parameters are trained too."""


@dataclass(frozen=True, kw_only=True)
class Embedding(Entrant):
    """What a contestant of metric learning brings.

    Attributes:
        loss: makes the head or the loss of pairs.
        penalty: makes a further term of the objective, of the same form.
        layer_alone: the penalty trains the embedding layer and not the layers below.
    """

    loss: MetricLoss
    penalty: MetricLoss | None = None
    layer_alone: bool = False


def margin_head(kind: str) -> MetricLoss:
    """A head of margin softmax; scale and margin are the setting's."""
    return lambda plan: MarginSoftmaxLoss(
        EMBEDDING_SIZE,
        plan.num_classes,
        kind=kind,  # type: ignore[arg-type]
        scale=float(plan.setting["scale"]),
        margin=None if kind == "softmax" else float(plan.setting["margin"]),
    )


def magface(plan: Plan) -> nn.Module:
    """The head whose margin grows with the embedding's length, with its authors' margins and weight."""
    return MagFaceLoss(EMBEDDING_SIZE, plan.num_classes, scale=float(plan.setting["scale"]))


RATES = (3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2)
"""What losses without a setting of their own choose from; the others from the two in the middle."""
TWO_RATES = (1e-3, 3e-3)
SCALES = {"scale": (4.0, 8.0, 16.0, 32.0, 64.0), "lr": TWO_RATES}
COSFACE_SETTINGS = {"scale": (16.0, 64.0), "margin": (0.2, 0.35), "lr": TWO_RATES}
ARCFACE_SETTINGS = {"scale": (16.0, 64.0), "margin": (0.25, 0.5), "lr": TWO_RATES}


class LinearSoftmax(nn.Module):
    """Cross-entropy of a linear classifier on the embeddings as they are."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(EMBEDDING_SIZE, num_classes)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.classifier(embeddings), labels)


def linear_softmax(plan: Plan) -> nn.Module:
    """Softmax."""
    return LinearSoftmax(plan.num_classes)


def triplet(plan: Plan) -> nn.Module:
    """All triplets of the batch that violate the setting's margin."""
    from pytorch_metric_learning.losses import TripletMarginLoss

    loss: nn.Module = TripletMarginLoss(margin=float(plan.setting["margin"]))
    return loss


def n_pair(plan: Plan) -> nn.Module:
    """N-pair loss."""
    from pytorch_metric_learning.losses import NPairsLoss

    loss: nn.Module = NPairsLoss()
    return loss


def multi_similarity(plan: Plan) -> nn.Module:
    """Multi-similarity loss with the mining of its authors."""
    from pytorch_metric_learning.losses import MultiSimilarityLoss
    from pytorch_metric_learning.miners import MultiSimilarityMiner

    return _Mined(MultiSimilarityLoss(), MultiSimilarityMiner())


class _Mined(nn.Module):
    """A loss of the pairs that a miner chooses."""

    def __init__(self, loss: nn.Module, miner: nn.Module) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = self.loss(embeddings, labels, self.miner(embeddings, labels))
        return value


def binomial(plan: Plan) -> nn.Module:
    """Binomial deviance."""
    return BinomialDevianceLoss()


@dataclass(frozen=True)
class Identities:
    """Images with the identity of each."""

    x: Float[Tensor, "n channels height width"]
    y: Int[Tensor, " n"]

    @classmethod
    def of(cls, x: Tensor, y: Tensor, generator: torch.Generator) -> Identities:
        """Every image once, in one of the rotations and at a place of its own."""
        turn = torch.randint(len(_ANGLES), y.shape, generator=generator)
        shift = _SHIFT * (2 * torch.rand(len(y), 2, generator=generator) - 1)
        angle = torch.tensor(_ANGLES).deg2rad()[turn]
        rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
        grid = F.affine_grid(torch.cat([rotation, shift[:, :, None]], dim=2), list(x.shape), align_corners=False)
        return cls(F.grid_sample(x, grid, align_corners=False), y * len(_ANGLES) + turn)

    def only(self, identities: Sequence[int]) -> Identities:
        """Those of some identities, renumbered from 0."""
        match = self.y[:, None] == torch.tensor(identities, device=self.y.device)
        kept = match.any(1)
        return Identities(self.x[kept], match[kept].int().argmax(1))

    def to(self, device: str) -> Identities:
        return Identities(self.x.to(device), self.y.to(device))


class EmbeddingTraining(Supervised):
    """Plain training by a loss of embeddings and labels, and perhaps a further term of the same form."""

    def __init__(self, bench: Workbench, entrant: Embedding) -> None:
        super().__init__(bench)
        self.term = entrant.penalty(bench.plan).to(bench.device) if entrant.penalty else None
        self.layer_alone = entrant.layer_alone

    def step(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        self.network.train()
        features: Tensor = self.network.features(x)  # type: ignore[operator]
        embeddings: Tensor = self.network.head(features)  # type: ignore[operator]
        value: Tensor = self.criterion(embeddings, y)
        if self.term is not None:
            held = self.network.head(features.detach()) if self.layer_alone else embeddings  # type: ignore[operator]
            value = value + self.term(held, y)
        return descent_step(self.optimizer, value)


@dataclass(frozen=True)
class OpenSetRetrieval(Task[Embedding]):
    """Train an embedding on 20 identities; then retrieve and verify images of 10 others.

    An identity is a class of images in one of three rotations, 60 degrees apart, and every image is shifted by up to a
    tenth of its side. The seed decides which identities are seen. A small CNN embeds an image in 64 numbers, Adam
    trains it along with the loss's own weights, in batches of 128 with about six images of an identity. Each contestant
    chooses among up to ten settings, by trainings on 16 of the seen identities and the other four: by MAP@R plus the
    true accept rate at a false accept rate of 0.01. The four have right labels, as the sets that face recognition is
    validated on.

    Attributes:
        dataset: "mnist", "fashion_mnist", "digits", or a file `.npz` with `x_train`, `y_train`, `x_test` and `y_test`;
            at the smoke budget digits.
        noise: share of the training labels that are replaced by another seen identity.
    """

    dataset: str = "mnist"
    noise: float = 0.0

    name: ClassVar[str] = "open-set-retrieval"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "recall_at_1": Metric("recall@1 (%)", percent=True),
        "map_at_r": Metric("MAP@R (%)", percent=True),
        "tar_at_far_1e-2": Metric("true accepts at false accept rate 0.01 (%)", percent=True),
        "tar_at_far_1e-3": Metric("true accepts at false accept rate 0.001 (%)", percent=True),
        "auroc": Metric("AUROC of pairs (%)", percent=True),
        "equal_error_rate": Metric("equal error rate (%)", best="min", percent=True),
        "nmi": Metric("NMI of clusters (%)", percent=True),
        "opis": Metric("threshold inconsistency (OPIS)", best="min"),
        "seconds": Metric("training time (s)", best="min"),
    }
    accepts: ClassVar[type[Embedding]] = Embedding
    needs_images: ClassVar[bool] = True
    tries: ClassVar[int] = 10
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": RATES}
    seeds: ClassVar[Mapping[Budget, int]] = {"smoke": 1, "laptop": 5, "paper": 5}
    cost: ClassVar[float] = 2.5

    def __post_init__(self) -> None:
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise must be in [0, 1), got {self.noise}")

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"clean": clean, "wrong identities": wrong_identities}

    @classmethod
    def references(cls) -> Mapping[str, Embedding]:
        peer = ("pytorch_metric_learning",)
        return {
            "softmax": Embedding(loss=linear_softmax),
            "normalised softmax": Embedding(loss=margin_head("softmax"), search=SCALES),
            "CosFace": Embedding(loss=margin_head("cosface"), search=COSFACE_SETTINGS),
            "ArcFace": Embedding(loss=margin_head("arcface"), search=ARCFACE_SETTINGS),
            "MagFace": Embedding(loss=magface, search=SCALES),
            "triplet": Embedding(
                loss=triplet, search={"margin": (0.05, 0.1, 0.2, 0.4), "lr": TWO_RATES}, requires=peer
            ),
            "N-pair": Embedding(loss=n_pair, requires=peer),
            "multi-similarity": Embedding(loss=multi_similarity, requires=peer),
            "binomial deviance": Embedding(loss=binomial),
        }

    def run(self, trial: Trial, entrant: Embedding) -> Result:
        data = load(self.datasets(trial.budget)[0])
        size = trial.pick(smoke=900, laptop=4_500, paper=None)
        data = data.subset(size, trial.pick(smoke=300, laptop=3_000, paper=None), generator=trial.generator())
        train = Identities.of(data.x_train, data.y_train, trial.generator(4)).to(trial.device)
        order = torch.randperm(data.num_classes * len(_ANGLES), generator=trial.generator(6)).tolist()
        unseen, seen = order[: len(order) // 3], order[len(order) // 3 :]
        epochs = trial.pick(smoke=2, laptop=8, paper=60)
        if trial.searching:
            held = max(2, len(seen) // 5)
            bench, rule = self._prepared(trial, entrant, train.only(seen[held:]), len(seen) - held, epochs)
            fit(bench, rule)
            other = train.only(seen[:held])
            found = predict(rule, other.x)
            return Result(score=map_at_r(found, other.y) + tpr_at_far(*pair_scores(found, other.y), far=1e-2))
        test = Identities.of(data.x_test, data.y_test, trial.generator(5)).to(trial.device).only(unseen)
        bench, rule = self._prepared(trial, entrant, train.only(seen), len(seen), epochs)
        shown = sorted(shown_epochs(epochs, points=6))
        reached: list[float] = []

        def measure(epoch: int) -> None:
            if epoch in shown:
                reached.append(recall_at_k(predict(rule, test.x), test.y))

        done = fit(bench, rule, after_epoch=measure)
        found = predict(rule, test.x)
        similarity, same = pair_scores(found, test.y)
        return Result(
            {
                "recall_at_1": reached[-1],
                "map_at_r": map_at_r(found, test.y),
                "tar_at_far_1e-2": tpr_at_far(similarity, same, far=1e-2),
                "tar_at_far_1e-3": tpr_at_far(similarity, same, far=1e-3),
                "auroc": auroc(similarity, same),
                "equal_error_rate": equal_error_rate(similarity, same),
                "nmi": nmi(found, test.y),
                "opis": opis(found, test.y),
                "seconds": done.seconds,
            },
            {"recall_at_1": Curve([float(epoch + 1) for epoch in shown], reached)},
        )

    def _prepared(
        self, trial: Trial, entrant: Embedding, identities: Identities, num_classes: int, epochs: int
    ) -> tuple[Workbench, EmbeddingTraining]:
        x, y = identities.x, identities.y
        if self.noise:
            y = symmetric_noise(y, self.noise, num_classes, generator=trial.generator(2), exclude_true=True).targets
        bench = Workbench(
            Training(loss=entrant.loss, optimizer=_adam),
            lambda: nets.small_cnn(tuple(x.shape[1:]), EMBEDDING_SIZE),
            (x, y),
            (x[:0], y[:0]),
            num_classes=num_classes,
            epochs=epochs,
            trial=trial,
        )
        return bench, EmbeddingTraining(bench, entrant)


def _adam(parameters: Any, plan: Plan) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=float(plan.setting.get("lr", 1e-3)))


clean = OpenSetRetrieval()
wrong_identities = OpenSetRetrieval(noise=0.4)
