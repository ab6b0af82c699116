"""Guided distillation against the guided teacher that it comes from, at few evaluations and at many.

The paper distils models of CIFAR-10, ImageNet and Stable Diffusion from up to 1024 steps, with 50,000 updates and more
for each halving, and judges by FID. Here a network of 190,000 parameters makes digits of 8 x 8 pixels; its teacher of
32 DDIM steps is halved five times, with some hundred updates each, and distances are Frechet's in the features of a
frozen classifier. All are guided by a scale of 2, which is 1 in the paper's count; the students know all from 1 to 5.
The teacher makes two evaluations a step, so that at 4 evaluations it has 2 steps; at one it is given its two.

The paper's text was not available: the losses, the target and the stochastic sampler are as reviews of it state them,
the truncated signal-to-noise weight is from memory. The student for the stochastic sampler comes from the one of four
steps and has one training more. In the task the teacher's training takes half of the allowance, and the student of
stage one stands in where none has that number of steps. One run on a seed that is not shown was looked at before: after
it the teacher had 32 steps instead of 16, and the students half as much training again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from trimtab.diffusion import (
    ClassifierFreeGuidance,
    DistilledGuidance,
    EDMPreconditioned,
    GuidedDistillation,
    ScaleConditioned,
    ScaleEmbedding,
    ddim,
    dpm_solver,
    grids,
    stochastic_ddim,
)
from trimtab.nets import DenoisingMLP
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Claim, Curve, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.digits_generation import Generator, Judge, Sample, digits, lesson_of
from trimtab.studies.tools.digit_generation import Images, Labels, Lesson, diffusion_model, train
from trimtab.studies.tools.samplers import Sampler

SCALE = 2.0
"""What all are guided by; students know every scale from 1 to 5."""

Weights = dict[str, Tensor]
Samples = Callable[[Labels, Tensor, int, torch.Generator], Images]
"""Maps classes, noise, the evaluations that an image may cost, and randomness to images."""


def student_of(trial: Trial, teacher: EDMPreconditioned) -> EDMPreconditioned:
    """The teacher's network, which is told the scale too."""
    base = cast(DenoisingMLP, copy.deepcopy(teacher.net))
    embedding = trial.seeded(lambda: ScaleEmbedding(base.inward.out_features))
    net = ScaleConditioned(base, {"noise_level": embedding}).requires_grad_(True)
    return EDMPreconditioned(net, teacher.sigma_data, teacher.schedule)


def distil(lesson: Lesson, teacher: EDMPreconditioned, shares: Sequence[float]) -> dict[str, Weights]:
    """The students' weights, by the number of steps that they make; that of stage one is "any".

    Args:
        lesson: data and allowance.
        teacher: the conditional model.
        shares: of the allowance, for stage one and for each halving, of which the last leaves one step.
    """
    student, trial = student_of(lesson.trial, teacher), lesson.trial
    steps = 2 ** (len(shares) - 1)
    rule = GuidedDistillation(student, teacher, grids.karras(teacher.schedule, steps), generator=trial.generator(20))
    found: dict[str, Weights] = {}
    for stage, share in enumerate(shares):
        if stage:
            rule.halve()
            steps //= 2
        student.load_state_dict(_trained(lesson, rule, share, stream=21 + stage))
        found[str(steps) if stage else "any"] = copy.deepcopy(student.state_dict())
    return found


def _trained(lesson: Lesson, rule: GuidedDistillation, share: float, stream: int) -> Weights:
    steps = lesson.steps(forward=3, share=share)  # the teacher is evaluated twice in either stage
    return train(lesson, rule.student, lambda x, y, _: rule.loss(x, y), steps, stream=stream).state_dict()  # type: ignore[no-any-return]


def few_steps(lesson: Lesson) -> Sample:
    """What enters the task; half of the allowance is the teacher's."""
    teacher = diffusion_model(lesson, share=0.5)
    weights = distil(lesson, teacher, (0.2, 0.1, 0.1, 0.1))
    student = student_of(lesson.trial, teacher).eval()

    def sample(labels: Labels, evaluations: int, generator: torch.Generator) -> Images:
        student.load_state_dict(weights.get(str(evaluations), weights["any"]))
        noise = teacher.schedule.prior(len(labels), *lesson.images.shape[1:], generator=generator)
        return ddim(DistilledGuidance(student, labels, SCALE), noise, grids.karras(teacher.schedule, evaluations))

    return sample


def guided(sampler: Sampler, evaluations: int | None, lesson: Lesson, teacher: EDMPreconditioned) -> Samples:
    """The teacher under classifier-free guidance, of two evaluations a step; of so many in all where they are given."""

    def sample(labels: Labels, noise: Tensor, allowed: int, generator: torch.Generator) -> Images:
        steps = max(1, (evaluations or allowed) // 2)
        both = ClassifierFreeGuidance(teacher, labels, scale=SCALE)
        return sampler(both, noise, grids.karras(teacher.schedule, steps))

    return sample


def students(lesson: Lesson, teacher: EDMPreconditioned, *, stage_one: bool = False) -> Samples:
    """A student for every number of evaluations; or that of stage one, which makes any number of steps."""
    weights = _all_students(lesson, teacher)
    student = student_of(lesson.trial, teacher).eval()

    def sample(labels: Labels, noise: Tensor, allowed: int, generator: torch.Generator) -> Images:
        student.load_state_dict(weights["any" if stage_one else str(allowed)])
        return ddim(DistilledGuidance(student, labels, SCALE), noise, grids.karras(teacher.schedule, allowed))

    return sample


def _all_students(lesson: Lesson, teacher: EDMPreconditioned) -> dict[str, Weights]:
    build = lambda: distil(lesson, teacher, (0.4, 0.08, 0.1, 0.14, 0.14, 0.14))
    return lesson.trial.cached(build, key=f"guided students, seed {lesson.trial.seed}, {lesson.allowance}")


def stochastic(lesson: Lesson, teacher: EDMPreconditioned) -> Samples:
    """The student of four steps for the stochastic sampler, from the deterministic one of as many."""
    weights, student = _all_students(lesson, teacher), student_of(lesson.trial, teacher)
    student.load_state_dict(weights["4"])
    times = grids.karras(teacher.schedule, 4)
    rule = GuidedDistillation(student, teacher, times, generator=lesson.trial.generator(30))
    rule.halve(stochastic=True)
    student.load_state_dict(_trained(lesson, rule, 0.14, stream=30))
    student.eval()

    def sample(labels: Labels, noise: Tensor, allowed: int, generator: torch.Generator) -> Images:
        return stochastic_ddim(DistilledGuidance(student, labels, SCALE), noise, times, generator=generator)

    return sample


def judged(
    trial: Trial,
    prepare: Callable[[Lesson, EDMPreconditioned], Samples],
    evaluations: Sequence[int] = (1, 2, 4, 8),
) -> Result:
    """How good the samples are at each number of evaluations, all of one teacher and from the same noise.

    The students may learn for three times the task's allowance, beside the teacher, which has it whole.
    """
    lesson, unseen = lesson_of(trial)
    teacher = diffusion_model(lesson)
    samples = prepare(replace(lesson, allowance=3 * lesson.allowance), teacher)
    judge, count = Judge.of(trial, *unseen), trial.pick(smoke=200, laptop=2000, paper=10_000)
    labels = unseen[1][torch.randint(len(unseen[1]), (count,), generator=trial.generator(1))]
    noise = teacher.schedule.prior(count, *lesson.images.shape[1:], generator=trial.generator(2))
    frechet, fidelity = [], []
    for allowed in evaluations:
        images = samples(labels, noise, allowed, trial.generator(3)).clamp(-1, 1)
        frechet.append(judge.frechet(images))
        fidelity.append(judge.quality(images, labels)["fidelity"])
        if allowed == 4:
            shown, order = images, labels.argsort(stable=True)
    per_row = [order[labels[order] == k][:4] for k in range(10)]
    picture = Picture.grid(shown[torch.cat(per_row), 0] / 2 + 0.5, columns=8)
    return Result(
        {
            **{f"frechet_{n}": value for n, value in zip(evaluations, frechet, strict=True)},
            **{f"fidelity_{n}": value for n, value in zip(evaluations, fidelity, strict=True) if n == 4},
        },
        {
            "frechet": Curve(evaluations, frechet, x_label="evaluations"),
            "fidelity": Curve(evaluations, fidelity, x_label="evaluations"),
        },
        pictures={"4 evaluations": picture},
    )


teacher_and_students = Experiment(
    "guided digits",
    arms={
        "guided teacher, 64 evaluations": partial(judged, prepare=partial(guided, ddim, 64)),
        "guided teacher": partial(judged, prepare=partial(guided, ddim, None)),
        "guided teacher, DPM-Solver++": partial(judged, prepare=partial(guided, dpm_solver, None)),
        "stage one alone": partial(judged, prepare=partial(students, stage_one=True)),
        "two stages": partial(judged, prepare=students),
        "two stages, stochastic": partial(judged, prepare=stochastic, evaluations=(4,)),
    },
    metrics={
        "frechet_4": Metric("Frechet distance at 4 evaluations", best="min"),
        "frechet_1": Metric("Frechet distance at 1 evaluation", best="min"),
        "frechet_2": Metric("Frechet distance at 2 evaluations", best="min"),
        "frechet_8": Metric("Frechet distance at 8 evaluations", best="min"),
        "fidelity_4": Metric("samples of the class asked for, at 4 evaluations (%)", percent=True),
    },
    reads=("digits",),
    log="xy",
    cost=7.0,
)

study = Study(
    paper="guided_distillation",
    entrants={"guided distillation": Generator(fit=few_steps)},
    on=[digits],
    experiments=[teacher_and_students],
    headline=Claim(
        "two stages",
        below="guided teacher, 64 evaluations",
        times=0.8,
        on="frechet_4",
        at=teacher_and_students,
        text="The student's Frechet distance at 4 evaluations is at most a quarter above its guided teacher's at 64",
    ),
    claims=[
        Claim("two stages", below="guided teacher", times=4, on="frechet_4", at=teacher_and_students),
        Claim("two stages", below="guided teacher, DPM-Solver++", times=2, on="frechet_8", at=teacher_and_students),
        Claim("two stages", below="stage one alone", times=2, on="frechet_4", at=teacher_and_students),
        Claim("two stages, stochastic", below="two stages", on="frechet_4", at=teacher_and_students),
        Claim("guided distillation", below="diffusion, CFG", on="frechet_4", at=digits),
        Claim("guided distillation", below="flow matching", on="frechet", at=digits),
    ],
)
