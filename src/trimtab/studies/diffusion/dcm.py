"""DCM's two experts against one consistency student, with phases and without, on videos of moving digits.

The paper distils HunyuanVideo and CogVideoX and is judged by VBench and by people, which nothing here replaces: videos
are five frames of a digit that moves sideways by a pixel a frame, networks have 360,000 parameters, and distances are
Frechet's over 32 principal directions of whole videos or of differences between frames. Levels have a shift of 3, not
17, which is for large videos; the split is at step 38 of 50.

Every student starts from the teacher and gets as many steps in all, the experts half of them each. The network has no
attention: adapters of rank 8 are on its residual blocks, and the detail expert has an output layer, a norm and the last
layer of the time embedding for itself, which in so small a network is a quarter of it. The one student with two phases
has the same ends as the experts (as phased consistency models do) in one set of weights, and neither the temporal loss
nor a GAN; two experts without these face it in a claim of their own. Learning rates are 0.0005, and 0.001 for the
detail expert, with no search. GAN and matching have the authors' weight of 0.1, after 0.01 in a run on a seed that is
not shown; the arm without temporal loss has neither. The discriminator sees what the teacher's blocks give.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.data import load
from trimtab.diffusion import DCM, Denoiser, DualExpert, Flow, denoising_loss, flow_sample, shifted_levels
from trimtab.diffusion.dcm.objectives import consistency_pair, huber
from trimtab.nets import DenoisingMLP
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Claim, Curve, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tools.descent import descend, descent_step, reported
from trimtab.studies.tools.sample_quality import frechet_distance
from trimtab.studies.tools.trained_once import trained_once

FRAMES, SIDE, BATCH = 5, 8, 64
LEVELS = shifted_levels(50, shift=3.0)
SPLIT = 38
EVALUATIONS = (1, 2, 4, 8)

Videos = Float[Tensor, "batch 1 frames side side"]


@cache
def _images() -> Tensor:
    data = load("digits")
    return torch.cat([data.x_train, data.x_test])[:, 0] * 2 - 1


def videos(count: int, generator: torch.Generator) -> Videos:
    """Digits that move sideways by one pixel a frame, to the left or to the right, and reenter on the other side."""
    images = _images()
    chosen = images[torch.randint(len(images), (count,), generator=generator)]
    start = torch.randint(SIDE, (count, 1), generator=generator)
    speed = 2 * torch.randint(2, (count, 1), generator=generator) - 1
    columns = (torch.arange(SIDE) - (start + speed * torch.arange(FRAMES))[..., None]) % SIDE
    frames = chosen[:, None].expand(-1, FRAMES, -1, -1)
    return frames.gather(3, columns[:, :, None].expand(-1, -1, SIDE, -1))[:, None]


def network(trial: Trial) -> DenoisingMLP:
    """What teacher and students are."""
    return trial.seeded(lambda: DenoisingMLP(FRAMES * SIDE * SIDE, hidden=160, blocks=3))


Loss = Callable[[Videos], Tensor]


def train(
    trial: Trial,
    module: nn.Module,
    loss: Loss,
    steps: int,
    lr: float,
    stream: int,
    after: Callable[[Videos], None] | None = None,
) -> None:
    """Adam with a cosine, on fresh videos; `after` is called with each batch when its step is done."""
    generator, trained = trial.generator(stream), [p for p in module.parameters() if p.requires_grad]
    batches = (videos(BATCH, generator) for _ in reported(steps, trial.report))
    descend(torch.optim.Adam(trained, lr=lr), loss, batches, anneal=steps, after=after)


def teacher_of(trial: Trial) -> DenoisingMLP:
    """The flow model, trained once per run; levels are drawn as the teacher's steps lie."""
    net = network(trial)
    flow = Denoiser(net, Flow(), "flow")
    generator, steps = trial.generator(1), trial.pick(smoke=20, laptop=1500, paper=50_000)

    def loss(batch: Videos) -> Tensor:
        t = LEVELS[torch.randint(1, len(LEVELS), (len(batch),), generator=generator)].float()
        noise = torch.randn(batch.shape, generator=generator)
        return denoising_loss(flow, batch, t, noise)

    build = lambda: train(trial, net, loss, steps, 2e-3, 2)
    return trained_once(trial, net, build, key=f"flow of moving digits, seed {trial.seed}").requires_grad_(False)


def _steps(trial: Trial) -> int:
    """Of either phase; a student of the whole trajectory gets twice as many."""
    return trial.pick(smoke=10, laptop=300, paper=10_000)


def distilled(trial: Trial, teacher: DenoisingMLP, *, temporal: bool = True) -> DenoisingMLP:
    """The semantic expert; trained once per run and kind."""
    student = copy.deepcopy(teacher).requires_grad_(True)

    def build() -> nn.Module:
        rule = DCM(
            student,
            teacher,
            "semantic",
            levels=LEVELS,
            split=SPLIT,
            decay=0.95,
            temporal_weight=1.0 if temporal else 0.0,
            lag=1,
            generator=trial.generator(3),
        )
        after = lambda batch: rule.update_target()
        train(trial, student, lambda batch: rule.losses(batch)["total"], _steps(trial), 5e-4, 4, after)
        return rule.target

    return trained_once(trial, student, build, key=f"semantic expert, seed {trial.seed}, temporal {temporal}")


class Features(nn.Module):
    """What a network's blocks give, by hooks; the network is not changed."""

    def __init__(self, net: DenoisingMLP) -> None:
        super().__init__()
        self.net, self.found = net, list[Tensor]()
        for block in net.blocks:
            block.register_forward_hook(lambda module, inputs, output: self.found.append(output))

    def forward(self, x: Tensor, level: Tensor, cond: Any = None) -> Sequence[Tensor]:
        self.found = []
        self.net(x, level, cond)
        return self.found


class Heads(nn.Module):
    """A score of the features of every block."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1)) for _ in range(count)
        )

    def forward(self, features: Sequence[Tensor]) -> Sequence[Tensor]:
        return [head(part) for head, part in zip(self.heads, features, strict=True)]


def two_experts(
    trial: Trial, teacher: DenoisingMLP, *, temporal: bool = True, adversarial: bool = True, whole: bool = False
) -> tuple[nn.Module, float]:
    """Both experts, and the size of the second as a share of the first; `whole` gives it all weights to train."""
    semantic = distilled(trial, teacher, temporal=temporal)
    if whole:
        both = DualExpert(semantic, float(LEVELS[SPLIT]), [r"outward"], [name for name, _ in semantic.named_children()])
    else:
        lora = [r"blocks\.\d\.(first|second)"]
        both = trial.seeded(
            lambda: DualExpert(
                semantic, float(LEVELS[SPLIT]), lora, ["noise_level.layers.2", "norm", "outward"], rank=8
            )
        )
    heads = trial.seeded(lambda: Heads(teacher.inward.out_features, len(teacher.blocks)))
    rule = DCM(
        both,
        teacher,
        "detail",
        levels=LEVELS,
        split=SPLIT,
        decay=0.95,
        features=Features(copy.deepcopy(teacher)) if adversarial else None,
        discriminator=heads if adversarial else None,
        generator=trial.generator(5),
    )
    critic = torch.optim.Adam(heads.parameters(), lr=1e-3)

    def after(batch: Videos) -> None:
        rule.update_target()
        if adversarial:
            descent_step(critic, rule.discriminator_loss(batch))

    train(trial, both, lambda batch: rule.losses(batch)["total"], _steps(trial), 1e-3, 6, after)
    return rule.target, both.detail_share()


def one_student(trial: Trial, teacher: DenoisingMLP, *, phases: bool) -> nn.Module:
    """One network for the whole trajectory, with the two phases' ends or with clean data as the only one."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    target = copy.deepcopy(teacher)
    generator = trial.generator(7)

    def loss(batch: Videos) -> Tensor:
        noise = torch.randn(batch.shape, generator=generator)
        half = len(batch) // 2  # as many at high noise as below, as the experts together have
        parts = []
        for rows, first, last, end in ((slice(half), SPLIT + 1, 50, SPLIT), (slice(half, None), 1, SPLIT, 0)):
            index = torch.randint(first, last + 1, (half,), generator=generator)
            level = float(LEVELS[end]) if phases else 0.0
            pair = consistency_pair(student, target, teacher, batch[rows], noise[rows], index, LEVELS, level)
            parts.append(huber(*pair))
        return torch.stack(parts).mean()

    def after(batch: Videos) -> None:
        with torch.no_grad():
            torch._foreach_lerp_(list(target.parameters()), [p.detach() for p in student.parameters()], 0.05)

    train(trial, student, loss, 2 * _steps(trial), 5e-4, 8, after)
    return target


def conflict(trial: Trial, teacher: DenoisingMLP) -> float:
    """The cosine between the gradients of one student, started from the teacher, at high noise and at low noise."""
    student, generator = copy.deepcopy(teacher).requires_grad_(True), trial.generator(9)
    directions = []
    for first, last in ((SPLIT + 1, 50), (1, SPLIT)):
        batch = videos(16 * BATCH, generator)
        noise = torch.randn(batch.shape, generator=generator)
        index = torch.randint(first, last + 1, (len(batch),), generator=generator)
        student.zero_grad()
        huber(*consistency_pair(student, teacher, teacher, batch, noise, index, LEVELS, 0.0)).backward()
        directions.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    return float(nn.functional.cosine_similarity(directions[0], directions[1], dim=0))


@dataclass(frozen=True)
class Scale:
    """Principal directions of videos, in which distances are measured, and their moments there."""

    directions: Tensor
    mean: Tensor
    cov: Tensor

    @classmethod
    def of(cls, data: Tensor, rank: int = 32) -> Scale:
        """The directions of most variance, at unit variance on average."""
        flat = data.flatten(1).double()
        values, vectors = torch.linalg.eigh(torch.cov(flat.T))
        directions = vectors[:, -rank:] / values[-rank:].mean().sqrt()
        seen = flat @ directions
        return cls(directions, seen.mean(0), torch.cov(seen.T))

    def frechet(self, made: Tensor) -> float:
        """The Fréchet distance to the data, of 0 for the same moments."""
        return frechet_distance(made.flatten(1).double() @ self.directions, self.mean, self.cov)


Student = Callable[[Trial, DenoisingMLP], tuple[nn.Module, float]]
"""Maps a run and its teacher to a few-step student, and the size of what it has beside one network."""


def judged(trial: Trial, prepare: Student, teacher_steps: int | None = None) -> Result:
    """Samples in few Euler steps, from the same noise, against fresh videos, whole ones and differences of frames."""
    teacher = teacher_of(trial)
    model, extra = prepare(trial, teacher)
    count = trial.pick(smoke=200, laptop=3000, paper=10_000)
    data = videos(2 * count, trial.generator(10))
    whole, motion = Scale.of(data), Scale.of(data.diff(dim=2))
    noise = torch.randn(count, *data.shape[1:], generator=trial.generator(11))
    frechet, moving, shown = [], [], noise
    for steps in EVALUATIONS:
        made = flow_sample(model, noise, shifted_levels(teacher_steps or steps, shift=3.0))
        frechet.append(whole.frechet(made))
        moving.append(motion.frechet(made.diff(dim=2)))
        shown = made if steps == 4 else shown
    by, by_motion = dict(zip(EVALUATIONS, frechet, strict=True)), dict(zip(EVALUATIONS, moving, strict=True))
    return Result(
        {
            "frechet_4": by[4],
            "frechet_2": by[2],
            "motion_4": by_motion[4],
            "extra": extra,
            "conflict": conflict(trial, teacher),
        },
        {
            "frechet": Curve(EVALUATIONS, frechet, x_label="evaluations"),
            "motion": Curve(EVALUATIONS, moving, x_label="evaluations"),
        },
        pictures={"4 evaluations, a video a row": Picture.grid(shown[:8, 0].flatten(0, 1) / 2 + 0.5, columns=FRAMES)},
    )


def as_it_is(trial: Trial, teacher: DenoisingMLP) -> tuple[nn.Module, float]:
    """The teacher."""
    return teacher, 0.0


def single(trial: Trial, teacher: DenoisingMLP, *, phases: bool) -> tuple[nn.Module, float]:
    """One network."""
    return one_student(trial, teacher, phases=phases), 0.0


experts = Experiment(
    "moving digits",
    arms={
        "teacher, 50 steps": partial(judged, prepare=as_it_is, teacher_steps=50),
        "teacher": partial(judged, prepare=as_it_is),
        "one student": partial(judged, prepare=partial(single, phases=False)),
        "one student, two phases": partial(judged, prepare=partial(single, phases=True)),
        "two whole experts": partial(judged, prepare=partial(two_experts, whole=True, adversarial=False)),
        "DCM": partial(judged, prepare=two_experts),
        "DCM without GAN and matching": partial(judged, prepare=partial(two_experts, adversarial=False)),
        "DCM without temporal loss": partial(judged, prepare=partial(two_experts, temporal=False, adversarial=False)),
    },
    metrics={
        "frechet_4": Metric("Frechet distance of videos at 4 evaluations", best="min"),
        "frechet_2": Metric("Frechet distance of videos at 2 evaluations", best="min"),
        "motion_4": Metric("Frechet distance of differences between frames at 4 evaluations", best="min"),
        "extra": Metric("parameters beside one network (%)", best="min", percent=True),
        "conflict": Metric("cosine between gradients at high and at low noise", best=None),
    },
    reads=("digits",),
    log="xy",
    cost=8.0,
)

study = Study(
    paper="dcm",
    experiments=[experts],
    headline=Claim("DCM", below="one student, two phases", on="frechet_4"),
    claims=[
        Claim("DCM without temporal loss", below="one student, two phases", on="frechet_4",
              text="Two experts alone, without temporal loss, GAN and matching, have a lower Frechet distance at 4 "
              "evaluations than one student with two phases"),
        Claim("DCM", below="one student", on="frechet_4"),
        Claim("DCM", below="two whole experts", times=1 / 1.1, on="frechet_4",
              text="DCM, whose second expert is a low-rank addition, has a Frechet distance at 4 evaluations at most a "
              "tenth above that of two whole experts"),
        Claim("DCM without GAN and matching", below="DCM without temporal loss", on="motion_4"),
        Claim("DCM", below="DCM without GAN and matching", on="frechet_4"),
        Claim("DCM", below="teacher", times=2, on="frechet_4"),
        Claim("DCM", below="one student, two phases", on="frechet_2"),
        Claim("teacher", at_most=0.2, on="conflict"),
    ],
)  # fmt: skip
