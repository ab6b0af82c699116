"""Captured motions: forward kinematics against SciPy's rotations and pybullet's places, and bodies that stay whole."""

import hashlib
import importlib
import json

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from trimtab.data import DataCorruptError, DataNotFoundError, captured_motions, files
from trimtab.domain import HUMAN

loader = importlib.import_module("trimtab.data.captured_motions")
here = all(files.find("captured_motions", f"humanoid3d_{clip}.txt") for clip in loader._CLIPS)
needs_motions = pytest.mark.skipif(not here, reason="captured_motions is not on this machine")

# Of HUMAN: what leads to each joint, in metres, as pybullet's humanoid has it; a shoulder hangs from the chest and lies
# 0.0785 / 4 above the neck and 0.0962 / 4 behind it.
SHOULDER = float(np.linalg.norm([0.0962, 0.974 - 0.895576, 0.73244])) / 4
LEG, ARM = (0.084887, 0.421546, 0.40987), (SHOULDER, 0.274788, 0.258947)
LENGTHS = torch.tensor([*LEG, *LEG, 0.236151, 0.223894, 0.2775, *ARM, *ARM])


@needs_motions
def test_sizes_and_names():
    data = captured_motions()
    assert data is captured_motions()
    assert (data.joints.shape, data.joints.dtype) == ((1620, 16, 3), torch.float32)
    assert data.joints.isfinite().all()
    assert len(data.names) == len(data.seconds) == 15
    assert data.clip.bincount().tolist() == [len(data.of(name)) for name in data.names]
    assert [len(data.of(name)) for name in ("walk", "run", "dance_b")] == [39, 25, 153]
    torch.testing.assert_close(data.seconds[data.names.index("walk")], torch.tensor(0.033332))
    with pytest.raises(ValueError, match="name must be one of .*walk.*, got 'swim'"):
        data.of("swim")


@needs_motions
def test_bones_keep_their_lengths_and_are_alike_on_both_sides():
    found = HUMAN.bones(captured_motions().joints).norm(dim=2)
    torch.testing.assert_close(found, LENGTHS.expand_as(found), atol=3e-6, rtol=0)


@needs_motions
def test_joints_are_where_pybullet_puts_them():
    # Frame 80 of the cartwheel, hands on the ground: getLinkState after resetJointStatesMultiDof, pybullet 3.2.7.
    places = {
        3: (0.24062, 1.45798, -1.35213),  # right ankle
        8: (-0.47870, 0.56003, -0.89194),  # neck
        12: (-0.44686, 0.03934, -0.62472),  # left wrist
        15: (-0.59255, 0.05219, -1.15534),  # right wrist
    }
    pose = captured_motions().of("cartwheel")[80]
    torch.testing.assert_close(pose[list(places)], torch.tensor(list(places.values())), atol=1e-5, rtol=0)
    up = torch.tensor((-0.47862, -0.86545, 0.14808))  # of the neck, from getMatrixFromQuaternion
    torch.testing.assert_close(pose[9] - pose[8], 0.2775 * up, atol=1e-5, rtol=0)


@needs_motions
def test_people_walk_forward_on_their_feet_and_stand_up():
    data = captured_motions()
    walk = data.of("walk")
    ankles = walk[:, [3, 6]]
    assert ((ankles[..., 1].amin(1) > 0.04) & (ankles[..., 1].amin(1) < 0.08)).all()  # soles are 5 cm below
    assert (walk[:, 9, 1] > 1.4).all()
    assert walk[-1, 0, 0] - walk[0, 0, 0] > 1  # along the first axis
    across = (walk[:, 1] - walk[:, 4]).mean(0)
    assert across.argmax() == 2  # the right hip is on the right
    knees = walk[:, [2, 5], 0] - (walk[:, [1, 4], 0] + walk[:, [3, 6], 0]) / 2
    assert (knees > 0).all()  # they bend forward
    rising = data.of("getup_faceup")[:, 9, 1]
    assert rising[0] < 0.3
    assert rising[-1] > 1.2


# The humanoid once more, by names: parent, place in it (in units of 0.25 m), columns of the turn.
TREE = {
    "root": (None, (0, 0, 0), range(4, 8)),
    "chest": ("root", (0, 0.944604, 0), range(8, 12)),
    "neck": ("chest", (0, 0.895576, 0), range(12, 16)),
    "head": ("neck", (0, 0.7 + 0.41, 0), ()),
    "right_hip": ("root", (0, 0, 0.339548), range(16, 20)),
    "right_knee": ("right_hip", (0, -1.686184, 0), (20,)),
    "right_ankle": ("right_knee", (0, -1.63948, 0), range(21, 25)),
    "right_shoulder": ("chest", (-0.0962, 0.974, 0.73244), range(25, 29)),
    "right_elbow": ("right_shoulder", (0, -1.099152, 0), (29,)),
    "right_wrist": ("right_elbow", (0, -1.035788, 0), ()),
    "left_hip": ("root", (0, 0, -0.339548), range(30, 34)),
    "left_knee": ("left_hip", (0, -1.686184, 0), (34,)),
    "left_ankle": ("left_knee", (0, -1.63948, 0), range(35, 39)),
    "left_shoulder": ("chest", (-0.0962, 0.974, -0.73244), range(39, 43)),
    "left_elbow": ("left_shoulder", (0, -1.099152, 0), (43,)),
    "left_wrist": ("left_elbow", (0, -1.035788, 0), ()),
}
LIMBS = [f"{side}_{joint}" for side in ("right", "left") for joint in ("hip", "knee", "ankle")]
ARMS = [f"{side}_{joint}" for side in ("left", "right") for joint in ("shoulder", "elbow", "wrist")]
ORDER = ["root", *LIMBS, "chest", "neck", "head", *ARMS]


def placed(frame, name):
    """Where a joint is, and how it is turned, by SciPy's rotations."""
    parent, offset, columns = TREE[name]
    values = [frame[column] for column in columns]
    turn = Rotation.identity()
    if len(values) == 4:
        turn = Rotation.from_quat([*values[1:], values[0]])
    elif values:
        turn = Rotation.from_euler("z", values[0])
    if parent is None:
        return np.array(frame[1:4]), turn
    place, before = placed(frame, parent)
    return place + before.apply(0.25 * np.array(offset)), before * turn


@pytest.fixture
def two_clips(monkeypatch, tmp_path):
    """A machine with two made-up clips of its own, of 3 and 2 frames."""
    monkeypatch.setenv("TRIMTAB_DATA", str(tmp_path))
    monkeypatch.setattr(files, "cache_folder", lambda name: tmp_path / "cache" / name)
    folder = tmp_path / "captured_motions"
    folder.mkdir()
    rng, sums, clips = np.random.default_rng(0), {}, {}
    for name, count in (("hop", 3), ("skip", 2)):
        frames = rng.normal(size=(count, 44))
        frames[:, 0] = 0.5 / count
        clips[name] = frames.tolist()
        body = json.dumps({"Loop": "none", "Frames": clips[name]}).encode()
        (folder / f"humanoid3d_{name}.txt").write_bytes(body)
        sums[name] = hashlib.sha256(body).hexdigest()
    monkeypatch.setattr(loader, "_CLIPS", sums)
    captured_motions.cache_clear()
    yield folder, clips, sums
    captured_motions.cache_clear()


def test_kinematics_agree_with_scipys_rotations(two_clips):
    _, clips, _ = two_clips
    data = captured_motions()
    assert data.names == ("hop", "skip")
    assert data.clip.tolist() == [0, 0, 0, 1, 1]
    torch.testing.assert_close(data.seconds, torch.tensor([0.5 / 3, 0.25]))
    expected = [[placed(frame, name)[0] for name in ORDER] for frames in clips.values() for frame in frames]
    torch.testing.assert_close(data.joints, torch.tensor(np.array(expected)).float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(data.of("skip"), data.joints[3:])


def test_without_a_file_the_error_says_what_goes_where(two_clips):
    folder, _, _ = two_clips
    (folder / "humanoid3d_skip.txt").unlink()
    with pytest.raises(DataNotFoundError, match=r"humanoid3d_skip\.txt.* into .*captured_motions; .*pybullet"):
        captured_motions()


def test_an_altered_file_is_refused(two_clips):
    file = two_clips[0] / "humanoid3d_skip.txt"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DataCorruptError, match="is not the expected file"):
        captured_motions()


@pytest.mark.parametrize(
    "body",
    [
        *(b"{", b"[]", b'{"Loop": "wrap"}', b'{"Frames": []}', b'{"Frames": [[0.1, 0.2]]}', b'{"Frames": [["a"]]}'),
        json.dumps({"Frames": [[float("nan")] * 44]}).encode(),
    ],
)
def test_what_holds_no_motion_is_refused_by_name(two_clips, body):
    folder, _, sums = two_clips
    (folder / "humanoid3d_hop.txt").write_bytes(body)
    sums["hop"] = hashlib.sha256(body).hexdigest()
    with pytest.raises(DataCorruptError, match=r"humanoid3d_hop\.txt is not a motion"):
        captured_motions()
