"""Telling whether two images are of one identity, for identities that training has not seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab import nets
from trimtab.data import load
from trimtab.losses.label_noise import symmetric_noise
from trimtab.metric.margin_softmax import MarginSoftmaxLoss
from trimtab.metric.retrieval import recall_at_k
from trimtab.metric.verification import PairScores, auroc, equal_error_rate, pair_scores, tpr_at_far
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial
from trimtab.studies.training import Fit, fit, predict

# Makes a loss `loss(embeddings, labels)`: factory(embedding_size, num_classes, **setting).
VerificationLoss = Callable[..., nn.Module]
Setting = Mapping[str, Any]

# What the heads of margin softmax choose from wherever they are compared, their papers' own in front.
MARGIN_SETTINGS: Mapping[str, Sequence[Setting]] = {
    "softmax": [{"kind": "softmax", "scale": scale} for scale in (64.0, 32.0, 16.0, 8.0)],
    "CosFace": [
        {"kind": "cosface", "scale": scale, "margin": margin}
        for scale, margin in ((64.0, 0.35), (32.0, 0.35), (32.0, 0.2), (16.0, 0.2))
    ],
    "ArcFace": [
        {"kind": "arcface", "scale": scale, "margin": margin}
        for scale, margin in ((64.0, 0.5), (32.0, 0.5), (32.0, 0.25), (16.0, 0.25))
    ],
}

# By these no digit turns into itself or another: 0, 1 and 8 look the same after half a turn, and a 6 becomes a 9.
_ANGLES = (0.0, 60.0, 120.0)
# Of half the image's side. Without it the pixels themselves verify as well as what is learned.
_SHIFT = 0.2
_EMBEDDING_SIZE = 64


@dataclass(frozen=True)
class _Identities:
    """Images with the identity of each."""

    x: Float[Tensor, "n channels height width"]
    y: Int[Tensor, " n"]

    def only(self, identities: Sequence[int]) -> _Identities:
        """Those of some identities, renumbered from 0."""
        match = self.y[:, None] == torch.tensor(identities, device=self.y.device)
        kept = match.any(1)
        return _Identities(self.x[kept], match[kept].int().argmax(1))

    def to(self, device: str) -> _Identities:
        return _Identities(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Verification(Task):
    """Train an embedding on 20 identities and verify pairs of 10 others.

    An identity is a class of images in one of three rotations, 60 degrees apart, and every image is shifted by up to a
    tenth of its side. Which identities are seen, the seed decides. A small CNN embeds an image in 64 numbers; Adam
    trains it along with the class weights of the loss. A contestant may bring several settings, and gets the one with
    the best true accept rate, at a false accept rate of 0.01, in trainings of a third of the length on 16 of the seen
    identities, by pairs of the other four, whose labels are right.

    Attributes:
        dataset: "mnist" or "fashion_mnist"; at the smoke budget always digits.
        noise: share of the training labels that are replaced by another seen identity.
        epochs: length of the training at the laptop budget.
    """

    dataset: str = "mnist"
    noise: float = 0.0
    epochs: int = 12

    name: ClassVar[str] = "verification"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "tar_at_far_1e-2": Metric("true accepts at false accept rate 0.01 (%)", percent=True),
        "tar_at_far_1e-3": Metric("true accepts at false accept rate 0.001 (%)", percent=True),
        "auroc": Metric("AUROC of pairs (%)", percent=True),
        "equal_error_rate": Metric("equal error rate (%)", best="min", percent=True),
        "recall_at_1": Metric("recall@1 (%)", percent=True),
        "setting": Metric("setting chosen (its place in the list)", best=None),
        "seconds": Metric("training time (s)", best="min"),
    }

    def train(self, loss: VerificationLoss | None = None, settings: Sequence[Setting] | None = None) -> Arm:
        """A contestant that brings its loss; without one it is ArcFace with its paper's margin and scale.

        Args:
            loss: makes a module called (embeddings, labels), from the embedding's width, the number of classes, and
                a setting's entries by name. Its parameters are trained too.
            settings: keyword arguments of `loss` to choose from; none by default.
        """
        return self.arm(loss=loss, settings=settings)

    def run(
        self,
        trial: Trial,
        loss: VerificationLoss = MarginSoftmaxLoss,
        settings: Sequence[Setting] = ({},),
        **options: Any,
    ) -> Result:
        data = load("digits" if trial.budget == "smoke" else self.dataset)
        size = trial.pick(smoke=900, laptop=4_500, paper=None)
        data = data.subset(size, trial.pick(smoke=300, laptop=3_000, paper=None), generator=trial.generator())
        train = _identities(data.x_train, data.y_train, trial.generator(4)).to(trial.device)
        test = _identities(data.x_test, data.y_test, trial.generator(5)).to(trial.device)
        order = torch.randperm(data.num_classes * len(_ANGLES), generator=trial.generator(6)).tolist()
        unseen, seen = test.only(order[:10]), order[10:]
        epochs = trial.pick(smoke=2, laptop=self.epochs, paper=60)
        search = len(settings) > 1
        total = 1 + len(settings) / 3 * search

        def report(begin: float, length: float) -> Trial:
            return replace(trial, report=lambda fraction: trial.report((begin + length * fraction) / total))

        choice = 0
        if search:
            held_out, rest = train.only(seen[:4]), train.only(seen[4:])
            rates = []
            for number, setting in enumerate(settings):
                third = report(number / 3, 1 / 3)
                model, _ = self._trained(third, rest, len(seen) - 4, max(1, epochs // 3), partial(loss, **setting))
                rates.append(tpr_at_far(*_scores(model, held_out), far=1e-2))
            choice = max(range(len(rates)), key=rates.__getitem__)

        accepted: list[float] = []

        def measure(model: nn.Module) -> None:
            accepted.append(tpr_at_far(*_scores(model, unseen), far=1e-2))

        factory = partial(loss, **settings[choice])
        model, done = self._trained(report(total - 1, 1), train.only(seen), len(seen), epochs, factory, measure)
        similarity, same = _scores(model, unseen)
        return Result(
            {
                "tar_at_far_1e-2": accepted[-1],
                "tar_at_far_1e-3": tpr_at_far(similarity, same, far=1e-3),
                "auroc": auroc(similarity, same),
                "equal_error_rate": equal_error_rate(similarity, same),
                "recall_at_1": recall_at_k(predict(model, unseen.x), unseen.y),
                "setting": float(choice),
                "seconds": done.seconds,
            },
            {"tar_at_far_1e-2": Curve([float(epoch + 1) for epoch in range(epochs)], accepted)},
        )

    def _trained(
        self,
        trial: Trial,
        identities: _Identities,
        num_classes: int,
        epochs: int,
        loss: VerificationLoss,
        after_epoch: Callable[[nn.Module], None] = lambda model: None,
    ) -> tuple[nn.Module, Fit]:
        x, y = identities.x, identities.y
        if self.noise:
            flipped = symmetric_noise(y, self.noise, num_classes, generator=trial.generator(2), exclude_true=True)
            y = flipped.targets
        with torch.random.fork_rng():
            torch.manual_seed(trial.seed)
            model = nets.small_cnn(tuple(x.shape[1:]), _EMBEDDING_SIZE).to(trial.device)
            criterion = loss(_EMBEDDING_SIZE, num_classes)
        done = fit(
            model,
            x,
            y,
            num_classes=num_classes,
            epochs=epochs,
            trial=trial,
            loss=lambda plan: criterion,
            optimizer=lambda parameters, plan: torch.optim.Adam(parameters, lr=1e-3),
            after_epoch=lambda epoch: after_epoch(model),
        )
        return model, done


def _identities(x: Tensor, y: Tensor, generator: torch.Generator) -> _Identities:
    """Every image once, in one of the rotations and at a place of its own."""
    turn = torch.randint(len(_ANGLES), y.shape, generator=generator)
    shift = _SHIFT * (2 * torch.rand(len(y), 2, generator=generator) - 1)
    angle = torch.tensor(_ANGLES).deg2rad()[turn]
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    grid = F.affine_grid(torch.cat([rotation, shift[:, :, None]], dim=2), list(x.shape), align_corners=False)
    return _Identities(F.grid_sample(x, grid, align_corners=False), y * len(_ANGLES) + turn)


def _scores(model: nn.Module, identities: _Identities) -> PairScores:
    return pair_scores(predict(model, identities.x), identities.y)
