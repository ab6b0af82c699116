"""A lifter trained on one studio's people, as they are placed and changed, and judged on another's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.domain import HUMAN, PartDiscriminator, PoseAugmenter, PoseDA, global_position_alignment, mpjpe, project
from trimtab.studies.domain.poseda.people import DRAWN, Move
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Result, Trial
from trimtab.studies.tools.descent import descent_step

Placing = Literal["own camera", "chance", "aligned", "true"]


class Lifter(nn.Module):
    """From 2-D joints to 3-D ones; coordinates are scaled to about one, so that a short training gets somewhere."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Flatten(), nn.Linear(32, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 48)),
            nn.Unflatten(1, (16, 3)),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(5 * x)
        return out


def train(move: Move, placing: Placing, augment: Literal["none", "learned", "chance"], trial: Trial) -> Result:
    """A run: a lifter trained on source poses as they are placed, tested on the target camera's people.

    At the smoke budget all people are drawn.
    """
    move = trial.pick(smoke=DRAWN, laptop=move, paper=move)
    source, target = move.source, move.target
    count = trial.pick(smoke=200, laptop=move.poses, paper=50_000)
    x, people = source.poses(count, trial.generator(1)), target.poses(count, trial.generator(2))
    if placing == "true":
        x = people
    seen, test = project(people, target.camera), target.poses(2_000, trial.generator(3), held_out=True)
    hidden = trial.pick(smoke=16, laptop=64, paper=256)
    rule = trial.seeded(lambda: PoseDA(Lifter(), PoseAugmenter(hidden=hidden), PartDiscriminator(hidden=32)))
    parts: tuple[Any, ...] = (rule.lifter, rule.augmenter, rule.discriminator)
    lifting, augmenting, judging = (torch.optim.Adam(part.parameters(), lr=2e-3) for part in parts)
    steps, draw = trial.pick(smoke=10, laptop=move.steps, paper=20_000), trial.generator(4)
    for step in range(steps):
        rows = torch.randint(count, (128,), generator=draw)
        rule.beta = 3 + 2 * step / steps
        rule.hardness = 0.1 if step > steps // 5 else 0.0  # the lifter first learns the plain poses
        poses = [x[rows]]
        if augment != "none":
            if augment == "learned" and step % 3 == 0:
                descent_step(augmenting, rule.generator_loss(x[rows], seen, target.camera, generator=draw)["total"])
                if step % 6 == 0:
                    descent_step(judging, rule.discriminator_loss(x[rows], generator=draw)["total"])
            with torch.no_grad():
                poses.append(rule.augmenter(x[rows], generator=draw).pose)
        lifting.zero_grad()
        for pose in poses:
            placed, camera = placed_before(move, pose, placing, seen, draw)
            lifted = rule.lifter(project(placed, camera))
            error = (lifted - lifted[:, :1]) - (placed - placed[:, :1])
            error.square().mean().backward()
        lifting.step()
        trial.report((step + 1) / steps)
    own = source.poses(2_000, trial.generator(5), held_out=True)
    with torch.no_grad():
        lifted, at_home = (rule.lifter(project(x, where.camera)) for x, where in ((test, target), (own, source)))
    return Result(
        {"target": 1000 * float(mpjpe(lifted, test)), "source": 1000 * float(mpjpe(at_home, own))},
        pictures={"true above, lifted below": from_the_side(test[:2], lifted[:2])},
    )


def placed_before(
    move: Move, pose: Tensor, placing: Placing, seen: Tensor, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Poses where they are to stand, and the camera that sees them."""
    if placing == "aligned":
        return global_position_alignment(pose, seen, move.target.camera, generator=draw), move.target.camera
    if placing == "chance":
        # Wherever the target camera sees a whole person.
        anywhere = replace(move.target, depth=(2.0, 8.0), aside=0.4).places(len(pose), draw)
        return pose - pose[:, :1] + anywhere[:, None], move.target.camera
    return pose, move.source.camera if placing == "own camera" else move.target.camera


def from_the_side(truth: Float[Tensor, "2 16 3"], lifted: Float[Tensor, "2 16 3"]) -> Picture:
    """Two people as the camera does not see them, from its right: their bones as they are, and as they were lifted."""
    people = torch.cat([truth, lifted])
    along = torch.linspace(0, 1, 100)[:, None, None, None]
    ends = people - people[:, :1]
    points = ends[:, 1:] - along * HUMAN.bones(ends)
    middles = torch.tensor([[-1.2, 1.2], [1.2, 1.2], [-1.2, -1.2], [1.2, -1.2]])
    flat = points[..., [2, 1]] * torch.tensor([1.0, -1.0]) + middles[:, None]
    return Picture.density(flat.flatten(0, 2), -2.4, 2.4, side=96)
