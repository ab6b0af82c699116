"""Learning a code for images whose factors are known, without being told them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.generative.infomec import dci, infomec, mutual_information_gap
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Curve, Entrant, Metric, Result, Setting, Task, Trial
from trimtab.studies.tools.autoencoders import VQVAE, Autoencoder, BetaTCVAE, BetaVAE, Learner, adam
from trimtab.studies.tools.descent import descent_step
from trimtab.studies.tools.factor_images import SIDE, FactorImages, shapes


@dataclass(frozen=True)
class Lesson:
    """What a contestant is given.

    Attributes:
        latents: numbers in a code, twice as many as there are factors.
        size: images to train on.
        steps: of training.
        setting: what the search chose, or tries.
        width: of the networks' hidden layers.
    """

    latents: int
    size: int
    steps: int
    setting: Setting
    width: int = 128

    def encoder(self, outputs: int) -> nn.Module:
        """From images (batch, 1, 16, 16) to (batch, outputs); torch's global state decides the weights."""
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(SIDE * SIDE, self.width),
            nn.ReLU(),
            nn.Linear(self.width, self.width),
            nn.ReLU(),
            nn.Linear(self.width, outputs),
        )

    def decoder(self, inputs: int) -> nn.Module:
        """From (batch, inputs) to logits of images."""
        return nn.Sequential(
            nn.Linear(inputs, self.width),
            nn.ReLU(),
            nn.Linear(self.width, self.width),
            nn.ReLU(),
            nn.Linear(self.width, SIDE * SIDE),
            nn.Unflatten(1, (1, SIDE, SIDE)),
        )


@dataclass(frozen=True, kw_only=True)
class Representation(Entrant):
    """What a contestant brings.

    Attributes:
        model: makes what learns; torch's global state is fixed by the seed.
        optimizer: makes its optimizer; Adam at a rate of 0.001, with the setting's `weight_decay` or none.
    """

    model: Callable[[Lesson], Learner]
    optimizer: Callable[[Any, Lesson], torch.optim.Optimizer] | None = None


def _adam(model: Any, lesson: Lesson) -> torch.optim.Optimizer:
    return adam(model, float(lesson.setting.get("weight_decay", 0.0)))


def _autoencoder(lesson: Lesson) -> Learner:
    return Autoencoder(lesson.encoder(lesson.latents), lesson.decoder(lesson.latents))


def _vae(lesson: Lesson) -> Learner:
    beta = float(lesson.setting.get("beta", 1.0))
    return BetaVAE(lesson.encoder(2 * lesson.latents), lesson.decoder(lesson.latents), beta)


def _tcvae(lesson: Lesson) -> Learner:
    beta = float(lesson.setting["beta"])
    return BetaTCVAE(lesson.encoder(2 * lesson.latents), lesson.decoder(lesson.latents), beta, lesson.size)


def _vqvae(lesson: Lesson) -> Learner:
    dim = 16
    numbers = lesson.latents * dim
    return VQVAE(lesson.encoder(numbers), lesson.decoder(numbers), lesson.latents, dim, num_codes=64)


@dataclass(frozen=True)
class RepresentationLearning(Task[Representation]):
    """Learn a code of ten numbers for small images of one shape each, which five factors make up.

    Column, row, size, shape and brightness take every combination once, 3,072 images; nine tenths are trained on. How
    well the code keeps the factors apart is measured on all, reconstruction on the tenth that no one has seen. Networks
    (three layers, 128 wide), batches and steps are the same for all; each contestant chooses among three settings by
    the sum of modularity and explicitness, as the authors of these metrics do, on another seed. Decays are higher than
    theirs because training is a hundred times shorter: a decay acts by its product with rate and steps.
    """

    name: ClassVar[str] = "representation"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "modularity": Metric("modularity, InfoM"),
        "explicitness": Metric("explicitness, InfoE"),
        "compactness": Metric("compactness, InfoC"),
        "mig": Metric("mutual information gap"),
        "dci": Metric("DCI disentanglement"),
        "error": Metric("reconstruction error on unseen images (nats a pixel)", best="min"),
        "active": Metric("active latents", best=None),
    }
    accepts: ClassVar[type[Representation]] = Representation
    tries: ClassVar[int] = 3
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"weight_decay": (0.0, 1.0, 3.0)}
    cost: ClassVar[float] = 3.0

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"shapes": shape_images}

    @classmethod
    def references(cls) -> Mapping[str, Representation]:
        return {
            "auto-encoder": Representation(model=_autoencoder),
            "VAE": Representation(model=_vae, search={}),
            "beta-VAE": Representation(model=_vae, search={"beta": (2.0, 4.0, 8.0)}),
            "beta-TCVAE": Representation(model=_tcvae, search={"beta": (3.0, 6.0, 12.0)}),
            "VQ-VAE": Representation(model=_vqvae),
        }

    def images(self, trial: Trial) -> FactorImages:
        """All images, in an order that the seed decides."""
        made = shapes(places=4, sizes=3, brightnesses=3) if trial.budget == "smoke" else shapes()
        order = torch.randperm(len(made.x), generator=trial.generator())
        return FactorImages(made.x[order], made.factors[order])

    def run(self, trial: Trial, entrant: Representation) -> Result:
        images = self.images(trial)
        seen = len(images.x) * 9 // 10
        steps = trial.pick(smoke=40, laptop=2_000, paper=100_000)
        lesson = Lesson(2 * images.factors.shape[1], seen, steps, trial.setting)
        model = trial.seeded(lambda: entrant.model(lesson))
        losses = train(model, images.x[:seen], (entrant.optimizer or _adam)(model, lesson), lesson, trial)
        measured = measure(model, images, seen)
        if trial.searching:
            return Result(score=measured["modularity"] + measured["explicitness"])
        shown = images.x[seen : seen + 10]
        with torch.no_grad():
            again = model.reconstruct(shown)
        sheet = Picture.grid(torch.cat([shown, again])[:, 0])
        return Result(measured, {"loss": losses}, pictures={"unseen images, and again from their codes": sheet})


def train(
    model: Any, x: Tensor, optimizer: torch.optim.Optimizer, lesson: Lesson, trial: Trial, batch_size: int = 64
) -> Curve:
    """Train in place on batches drawn at random; gives the loss over the steps."""
    draws, noise = trial.generator(1), trial.generator(2)
    every, held, at, values = max(1, lesson.steps // 20), torch.zeros(()), [], []
    model.train()
    for step in range(lesson.steps):
        loss = model.loss(x[torch.randint(len(x), (batch_size,), generator=draws)], noise)
        held += descent_step(optimizer, loss)
        if (step + 1) % every == 0:
            at.append(float(step + 1))
            values.append(held.item() / every)
            held.zero_()
            trial.report((step + 1) / lesson.steps)
    model.eval()
    return Curve(at, values, x_label="step")


@torch.no_grad()
def measure(model: Learner, images: FactorImages, seen: int, largest: int = 1000) -> dict[str, float]:
    """How well a code keeps factors apart, and what images it has not seen look like after it."""
    x, factors = images.x[:largest], images.factors[:largest]
    code = model.code(x)
    found = infomec(factors, code, discrete=model.discrete)
    unseen = images.x[seen:]
    return {
        "modularity": found.modularity,
        "explicitness": found.explicitness,
        "compactness": found.compactness,
        "mig": mutual_information_gap(found.nmi),
        "dci": dci(factors, code, trees=10).disentanglement,
        "error": float(F.binary_cross_entropy(model.reconstruct(unseen).clamp(0, 1), unseen)),
        "active": float(found.active.sum()),
    }


shape_images = RepresentationLearning()
