"""Skeletons: joints and bones, and how bones turn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Skeleton:
    """A tree of joints.

    Attributes:
        parents: of each joint; the root is joint 0, of parent -1, and a parent comes before its children. A joint's
            bone is the one that leads to it: bone b ends at joint b + 1.
        mirrored: pairs of joints whose bones share a length, left and right.
        rigid: joints whose bones do not bend (from pelvis to thorax).
        parts: joints whose bones a critic sees together.
        groups: joints over which errors are averaged.

    Raises:
        ValueError: it is no such tree.

    Example:
        >>> arm = Skeleton(parents=(-1, 0, 1))
        >>> arm.bones(torch.tensor([[[0.0, 0, 0], [1, 0, 0], [1, 2, 0]]]))
        tensor([[[1., 0., 0.],
                 [0., 2., 0.]]])
    """

    parents: tuple[int, ...]
    mirrored: tuple[tuple[int, int], ...] = ()
    rigid: tuple[int, ...] = ()
    parts: tuple[tuple[int, ...], ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not all(isinstance(parent, int) for parent in self.parents):
            raise ValueError(f"parents must be integers, got {self.parents}")
        if any(len(pair) != 2 for pair in self.mirrored):
            raise ValueError(f"mirrored must be pairs of joints, got {self.mirrored}")
        if any(not 0 <= joint < len(self.parents) for group in self.groups for joint in group):
            raise ValueError(f"groups must name joints from 0 to {len(self.parents) - 1}, got {self.groups}")
        if len(self.parents) < 2 or self.parents[0] != -1:
            raise ValueError(f"parents must begin with -1 and have two entries or more, got {self.parents}")
        if any(not 0 <= parent < joint for joint, parent in enumerate(self.parents[1:], 1)):
            raise ValueError(f"parents must come before their children, got {self.parents}")
        named = [*self.rigid, *(j for held in (*self.mirrored, *self.parts) for j in held)]
        if any(not 1 <= joint < len(self.parents) for joint in named):
            most, found = len(self.parents) - 1, sorted(set(named))
            raise ValueError(f"mirrored, rigid and parts must name joints from 1 to {most}, got {found}")

    def bones(self, pose: Float[Tensor, "batch joints 3"]) -> Float[Tensor, "batch bones 3"]:
        """From parents to children."""
        return pose[:, 1:] - pose[:, list(self.parents[1:])]

    def joints(
        self, bones: Float[Tensor, "batch bones 3"], root: Float[Tensor, "batch 3"]
    ) -> Float[Tensor, "batch joints 3"]:
        """Forward kinematics: the pose that has these bones and this root."""
        placed = [root]
        for joint, parent in enumerate(self.parents[1:]):
            placed.append(placed[parent] + bones[:, joint])
        return torch.stack(placed, 1)

    def ratios(self) -> list[int]:
        """For each bone which ratio of lengths it takes; mirrored bones share one."""
        twin = {max(pair): min(pair) for pair in self.mirrored}
        own = sorted({twin.get(joint, joint) for joint in range(1, len(self.parents))})
        return [own.index(twin.get(joint, joint)) for joint in range(1, len(self.parents))]


HUMAN = Skeleton(
    # Pelvis; right hip, knee, ankle; left hip, knee, ankle; spine, thorax, head; left and right shoulder, elbow, wrist.
    parents=(-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 8, 10, 11, 8, 13, 14),
    mirrored=((1, 4), (2, 5), (3, 6), (10, 13), (11, 14), (12, 15)),
    rigid=(7, 8),
    # A leg is seen beside hips and spine, an arm beside the upper trunk: else no critic would see where it points.
    parts=((1, 2, 3, 4, 7), (1, 4, 5, 6, 7), (8, 10, 11, 12), (8, 13, 14, 15), (1, 4, 7, 8, 9, 10, 13)),
    groups=((1, 4, 10, 13), (2, 5, 9, 11, 14), (3, 6, 12, 15)),
)
"""The sixteen joints of Human3.6M without the nose; parts and groups are those of PoseAug's code, whose second group
counts the head half as much as knees and elbows, and here alike."""


def bend(
    bones: Float[Tensor, "batch bones 3"], residual: Float[Tensor, "batch bones 3"]
) -> tuple[Float[Tensor, "batch bones 3"], Float[Tensor, "batch bones"]]:
    """Bones turned towards their unit direction plus a residual, lengths kept; and 1 - cosine of each turn."""
    length = bones.norm(dim=2, keepdim=True).clamp_min(1e-8)
    turned = F.normalize(bones / length + residual, dim=2)
    return length * turned, 1 - (bones / length * turned).sum(2)


def rotate(x: Float[Tensor, "batch points 3"], turn: Float[Tensor, "batch 3"]) -> Float[Tensor, "batch points 3"]:
    """Vectors turned about an axis by its length in radians (Rodrigues' formula).

    Example:
        >>> rotate(torch.tensor([[[1.0, 0.0, 0.0]]]), torch.tensor([[0.0, 0.0, torch.pi / 2]])).round(decimals=4)
        tensor([[[-0., 1., 0.]]])
    """
    turn = turn.to(x.dtype)  # under autocast it has less
    angle = turn.square().sum(1).clamp_min(1e-16).sqrt()[:, None, None]
    axis = (turn[:, None] / angle).expand_as(x)
    along = (axis * x).sum(2, keepdim=True) * axis
    turned: Tensor = angle.cos() * x + angle.sin() * torch.linalg.cross(axis, x) + (1 - angle.cos()) * along
    return turned
