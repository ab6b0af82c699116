r"""Adversarial training with the hinge loss, for real and generated images that may both be augmented.

$$
L_D = E[\max(0, 1 - D(x))] + E[\max(0, 1 + D(G(z)))], \qquad L_G = -E[D(G(z))].
$$

Reference: Jae Hyun Lim and Jong Chul Ye, "Geometric GAN", 2017, arXiv 1705.02894.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.generative.augment import DiffAugment, Parameters
from trimtab.ops.arguments import class_indices, floating_tensor, integer, real_problem


class Discriminator(Protocol):
    """A trunk and a head, an `nn.Module`: what is told apart is read from features, which other heads may read too."""

    def features(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch features"]: ...

    def score(
        self, features: Float[Tensor, "batch features"], labels: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, " batch"]: ...


def hinge_discriminator_loss(real: Float[Tensor, " batch"], fake: Float[Tensor, " batch"]) -> Tensor:
    """The discriminator's hinge loss: scores of real images should be above 1, of generated ones below -1.

    Raises:
        ValueError: there are no scores.

    Example:
        >>> hinge_discriminator_loss(torch.tensor([0.5, 2.0]), torch.tensor([-3.0]))
        tensor(0.2500)
    """
    if problem := real_problem(real=real, fake=fake):
        raise TypeError(problem)
    if not real.numel() or not fake.numel():
        raise ValueError(f"real and fake must be at least one score each, got {real.numel()} and {fake.numel()}")
    return (1 - real).relu().mean() + (1 + fake).relu().mean()


def hinge_generator_loss(fake: Float[Tensor, " batch"]) -> Tensor:
    """The generator's loss: minus the mean score of its images.

    Raises:
        ValueError: there are no scores.

    Example:
        >>> hinge_generator_loss(torch.tensor([1.0, 2.0]))
        tensor(-1.5000)
    """
    if problem := real_problem(fake=fake):
        raise TypeError(problem)
    if not fake.numel():
        raise ValueError("fake must be at least one score, got none")
    return -fake.mean()


class GAN:
    """Trains a generator and a discriminator in turn, one batch of real images a step.

    A training rule for your own loop; networks and optimizers are yours. With `augment`, real and generated images are
    augmented in every loss of both networks, which is DiffAugment.

    Args:
        synthesis: the generating network, called `synthesis(z)`, or `synthesis(z, labels)` where there are labels.
        discriminator: the network that tells images apart, see `Discriminator`.
        optimizers: of the two, in this order; the second may hold further heads.
        latent_dim: length of z, which is standard normal.
        augment: augments images.
        discriminator_steps: steps of the discriminator for one of the generator; a batch is shared out among them.
        generator: draws z and augmentations.

    Raises:
        ValueError: a number is not positive.

    Example:
        >>> class Critic(nn.Linear):
        ...     def features(self, x):
        ...         return x.flatten(1)
        ...     def score(self, features, labels=None):
        ...         return self(features)[:, 0]
        >>> class Maker(nn.Linear):
        ...     def forward(self, z):
        ...         return super().forward(z).view(-1, 1, 8, 8)
        >>> maker, critic = Maker(3, 64), Critic(64, 1)
        >>> optimizers = [torch.optim.Adam(network.parameters()) for network in (maker, critic)]
        >>> gan = GAN(maker, critic, optimizers, latent_dim=3, augment=DiffAugment(("light", "translation")))
        >>> sorted(gan.step(torch.rand(16, 1, 8, 8)))
        ['discriminator', 'generator']
    """

    def __init__(
        self,
        synthesis: nn.Module,
        discriminator: Discriminator,
        optimizers: Sequence[torch.optim.Optimizer],
        latent_dim: int,
        *,
        augment: DiffAugment | None = None,
        discriminator_steps: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        self.synthesis, self.discriminator = synthesis, discriminator
        self.optimizers = list(optimizers)
        if len(self.optimizers) != 2:
            raise ValueError(f"optimizers must be two, the generating network's first, got {len(self.optimizers)}")
        self.latent_dim = integer("latent_dim", latent_dim)
        self.augment = augment
        self.discriminator_steps = integer("discriminator_steps", discriminator_steps)
        self.generator = generator

    def step(self, x: Float[Tensor, "batch ..."], labels: Int[Tensor, " batch"] | None = None) -> dict[str, Tensor]:
        """One step of each network, or several of the discriminator.

        Args:
            x: real images.
            labels: their classes, which generated images are given too.

        Returns:
            The losses, detached.

        Raises:
            TypeError: `x` is not floating point, or `labels` not int64.
            ValueError: there are fewer images than steps, or not as many labels.
        """
        x = floating_tensor("x", x)
        if len(x) < self.discriminator_steps:
            raise ValueError(f"x must be at least {self.discriminator_steps} images, got {len(x)}")
        if labels is not None:
            class_indices("labels", labels)
            if labels.shape != x.shape[:1]:
                raise ValueError(f"labels must be {len(x)}, got shape {tuple(labels.shape)}")
        own, other = self.optimizers
        parts = x.chunk(self.discriminator_steps)
        classes = [None] * len(parts) if labels is None else labels.chunk(self.discriminator_steps)
        for real, of in zip(parts, classes, strict=True):
            with torch.no_grad():
                fake = self.make(len(real), of)
            loss_d = self.discriminator_loss(real, fake, of)
            other.zero_grad()
            loss_d.backward()
            other.step()
        with _frozen(other):
            loss_g = self.generator_loss(self.make(len(parts[-1]), classes[-1]), classes[-1])
            own.zero_grad()
            loss_g.backward()
        own.step()
        return {"discriminator": loss_d.detach(), "generator": loss_g.detach()}

    def make(self, count: int, labels: Int[Tensor, " count"] | None = None) -> Float[Tensor, "count ..."]:
        """Generated images."""
        like = next(self.synthesis.parameters())
        z = torch.randn(count, self.latent_dim, generator=self.generator, dtype=like.dtype, device=like.device)
        made: Tensor = self.synthesis(z) if labels is None else self.synthesis(z, labels)
        return made

    def discriminator_loss(self, real: Tensor, fake: Tensor, labels: Tensor | None = None) -> Tensor:
        """Hinge loss of augmented images."""
        if problem := real_problem(real=real, fake=fake):
            raise TypeError(problem)
        scores = [self.discriminator.score(self.discriminator.features(self.view(x)[0]), labels) for x in (real, fake)]
        return hinge_discriminator_loss(*scores)

    def generator_loss(self, fake: Tensor, labels: Tensor | None = None) -> Tensor:
        """Minus the mean score of augmented images."""
        if problem := real_problem(fake=fake):
            raise TypeError(problem)
        return hinge_generator_loss(self.discriminator.score(self.discriminator.features(self.view(fake)[0]), labels))

    def view(self, x: Tensor) -> tuple[Tensor, Parameters]:
        """Images augmented, and how."""
        return (x, {}) if self.augment is None else self.augment(x, generator=self.generator)

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimizers and the generator of randomness."""
        return {
            **{name: part.state_dict() for name, part in self._parts().items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` was called; a state that does not fit is refused and changes nothing.

        Raises:
            KeyError, RuntimeError, ValueError: the state is another rule's or of other networks.
        """
        before = copy.deepcopy(self.state_dict())
        try:
            self._restore(state)
        except Exception:
            self._restore(before)
            raise

    def _restore(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        for optimizer, held in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        if self.generator is not None:
            self.generator.set_state(state["generator"])

    def _parts(self) -> dict[str, Any]:
        return {"synthesis": self.synthesis, "discriminator": self.discriminator}


@contextlib.contextmanager
def _frozen(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """What an optimizer trains takes no gradients meanwhile: the other network's step needs none of them."""
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
