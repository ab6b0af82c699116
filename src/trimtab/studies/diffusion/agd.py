"""AGD against the guidance that it replaces, at equal steps and at equal evaluations, and against its own parts.

The paper guides DiT and Stable Diffusion and measures FID. Here a network of 190,000 parameters makes digits of 8 x 8
pixels in 20 DDIM steps. Its conditional model would hardly need guidance, so that half of its training labels were
drawn anew, as if from loose captions. The distance is of features and class together, since one blind to the class
would favour who guides too little. Adapters sit behind the three residual blocks, as the network has no attention: 4 %
of its parameters, 6 % with attention, which here reads from a single token. They learn from the error of the network's
own output, at half the cost of the teacher's training; scales are drawn from 1 to 6, and 7 is unseen. The authors'
release multiplies the scale by 1000 before the offset adapters embed it; here it is not multiplied. Runs on a seed that
is not shown, of twice that training, were looked at before: the loose labels and the distance that knows the class came
after them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from trimtab.diffusion import (
    ClassifierFreeGuidance,
    DistilledGuidance,
    EDMPreconditioned,
    GuidedTrajectories,
    TrajectoryRecorder,
    adapt_to_guidance,
    ddim,
    grids,
    trajectory_loss,
)
from trimtab.diffusion.agd.adapters import Kind
from trimtab.diffusion.denoiser import DenoiserLike
from trimtab.nets import DenoisingMLP
from trimtab.studies.diffusion.guided_distillation import student_of
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Claim, Curve, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.digits_generation import Generator, Judge, Sample, digits, lesson_of
from trimtab.studies.tools.digit_generation import Images, Labels, Lesson, diffusion_model, train
from trimtab.studies.tools.sample_quality import frechet_distance

STEPS = 20
SCALES = (1.5, 3.0, 5.0, 7.0)
"""What is sampled at; training knows 1 to 6."""

Guide = Callable[[Labels, float], DenoiserLike]
"""Maps classes and a scale to the guided denoiser."""


Pupil = Callable[[Trial, EDMPreconditioned], EDMPreconditioned]
"""Makes the student of a teacher."""


def adapters(trial: Trial, teacher: EDMPreconditioned, kind: Kind = "offset") -> EDMPreconditioned:
    """Adapters behind every block of the network, with 4 % of its parameters (6 % of those with attention)."""
    net = cast(DenoisingMLP, copy.deepcopy(teacher.net))
    widths = {f"blocks.{k}": net.inward.out_features for k in range(len(net.blocks))}
    adapted = trial.seeded(lambda: adapt_to_guidance(net, widths, kind, hidden=8, num_classes=net.num_classes))
    return EDMPreconditioned(adapted, teacher.sigma_data, teacher.schedule)


def recorded(lesson: Lesson, teacher: EDMPreconditioned, count: int, *, noised: bool = False) -> GuidedTrajectories:
    """The steps of guided sampling, of so many images at scales from 1 to 6; or as many at data with noise."""
    generator = lesson.trial.generator(40)
    rows = torch.randint(len(lesson.labels), (count,), generator=generator)
    labels, scale = lesson.labels[rows], 1 + 5 * torch.rand(count, generator=generator)
    times = grids.karras(teacher.schedule, STEPS)
    recorder = TrajectoryRecorder(teacher, labels, scale)
    noise = teacher.schedule.prior(count, *lesson.images.shape[1:], generator=generator)
    if not noised:
        ddim(recorder, noise, times)
        return recorder.trajectories()
    with torch.no_grad():
        for time in times[:-1].float():
            fresh = torch.randn(noise.shape, generator=generator)
            recorder(lesson.images[rows] + time * fresh, time.expand(count))
    return recorder.trajectories()


def taught(
    lesson: Lesson,
    teacher: EDMPreconditioned,
    share: float = 1.0,
    *,
    pupil: Pupil = adapters,
    lr: float = 5e-3,
    noised: bool = False,
) -> EDMPreconditioned:
    """A student of guidance, for a share of the allowance, an eighth of which is for the recording."""
    count = max(8, int(share * lesson.allowance / 8) // (2 * STEPS))
    held = recorded(lesson, teacher, count, noised=noised)
    student = pupil(lesson.trial, teacher)

    def loss(images: Images, labels: Labels, generator: torch.Generator) -> Tensor:
        steps = held.rows(torch.randint(len(held.t), (len(images),), generator=generator))
        return trajectory_loss(student, steps, student.weight(steps.t))

    optimizer = partial(torch.optim.AdamW, lr=lr, weight_decay=0.0)
    return train(lesson, student, loss, lesson.steps(share=7 / 8 * share), optimizer=optimizer, stream=41)


def half_price(lesson: Lesson) -> Sample:
    """What enters the task; the teacher takes three quarters of the allowance."""
    teacher = diffusion_model(lesson, share=0.75)
    student = taught(lesson, teacher, share=0.25)

    def sample(labels: Labels, evaluations: int, generator: torch.Generator) -> Images:
        noise = teacher.schedule.prior(len(labels), *lesson.images.shape[1:], generator=generator)
        guided = DistilledGuidance(student, labels, 2.0)
        return ddim(guided, noise, grids.karras(teacher.schedule, evaluations))

    return sample


def by_cfg(lesson: Lesson, teacher: EDMPreconditioned) -> tuple[Guide, float]:
    """Classifier-free guidance, which trains nothing."""
    return lambda labels, scale: ClassifierFreeGuidance(teacher, labels, scale=scale), 0.0


def by_none(lesson: Lesson, teacher: EDMPreconditioned) -> tuple[Guide, float]:
    """The conditional model, whatever the scale."""
    return lambda labels, scale: ClassifierFreeGuidance(teacher, labels, scale=1.0), 0.0


def by_student(
    lesson: Lesson, teacher: EDMPreconditioned, pupil: Pupil = adapters, lr: float = 5e-3, noised: bool = False
) -> tuple[Guide, float]:
    """A student, and the share of its parameters that were trained."""
    student = taught(lesson, teacher, share=0.5, pupil=pupil, lr=lr, noised=noised)
    fresh = pupil(lesson.trial, teacher)
    trained = sum(p.numel() for p in fresh.parameters() if p.requires_grad)
    return lambda labels, scale: DistilledGuidance(student, labels, scale), trained / sum(
        p.numel() for p in teacher.parameters()
    )


def loose_teacher(lesson: Lesson) -> EDMPreconditioned:
    """A conditional model that guidance has something to do for: half of the labels it learned from were drawn anew."""
    generator = lesson.trial.generator(42)
    drawn = torch.rand(len(lesson.labels), generator=generator) < 0.5
    others = torch.randint(lesson.num_classes, drawn.shape, generator=generator)
    loose = replace(lesson, labels=torch.where(drawn, others, lesson.labels))
    return diffusion_model(loose, stream=43)  # the stream of these labels alone


@dataclass(frozen=True)
class JointJudge:
    """The task's judge, which sees the class asked for beside the image.

    The Fréchet distance is of features and class together (DeVries et al., "On the Evaluation of Conditional GANs",
    2019, arXiv 1907.08175): one of the features alone would favour whoever guides too little.
    """

    judge: Judge
    unseen: Tensor

    @classmethod
    def of(cls, trial: Trial, images: Images, labels: Labels) -> JointJudge:
        """The judge of a run."""
        judge = Judge.of(trial, images, labels)
        return cls(judge, cls.joint(judge.features, labels))

    @staticmethod
    def joint(features: Tensor, labels: Labels) -> Tensor:
        """Features, and classes as vectors of about the same variance in all."""
        return torch.cat([features, 6.0 * torch.nn.functional.one_hot(labels, 10)], dim=1).double()

    def frechet(self, images: Images, labels: Labels) -> float:
        """The Fréchet joint distance."""
        features = self.judge.classifier.features(images) / self.judge.scale
        return frechet_distance(self.joint(features, labels), self.unseen.mean(0), torch.cov(self.unseen.T))


def judged(trial: Trial, by: Callable[[Lesson, EDMPreconditioned], tuple[Guide, float]], steps: int = STEPS) -> Result:
    """Samples of one teacher's guidance at several scales, by whatever stands in for it, from the same noise."""
    lesson, unseen = lesson_of(trial)
    teacher = loose_teacher(lesson)
    guide, trained = by(lesson, teacher)
    judge, count = JointJudge.of(trial, *unseen), trial.pick(smoke=100, laptop=1500, paper=10_000)
    labels = unseen[1][torch.randint(len(unseen[1]), (count,), generator=trial.generator(1))]
    noise = teacher.schedule.prior(count, *lesson.images.shape[1:], generator=trial.generator(2))
    frechet, error, fidelity = dict[float, float](), dict[float, float](), dict[float, float]()
    for scale in SCALES:
        wanted = ddim(by_cfg(lesson, teacher)[0](labels, scale), noise, grids.karras(teacher.schedule, STEPS))
        images = ddim(guide(labels, scale), noise, grids.karras(teacher.schedule, steps))
        error[scale] = float((images - wanted).square().mean().sqrt())
        images = images.clamp(-1, 1)
        frechet[scale] = judge.frechet(images, labels)
        fidelity[scale] = judge.judge.quality(images, labels)["fidelity"]
        if scale == 3.0:
            shown = images[torch.cat([(labels == k).nonzero()[:4, 0] for k in range(10)])]
    return Result(
        {
            "frechet": frechet[3.0],
            "frechet_7": frechet[7.0],
            "rmse": error[3.0],
            "rmse_5": error[5.0],
            "fidelity": fidelity[3.0],
            "trained": trained,
        },
        {
            name: Curve(SCALES, list(values.values()), x_label="guidance scale")
            for name, values in {"frechet": frechet, "rmse": error, "fidelity": fidelity}.items()
        },
        pictures={"scale 3": Picture.grid(shown[:, 0] / 2 + 0.5, columns=8)},
    )


guidance = Experiment(
    "guidance at one evaluation a step",
    arms={
        "CFG": partial(judged, by=by_cfg),
        "CFG, half of the steps": partial(judged, by=by_cfg, steps=STEPS // 2),
        "conditional model": partial(judged, by=by_none),
        "AGD": partial(judged, by=by_student),
        "AGD, cross-attention": partial(
            judged, by=partial(by_student, pupil=partial(adapters, kind="cross_attention"))
        ),
        "AGD on noised data": partial(judged, by=partial(by_student, noised=True)),
        "whole network": partial(judged, by=partial(by_student, pupil=student_of, lr=1e-3)),
    },
    metrics={
        "frechet": Metric("Frechet joint distance at scale 3", best="min"),
        "frechet_7": Metric("Frechet joint distance at scale 7, not trained at", best="min"),
        "rmse": Metric("RMSE to the sample of CFG at scale 3", best="min"),
        "rmse_5": Metric("RMSE to the sample of CFG at scale 5", best="min"),
        "fidelity": Metric("samples of the class asked for, at scale 3 (%)", percent=True),
        "trained": Metric("parameters trained (%)", best="min", percent=True),
    },
    reads=("digits",),
    cost=5.0,
)

study = Study(
    paper="agd",
    entrants={"AGD": Generator(fit=half_price)},
    on=[digits],
    experiments=[guidance],
    headline=Claim(
        "AGD",
        below="CFG",
        times=1 / 1.1,
        on="frechet",
        at=guidance,
        text="AGD's Frechet joint distance is at most a tenth above that of CFG, which makes twice its evaluations",
    ),
    claims=[
        Claim("AGD", below="CFG, half of the steps", on="frechet", at=guidance),
        Claim("AGD", below="conditional model", times=2, on="rmse", at=guidance),
        Claim("AGD", below="AGD on noised data", on="rmse_5", at=guidance),
        Claim(
            "AGD",
            below="whole network",
            times=1 / 1.1,
            on="rmse",
            at=guidance,
            text="AGD, with 4 % of the parameters, has an error to CFG at most a tenth above that of the whole network",
        ),
        Claim("AGD, cross-attention", below="AGD", on="rmse", at=guidance),
        Claim("AGD", below="diffusion, CFG", on="frechet_4", at=digits),
    ],
)
