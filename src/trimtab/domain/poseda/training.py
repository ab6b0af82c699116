"""The losses of augmenter, critic and lifter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.domain.poseda.alignment import global_position_alignment, project
from trimtab.domain.poseda.augmentation import PartDiscriminator, PoseAugmenter, banded
from trimtab.ops.arguments import non_negative, real_problem
from trimtab.ops.whole_state import WholeState


class PoseDA(WholeState, nn.Module):
    """The losses of a training; in the user's loop, with an optimizer each and a step in this order:

        generator_loss(x, target, camera)        # weights of `augmenter`
        discriminator_loss(x)                    # weights of `discriminator`, every second step
        lifter_loss(x, target, camera)           # weights of `lifter`

    Lifters take 2-D poses of the target camera's unit, and give 3-D ones of which the place of the root is not used.

    Args:
        lifter: from (batch, joints, 2) to (batch, joints, 3).
        augmenter: as `PoseAugmenter`.
        discriminator: as `PartDiscriminator`.
        realism: weight of the discriminator's part, the authors' 6.
        plausibility: weight of the bounds on bends and lengths, 3.
        hardness: weight of the lifter's part, 0.1; set it to zero while the lifter still learns the plain poses.
        beta: how much harder an augmented pose should be; from 3 to 5 over the training.

    Raises:
        ValueError: a weight is negative.

    Example:
        >>> lifter = nn.Sequential(nn.Flatten(), nn.Linear(32, 48), nn.Unflatten(1, (16, 3)))
        >>> rule = PoseDA(lifter, PoseAugmenter(hidden=16), PartDiscriminator(hidden=8))
        >>> x, camera = torch.randn(6, 16, 3), torch.tensor([0.0, 0.0, 2.0, 2.0])
        >>> sorted(rule.generator_loss(x, torch.randn(9, 16, 2), camera))
        ['hardness', 'plausibility', 'realism', 'total']
    """

    def __init__(
        self,
        lifter: Callable[[Tensor], Tensor],
        augmenter: PoseAugmenter,
        discriminator: PartDiscriminator,
        *,
        realism: float = 6.0,
        plausibility: float = 3.0,
        hardness: float = 0.1,
        beta: float = 3.0,
    ) -> None:
        super().__init__()
        self.lifter, self.augmenter, self.discriminator = lifter, augmenter, discriminator
        self.realism = non_negative("realism", realism)
        self.plausibility = non_negative("plausibility", plausibility)
        self.hardness = non_negative("hardness", hardness)
        self.beta = non_negative("beta", beta)

    def generator_loss(
        self,
        x: Float[Tensor, "n joints 3"],
        target: Float[Tensor, "m joints 2"],
        camera: Float[Tensor, "... 4"],
        *,
        noise: Tensor | None = None,
        pairing: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The augmenter's loss, `total`, and its parts before weighting. Both poses follow the same target.

        Raises:
            TypeError, ValueError: as `PoseAugmenter` and `global_position_alignment`.
        """
        if problem := real_problem(x=x):
            raise TypeError(problem)
        if pairing is not None and pairing.shape != x.shape[:1]:  # before batch statistics move
            raise ValueError(f"pairing must be of shape ({len(x)},), got {tuple(pairing.shape)}")
        made = self.augmenter(x, noise=noise, generator=generator)
        if pairing is None:
            pairing = torch.randint(len(target), (len(x),), generator=generator)
        realism = (self.discriminator(made.pose) - 1).square().mean() / 2
        held = self.augmenter.skeleton.ratios()
        ratio = made.ratio[:, [held.index(number) for number in range(max(held) + 1)]]  # mirrored bones count once
        wide = torch.where(ratio.abs() > 0.1, ratio.square(), 0.0).mean()
        plausibility = banded(made.bend.mean(1), 0.205, 0.165).mean() + wide
        hardness = torch.zeros_like(realism)
        if self.hardness:
            before, after = (self._errors(p, target, camera, pairing) for p in (x, made.pose))
            hardness = banded(after / before.detach().clamp_min(1e-6), self.beta, 2.0).mean()
        total = self.realism * realism + self.plausibility * plausibility + self.hardness * hardness
        return {"total": total, "realism": realism, "plausibility": plausibility, "hardness": hardness}

    def _errors(self, pose: Tensor, target: Tensor, camera: Tensor, pairing: Tensor) -> Tensor:
        """The lifter's distance from each pose, (batch, groups)."""
        placed = global_position_alignment(pose, target, camera, pairing=pairing)
        error = self._residual(placed, camera).norm(dim=2)
        groups = self.augmenter.skeleton.groups or (tuple(range(1, error.shape[1])),)
        return torch.stack([error[:, list(group)].mean(1) for group in groups], 1)

    def _residual(self, placed: Tensor, camera: Tensor) -> Tensor:
        lifted = self.lifter(project(placed, camera))
        return (lifted - lifted[:, :1]) - (placed - placed[:, :1])

    def discriminator_loss(
        self,
        x: Float[Tensor, "n joints 3"],
        *,
        fakes: Float[Tensor, "m joints 3"] | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The discriminator's loss, `total`.

        Args:
            x: source poses.
            fakes: augmented poses, such as those of a pool of past ones; made from `x` where they are None.
            noise, generator: of what is made.
        """
        if fakes is None:
            with torch.no_grad():
                fakes = self.augmenter(x, noise=noise, generator=generator).pose
        real, fake = self.discriminator(x), self.discriminator(fakes.detach())
        return {"total": ((real - 1).square().mean() + fake.square().mean()) / 2}

    def lifter_loss(
        self,
        x: Float[Tensor, "n joints 3"],
        target: Float[Tensor, "m joints 2"],
        camera: Float[Tensor, "... 4"],
        *,
        augment: bool = True,
        noise: Tensor | None = None,
        pairing: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The lifter's mean squared error from the root, `total`, on aligned poses: `source`, and `augmented` ones.

        Args:
            x: source poses.
            target: 2-D poses of the target domain.
            camera: of the target domain.
            augment: whether augmented poses are seen too; without, this is alignment alone.
            noise, pairing, generator: of what is drawn.
        """
        poses = {"source": x}
        if augment:
            with torch.no_grad():
                poses["augmented"] = self.augmenter(x, noise=noise, generator=generator).pose
        losses = {}
        for name, pose in poses.items():
            placed = global_position_alignment(pose, target, camera, pairing=pairing, generator=generator)
            losses[name] = self._residual(placed.detach(), camera).square().mean()
        return {"total": torch.stack(list(losses.values())).sum(), **losses}
