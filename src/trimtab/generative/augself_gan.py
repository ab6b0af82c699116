r"""AugSelf-GAN: a discriminator that can tell how images were augmented, and of real ones otherwise than of generated.

To be used in place of plain augmented training (DiffAugment) where real images are few. Augmentation keeps a
discriminator from learning them by heart, but leaves it blind to what the augmentation changes. Here a linear head
reads the augmentation's parameters $\omega$ from the difference of the features of an image with and without it,
$\hat\omega(x) = h(\phi(T(x; \omega)) - \phi(x))$, with *opposite targets* for real and generated images; the
generator is to make images of which it reads $\omega$ and not $-\omega$:

$$
L_D \mathrel{+}= \lambda_d \left(E\lVert\hat\omega(x) - \omega\rVert^2
+ E\lVert\hat\omega(G(z)) + \omega\rVert^2\right), \qquad
L_G \mathrel{+}= \lambda_g\, E\left[\lVert\hat\omega(G(z)) - \omega\rVert^2 - \lVert\hat\omega(G(z)) + \omega\rVert^2
\right],
$$

where norms are means over the parameters. Under the best head the generator's term is a divergence between real and
generated images, joint with how they were augmented, by arithmetic and harmonic means.

Reference: Liang Hou, Qi Cao, Yige Yuan, Songtao Zhao, Chongyang Ma, Siyuan Pan, Pengfei Wan, Zhongyuan Wang, Huawei
Shen and Xueqi Cheng, "Augmentation-Aware Self-Supervision for Data-Efficient GAN Training", NeurIPS 2023, arXiv
2205.15677.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.generative.augment import DiffAugment, Parameters
from trimtab.generative.gan import GAN, Discriminator, hinge_discriminator_loss, hinge_generator_loss
from trimtab.ops.arguments import integer, non_negative, real_problem, same_shape


class AugSelfHead(nn.Module):
    """A linear reading of each augmentation's parameters from what it changed in the features.

    The generator's term grows with what is read, without bound. The authors normalise these layers spectrally, as all
    of the discriminator's: apply `torch.nn.utils.parametrizations.spectral_norm` to each of `heads`.

    Args:
        in_features: number of features.
        counts: for each augmentation how many parameters it has, as `DiffAugment.counts`.

    Raises:
        ValueError: a number is not positive.

    Example:
        >>> head = AugSelfHead(16, {"translation": 2})
        >>> head(torch.randn(4, 16), torch.randn(4, 16))["translation"].shape
        torch.Size([4, 2])
    """

    def __init__(self, in_features: int, counts: Mapping[str, int]) -> None:
        super().__init__()
        integer("in_features", in_features)
        self.heads = nn.ModuleDict({name: nn.Linear(in_features, integer(name, n)) for name, n in counts.items()})

    def forward(
        self, augmented: Float[Tensor, "batch features"], plain: Float[Tensor, "batch features"]
    ) -> dict[str, Tensor]:
        """Predictions from the features of augmented images and of the same images as they were."""
        same_shape("augmented", augmented, "plain", plain)
        return {name: head(augmented - plain) for name, head in self.heads.items()}


def augself_discriminator_loss(
    real: Parameters, fake: Parameters, real_params: Parameters, fake_params: Parameters
) -> Tensor:
    """Squared errors of what is read: the parameters themselves for real images, minus them for generated ones.

    Args:
        real, fake: predictions, by augmentation.
        real_params, fake_params: how the images were augmented.

    Returns:
        The sum over augmentations of means over images and parameters.

    Raises:
        ValueError: predictions and parameters are of other augmentations or shapes.

    Example:
        >>> half = {"translation": torch.full((1, 2), 0.5)}
        >>> augself_discriminator_loss(half, half, half, half)  # of real images right, of generated ones off by 1
        tensor(1.)
    """
    return _squared_error(real, real_params, 1.0) + _squared_error(fake, fake_params, -1.0)


def augself_generator_loss(fake: Parameters, params: Parameters) -> Tensor:
    """How much nearer what is read of generated images is to minus the parameters than to the parameters.

    Raises:
        ValueError: predictions and parameters are of other augmentations or shapes.

    Example:
        >>> augself_generator_loss({"cutout": torch.tensor([[0.5]])}, {"cutout": torch.tensor([[1.0]])})
        tensor(-2.)
    """
    return _squared_error(fake, params, 1.0) - _squared_error(fake, params, -1.0)


def _squared_error(predicted: Parameters, params: Parameters, sign: float) -> Tensor:
    if predicted.keys() - params.keys() or not predicted:
        raise ValueError(f"params must be of {', '.join(predicted) or 'an augmentation'}, got {', '.join(params)}")
    for name, value in predicted.items():
        same_shape(name, value, f"params of {name}", params[name])
    return torch.stack([F.mse_loss(value, sign * params[name]) for name, value in predicted.items()]).sum()


class AugSelfGAN(GAN):
    """Adversarial training with augmentation-aware self-supervision; a training rule as `GAN`.

    Args:
        synthesis, discriminator, latent_dim, discriminator_steps, generator: as for `GAN`.
        head: reads the augmentations; it is trained by the second optimizer, which must hold its parameters. It may
            have fewer augmentations than `augment`.
        optimizers: as for `GAN`.
        augment: augments images.
        discriminator_weight, generator_weight: of the two terms; with zeros it is `GAN`, that is DiffAugment.

    Raises:
        ValueError: a weight is negative, or a head is of an augmentation that there is not.

    Example:
        >>> class Critic(nn.Linear):
        ...     def features(self, x):
        ...         return x.flatten(1)
        ...     def score(self, features, labels=None):
        ...         return self(features)[:, 0]
        >>> class Maker(nn.Linear):
        ...     def forward(self, z):
        ...         return super().forward(z).view(-1, 1, 8, 8)
        >>> maker, critic, augment = Maker(3, 64), Critic(64, 1), DiffAugment(("light", "translation"))
        >>> head = AugSelfHead(64, augment.counts)
        >>> groups = list(maker.parameters()), [*critic.parameters(), *head.parameters()]
        >>> optimizers = [torch.optim.Adam(group) for group in groups]
        >>> gan = AugSelfGAN(maker, critic, head, optimizers, latent_dim=3, augment=augment)
        >>> sorted(gan.step(torch.rand(16, 1, 8, 8)))
        ['discriminator', 'generator']
    """

    def __init__(
        self,
        synthesis: nn.Module,
        discriminator: Discriminator,
        head: AugSelfHead,
        optimizers: Sequence[torch.optim.Optimizer],
        latent_dim: int,
        *,
        augment: DiffAugment,
        discriminator_weight: float = 1.0,
        generator_weight: float = 1.0,
        discriminator_steps: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            synthesis,
            discriminator,
            optimizers,
            latent_dim,
            augment=augment,
            discriminator_steps=discriminator_steps,
            generator=generator,
        )
        self.discriminator_weight = non_negative("discriminator_weight", discriminator_weight)
        self.generator_weight = non_negative("generator_weight", generator_weight)
        if unknown := sorted(head.heads.keys() - augment.counts.keys()):
            raise ValueError(f"head must be of augmentations among {', '.join(augment.counts)}, got {unknown}")
        self.head = head

    def discriminator_loss(self, real: Tensor, fake: Tensor, labels: Tensor | None = None) -> Tensor:
        """The hinge loss, and the error of what is read of real and generated images."""
        if problem := real_problem(real=real, fake=fake):
            raise TypeError(problem)
        (score, read, params), (fake_score, fake_read, fake_params) = (self._seen(x, labels) for x in (real, fake))
        loss = hinge_discriminator_loss(score, fake_score)
        return loss + self.discriminator_weight * augself_discriminator_loss(read, fake_read, params, fake_params)

    def generator_loss(self, fake: Tensor, labels: Tensor | None = None) -> Tensor:
        """Minus the mean score, and the difference of errors of what is read."""
        if problem := real_problem(fake=fake):
            raise TypeError(problem)
        score, read, params = self._seen(fake, labels)
        return hinge_generator_loss(score) + self.generator_weight * augself_generator_loss(read, params)

    def _seen(self, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Parameters, Parameters]:
        augmented, params = self.view(x)
        features, plain = self.discriminator.features(torch.cat([augmented, x])).chunk(2)
        return self.discriminator.score(features, labels), self.head(features, plain), params

    def _parts(self) -> dict[str, Any]:
        return {**super()._parts(), "head": self.head}
