"""Class-conditional generation of digits in one to ten evaluations of a small network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.data import load
from trimtab.diffusion import ClassifierFreeGuidance, Denoiser, Flow, deis, deis_rk, denoising_loss, grids
from trimtab.diffusion.denoiser import DenoiserLike
from trimtab.nets import Classifier, mlp
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Budget, Curve, Entrant, Metric, Result, Task, Trial
from trimtab.studies.tools.descent import descend, shuffled
from trimtab.studies.tools.digit_generation import Images, Labels, Lesson, Pair, by_chance, diffusion_model, train
from trimtab.studies.tools.sample_quality import frechet_distance, knn_recall

EVALUATIONS = (1, 2, 4, 10)
MOST_NOISE = 20.0
"""Where diffusion models start from: more is lost on few steps, and the images are long gone there."""
Sample = Callable[[Labels, int, torch.Generator], Images]
"""Maps classes, the number of network evaluations that an image may cost, and randomness to images in [-1, 1]."""
Fit = Callable[[Lesson], Sample]


@dataclass(frozen=True, kw_only=True)
class Generator(Entrant):
    """What a contestant of digit generation brings.

    Attributes:
        fit: learns from a lesson, within its allowance, and gives back what makes images.
    """

    fit: Fit


def guided(model: DenoiserLike, labels: Labels, scale: float) -> DenoiserLike:
    """The denoiser for classes; at scale 1 it costs one evaluation, else two."""
    return ClassifierFreeGuidance(model, labels, scale=scale)


def diffusion(lesson: Lesson, *, method: str = "ddim", scale: float = 1.0) -> Sample:
    """A diffusion model and an ODE solver: DDIM, or Heun's method; with guidance where it can pay for it."""
    return solved(diffusion_model(lesson), method=method, scale=scale)


def solved(model: DenoiserLike, *, method: str = "ddim", scale: float = 1.0) -> Sample:
    """What makes images by solving a diffusion model's ODE in as many steps as the evaluations pay for."""

    def sample(labels: Labels, evaluations: int, generator: torch.Generator) -> Images:
        x = MOST_NOISE * torch.randn(len(labels), 1, 8, 8, generator=generator)
        # EDM's Heun ends on a step of Euler's, so that k steps cost 2 k - 1.
        steps = (evaluations + 1) // 2 if method == "heun" else evaluations if scale == 1 else max(1, evaluations // 2)
        times = grids.karras(model.schedule, steps, t_max=MOST_NOISE)
        given = guided(model, labels, scale if evaluations > 1 else 1.0)
        if method == "heun" and steps > 1:
            x, times = deis_rk(given, x, times[:-1], method="heun"), times[-2:]
        return deis(given, x, times, order=0)

    return sample


def flow_matching(lesson: Lesson, *, pair: Pair = by_chance) -> Sample:
    """A network that learns the velocity of straight paths from noise to images, followed by Euler's method."""
    network = lesson.network()
    flow = Denoiser(network, Flow(), "flow")

    def loss(images: Images, labels: Labels, generator: torch.Generator) -> Tensor:
        t = torch.rand(len(images), generator=generator)
        noise = pair(images, torch.randn(images.shape, generator=generator))
        return denoising_loss(flow, images, t, noise, labels)

    trained = train(lesson, network, loss, lesson.steps())

    @torch.no_grad()
    def sample(labels: Labels, evaluations: int, generator: torch.Generator) -> Images:
        x = torch.randn(len(labels), 1, 8, 8, generator=generator)
        for k in range(evaluations):
            t = torch.full((len(x),), 1 - k / evaluations)
            x = x - trained(x, t, labels) / evaluations
        return x

    return sample


@dataclass(frozen=True)
class DigitsGeneration(Task[Generator]):
    """Generate digits of 8 x 8 pixels of a class asked for, in 1, 2, 4 and 10 evaluations of a network.

    Every contestant learns from the same images within the same allowance of passes through a network, of which a
    distilled model pays its teacher's training too, and makes samples with a network of at most the same size. Samples
    are judged in the features of a frozen classifier, against images that no contestant has seen. Settings are chosen
    on a part of the training images that is held out while they are tried; the largest rate was added for everybody
    when ten of fourteen had chosen the largest of three.

    What the references share (the levels that diffusion is trained at, where its samplers start, CFG's scale of 1.5)
    was settled once, on one seed and against the images that all are judged by: it favours the references.
    """

    name: ClassVar[str] = "digits-generation"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "frechet": Metric("Frechet distance, geometric mean over 1, 2, 4 and 10 evaluations", best="min"),
        **{
            f"frechet_{n}": Metric(f"Frechet distance at {n} evaluation{'s' * (n > 1)}", best="min")
            for n in EVALUATIONS
        },
        "precision": Metric("precision at 4 evaluations (%)", percent=True),
        "recall": Metric("recall at 4 evaluations (%)", percent=True),
        "fidelity": Metric("samples of the class asked for, at 4 evaluations (%)", percent=True),
    }
    accepts: ClassVar[type[Generator]] = Generator
    tries: ClassVar[int] = 4
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (5e-4, 1.5e-3, 5e-3, 1.5e-2)}
    seeds: ClassVar[Mapping[Budget, int]] = {"smoke": 1, "laptop": 5, "paper": 10}
    cost: ClassVar[float] = 10.0

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"8 x 8 pixels": digits}

    @classmethod
    def references(cls) -> Mapping[str, Generator]:
        return {
            "diffusion, DDIM": Generator(fit=diffusion),
            "diffusion, Heun": Generator(fit=partial(diffusion, method="heun")),
            "diffusion, CFG": Generator(fit=partial(diffusion, scale=1.5)),
            "flow matching": Generator(fit=flow_matching),
        }

    def datasets(self, budget: Budget) -> tuple[str, ...]:
        return ("digits",)

    def run(self, trial: Trial, entrant: Generator) -> Result:
        lesson, unseen = lesson_of(trial)
        sample = entrant.fit(lesson)
        judge = Judge.of(trial, *unseen)
        count = trial.pick(smoke=200, laptop=1000, paper=10_000)
        labels = unseen[1][torch.randint(len(unseen[1]), (count,), generator=trial.generator(1))]
        images = {n: sample(labels, n, trial.generator(2)).clamp(-1, 1) for n in EVALUATIONS}
        frechet = {n: judge.frechet(made) for n, made in images.items()}
        overall = math.exp(sum(math.log(max(value, 1e-12)) for value in frechet.values()) / len(frechet))
        if trial.searching:
            return Result(score=-overall)
        quality = {n: judge.quality(made, labels) for n, made in images.items()}
        shown = sample(torch.arange(10).repeat(4), 4, trial.generator(3)).clamp(-1, 1)
        return Result(
            {"frechet": overall, **{f"frechet_{n}": value for n, value in frechet.items()}, **quality[4]},
            curves={
                name: Curve(EVALUATIONS, values, x_label="evaluations")
                for name, values in {
                    "frechet": list(frechet.values()),
                    **{key: [quality[n][key] for n in EVALUATIONS] for key in quality[4]},
                }.items()
            },
            pictures={"4 evaluations": Picture.grid(shown[:, 0] / 2 + 0.5)},
        )


def lesson_of(trial: Trial) -> tuple[Lesson, tuple[Images, Labels]]:
    """The lesson of a run, and the images that its generator is judged by; while searching, held out of the lesson."""
    data = load("digits")
    train_x, train_y, test = data.x_train * 2 - 1, data.y_train, (data.x_test * 2 - 1, data.y_test)
    if trial.searching:
        kept = 3 * len(train_x) // 4
        train_x, train_y, test = train_x[:kept], train_y[:kept], (train_x[kept:], train_y[kept:])
    allowance = trial.pick(smoke=30_000, laptop=600_000, paper=30_000_000)
    lesson = Lesson(train_x, train_y, data.num_classes, allowance, size_limit=200_000, trial=trial)
    return lesson, test


@dataclass(frozen=True)
class Judge:
    """A frozen classifier and the images that samples should resemble.

    Attributes:
        classifier: in whose features distances are measured.
        features: of images that nobody has learnt from, shape (images, 32), of variance one on average.
        scale: by which features of the classifier are divided for that.
    """

    classifier: Classifier
    features: Tensor
    scale: float

    @classmethod
    def of(cls, trial: Trial, images: Images, labels: Labels) -> Judge:
        """The judge of a run; the classifier is the same in all."""
        classifier = mlp(images[0].numel(), (128, 32), 10)
        classifier.load_state_dict(trial.cached(_classifier_weights, key="classifier of digits"))
        classifier.eval().requires_grad_(False)
        features = classifier.features(images)
        scale = float(features.var(0).mean().sqrt())
        return cls(classifier, features / scale, scale)

    def frechet(self, images: Images) -> float:
        """The Fréchet distance of images to the unseen ones."""
        own, other = (self.classifier.features(images) / self.scale).double(), self.features.double()
        return frechet_distance(own, other.mean(0), torch.cov(other.T))

    def quality(self, images: Images, labels: Labels) -> dict[str, float]:
        """Precision and recall in the features (k = 3), and the share of the images that are of their class."""
        own = self.classifier.features(images) / self.scale
        return {
            "precision": knn_recall(self.features, own),
            "recall": knn_recall(own, self.features),
            "fidelity": float((self.classifier(images).argmax(1) == labels).double().mean()),
        }


def _classifier_weights() -> dict[str, Tensor]:
    """A classifier trained on all digits, those that generators are judged by too: nobody is judged by its accuracy."""
    data = load("digits")
    x, y = torch.cat([data.x_train, data.x_test]) * 2 - 1, torch.cat([data.y_train, data.y_test])
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = mlp(x[0].numel(), (128, 32), 10)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    loss = lambda rows: nn.functional.cross_entropy(classifier(x[rows]), y[rows])
    descend(optimizer, loss, shuffled(len(x), 64, 20, generator))
    return classifier.state_dict()


digits = DigitsGeneration()
