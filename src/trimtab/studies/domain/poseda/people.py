"""Drawn and captured people, and the cameras they stand before; the camera's axes are right, down and ahead."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.data import captured_motions
from trimtab.domain import HUMAN
from trimtab.domain.poseda.skeleton import rotate

# Where each bone points at rest, the camera's second axis down, and its length in metres.
_LEG = ((0.0, 1.0, 0.0), (0.0, 1.0, 0.0))
_TRUNK = ((0.0, -1.0, 0.0),) * 3
_RIGHT, _LEFT = ((-1.0, 0.0, 0.0), *_LEG), ((1.0, 0.0, 0.0), *_LEG)
_REST = torch.tensor((*_RIGHT, *_LEFT, *_TRUNK, *_LEFT, *_RIGHT))
_LENGTH = torch.tensor([0.13, 0.45, 0.45] * 2 + [0.24, 0.25, 0.25] + [0.15, 0.28, 0.25] * 2)
Bones = tuple[Float[Tensor, "count 15 3"], Float[Tensor, "*count 15"]]
"""Unit directions, and lengths in metres."""


@dataclass(frozen=True)
class Drawn:
    """People whose bones point anywhere near where they point at rest.

    Attributes:
        bends: spread of the bones' directions.
    """

    bends: float

    def bones(self, count: int, draw: torch.Generator, *, held_out: bool = False) -> Bones:
        """New people at every call, held out or not."""
        noise = torch.randn(count, 15, 3, generator=draw)
        noise[:, [6, 7]] *= 0.3  # the trunk is stiff
        return F.normalize(_REST + self.bends * noise, dim=2), _LENGTH


@dataclass(frozen=True)
class Captured:
    """People as clips have them, every clip as often as another.

    Attributes:
        clips: names among those of `captured_motions`.
    """

    clips: tuple[str, ...]

    def bones(self, count: int, draw: torch.Generator, *, held_out: bool = False) -> Bones:
        """Frames of the stretches that train, or of those that are held out."""
        held = [captured_motions().of(name) for name in self.clips]
        parts = [frames[stretches(len(frames), held_out=held_out)] for frames in held]
        often = torch.cat([torch.full((len(part),), 1 / len(part)) for part in parts])
        rows = torch.multinomial(often, count, replacement=True, generator=draw)
        bones = HUMAN.bones(torch.cat(parts))[rows] * torch.tensor([1.0, -1.0, -1.0])  # the clips' second axis is up
        lengths = bones.norm(dim=2)
        return bones / lengths[..., None], lengths


def stretches(frames: int, *, held_out: bool) -> Bool[Tensor, " frames"]:
    """Which frames of a clip train, and which are held out.

    Of five equal stretches of time the second and the fourth are held out, but for a fifth of each at either end, which
    nobody sees: so that no frame has a neighbour on the other side.

    Example:
        >>> stretches(15, held_out=True).int().tolist()
        [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    """
    place = 5 * (torch.arange(frames) + 0.5) / frames
    odd, within = place.int() % 2 == 1, (place % 1 - 0.5).abs() < 0.3
    return odd & within if held_out else ~odd


@dataclass(frozen=True)
class Studio:
    """Who moves there, and where a camera sees them.

    Attributes:
        people: how they move.
        lengths: relative spread of a person's limbs.
        tilt: of the camera, in radians.
        depth: nearest and farthest root, in metres.
        aside: how far the root is from the middle, as a share of its depth.
        lens: (cx, cy, fx, fy), where the image goes from -1 to 1.
    """

    people: Drawn | Captured
    lengths: float
    tilt: float
    depth: tuple[float, float]
    aside: float
    lens: tuple[float, float, float, float]

    @property
    def camera(self) -> Float[Tensor, "4"]:
        """As `project` takes it."""
        return torch.tensor(self.lens)

    def poses(self, count: int, draw: torch.Generator, *, held_out: bool = False) -> Float[Tensor, "count 16 3"]:
        """People in the camera's frame, turned anyhow about the vertical, each where it stands."""
        directions, lengths = self.people.bones(count, draw, held_out=held_out)
        ratio = 1 + self.lengths * torch.randn(count, max(HUMAN.ratios()) + 1, generator=draw)[:, HUMAN.ratios()]
        bones = directions * (lengths * ratio.clamp(0.6, 1.4))[..., None]
        yaw = (2 * torch.rand(count, generator=draw) - 1) * torch.pi
        still = torch.zeros_like(yaw)
        bones = rotate(bones, torch.stack([still, yaw, still], 1))
        bones = rotate(bones, torch.stack([torch.full_like(yaw, self.tilt), still, still], 1))
        return HUMAN.joints(bones, self.places(count, draw))

    def places(self, count: int, draw: torch.Generator) -> Float[Tensor, "count 3"]:
        """Roots."""
        near, far = self.depth
        z = near + (far - near) * torch.rand(count, 1, generator=draw)
        return torch.cat([self.aside * z * (2 * torch.rand(count, 2, generator=draw) - 1), z], 1)


@dataclass(frozen=True)
class Move:
    """From a studio whose people are known in 3-D to one where they are only seen.

    Attributes:
        source: the former.
        target: the latter.
        poses: how many of each train, at the laptop budget.
        steps: of the lifter's training there.
    """

    source: Studio
    target: Studio
    poses: int
    steps: int


_SOURCE = Studio(Drawn(0.35), 0.03, 0.0, (4.0, 6.0), 0.05, (0.0, 0.0, 2.3, 2.3))
_TARGET = Studio(Drawn(0.5), 0.08, 0.25, (4.5, 7.0), 0.3, (0.0, 0.05, 1.5, 1.5))
_EVERYDAY = ("walk", "run", "jump", "punch")
_OTHERS = (
    *("dance_a", "dance_b", "kick", "spin", "spinkick", "cartwheel", "backflip"),
    *("roll", "crawl", "getup_facedown", "getup_faceup"),
)
DRAWN = Move(_SOURCE, _TARGET, poses=4_000, steps=250)
CAPTURED = Move(
    replace(_SOURCE, people=Captured(_EVERYDAY)), replace(_TARGET, people=Captured(_OTHERS)), poses=20_000, steps=1_500
)
