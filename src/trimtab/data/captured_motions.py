"""Captured motions: fifteen clips of people who walk, jump, dance, fall and get up, as places of sixteen joints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.data.files import DataCorruptError, content, require

_CLIPS = {
    "backflip": "ffc5e117f69364e239eeedc86d6a30ab854500a375a1c137a405f1b7652905e6",
    "cartwheel": "17453459a40ec4ea08346072748ae3c7c384b49e619753e9779637fa8a9f7c49",
    "crawl": "104a3b675131a43e7a214e24c0ed631c6a0d814b85c8b66b71ce63b23a5731ae",
    "dance_a": "15ef3731f594edc9ed078170f1075815cc164acaca9e35a46db12a31ac64b717",
    "dance_b": "b5a9d7a3f2304f6242776d7ff6d19d1f6bcb98d78d68622761c3843b614a92b5",
    "getup_facedown": "1bd1a96e9175f65eb66e10f225473b4467bd70c68e283f4006b2ab090e337c0b",
    "getup_faceup": "5936c32d51dad9b0cd5e61df681079d160436cdce845c312f200d7a347c4040d",
    "jump": "a433557e94b193d8a95530572a0e32f387eb6d9996987b4216efb65444c3c641",
    "kick": "177cfb399466309ba7f4a8a987c3b6f6edde1cbe8b2d476e53dc6061ec5d4bac",
    "punch": "1ab4b654cecdb4ff3b2a4bf4086e50397bef28435bb59ab3aedd6a6bdc926fde",
    "roll": "50d75c2243b2859f8dcae4ad8fa14b59054dd9ee529b4fb52ec14470cd982c55",
    "run": "2cbe488023b243e5769299158ce7c78875ec4b701a2ffe6c0beeaf83d16ca87b",
    "spin": "9614f10b92e7a8b123990ad5bcfafc65aa4d8fa8ac7f10ade3c3591122d34425",
    "spinkick": "60ec9c200d96e0cd71693061f24db0bd8da9eb295daf487f6f60f8dfb324075a",
    "walk": "32d082c3599bc40aac50b1afa196ff1e2cf3842bb40f0541ab088845f6328a41",
}
_HINT = "the PyPI package pybullet holds the files under pybullet_data/data/motions; `make data` fetches them"

# The humanoid that the files are for, as pybullet describes it (pybullet_data/humanoid/humanoid.urdf), a quarter of its
# size: for each joint its parent, its place there, and the columns of its turn in a frame, a quaternion (w, x, y, z) or
# an angle about the third axis. Nothing hangs from where there are none.
_SIZE = 0.25
_HUMANOID: tuple[tuple[int, tuple[float, float, float], slice | None], ...] = (
    (-1, (0.0, 0.0, 0.0), slice(4, 8)),  # pelvis
    (0, (0.0, 0.0, 0.339548), slice(16, 20)),  # right hip, knee, ankle
    (1, (0.0, -1.686184, 0.0), slice(20, 21)),
    (2, (0.0, -1.63948, 0.0), None),
    (0, (0.0, 0.0, -0.339548), slice(30, 34)),  # left hip, knee, ankle
    (4, (0.0, -1.686184, 0.0), slice(34, 35)),
    (5, (0.0, -1.63948, 0.0), None),
    (0, (0.0, 0.944604, 0.0), slice(8, 12)),  # chest
    (7, (0.0, 0.895576, 0.0), slice(12, 16)),  # neck
    (8, (0.0, 1.11, 0.0), None),  # top of the head, a ball of radius 0.41 about a point 0.7 above the neck
    (7, (-0.0962, 0.974, -0.73244), slice(39, 43)),  # left shoulder, elbow, wrist
    (10, (0.0, -1.099152, 0.0), slice(43, 44)),
    (11, (0.0, -1.035788, 0.0), None),
    (7, (-0.0962, 0.974, 0.73244), slice(25, 29)),  # right shoulder, elbow, wrist
    (13, (0.0, -1.099152, 0.0), slice(29, 30)),
    (14, (0.0, -1.035788, 0.0), None),
)
_COLUMNS = 44


@dataclass(frozen=True)
class MotionData:
    """Clips of people in motion, all carried over to one body.

    Attributes:
        joints: float32, places in metres, all clips one after another; the first axis is forward, the second up, the
            third to the right.
        clip: int64, of which clip each frame is, a position in `names`.
        names: of the clips.
        seconds: float32, between two frames of each clip.
        source: where the data came from, for the record.
    """

    joints: Float[Tensor, "frames 16 3"]
    clip: Int[Tensor, " frames"]
    names: tuple[str, ...]
    seconds: Float[Tensor, " clips"]
    source: str = ""

    def of(self, name: str) -> Float[Tensor, "frames 16 3"]:
        """The frames of a clip, in order.

        Raises:
            ValueError: there is no clip of that name.
        """
        if name not in self.names:
            raise ValueError(f"name must be one of {', '.join(self.names)}, got {name!r}")
        return self.joints[self.clip == self.names.index(name)]


@cache
def captured_motions() -> MotionData:
    """Fifteen clips of captured motions, 1,620 frames at 16 to 60 a second: the sixteen joints of one body.

    They are those of Xue Bin Peng, Pieter Abbeel, Sergey Levine and Michiel van de Panne, "DeepMimic: Example-Guided
    Deep Reinforcement Learning of Physics-Based Character Skills", ACM Transactions on Graphics 2018: what was recorded
    of people, carried over to a humanoid of rigid parts, so that bones keep their lengths.

    Joints have the order of `trimtab.domain.HUMAN`: pelvis; right hip, knee and ankle; left hip, knee and ankle; spine,
    thorax and head; left shoulder, elbow and wrist; right shoulder, elbow and wrist. The humanoid has no spine, thorax
    and head as points: they are the joint below its chest, the joint of its neck and the top of its head.

    Raises:
        DataNotFoundError: a file is missing; says which file goes where.
        DataCorruptError: a file is truncated or altered.
    """
    paths = [require("captured_motions", f"humanoid3d_{clip}.txt", sha, hint=_HINT) for clip, sha in _CLIPS.items()]
    clips = [_frames(path) for path in paths]
    joints = _joints(torch.cat(clips)).round(decimals=6).float()  # to the micrometre: the same on every machine
    lengths = torch.tensor([len(frames) for frames in clips])
    seconds = torch.stack([frames[0, 0] for frames in clips]).float()
    clip = torch.arange(len(clips)).repeat_interleave(lengths)
    return MotionData(joints, clip, tuple(_CLIPS), seconds, source=str(paths[0].parent))


def _frames(path: Path) -> Float[Tensor, "frames 44"]:
    """Rows of a file: duration, place of the pelvis, and the turns of the joints."""
    try:
        frames = torch.tensor(json.loads(content(path))["Frames"], dtype=torch.float64)
    except (ValueError, TypeError, KeyError) as error:
        raise DataCorruptError(f"{path} is not a motion of DeepMimic's humanoid: {error}") from error
    if frames.ndim != 2 or frames.shape[1] != _COLUMNS or not frames.isfinite().all():
        found = tuple(frames.shape)
        raise DataCorruptError(
            f"{path} is not a motion of DeepMimic's humanoid: frames of shape {found}, or not finite"
        )
    return frames


def _joints(frames: Float[Tensor, "frames 44"]) -> Float[Tensor, "frames 16 3"]:
    """Forward kinematics: from the pelvis outwards, each joint where the turns before it put it."""
    places: list[Tensor] = []
    turns: list[Tensor] = []
    for parent, offset, columns in _HUMANOID:
        own = torch.eye(3).to(frames) if columns is None else _turn(frames[:, columns])
        if parent < 0:
            places.append(frames[:, 1:4])
            turns.append(own)
        else:
            places.append(places[parent] + turns[parent] @ (_SIZE * frames.new_tensor(offset)))
            turns.append(turns[parent] @ own)
    return torch.stack(places, 1)


def _turn(values: Float[Tensor, "frames values"]) -> Float[Tensor, "frames 3 3"]:
    """Matrices of quaternions (w, x, y, z), of any length, or of angles about the third axis."""
    if values.shape[1] == 1:
        half, still = values / 2, torch.zeros_like(values)
        values = torch.cat([half.cos(), still, still, half.sin()], 1)
    unit = values / values.norm(dim=1, keepdim=True)
    w, axis, plain = unit[:, 0, None, None], unit[:, 1:], torch.eye(3).to(values)
    cross = torch.linalg.cross(axis[:, None].expand(-1, 3, -1), plain.expand(len(values), 3, 3)).mT
    turns: Tensor = plain + 2 * w * cross + 2 * cross @ cross
    return turns
