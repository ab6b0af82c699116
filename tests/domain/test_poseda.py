"""PoseDA: alignment's exact projections, operators that keep what they promise, and losses against their formulas."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from trimtab.data import MotionData
from trimtab.domain import (
    HUMAN,
    PartDiscriminator,
    PoseAugmenter,
    PoseDA,
    Skeleton,
    global_position_alignment,
    mpjpe,
    project,
)
from trimtab.domain.poseda.augmentation import banded
from trimtab.domain.poseda.skeleton import bend, rotate
from trimtab.studies.domain.poseda import captured, lifting, people
from trimtab.studies.engine.study import Trial

loader = importlib.import_module("trimtab.data.captured_motions")
CAMERA = torch.tensor([0.1, -0.2, 1.5, 1.8], dtype=torch.float64)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(**options: float) -> PoseDA:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lifter = nn.Sequential(nn.Flatten(), nn.Linear(32, 48), nn.Unflatten(1, (16, 3)))
        return PoseDA(lifter, PoseAugmenter(hidden=16), PartDiscriminator(hidden=8), **options).double()


class TestAlignment:
    def test_roots_project_exactly_onto_their_targets(self):
        source, target, pairing = drawn(5, 16, 3), drawn(7, 16, 2, seed=1), torch.tensor([3, 0, 6, 6, 1])
        placed = global_position_alignment(source, target, CAMERA, pairing=pairing)
        torch.testing.assert_close(project(placed, CAMERA)[:, 0], target[pairing][:, 0])

    def test_a_flat_pose_has_the_size_of_its_target(self):
        source, target = drawn(5, 16, 3), drawn(5, 16, 2, seed=1)
        source[..., 2] = 4.0
        placed = global_position_alignment(source, target, CAMERA, pairing=torch.arange(5))
        seen = project(placed, CAMERA)
        size = lambda pose: (pose.amax(1) - pose.amin(1)).mean(1)
        torch.testing.assert_close(size(seen), size(target))

    def test_shape_stays_and_where_the_source_stood_does_not_matter(self):
        source, target = drawn(5, 16, 3), drawn(5, 16, 2, seed=1)
        pairing = torch.arange(5)
        placed = global_position_alignment(source, target, CAMERA, pairing=pairing)
        torch.testing.assert_close(placed - placed[:, :1], source - source[:, :1])
        torch.testing.assert_close(
            global_position_alignment(source + 100, target, CAMERA, pairing=pairing), placed, atol=1e-9, rtol=1e-9
        )

    def test_one_camera_for_each_and_the_generator_decides(self):
        source, target = drawn(5, 16, 3), drawn(9, 16, 2, seed=1)
        seeded = [torch.Generator().manual_seed(s) for s in (0, 0, 1)]
        first, again, other = (global_position_alignment(source, target, CAMERA, generator=g) for g in seeded)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        pairing = torch.arange(5)
        torch.testing.assert_close(
            global_position_alignment(source, target, CAMERA.expand(5, 4), pairing=pairing),
            global_position_alignment(source, target, CAMERA, pairing=pairing),
        )

    @pytest.mark.parametrize(
        ("source", "target", "camera", "name"),
        [
            (drawn(2, 16, 3), drawn(2, 15, 2), CAMERA, "source and target"),
            (drawn(0, 16, 3), drawn(2, 16, 2), CAMERA, "empty"),
            (drawn(2, 16, 3), torch.zeros(2, 16, 2), CAMERA, "target must"),
            (drawn(2, 16, 3), drawn(2, 16, 2), -CAMERA, "camera"),
        ],
    )
    def test_refusals(self, source, target, camera, name):
        with pytest.raises(ValueError, match=name):
            global_position_alignment(source, target, camera)


class TestSkeleton:
    def test_kinematics_undo_bones(self):
        pose = drawn(4, 16, 3)
        torch.testing.assert_close(HUMAN.joints(HUMAN.bones(pose), pose[:, 0]), pose)

    def test_mirrored_bones_share_a_ratio(self):
        ratios = HUMAN.ratios()
        assert len(set(ratios)) == 9
        assert all(ratios[a - 1] == ratios[b - 1] for a, b in HUMAN.mirrored)

    @pytest.mark.parametrize(
        "options", [{"parents": (0, 0)}, {"parents": (-1, 2, 0)}, {"parents": (-1, 0), "rigid": (5,)}]
    )
    def test_refusals(self, options):
        with pytest.raises(ValueError, match="must"):
            Skeleton(**options)


class TestOperators:
    def test_bending_keeps_lengths_and_measures_the_turn(self):
        bones = drawn(3, 5, 3)
        turned, change = bend(bones, drawn(3, 5, 3, seed=1))
        torch.testing.assert_close(turned.norm(dim=2), bones.norm(dim=2))
        torch.testing.assert_close(change, 1 - torch.cosine_similarity(bones, turned, dim=2))
        same, none = bend(bones, torch.zeros_like(bones))
        torch.testing.assert_close(same, bones)
        torch.testing.assert_close(none, torch.zeros(3, 5, dtype=torch.float64), atol=1e-12, rtol=0)

    def test_rotation_equals_the_matrix_exponential(self):
        x, turn = drawn(4, 6, 3), drawn(4, 3, seed=1)
        cross = torch.zeros(4, 3, 3, dtype=torch.float64)
        cross[:, 0, 1], cross[:, 0, 2], cross[:, 1, 2] = -turn[:, 2], turn[:, 1], -turn[:, 0]
        matrix = torch.matrix_exp(cross - cross.mT)
        torch.testing.assert_close(rotate(x, turn), x @ matrix.mT)
        still = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(rotate(x, still), x)
        rotate(x, still).sum().backward()
        assert still.grad is not None
        assert still.grad.isfinite().all()

    def test_an_augmenter_that_says_nothing_changes_nothing(self):
        augmenter = PoseAugmenter(hidden=8).double()
        for net in (augmenter.bending, augmenter.stretching, augmenter.turning):
            nn.init.zeros_(net[-1].weight)
            nn.init.zeros_(net[-1].bias)
        pose = drawn(5, 16, 3)
        made = augmenter(pose)
        torch.testing.assert_close(made.pose, pose)
        torch.testing.assert_close(made.ratio, torch.zeros_like(made.ratio))

    def test_what_an_augmenter_keeps(self):
        augmenter = PoseAugmenter(hidden=8).double()
        for p in augmenter.parameters():
            p.data.mul_(4)  # so that it changes much
        pose = drawn(6, 16, 3)
        made = augmenter(pose, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(made.pose[:, 0], pose[:, 0])
        assert made.ratio.abs().max() <= 0.2
        length = HUMAN.bones(made.pose).norm(dim=2) / HUMAN.bones(pose).norm(dim=2)
        torch.testing.assert_close(length, 1 + made.ratio)
        for a, b in HUMAN.mirrored:
            torch.testing.assert_close(made.ratio[:, a - 1], made.ratio[:, b - 1])
        assert (made.ratio[:, 6] == 0).all()
        assert (made.bend[:, [6, 7]].abs() < 1e-9).all()
        assert made.bend[:, 0].min() > 0

    def test_noise_may_be_given_and_wrong_poses_are_refused(self):
        augmenter = PoseAugmenter(hidden=8).double()
        noise = drawn(4, 3, 48)
        first, again = (augmenter(drawn(4, 16, 3), noise=noise).pose for _ in range(2))
        torch.testing.assert_close(first, again)
        with pytest.raises(ValueError, match="pose"):
            augmenter(drawn(4, 15, 3))
        with pytest.raises(TypeError, match="pose"):
            augmenter(torch.zeros(4, 16, 3, dtype=torch.int64))


class TestDiscriminator:
    def test_lengths_places_and_turns_do_not_count(self):
        critic = PartDiscriminator(hidden=8).double()
        pose = drawn(4, 16, 3)
        bones = HUMAN.bones(pose) * drawn(4, 15, 1, seed=1).abs().add(0.1)
        other = HUMAN.joints(rotate(bones, drawn(4, 3, seed=2)), drawn(4, 3, seed=3))
        torch.testing.assert_close(critic(other), critic(pose))

    def test_where_legs_and_arms_point_counts(self):
        """A leg or an arm that turns stiffly about its own first bone is seen beside the rest of the body."""
        critic, pose = PartDiscriminator(hidden=8).double(), drawn(4, 16, 3)
        bones = HUMAN.bones(pose)
        for first, joints, scores in ((4, (5, 6), 1), (1, (2, 3), 0), (10, (11, 12), 2), (13, (14, 15), 3)):
            turned, axis = bones.clone(), torch.nn.functional.normalize(bones[:, first - 1], dim=1)
            rows = [joint - 1 for joint in joints]
            turned[:, rows] = rotate(bones[:, rows], 1.3 * axis)
            moved = critic(HUMAN.joints(turned, pose[:, 0])) - critic(pose)
            assert (moved[:, scores].abs() > 1e-9).all()
            others = [k for k in range(5) if k != scores]
            assert (moved[:, others].abs() < 1e-9).all()

    def test_angles_count(self):
        critic = PartDiscriminator(hidden=8).double()
        assert not torch.allclose(critic(drawn(4, 16, 3)), critic(drawn(4, 16, 3, seed=1)))
        with pytest.raises(ValueError, match="parts"):
            PartDiscriminator(Skeleton((-1, 0)))


class TestLosses:
    def test_band(self):
        values = torch.tensor([0.0, 0.05, 0.205, 0.36, 0.4])
        expected = torch.tensor([0.205**2, 0.0, 0.0, 0.0, 0.195**2])
        torch.testing.assert_close(banded(values, 0.205, 0.165), expected)

    def test_generator_loss_is_the_sum_of_its_parts(self):
        rule, x, target = built(), drawn(6, 16, 3), drawn(9, 16, 2, seed=1)
        noise, pairing = drawn(6, 3, 48, seed=2), torch.arange(6)
        found = rule.generator_loss(x, target, CAMERA, noise=noise, pairing=pairing)
        made = rule.augmenter(x, noise=noise)
        realism = (rule.discriminator(made.pose) - 1).square().mean() / 2
        nine = made.ratio[:, [0, 1, 2, 6, 7, 8, 9, 10, 11]]  # of mirrored bones one
        wide = (nine.square() * (nine.abs() > 0.1)).mean()
        plausible = banded(made.bend.mean(1), 0.205, 0.165).mean() + wide
        errors = []
        for pose in (x, made.pose):
            placed = global_position_alignment(pose, target, CAMERA, pairing=pairing)
            lifted = rule.lifter(project(placed, CAMERA))
            error = ((lifted - lifted[:, :1]) - (placed - placed[:, :1])).norm(dim=2)
            errors.append(torch.stack([error[:, list(group)].mean(1) for group in HUMAN.groups], 1))
        hard = banded(errors[1] / errors[0], 3.0, 2.0).mean()
        torch.testing.assert_close(found["total"], 6 * realism + 3 * plausible + 0.1 * hard)
        found["total"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in rule.augmenter.parameters())

    def test_what_is_hard_for_the_lifter_teaches_the_augmenter(self):
        rule, x, target = built(realism=0.0, plausibility=0.0), drawn(6, 16, 3), drawn(9, 16, 2, seed=1)
        rule.beta = 30.0  # no augmented pose is as hard as that
        noise = drawn(6, 3, 48, seed=2)
        rule.generator_loss(x, target, CAMERA, noise=noise, pairing=torch.arange(6))["total"].backward()
        assert all((p.grad != 0).any() for p in rule.augmenter.parameters() if p.ndim == 2)

    def test_the_generator_decides_all_that_is_drawn(self):
        rule, x, target = built(), drawn(6, 16, 3), drawn(9, 16, 2, seed=1)
        state = torch.get_rng_state()
        for call in (
            lambda generator: rule.generator_loss(x, target, CAMERA, generator=generator),
            lambda generator: rule.discriminator_loss(x, generator=generator),
            lambda generator: rule.lifter_loss(x, target, CAMERA, generator=generator),
        ):
            one, other, third = (call(torch.Generator().manual_seed(seed))["total"] for seed in (0, 0, 1))
            assert torch.equal(one, other)
            assert not torch.equal(one, third)
        assert torch.equal(torch.get_rng_state(), state)

    def test_discriminator_loss_and_what_it_trains(self):
        rule, x, fakes = built(), drawn(6, 16, 3), drawn(5, 16, 3, seed=1)
        found = rule.discriminator_loss(x, fakes=fakes)["total"]
        real, fake = rule.discriminator(x), rule.discriminator(fakes)
        torch.testing.assert_close(found, ((real - 1).square().mean() + fake.square().mean()) / 2)
        rule.discriminator_loss(x)["total"].backward()
        assert all(p.grad is None for p in (*rule.augmenter.parameters(), *rule.lifter.parameters()))

    def test_lifter_loss_without_augmentation_is_alignment_alone(self):
        rule, x, target = built(), drawn(6, 16, 3), drawn(9, 16, 2, seed=1)
        pairing = torch.arange(6)
        found = rule.lifter_loss(x, target, CAMERA, augment=False, pairing=pairing)
        placed = global_position_alignment(x, target, CAMERA, pairing=pairing)
        lifted = rule.lifter(project(placed, CAMERA))
        expected = ((lifted - lifted[:, :1]) - (placed - placed[:, :1])).square().mean()
        torch.testing.assert_close(found["total"], expected)
        rule.lifter_loss(x, target, CAMERA)["total"].backward()
        assert all(p.grad is None for p in (*rule.augmenter.parameters(), *rule.discriminator.parameters()))

    def test_a_weight_of_zero_does_not_ask_the_lifter(self):
        rule = built(hardness=0.0)
        rule.generator_loss(drawn(6, 16, 3), drawn(9, 16, 2), CAMERA)["total"].backward()
        assert all(p.grad is None for p in rule.lifter.parameters())
        with pytest.raises(ValueError, match="realism"):
            built(realism=-1.0)


def test_error_does_not_see_where_a_pose_stands():
    pose = drawn(3, 16, 3)
    assert mpjpe(pose + 5, pose) < 1e-12
    moved = pose.clone()
    moved[:, 4, 0] += 1.6
    assert mpjpe(moved, pose).item() == pytest.approx(0.1)
    assert math.isclose(mpjpe(pose, moved).item(), 0.1)


@pytest.fixture
def two_clips(monkeypatch):
    """A machine with two clips of people who stand, of 50 and 25 frames; how large they are tells the frame."""
    # Legs down, trunk and head up, arms down; forward is the first axis, up the second, right the third.
    leg, arm = ([0.0, -0.4, 0.0],) * 2, ([0.0, -0.25, 0.0],) * 2
    right, left = [0.0, 0.0, 0.1], [0.0, 0.0, -0.1]
    bones = torch.tensor([right, *leg, left, *leg, *([[0.0, 0.25, 0.0]] * 3), left, *arm, right, *arm])
    standing = HUMAN.joints(bones[None], torch.zeros(1, 3))
    sizes = torch.cat([1 + torch.arange(50) / 100, 2 + torch.arange(25) / 100])
    clip = torch.tensor([0] * 50 + [1] * 25)
    data = MotionData(standing * sizes[:, None, None], clip, ("long", "short"), torch.tensor([0.02, 0.02]))
    monkeypatch.setattr(people, "captured_motions", lambda: data)
    return people.Captured(("long", "short"))


class TestCapturedPeople:
    @pytest.mark.parametrize("frames", [25, 29, 39, 107, 227])
    def test_no_frame_that_trains_is_beside_one_that_is_held_out(self, frames):
        train, held = (people.stretches(frames, held_out=part) for part in (False, True))
        assert not (train & held).any()
        apart = (train.nonzero() - held.nonzero().T).abs()
        assert apart.min() > 1 + frames // 50
        assert train.float().mean().item() == pytest.approx(0.6, abs=0.05)
        assert held.float().mean().item() == pytest.approx(0.24, abs=0.05)

    def test_people_are_frames_of_their_part_and_every_clip_comes_as_often(self, two_clips):
        sizes = {}
        for held_out in (False, True):
            directions, lengths = two_clips.bones(4_000, torch.Generator().manual_seed(0), held_out=held_out)
            torch.testing.assert_close(directions.norm(dim=2), torch.ones(4_000, 15))
            size = lengths[:, 1] / 0.4
            torch.testing.assert_close(lengths[:, 6], 0.25 * size)
            assert ((size >= 2).float().mean() - 0.5).abs() < 0.05
            sizes[held_out] = (100 * size).round().unique()
        frames = torch.cat([100 + torch.arange(50), 200 + torch.arange(25)])
        kept = torch.cat([people.stretches(50, held_out=True), people.stretches(25, held_out=True)])
        assert sizes[True].tolist() == frames[kept].tolist()
        assert not set(sizes[False].tolist()) & set(sizes[True].tolist())

    def test_they_stand_before_the_camera_on_their_feet_with_their_sides_kept(self, two_clips):
        studio = replace(captured.arms["PoseDA"].args[0].source, people=two_clips, lengths=0.0)
        poses = studio.poses(300, torch.Generator().manual_seed(0))
        assert (poses[:, [3, 6], 1] - poses[:, 9:10, 1] > 1.4).all()  # the second axis is down
        assert ((poses[:, 0, 2] >= 4) & (poses[:, 0, 2] <= 6)).all()
        side = torch.nn.functional.normalize(poses[:, 1] - poses[:, 4], dim=1)
        assert side[:, 1].abs().max() < 1e-4
        assert torch.linalg.vector_norm(side[:, [0, 2]].mean(0)) < 0.15  # turned anyhow about the vertical

    def test_everybody_has_limbs_of_their_own_alike_on_both_sides(self, two_clips):
        studio = replace(people.CAPTURED.target, people=replace(two_clips, clips=("short",)), lengths=0.08)
        lengths = HUMAN.bones(studio.poses(2_000, torch.Generator().manual_seed(0))).norm(dim=2)
        for a, b in HUMAN.mirrored:
            torch.testing.assert_close(lengths[:, a - 1], lengths[:, b - 1])
        thigh, shin = lengths[:, 1], lengths[:, 2]
        spread = (thigh / shin).log().std().item()  # whatever the size of the frame
        assert spread == pytest.approx(0.08 * math.sqrt(2), rel=0.1)

    def test_a_mirror_is_no_person(self, two_clips):
        """Right is where forward and up say, in the camera's axes as in the clips'."""
        directions, _ = two_clips.bones(1, torch.Generator().manual_seed(0))
        forward, up, right = torch.tensor([1.0, 0.0, 0.0]), directions[0, 6], directions[0, 0]
        torch.testing.assert_close(torch.linalg.cross(forward, up), right)

    def test_a_smoke_run_asks_for_no_clip_and_is_judged_on_held_out_people(self, monkeypatch):
        asked, poses = [], people.Studio.poses

        def noted(studio, count, draw, *, held_out=False):
            asked.append((studio, held_out))
            return poses(studio, count, draw, held_out=held_out)

        monkeypatch.setattr(people, "captured_motions", lambda: pytest.fail("asked for clips"))
        monkeypatch.setattr(people.Studio, "poses", noted)
        found = captured.arms["alignment"](Trial(budget="smoke"))
        assert found.metrics.keys() == {"target", "source"}
        source, target = people.DRAWN.source, people.DRAWN.target
        assert asked == [(source, False), (target, False), (target, True), (source, True)]

    def test_no_clip_is_on_both_sides(self):
        sides = [set(side.people.clips) for side in (people.CAPTURED.source, people.CAPTURED.target)]
        assert not sides[0] & sides[1]
        assert sides[0] | sides[1] == set(loader._CLIPS)


def test_the_picture_shows_bones_from_the_side():
    """Of a person who lies away from the camera there is a line as long as the person; of a lifted point nothing."""
    lying = torch.zeros(2, 16, 3)
    lying[:, [7, 8, 9], 2] = torch.tensor([0.3, 0.6, 0.9])
    dark = lifting.from_the_side(lying, torch.zeros(2, 16, 3)).pixels() < 255
    rows, columns = dark[:48, :48].nonzero()
    assert len(set(rows.tolist())) == 1
    assert abs(columns.min() - 24) <= 1  # the root in the middle
    assert columns.max() - columns.min() == 18  # 20 pixels a metre
    assert dark[48:, :48].sum() == 1
