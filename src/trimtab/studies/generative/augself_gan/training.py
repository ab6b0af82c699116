"""Adversarial training on few images: the rules side by side, and the one loop that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from trimtab.generative import GAN, AugSelfGAN, AugSelfHead, DiffAugment
from trimtab.generative.augment import Parameters
from trimtab.nets import ImageDiscriminator, ImageGenerator
from trimtab.ops.averaging import frozen_copy, move_average

LATENT = 32
_WIDTH = 24
# Images have one channel, for which "color" is "light": there is nothing to saturate.
POLICY = DiffAugment(("light", "translation", "cutout"))
_AVERAGE = 0.99


@dataclass(frozen=True)
class Makings:
    """What a rule is made of.

    Attributes:
        side: of the images.
        num_classes: number of classes.
        lr: learning rate of both networks.
        generator: of all that a rule draws.
    """

    side: int
    num_classes: int
    lr: float
    generator: torch.Generator
    synthesis: ImageGenerator = field(init=False)
    discriminator: ImageDiscriminator = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "synthesis", ImageGenerator(self.side, LATENT, self.num_classes, _WIDTH))
        object.__setattr__(self, "discriminator", ImageDiscriminator(self.num_classes, _WIDTH))

    def optimizers(self, *heads: nn.Module) -> list[torch.optim.Optimizer]:
        """Adam for both networks, with BigGAN's betas."""
        groups: list[list[nn.Module]] = [[self.synthesis], [self.discriminator, *heads]]
        return [
            torch.optim.Adam([p for part in group for p in part.parameters()], lr=self.lr, betas=(0.0, 0.999))
            for group in groups
        ]


MakeRule = Callable[[Makings], GAN]


def plain(makings: Makings, *, augment: DiffAugment | None = None, kind: type[GAN] = GAN) -> GAN:
    """The hinge loss alone, or on augmented images."""
    return kind(
        makings.synthesis,
        makings.discriminator,
        makings.optimizers(),
        LATENT,
        augment=augment,
        generator=makings.generator,
    )


def augself(makings: Makings, *, kind: type[AugSelfGAN] = AugSelfGAN) -> AugSelfGAN:
    """AugSelf-GAN with its authors' weights, reading all that is augmented by layers normalised as theirs."""
    head = AugSelfHead(makings.discriminator.num_features, POLICY.counts)
    for layer in head.heads.values():
        spectral_norm(layer)
    return kind(
        makings.synthesis,
        makings.discriminator,
        head,
        makings.optimizers(head),
        LATENT,
        augment=POLICY,
        generator=makings.generator,
    )


class SameTargets(AugSelfGAN):
    """Self-supervision that does not know real from generated: the same target for both, and for the generator."""

    def discriminator_loss(self, real: Tensor, fake: Tensor, labels: Tensor | None = None) -> Tensor:
        seen = [self._seen(x, labels) for x in (real, fake)]
        loss = (1 - seen[0][0]).relu().mean() + (1 + seen[1][0]).relu().mean()
        return loss + sum((_error(read, params) for _, read, params in seen), start=torch.zeros(()))

    def generator_loss(self, fake: Tensor, labels: Tensor | None = None) -> Tensor:
        score, read, params = self._seen(fake, labels)
        return _error(read, params) - score.mean()


def _error(read: Parameters, params: Parameters) -> Tensor:
    return torch.stack([(read[name] - params[name]).square().mean() for name in read]).sum()


class LeCam(GAN):
    """Scores of real images are held near the running mean of generated ones' scores, and the other way round.

    Tseng, Jiang, Liu, Yang and Yang, "Regularizing Generative Adversarial Networks under Limited Data", CVPR 2021,
    arXiv 2104.03310; their weights for CIFAR-10 are 0.01 to 0.3.
    """

    weight, decay = 0.1, 0.99
    means: tuple[float, float] | None = None

    def discriminator_loss(self, real: Tensor, fake: Tensor, labels: Tensor | None = None) -> Tensor:
        scores = [self.discriminator.score(self.discriminator.features(self.view(x)[0]), labels) for x in (real, fake)]
        now = (float(scores[0].detach().mean()), float(scores[1].detach().mean()))
        old = self.means or now
        self.means = (self.decay * old[0] + (1 - self.decay) * now[0], self.decay * old[1] + (1 - self.decay) * now[1])
        apart = (scores[0] - self.means[1]).square().mean() + (scores[1] - self.means[0]).square().mean()
        return (1 - scores[0]).relu().mean() + (1 + scores[1]).relu().mean() + self.weight * apart


RULES: dict[str, MakeRule] = {
    "AugSelf": augself,
    "DiffAugment": partial(plain, augment=POLICY),
    "DiffAugment, LeCam": partial(plain, augment=POLICY, kind=LeCam),
    "the same target for both": partial(augself, kind=SameTargets),
    "no augmentation": plain,
}


@dataclass(frozen=True)
class Trained:
    """A rule in training, and the moving average of its generating network."""

    rule: GAN
    average: nn.Module

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Images of classes, from averaged weights."""
        images: Tensor = self.average(torch.randn(len(labels), LATENT, generator=generator), labels)
        return images


def start(rule: GAN) -> Trained:
    """Before the first step."""
    return Trained(rule, frozen_copy(rule.synthesis))


def train(trained: Trained, images: Tensor, labels: Tensor) -> None:
    """One step on a batch."""
    trained.rule.step(images, labels)
    move_average(trained.average, trained.rule.synthesis, _AVERAGE)
