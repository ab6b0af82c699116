"""Networks that change poses, and the critic that keeps them real."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.domain.poseda.skeleton import HUMAN, Skeleton, bend, rotate
from trimtab.ops.arguments import floating_tensor, integer

NOISE = 48


def banded(a: Tensor, middle: float, reach: float) -> Tensor:
    """The square of the distance from the middle of a band, zero within it.

    Example:
        >>> banded(torch.tensor([0.0, 1.0, 4.0]), middle=1.0, reach=2.0)
        tensor([0., 0., 9.])
    """
    off = a - middle
    return torch.where(off.abs() > reach, off.square(), 0.0)


@dataclass(frozen=True)
class AugmentedPose:
    """What an augmenter made of poses.

    Attributes:
        pose: with the root where it was.
        bend: 1 - cosine of each bone's turn, (batch, bones); zero for rigid ones.
        ratio: relative change of each bone's length, (batch, bones), within 0.2.
    """

    pose: Float[Tensor, "batch joints 3"]
    bend: Float[Tensor, "batch bones"]
    ratio: Float[Tensor, "batch bones"]


class PoseAugmenter(nn.Module):
    """Networks that bend, lengthen and turn a pose, from the pose itself and from noise.

    Mirrored limbs change alike, the first rigid bone keeps its length (a larger person further away would look the
    same), rigid bones do not bend.

    Args:
        skeleton: of the poses.
        hidden: width of the networks.

    Example:
        >>> augmenter = PoseAugmenter(HUMAN, hidden=16)
        >>> augmenter(torch.randn(4, 16, 3), noise=torch.randn(4, 3, 48)).pose.shape
        torch.Size([4, 16, 3])
    """

    _bends: Tensor
    _stretches: Tensor

    def __init__(self, skeleton: Skeleton = HUMAN, hidden: int = 256) -> None:
        super().__init__()
        integer("hidden", hidden)
        self.skeleton = skeleton
        bones, self._ratio_of = len(skeleton.parents) - 1, skeleton.ratios()
        fixed = [1.0] * bones
        for joint in skeleton.rigid:
            fixed[joint - 1] = 0.0
        lengths = [1.0] * bones
        if skeleton.rigid:
            lengths[skeleton.rigid[0] - 1] = 0.0
        self.register_buffer("_bends", torch.tensor(fixed), persistent=False)
        self.register_buffer("_stretches", torch.tensor(lengths), persistent=False)
        pose = 3 * (bones + 1) + NOISE
        self.bending = _mlp(pose, 3 * bones, hidden)
        self.stretching = _mlp(pose + bones, max(self._ratio_of) + 1, hidden)
        self.turning = _mlp(pose, 3, hidden)

    def forward(
        self,
        pose: Float[Tensor, "batch joints 3"],
        *,
        noise: Float[Tensor, "batch 3 48"] | None = None,
        generator: torch.Generator | None = None,
    ) -> AugmentedPose:
        """Augmented poses.

        Args:
            pose: in any place; networks see it from its root.
            noise: standard normal, of each network; drawn where it is None.
            generator: of that draw, on the CPU.

        Raises:
            TypeError: `pose` is not floating point.
            ValueError: `pose` has not the skeleton's joints, or `noise` another shape.
        """
        pose = floating_tensor("pose", pose)
        if pose.shape[1:] != (len(self.skeleton.parents), 3):
            wanted = f"(batch, {len(self.skeleton.parents)}, 3)"
            raise ValueError(f"pose must have shape {wanted}, got {tuple(pose.shape)}")
        if noise is not None and noise.shape != (len(pose), 3, NOISE):
            raise ValueError(f"noise must be of shape {(len(pose), 3, NOISE)}, got {tuple(noise.shape)}")
        if noise is None:
            device = pose.device if generator is None else generator.device
            noise = torch.randn(len(pose), 3, NOISE, generator=generator, device=device, dtype=pose.dtype)
        noise, seen = noise.to(pose), (pose - pose[:, :1]).flatten(1)
        bones = self.skeleton.bones(pose)
        residual = self.bending(torch.cat([seen, noise[:, 0]], 1)).view_as(bones)
        bent, change = bend(bones, residual * self._bends.to(pose)[:, None])
        lengths = bones.norm(dim=2)
        raw = self.stretching(torch.cat([seen, lengths, noise[:, 1]], 1))
        ratio = 0.2 * raw.tanh()[:, self._ratio_of] * self._stretches.to(pose)
        turn = math.pi * self.turning(torch.cat([seen, noise[:, 2]], 1)).tanh()
        return AugmentedPose(
            self.skeleton.joints(rotate(bent * (1 + ratio[..., None]), turn), pose[:, 0]), change, ratio
        )


def _mlp(inputs: int, outputs: int, hidden: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, *[hidden] * 4):
        layers += [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU()]
    return _he_initialised(nn.Sequential(*layers, nn.Linear(hidden, outputs)))


def _he_initialised(net: nn.Sequential) -> nn.Sequential:
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    return net


class _Skip(nn.Module):
    """Two layers whose output is added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


class PartDiscriminator(nn.Module):
    """Scores each part of the body by the angles between its bones; how long they are does not count.

    Args:
        skeleton: with `parts`.
        hidden: width of the networks, but for their last layer's 100.

    Raises:
        ValueError: the skeleton names no parts, or `hidden` is not a positive integer.

    Example:
        >>> PartDiscriminator(HUMAN, hidden=8)(torch.randn(4, 16, 3)).shape
        torch.Size([4, 5])
    """

    def __init__(self, skeleton: Skeleton = HUMAN, hidden: int = 256) -> None:
        super().__init__()
        if isinstance(hidden, bool) or not isinstance(hidden, int | Integral) or hidden < 1:
            raise ValueError(f"hidden must be a positive integer, got {hidden!r}")
        if not skeleton.parts:
            raise ValueError("skeleton must name its parts, got none")
        self.skeleton = skeleton
        self.nets = nn.ModuleList(
            _he_initialised(
                nn.Sequential(
                    *(nn.Linear(len(part) ** 2, hidden), nn.LeakyReLU(), _Skip(hidden)),
                    *(nn.Linear(hidden, 100), nn.LeakyReLU(), nn.Linear(100, 1)),
                )
            )
            for part in skeleton.parts
        )

    def forward(self, pose: Float[Tensor, "batch joints 3"]) -> Float[Tensor, "batch parts"]:
        """A score for each part: near 1 for real poses, near 0 for others.

        Raises:
            ValueError: `pose` has not the skeleton's joints.
        """
        if pose.ndim != 3 or pose.shape[1:] != (len(self.skeleton.parents), 3):
            raise ValueError(f"pose must be (batch, {len(self.skeleton.parents)}, 3), got {tuple(pose.shape)}")
        unit = F.normalize(self.skeleton.bones(pose), dim=2)
        scores = []
        for part, net in zip(self.skeleton.parts, self.nets, strict=True):
            bones = unit[:, [joint - 1 for joint in part]]
            scores.append(net((bones @ bones.mT).flatten(1)))
        return torch.cat(scores, 1)
