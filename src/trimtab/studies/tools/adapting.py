"""Adapting a trained network to another domain, with the places where a method may enter; and what everyone does.

A contestant makes a predictor from a `Lesson`. Where the target is at hand beforehand, it may train on its images and
the predictor is then asked for unseen ones; on a stream the predictor is called with batches as they arrive, in order,
and may learn from each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.nets import Classifier
from trimtab.ops.gradient_reversal import reverse_gradient
from trimtab.studies.engine.study import Entrant, Trial
from trimtab.studies.tools.descent import descent_step

BATCH = 64


@dataclass(frozen=True)
class Lesson:
    """What there is to adapt with.

    Attributes:
        network: the trained source network, in eval mode; a copy of the contestant's own.
        source: training images and labels of the source domain, or None where they are not given away.
        target: images of the target domain without labels, or None where they come as a stream.
        num_classes: number of classes.
        steps: how many batches of target images the contestant may learn from, where they do not come as a stream.
        trial: source of random draws, and the setting.
    """

    network: Classifier
    source: tuple[Float[Tensor, "n channels height width"], Int[Tensor, " n"]] | None
    target: Float[Tensor, "m channels height width"] | None
    num_classes: int
    steps: int
    trial: Trial

    @property
    def lr(self) -> float:
        """The learning rate of the setting."""
        return float(self.trial.setting.get("lr", 1e-3))

    @property
    def streaming(self) -> bool:
        """Whether the target comes as a stream."""
        return self.target is None

    def target_batches(self) -> Iterator[tuple[Float[Tensor, "batch ..."], Int[Tensor, " batch"]]]:
        """`steps` batches of target images and their places, gone through in random order again and again."""
        if self.target is None:
            raise ValueError("target must be at hand to draw batches from it, got a stream")
        return _batches(self.target, self.steps, self.trial.generator(21))

    def source_batches(self) -> Iterator[tuple[Float[Tensor, "batch ..."], Int[Tensor, " batch"]]]:
        """As many batches of labelled source images."""
        if self.source is None:
            raise ValueError("source must be given to draw batches from it, got None")
        x, y = self.source
        for part, index in _batches(x, self.steps, self.trial.generator(22)):
            yield part, y[index.to(y.device)]


def _batches(x: Tensor, steps: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    size = min(BATCH, len(x))
    order = torch.zeros(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(x), generator=generator)
        index, order = order[:size], order[size:]
        yield x[index.to(x.device)], index


Predictor = Callable[[Float[Tensor, "batch channels height width"]], Float[Tensor, "batch classes"]]
"""Scores of the classes, logits or probabilities; on a stream called with one batch after the other."""


@dataclass(frozen=True, kw_only=True)
class Adaptation(Entrant):
    """What a contestant brings.

    Attributes:
        adapt: makes a predictor of a lesson. Where `lesson.target` is None, the predictor is what adapts.
    """

    adapt: Callable[[Lesson], Predictor] = field(default=lambda lesson: source_only(lesson))


@dataclass
class Timed:
    """A predictor whose processor time is added up."""

    predictor: Predictor
    seconds: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        started = time.process_time()
        found = self.predictor(x)
        self.seconds += time.process_time() - started
        return found


# --- what everyone does ---


def in_eval(network: nn.Module) -> Predictor:
    """The network as it is."""

    @torch.no_grad()
    def predict(x: Tensor) -> Tensor:
        return torch.cat([network.eval()(part) for part in x.split(2048)])

    return predict


def source_only(lesson: Lesson) -> Predictor:
    """No adaptation."""
    return in_eval(lesson.network)


def batch_statistics(lesson: Lesson) -> Predictor:
    """Batch normalisation by the target's statistics: of all its images, or of the batch where they come as a stream.

    Nado et al., "Evaluating Prediction-Time Batch Normalization for Robustness under Covariate Shift", 2020.
    """
    network = lesson.network
    if lesson.target is None:
        return _by_batch(network)
    for layer in norms(network):
        layer.reset_running_stats()
        layer.momentum = None  # the mean of all batches
    with torch.no_grad():
        network.train()
        for part in lesson.target.split(BATCH):
            if len(part) > 1:
                network(part)
    return in_eval(network)


def _by_batch(network: nn.Module) -> Predictor:
    for layer in norms(network):
        layer.momentum = 0.0

    @torch.no_grad()
    def predict(x: Tensor) -> Tensor:
        found: Tensor = network.train()(x)
        return found

    return predict


def norms(network: nn.Module) -> list[nn.BatchNorm1d | nn.BatchNorm2d]:
    """Its layers of batch normalisation."""
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]


def by_objective(
    lesson: Lesson, parameters: list[nn.Parameter], objective: Callable[[Float[Tensor, "batch classes"]], Tensor]
) -> Predictor:
    """Adam on an objective of the target's logits; on a stream one step a batch, after the batch is predicted."""
    network = lesson.network.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=lesson.lr)

    def step(x: Tensor) -> Tensor:
        logits: Tensor = network.train()(x)
        descent_step(optimizer, objective(logits))
        return logits.detach()

    if lesson.streaming:
        return step
    for x, _ in lesson.target_batches():
        step(x)
    return in_eval(network)


def entropy_minimisation(lesson: Lesson) -> Predictor:
    """Tent: the entropy of predictions, by the scales and shifts of batch normalisation alone (arXiv 2006.10726)."""
    parameters = [p for layer in norms(lesson.network) for p in layer.parameters()]
    return by_objective(lesson, parameters, lambda logits: entropy(logits).mean())


def information_maximisation(lesson: Lesson) -> Predictor:
    """SHOT-IM: sure of each image and diverse over the batch, with the head frozen (arXiv 2002.08546)."""

    def objective(logits: Tensor) -> Tensor:
        mean = logits.softmax(1).mean(0)
        return entropy(logits).mean() + (mean * mean.clamp_min(1e-12).log()).sum()

    return by_objective(lesson, list(lesson.network.features.parameters()), objective)


def pseudo_labels(lesson: Lesson) -> Predictor:
    """Cross-entropy to the network's own labels of which it is sure by 0.9, by all of its weights."""

    def objective(logits: Tensor) -> Tensor:
        sure, label = logits.detach().softmax(1).max(1)
        return (F.cross_entropy(logits, label, reduction="none") * (sure > 0.9)).mean()

    return by_objective(lesson, list(lesson.network.parameters()), objective)


def entropy(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, " batch"]:
    """Of the softmax, in nats."""
    found: Tensor = torch.special.entr(logits.softmax(1)).sum(1)
    return found


class PrototypesOfSure:
    """T3A: class prototypes are the head's weights and those target features of which it was surest.

    Iwasawa and Matsuo, "Test-Time Classifier Adjustment Module for Model-Agnostic Domain Generalization", NeurIPS
    2021. `keep` features a class, of least entropy, stay.
    """

    def __init__(self, network: Classifier, keep: int) -> None:
        self.network, self.keep = network.eval(), keep
        rows = network.head.weight.detach()
        self.z, self.label = rows, torch.arange(len(rows), device=rows.device)
        self.entropy = entropy(self._head(rows))

    def _head(self, z: Tensor) -> Tensor:
        logits: Tensor = self.network.head(z)
        return logits.detach()

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Learns from a batch, and then scores it."""
        z = self.network.features(x)
        logits = self._head(z)
        self.z = torch.cat([self.z, z])
        self.label = torch.cat([self.label, logits.argmax(1)])
        self.entropy = torch.cat([self.entropy, entropy(logits)])
        order = self.entropy.argsort(stable=True)
        of_class = F.one_hot(self.label[order], logits.shape[1])
        rank = (of_class.cumsum(0) * of_class).sum(1)  # within its class, the surest first
        kept = order[rank <= self.keep]
        self.z, self.label, self.entropy = self.z[kept], self.label[kept], self.entropy[kept]
        return self.scores(z)

    def scores(self, z: Tensor) -> Tensor:
        """Products with the prototypes."""
        sums = F.one_hot(self.label, self.network.head.out_features).to(z).T @ F.normalize(self.z, dim=1)
        return z @ F.normalize(sums, dim=1).T


def prototypes(lesson: Lesson) -> Predictor:
    """T3A, keeping as many features as the setting says; the head's bias plays no part in it."""
    predictor = PrototypesOfSure(lesson.network, int(lesson.trial.setting["keep"]))
    if lesson.target is None:
        return predictor
    for part in lesson.target.split(BATCH):
        predictor(part)
    return torch.no_grad()(lambda x: predictor.scores(lesson.network.features(x)))


def adversarial(lesson: Lesson) -> Predictor:
    """DANN: source labels, and features that a critic cannot tell apart by domain (arXiv 1505.07818); needs both."""
    network, trial = lesson.network.requires_grad_(True).train(), lesson.trial
    width = network.feature_dim
    critic = trial.seeded(lambda: nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 1)), stream=23)
    critic.to(trial.device)
    optimizer = torch.optim.Adam([*network.parameters(), *critic.parameters()], lr=lesson.lr)
    for step, ((x, y), (unlabelled, _)) in enumerate(
        zip(lesson.source_batches(), lesson.target_batches(), strict=True)
    ):
        z = [network.features(part) for part in (x, unlabelled)]
        weight = 2 / (1 + torch.exp(torch.tensor(-10 * step / lesson.steps))).item() - 1
        said = critic(reverse_gradient(torch.cat(z), weight))[:, 0]
        domain = torch.cat([torch.ones(len(x)), torch.zeros(len(unlabelled))]).to(said)
        loss = F.cross_entropy(network.head(z[0]), y) + F.binary_cross_entropy_with_logits(said, domain)
        descent_step(optimizer, loss)
    return in_eval(network)
